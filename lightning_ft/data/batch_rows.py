"""A micro-batch taken apart into its rows, and rows put together again, so that rows can be kept and trained on once more.

A row is a plain dictionary of tensors, as a checkpoint may hold it. Of a `Batch` it is one row, or a pair with both its answers,
however the batch was laid out; of anything else (tensors, or lists, tuples and dictionaries of them, rows first) it is the
n-th of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch, Source
from lightning_ft.functional.errors import Refusal

Row = dict[str, Any]

_PER_SEGMENT, _PER_PAIR, _PER_TOKEN = "segment", "pair", "token"


def rows_of(batch: Any) -> list[Row]:
    """The rows of a micro-batch, fillers left out, on the CPU.

    Raises:
        Refusal: rows that lean on others of their batch.
    """
    return _rows_of_ours(batch) if isinstance(batch, Batch) else _rows_of_plain(batch)


def batch_of(rows: Sequence[Row], *, packed: bool = True) -> Any:
    """One micro-batch of rows, as `rows_of` gave them; without the totals of a window.

    Args:
        rows: at least one.
        packed: of a `Batch`, rows end to end; else padded on the right.
    """
    return _join_ours(rows, packed) if "segments" in rows[0] else _join_plain(rows)


# -- this library's batches -------------------------------------------------------------------------------------------


def _rows_of_ours(batch: Batch) -> list[Row]:
    ids, positions = batch.ids.reshape(-1).cpu(), batch.positions.reshape(-1).cpu()
    types = batch.types.reshape(-1).cpu() if batch.types is not None else None
    places = _places(batch)
    size = 2 if "pair" in batch.counts else 1
    scored, labels, owner = batch.scored.cpu(), batch.labels.cpu(), batch.segment_of_scored.cpu()
    numbers, found = batch.rows.tolist(), []
    kinds = {name: _kind(name, value, batch, size) for name, value in batch.columns.items()}
    begins = torch.tensor([begin for begin, _ in places])
    for first in range(0, len(places), size):
        if numbers[first] < 0:
            continue
        group = range(first, first + size)
        mine = ((owner >= first) & (owner < first + size)).nonzero()[:, 0]
        at = torch.searchsorted(begins, scored[mine], right=True) - 1  # the segment in which a scored position stands
        if len(mine) and not (int(at.min()) >= first and int(at.max()) < first + size):
            raise Refusal(_leans())
        row: Row = {
            "segments": [
                {
                    "ids": ids[begin:end].clone(),
                    "positions": positions[begin:end].clone(),
                    **({"types": types[begin:end].clone()} if types is not None else {}),
                    **({"source": _source_of(batch.source, n)} if batch.source is not None else {}),
                    **({"target": batch.targets[n].detach().cpu().clone()} if batch.targets is not None else {}),
                    "row": numbers[n],
                }
                for n, (begin, end) in zip(group, places[first : first + size], strict=True)
            ],
            "scored": torch.stack([at - first, scored[mine] - begins[at], owner[mine] - first], 1),  # (N, 3)
            "labels": labels[mine].clone(),
            "shared": [_shared_of(batch, n, first) for n in group],
            "columns": {
                name: [kind, _column_of(value, kind, first, size, mine)]
                for (name, value), kind in zip(batch.columns.items(), kinds.values(), strict=True)
            },
            "task": batch.task,
        }
        found.append(row)
    return found


def _leans() -> str:
    return (
        "These rows lean on others of their batch (mismatched answers of KTO), so they cannot be kept one by one; replay needs "
        "SFT, classification, reward or DPO data."
    )


def _places(batch: Batch) -> list[tuple[int, int]]:
    """Where each segment begins and ends in the flattened tensor."""
    if batch.bounds is not None:
        return list(pairwise(batch.bounds))
    width = batch.ids.shape[1]
    lengths = batch.mask.sum(1).tolist() if batch.mask is not None else [width] * len(batch.ids)
    return [(n * width, n * width + int(length)) for n, length in enumerate(lengths)]


def _kind(name: str, value: Tensor, batch: Batch, size: int) -> str:
    if len(value) == len(batch.rows):
        return _PER_SEGMENT
    if size == 2 and 2 * len(value) == len(batch.rows):
        return _PER_PAIR
    if len(value) == len(batch.scored):
        return _PER_TOKEN
    raise Refusal(
        f"The batch has a column {name} of {len(value)} numbers, which are neither of rows nor of scored tokens."
    )


def _column_of(value: Tensor, kind: str, first: int, size: int, mine: Tensor) -> Tensor:
    value = value.detach().cpu()
    if kind == _PER_TOKEN:
        return value[mine].clone()
    return (value[first // 2 : first // 2 + 1] if kind == _PER_PAIR else value[first : first + size]).clone()


def _shared_of(batch: Batch, segment: int, first: int) -> list[int] | None:
    entry = batch.shared[segment] if batch.shared is not None else None
    if entry is None:
        return None
    if entry[0] < first:
        raise Refusal(_leans())
    return [entry[0] - first, entry[1]]


def _source_of(source: Source, row: int) -> Tensor:
    return source.ids[row][source.mask[row]].detach().cpu().clone()


def _join_ours(rows: Sequence[Row], packed: bool) -> Batch:
    segments = [segment for row in rows for segment in row["segments"]]
    firsts, count = [], 0
    for row in rows:
        firsts.append(count)
        count += len(row["segments"])
    shared = tuple(
        None if entry is None else (first + entry[0], entry[1])
        for first, row in zip(firsts, rows, strict=True)
        for entry in row["shared"]
    )
    packed = packed or any(entry is not None for entry in shared)
    lengths = [len(segment["ids"]) for segment in segments]
    ends = torch.tensor(lengths).cumsum(0)
    width = max(lengths)
    begins = ends - torch.tensor(lengths) if packed else torch.arange(len(segments)) * width

    def laid(name: str, past_end: bool = False) -> Tensor:
        if packed:
            return torch.cat([segment[name] for segment in segments])[None]
        out = torch.zeros(len(segments), width, dtype=torch.int64)
        for line, segment in zip(out, segments, strict=True):
            line[: len(segment[name])] = segment[name]
            if past_end:
                line[len(segment[name]) :] = segment[name][-1]
        return out

    scored, owner = [], []
    for first, row in zip(firsts, rows, strict=True):
        at, offset, of = row["scored"].unbind(1)
        scored.append(begins[first + at] + offset)
        owner.append(first + of)
    sources = [segment["source"] for segment in segments if "source" in segment]
    tokens = sum(len(row["labels"]) for row in rows)
    counts = {"token": float(tokens), "row": float(len(segments))}
    if len(segments) == 2 * len(rows):
        chosen = sum(int((row["scored"][:, 2] == 0).sum()) for row in rows)
        counts |= {"chosen_token": float(chosen), "pair": float(len(rows))}
    return Batch(
        ids=laid("ids"),
        positions=laid("positions", past_end=True),
        bounds=(0, *ends.tolist()) if packed else None,
        mask=None if packed else torch.arange(width) < torch.tensor(lengths)[:, None],
        scored=torch.cat(scored),
        labels=torch.cat([row["labels"] for row in rows]),
        segment_of_scored=torch.cat(owner),
        rows=torch.tensor([segment["row"] for segment in segments]),
        counts=counts,
        targets=torch.stack([s["target"] for s in segments]) if "target" in segments[0] else None,
        types=laid("types") if "types" in segments[0] else None,
        source=_join_sources(sources) if sources else None,
        shared=shared if any(entry is not None for entry in shared) else None,
        columns={
            name: torch.cat([row["columns"][name][1] for row in rows])
            for name in rows[0]["columns"]
            if all(name in row["columns"] for row in rows)
        },
    )


def _join_sources(sources: Sequence[Tensor]) -> Source:
    width = max(len(source) for source in sources)
    ids = torch.zeros(len(sources), width, dtype=torch.int64)
    for line, source in zip(ids, sources, strict=True):
        line[: len(source)] = source
    return Source(ids, torch.arange(width) < torch.tensor([len(source) for source in sources])[:, None])


# -- a user's batches ---------------------------------------------------------------------------------------------------


def _rows_of_plain(batch: Any) -> list[Row]:
    leaves = _leaves(batch)
    sizes = {len(leaf) for leaf in leaves if leaf.ndim}
    if not leaves or len(sizes) != 1 or any(leaf.ndim == 0 for leaf in leaves):
        raise Refusal(
            "To keep rows of a batch, it must be tensors (in a list, tuple or dictionary) that have the rows in their first "
            f"dimension, and this one is {type(batch).__name__} with first dimensions {sorted(sizes)}."
        )
    return [{"plain": _pick(batch, row)} for row in range(sizes.pop())]


def _leaves(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in _leaves(value)]
    if isinstance(batch, (list, tuple)):
        return [leaf for value in batch for leaf in _leaves(value)]
    raise Refusal(
        f"To keep rows of a batch, it must be tensors in lists, tuples or dictionaries, and it holds a {type(batch).__name__}."
    )


def _pick(batch: Any, row: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[row].detach().cpu().clone()
    if isinstance(batch, dict):
        return {key: _pick(value, row) for key, value in batch.items()}
    return [_pick(value, row) for value in batch]


def _join_plain(rows: Sequence[Row]) -> Any:
    return _stack([row["plain"] for row in rows])


def _stack(rows: Sequence[Any]) -> Any:
    if isinstance(rows[0], Tensor):
        return torch.stack(list(rows))
    if isinstance(rows[0], dict):
        return {key: _stack([row[key] for row in rows]) for key in rows[0]}
    return [_stack([row[n] for row in rows]) for n in range(len(rows[0]))]


__all__ = ["Row", "batch_of", "rows_of"]
