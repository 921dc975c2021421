"""The batch contract: what packing, preference pairs, rollouts, distillation and replay hand to a step.

Rows are either laid end to end in one packed row (``bounds`` says where each begins) or padded on the right
(``mask`` says which tokens are real). What is scored is given by position, never recovered by comparing ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_ft.nn.shared_segments import Shared


@dataclass
class Source:
    """What an encoder reads, beside the decoder's rows in a `Batch`.

    Attributes:
        ids: (B, T) padded on the right, int64.
        mask: (B, T) bool, True on real tokens.
    """

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Source:
        """The same on ``device``."""
        return Source(self.ids.to(device, non_blocking=non_blocking), self.mask.to(device, non_blocking=non_blocking))


@dataclass
class Batch:
    """One micro-batch of token rows.

    Attributes:
        ids: (1, T) packed or (B, T) padded on the right, int64.
        positions: like ``ids``; restarts at 0 in each segment.
        bounds: packed rows: cumulative segment bounds (0, ..., T); None when padded.
        mask: padded rows: (B, T) bool, True on real tokens; None when packed.
        shared: packed rows that begin alike: for each segment (index of an earlier one, how many of its first tokens are seen
            before the segment's own), or None; the positions go on from there. None where nothing is shared.
        scored: (N,) int64, flat indices into ``ids.reshape(-1)`` of the positions whose hidden state predicts: for a language
            model those before the tokens to learn, for token classification the labelled tokens themselves.
        labels: (N,) int64, the token (or class) that each of them has to predict.
        segment_of_scored: (N,) int64, the segment (row of this batch) that each scored token belongs to.
        rows: (S,) int64, data-set row number of each segment; -1 for a filler that counts zero.
        counts: units in this micro-batch, ``{"token": N, "row": S}`` without fillers.
        window: the same summed over the accumulation window and all ranks; None when the loader does not know.
        task: name of the task that all rows belong to, if any.
        targets: one for each segment where a whole row has one: (S,) int64 classes, (S,) float32 values, or (S, C) float32
            with 1 for each class that holds; what stands there for a filler is never looked at.
        types: like ``ids``, 1 (or what the tokenizer says) on the second text of a pair; None where rows have no types.
        source: what the encoder of a sequence-to-sequence model reads; the fields above are then the decoder's.
        columns: further numbers by name, one for each segment, pair of segments or scored token, as whoever made the batch and
            whoever reads it agree: margins, reference log-probabilities, advantages.
    """

    ids: Tensor
    positions: Tensor
    bounds: tuple[int, ...] | None
    mask: Tensor | None
    scored: Tensor
    labels: Tensor
    segment_of_scored: Tensor
    rows: Tensor
    counts: dict[str, float]
    window: dict[str, float] | None = None
    task: str | None = None
    targets: Tensor | None = None
    types: Tensor | None = None
    source: Source | None = None
    shared: Shared | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``; bounds and counts stay plain numbers (no device sync)."""
        moved: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (Tensor, Source)):
                moved[one.name] = value.to(device, non_blocking=non_blocking)
        moved["columns"] = {name: v.to(device, non_blocking=non_blocking) for name, v in self.columns.items()}
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Number of real tokens, fillers included; without a device sync for packed rows."""
        return (
            self.bounds[-1]
            if self.bounds is not None
            else int(self.mask.sum())
            if self.mask is not None
            else self.ids.numel()
        )
