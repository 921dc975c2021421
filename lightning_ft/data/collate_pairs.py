"""Prompts with their answers -> :class:`~lightning_ft.engine.batch.Batch`, the prompt of several answers laid out once.

Where prompts are shared the first answer stands behind its prompt, and each further one alone: it sees the prompt through
``Batch.shared``, its positions go on from there, and its first token is predicted by the prompt's last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from lightning_ft.data.collate import FILLER, Layout, Segment, joined
from lightning_ft.engine.batch import Batch
from lightning_ft.functional.errors import Refusal

_NONE = np.empty((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class Answer:
    """What follows a prompt.

    Attributes:
        ids: (T,) token ids.
        spans: (K, 2) [start, end) of the tokens to learn, counted from the answer's first, ascending and disjoint.
    """

    ids: np.ndarray
    spans: np.ndarray

    @property
    def places(self) -> np.ndarray:
        """(N,) which of its tokens are scored."""
        pieces = [np.arange(int(start), int(end)) for start, end in self.spans]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class PairSegment(Segment):
    """One pair; ``ids`` and ``spans`` are those of the prompt with the chosen answer.

    Attributes:
        prompt: how many tokens the prompt has, at least one.
        rejected: the other answer.
        margin: by how much the chosen one is better; None where the file does not say.
    """

    prompt: int
    rejected: Answer
    margin: float | None

    @property
    def chosen(self) -> Answer:
        """The answer that ``ids`` end with."""
        return Answer(self.ids[self.prompt :], self.spans - self.prompt)


@dataclass(frozen=True)
class UnpairedSegment(Segment):
    """One answer with its prompt, and whether it is a good one.

    Attributes:
        prompt: how many tokens the prompt has, at least one.
        desirable: the label.
        neighbour: the answer of another row, no longer than this one: the mismatched one of a row that is alone in its batch.
    """

    prompt: int
    desirable: bool
    neighbour: Answer | None = None

    @property
    def answer(self) -> Answer:
        """What follows the prompt."""
        return Answer(self.ids[self.prompt :], self.spans - self.prompt)


@dataclass(frozen=True)
class Answered:
    """A prompt and an answer as one segment of a batch.

    Attributes:
        prompt: (T,) token ids, at least one.
        answer: what follows.
        row: number in the data set, -1 for what counts in no unit.
        like: an earlier segment that has the same prompt and may lend it; None: there is none.
    """

    prompt: np.ndarray
    answer: Answer
    row: int
    like: int | None = None


# Two tokens (see `FILLER`), none scored.
VOID = Answered(FILLER.ids[:1], Answer(FILLER.ids[:1], _NONE), -1)


def lay_out(answered: Sequence[Answered], *, packed: bool, shared: bool) -> Batch:
    """The segments in order, without counts.

    Args:
        answered: at least one.
        packed: one row of all tokens with segment bounds; else (B, T) padded on the right.
        shared: whether a segment whose prompt stands in an earlier one leaves it out; needs ``packed``.
    """
    lent = [one.like if shared else None for one in answered]
    rows = [
        one.answer.ids if owner is not None else np.concatenate([one.prompt, one.answer.ids])
        for one, owner in zip(answered, lent, strict=True)
    ]
    layout = Layout.of([len(row) for row in rows], packed=packed)
    begins, predictors, labels = layout.begins.tolist(), [], []
    for one, owner, begin in zip(answered, lent, begins, strict=True):
        prompt, places = len(one.prompt), one.answer.places
        before = begin + prompt if owner is None else begin  # where the answer begins
        last = before - 1 if owner is None else begins[owner] + prompt - 1  # the last token of the prompt that it sees
        predictors.append(np.where(places > 0, before + places - 1, last))
        labels.append(one.answer.ids[places])
    positions = layout.positions()
    if any(owner is not None for owner in lent):
        starts = [len(one.prompt) if owner is not None else 0 for one, owner in zip(answered, lent, strict=True)]
        positions += layout.fill([np.full(len(row), start) for row, start in zip(rows, starts, strict=True)])
    owners = [None if owner is None else (owner, len(one.prompt)) for one, owner in zip(answered, lent, strict=True)]
    return Batch(
        ids=layout.fill(rows),
        positions=positions,
        bounds=layout.bounds,
        mask=layout.mask(),
        scored=joined(predictors),
        labels=joined(labels),
        segment_of_scored=torch.from_numpy(np.repeat(np.arange(len(rows)), [len(found) for found in labels])),
        rows=torch.tensor([one.row for one in answered], dtype=torch.int64),
        counts={},
        shared=tuple(owners) if any(owner is not None for owner in owners) else None,
    )


def lay_out_all(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], most: int, *, packed: bool, shared: bool
) -> Iterator[Batch]:
    """Answers behind their prompts in their order, as many in a batch as fit; row n is segment n of them all.

    Args:
        prompts: token ids of each answer's prompt, at least one; where it is its neighbour's, that may lend it.
        answers: token ids, at least one each; none of them is scored.
        most: tokens of a batch, padding included, or one answer where that is longer.
        packed: as `lay_out`.
        shared: likewise.

    Raises:
        Refusal: an empty prompt or answer.
    """
    chunk: list[Answered] = []
    tokens = longest = 0
    owner: int | None = None
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not len(prompt) or not len(answer):
            raise Refusal(f"Row {number} has an empty prompt or answer, and both need a token.")
        ids = np.asarray(prompt, dtype=np.int64)
        whole = len(prompt) + len(answer)
        same = bool(chunk) and np.array_equal(chunk[-1].prompt, ids)
        own = len(answer) if same and shared else whole
        size = tokens + own if packed else max(longest, whole) * (len(chunk) + 1)
        if chunk and size > most:
            yield lay_out(chunk, packed=packed, shared=shared)
            chunk, tokens, longest, same, own = [], 0, 0, False, whole
        owner = owner if same else len(chunk)
        tokens, longest = tokens + own, max(longest, whole)
        like = owner if same else None
        chunk.append(Answered(ids, Answer(np.asarray(answer, dtype=np.int64), _NONE), number, like=like))
    if chunk:
        yield lay_out(chunk, packed=packed, shared=shared)


def collate_pairs(
    segments: Sequence[Segment],
    *,
    packed: bool,
    shared: bool,
    window: dict[str, float] | None = None,
    task: str | None = None,
) -> Batch:
    """One micro-batch of P pairs: segment 2i is pair i's prompt with the chosen answer, 2i + 1 the rejected one.

    Units: ``pair`` (P), ``row`` (2P), ``token`` (scored tokens of both answers), ``chosen_token`` (of the chosen ones). Where
    the pairs have margins, ``columns["margin"]`` are these, (P,) float32.

    Args:
        segments: `PairSegment`; none gives a filler pair.
        packed: end to end, or padded.
        shared: whether the rejected answer leaves its prompt out; needs ``packed``.
        window: totals of the accumulation window.
        task: name of the task that all pairs belong to.
    """
    pairs = list(cast("Sequence[PairSegment]", segments))
    answered: list[Answered] = [] if pairs else [VOID, replace(VOID, like=0)]
    for pair in pairs:
        prompt = pair.ids[: pair.prompt]
        answered.append(Answered(prompt, pair.chosen, pair.row))
        answered.append(Answered(prompt, pair.rejected, pair.row, like=len(answered) - 1))
    batch = lay_out(answered, packed=packed, shared=shared)
    chosen = int((batch.segment_of_scored % 2 == 0).sum())
    counts = {"token": len(batch.scored), "chosen_token": chosen, "row": 2 * len(pairs), "pair": len(pairs)}
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    if 0 < len(margins) < len(pairs):
        raise ValueError(f"Of {len(pairs)} pairs {len(margins)} have a margin: all of a batch must have one, or none.")
    columns = {"margin": torch.tensor(margins, dtype=torch.float32)} if margins else {}
    numbers = {unit: float(count) for unit, count in counts.items()}
    return replace(batch, counts=numbers, window=window, task=task, columns=columns)


def collate_unpaired(
    segments: Sequence[Segment],
    *,
    packed: bool,
    shared: bool,
    mismatched: bool,
    window: dict[str, float] | None = None,
    task: str | None = None,
) -> Batch:
    """One micro-batch of S answers; ``targets`` are (S,) float32, 1 for a desirable one.

    With ``mismatched`` segments S to 2S - 1 follow: prompt i with the answer of row i - k, counted around; their ``rows`` are -1
    and they count in no unit. k is 1, as in TRL, or the least number for which no row meets an answer to its own prompt, as the
    two halves of a pair do that stand beside each other. A row alone in its batch gets its ``neighbour``.

    Units: ``row`` (S) and ``token`` (scored tokens of the S answers).

    Args:
        segments: `UnpairedSegment`; none gives a filler.
        packed: end to end, or padded.
        shared: whether mismatched answers leave the prompt out; needs ``packed``.
        mismatched: whether they are wanted.
        window: totals of the accumulation window.
        task: name of the task that all rows belong to.
    """
    rows = list(cast("Sequence[UnpairedSegment]", segments))
    answered = [Answered(row.ids[: row.prompt], row.answer, row.row) for row in rows] or [VOID]
    if mismatched:
        shift = _apart([one.prompt.tobytes() for one in answered])
        others = [answered[i - shift].answer for i in range(len(answered))]
        if len(rows) == 1 and rows[0].neighbour is not None:
            others = [rows[0].neighbour]
        pairs = list(zip(answered, others, strict=True))
        answered += [Answered(one.prompt, other, -1, like=i) for i, (one, other) in enumerate(pairs)]
    batch = lay_out(answered, packed=packed, shared=shared)
    own = int((batch.segment_of_scored < max(len(rows), 1)).sum())
    return replace(
        batch,
        counts={"token": float(own), "row": float(len(rows))},
        window=window,
        task=task,
        targets=torch.tensor([float(row.desirable) for row in rows] or [0.0], dtype=torch.float32),
    )


def _apart(prompts: Sequence[bytes]) -> int:
    """By how many places to go back around, at least one, so that as few as possible meet their like; the least such number.

    Every row's answer is used once whatever the number, so that a batch is as large with any.
    """
    shifts = range(1, max(len(prompts), 2))
    return min(shifts, key=lambda shift: sum(prompts[i - shift] == prompt for i, prompt in enumerate(prompts)))
