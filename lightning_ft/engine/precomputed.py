"""Log-probabilities of the reference, computed once and kept on disk, so that training runs no reference forward.

A folder belongs to one reference (see `digest`), a record in it to the content of one pair: a key of 64 bits and two floats. So
rows may be shuffled, split or added, and other runs from the same start find what is there. While it is being computed each rank
appends to a file of its own; a run that was killed goes on where it stopped. What is complete is one sorted file, which is mapped
into memory and not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.reference import is_identity
from lightning_ft.formats.atomic import atomic_folder
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.packed import Sample, packed_layers
from lightning_ft.nn.registry import base_name, injected_layers

_RECORD = np.dtype([("key", "<u8"), ("chosen", "<f4"), ("rejected", "<f4")])
_TABLE, _PARTS = "table.npy", "parts"


def digest(model: nn.Module, about: dict[str, Any], *, rounded: bool = False) -> str:
    """Names what a model computes now: sums of all its tensors but those of layers that are exactly nothing, and settings.

    So a fresh LoRA, whatever its rank and seed, has the name of its base. What was computed on this machine, as the factors and
    the remainder of PiSSA are, is sampled and rounded instead, since another machine may compute the last bits otherwise. All
    ranks must call it where tensors are sharded.

    Args:
        model: with its injected layers.
        about: further things that the numbers depend on, such as the precision; plain types.
        rounded: whether numbers are told apart only as far as bfloat16 does, so that the dtype they are kept in says nothing.
    """
    nothing = {
        f"{path}.{name}" if path else name
        for path, layer in injected_layers(model).items()
        if is_identity(layer)
        for name in layer.injected_parameters()
    }
    computed = tuple(
        f"{path}." if path else "" for path, layer in injected_layers(model).items() if not is_identity(layer)
    )
    packed = {f"{path}.weight": layer.source for path, layer in packed_layers(model).items()}
    found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for pristine, name, parameter in sorted(
        ((base_name(name, model), name, p) for name, p in model.named_parameters()), key=lambda triple: triple[:2]
    ):
        if name in nothing:
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        sample = packed.get(name) or Sample.of(whole)
        if rounded and whole.is_floating_point():
            whole = whole.to(torch.bfloat16)
        found.update(f"{pristine} {whole.dtype} {sample.shape}".encode())
        exact = name not in packed and not name.startswith(computed)
        found.update((_sums(whole) if exact else sample.numbers).numpy().tobytes())
    return found.hexdigest()[:32]


def _sums(tensor: Tensor) -> Tensor:
    """int64 sums of the bits of a tensor along its rows and along its columns, so that any number that differs shows."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integers)
    bits = bits.reshape(bits.shape[0] if bits.ndim > 1 else 1, -1)
    return torch.cat([bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)]).cpu()


def keys_of(batch: Batch) -> np.ndarray:
    """(P,) uint64, a hash of the tokens of each real pair and of which are scored, however the batch is laid out."""
    real = int(batch.counts["pair"])
    ids, positions = batch.ids.reshape(-1).cpu().numpy(), batch.positions.reshape(-1).cpu().numpy()
    owner, scored = batch.segment_of_scored.cpu().numpy(), batch.scored.cpu().numpy()
    rows = [ids[begin:end] for begin, end in segment_places(batch)]
    keys = np.empty(real, dtype=np.uint64)
    for pair in range(real):
        found = hashlib.blake2b(digest_size=8)
        for segment in (2 * pair, 2 * pair + 1):
            whole, lent = rows[segment], batch.shared[segment] if batch.shared is not None else None
            if lent is not None:
                whole = np.concatenate([rows[lent[0]][: lent[1]], whole])
            # Where a scored token stands in its whole row: its predictor's position there.
            places = positions[scored[owner == segment]]
            found.update(np.array([len(whole), len(places)], dtype=np.int64).tobytes())
            found.update(whole.astype(np.int64).tobytes())
            found.update(places.astype(np.int64).tobytes())
        keys[pair] = np.frombuffer(found.digest(), dtype=np.uint64)[0]
    return keys


def segment_places(batch: Batch) -> list[tuple[int, int]]:
    """Where each segment begins and ends in the flattened tensor."""
    if batch.bounds is not None:
        return list(pairwise(batch.bounds))
    assert batch.mask is not None
    width = batch.ids.shape[1]
    return [(n * width, n * width + length) for n, length in enumerate(batch.mask.sum(1).tolist())]


class ReferenceTable:
    """Log-probabilities of pairs by one reference.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: of this reference; it need not exist."""
        self.folder = folder
        self._keys = np.empty(0, dtype=np.uint64)
        self._values = np.empty((0, 2), dtype=np.float32)
        self._new: dict[int, tuple[float, float]] = {}
        self.open()

    def open(self) -> None:
        """Looks again at what lies in the folder: what is complete, and what killed runs have left."""
        table = self.folder / _TABLE
        if table.exists():
            both = np.load(table, mmap_mode="r", allow_pickle=False)  # (2, N)
            self._keys, self._values = both[0], both[1].view(np.float32).reshape(-1, 2)
        self._new = {}
        for file in sorted(self.folder.parent.glob(f"{self.folder.name}.{_PARTS}/*.bin")):
            data = file.read_bytes()  # the last record of a killed run may be torn
            for record in np.frombuffer(data[: len(data) // _RECORD.itemsize * _RECORD.itemsize], dtype=_RECORD):
                self._new[int(record["key"])] = (float(record["chosen"]), float(record["rejected"]))

    def has(self, keys: np.ndarray) -> np.ndarray:
        """(P,) bool: which of them are known."""
        return (self._find(keys) >= 0) | np.array([int(key) in self._new for key in keys], dtype=bool)

    def values(self, keys: np.ndarray) -> np.ndarray:
        """(P, 2) float32, of the chosen and the rejected answer.

        Raises:
            Refusal: a pair is unknown.
        """
        places = self._find(keys)
        known = self._values[np.maximum(places, 0)] if len(self._keys) else np.zeros((len(keys), 2), dtype=np.float32)
        found = np.array(known, dtype=np.float32)
        for n in np.flatnonzero(places < 0):
            value = self._new.get(int(keys[n]))
            if value is None:
                raise Refusal(
                    f"The reference's log-probabilities of a pair are not in {self.folder}: they were computed for other rows, and "
                    "the reference itself is gone; begin a fit that names these rows too (data.test_path), or one with "
                    "reference_policy start."
                )
            found[n] = value
        return found

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """(P,) their places in the complete table, -1 where they are not in it."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[places] == keys, places, -1)

    def complete(
        self,
        batches: Iterable[Batch],
        score: Callable[[Batch], Tensor],
        *,
        rank: int = 0,
        ranks: int = 1,
        writes: bool = True,
    ) -> int:
        """Computes what is unknown, each rank its own batches, and leaves one file that holds everything.

        Args:
            batches: of this rank; all ranks have the same number.
            score: (2P,) summed log-probabilities; all ranks call it for the same places, since weights may be sharded.
            rank: this one.
            ranks: how many compute.
            writes: whether this rank writes the file: one of each machine.

        Returns:
            How many pairs of this rank were computed.
        """
        computed = 0
        parts = self.folder.parent / f"{self.folder.name}.{_PARTS}"
        parts.mkdir(parents=True, exist_ok=True)
        with open(parts / f"{rank}-{os.getpid()}.bin", "ab") as file:
            for batch in batches:
                keys = keys_of(batch)
                missing = not bool(self.has(keys).all())
                if not _any(missing, ranks):
                    continue
                pairs = score(batch).float().cpu().numpy().reshape(-1, 2)[: len(keys)]
                if missing:
                    records = np.zeros(len(keys), dtype=_RECORD)
                    records["key"], records["chosen"], records["rejected"] = keys, pairs[:, 0], pairs[:, 1]
                    file.write(records.tobytes())
                    file.flush()
                    self._new.update(zip(keys.tolist(), map(tuple, pairs.tolist()), strict=True))
                    computed += len(keys)
        if _any(bool(self._new), ranks):
            self._gather(ranks)
            if writes:
                self._write(parts)
        elif writes:
            _remove(parts)
        if ranks > 1:
            dist.barrier()
        self.open()
        return computed

    def _gather(self, ranks: int) -> None:
        """Every rank learns what the others have computed."""
        if ranks == 1:
            return
        found: list[Any] = [None] * ranks
        dist.all_gather_object(found, self._new)
        for other in found:
            self._new.update(other)

    def _write(self, parts: Path) -> None:
        new = self._new
        self.open()  # another run may have been faster with other rows
        self._new.update(new)
        added = np.array(list(self._new.values()), dtype=np.float32).reshape(-1, 2)
        keys = np.concatenate([self._keys, np.fromiter(self._new, dtype=np.uint64, count=len(self._new))])
        keys, first = np.unique(keys, return_index=True)
        values = np.concatenate([self._values, added])[first]
        both = np.stack([keys, np.ascontiguousarray(values).view(np.uint64)[:, 0]])
        with atomic_folder(self.folder, marker=_TABLE, needed_bytes=both.nbytes) as folder:
            np.save(folder / _TABLE, both, allow_pickle=False)
        _remove(parts)


def _remove(parts: Path) -> None:
    for file in parts.glob("*.bin"):
        file.unlink(missing_ok=True)
    if parts.exists() and not any(parts.iterdir()):
        parts.rmdir()


def _any(flag: bool, ranks: int) -> bool:
    """Whether the flag holds on any rank."""
    if ranks == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(float(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


def in_turn(loaders: Iterable[Iterable[Batch]]) -> Iterator[Batch]:
    """The batches of one loader after the other."""
    for loader in loaders:
        yield from loader
