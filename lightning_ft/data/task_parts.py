"""The tasks of a stream as their rows: views of this library's data modules, or of any with a plain DataLoader.

Rows of a plain DataLoader are dealt by the same plan as ours, so that a run is resumed within an epoch, every rank gets its
own rows; its ``dataset``, ``collate_fn``, workers and batch size are the user's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightning_ft.data.collate import Segment
from lightning_ft.data.dealt_loader import DealtLoader
from lightning_ft.data.loader import EpochClock, Placement
from lightning_ft.data.mixture import MixedRows, mixed
from lightning_ft.data.named_files import Split
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.token_rows import TokenRows
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.randomness import global_seed
from lightning_ft.engine.scoring import CLASS_MASK
from lightning_ft.functional.errors import Refusal

Rows = TokenRows | MixedRows


class TaskPart(Protocol):
    """The rows of one task."""

    def train_loader(self, epoch: Callable[[], int], steps: int | None) -> Any:
        """One epoch of training, which ``epoch`` numbers when it begins; with ``steps`` so many optimizer steps."""

    def loader(self, split: Split) -> Any | None:
        """The rows of a split, each once and in order; None where there are none."""

    def first_pass(self) -> int:
        """Micro-batches after which every training row has come, where steps count; whole accumulation windows."""

    def deal(self) -> dict[str, Any]:
        """What decides the training batches, in plain types; position and epoch come with it where they matter."""

    def resume(self, deal: dict[str, Any], position: int) -> None:
        """Refuses to go on at this micro-batch of an epoch if the rest of it would now be dealt otherwise."""


class TaskClock(EpochClock):
    """The epochs of one task, which the stream counts."""

    def __init__(self, epoch: Callable[[], int]) -> None:
        """Args: epoch: gives the present epoch of the task, from 0."""
        super().__init__()
        self._local = epoch

    @property
    def epoch(self) -> int:
        """The epoch that is dealt."""
        return self._local()

    def begin(self, position: int) -> None:
        """Nothing: the stream knows where it is."""


def class_mask(classes: int, competing: Sequence[int], rows: int) -> Tensor:
    """(rows, classes) bool, True on classes that compete."""
    mask = torch.zeros(classes, dtype=torch.bool)
    mask[list(competing)] = True
    return mask.repeat(rows, 1)


def parts_of(rows: Rows) -> tuple[TokenRows, ...]:
    """The rows of each file."""
    return rows.parts if isinstance(rows, MixedRows) else (rows,)


class PlannedTask:
    """Rows of one of this library's data modules.

    Attributes:
        data: a shallow copy with the rows of this task alone; what the user gave stays as it was.
    """

    def __init__(self, data: PlannedData, rows: dict[Split, Rows]) -> None:
        """Args: data: whose rows they are; rows: those of this task by split."""
        self.data = copy.copy(data)
        self.data._rows = dict(rows)

    def mask(self, classes: int, competing: Callable[[], Sequence[int] | None]) -> None:
        """Lets batches say which classes compete for their rows.

        Args:
            classes: their number.
            competing: gives those that do when a batch is made; None: all.
        """
        self._mark(lambda rows: None if (now := competing()) is None else class_mask(classes, now, len(rows)))

    def _mark(self, mask_of: Callable[[Tensor], Tensor | None]) -> None:
        """Adds to each batch what is said of its rows, (rows, classes) bool."""
        plain = self.data.collate

        def collate(segments: Sequence[Segment], **settings: Any) -> Batch:
            batch = plain(segments, **settings)
            if (mask := mask_of(batch.rows)) is not None:
                batch.columns[CLASS_MASK] = mask
            return batch

        self.data.collate = collate  # type: ignore[method-assign]

    def train_loader(self, epoch: Callable[[], int], steps: int | None) -> Any:
        """As the data module deals it, with the totals of each accumulation window."""
        data = copy.copy(self.data)
        if steps is not None:
            placement = data._train_placement()
            data.epoch_rows = steps * data.batch_size * placement.accumulate * placement.world_size
        data._clock = TaskClock(epoch)
        return data.train_dataloader()

    def loader(self, split: Split) -> Any | None:
        """In order."""
        return self.data._eval_loader(split) if split in self.data._rows else None

    def first_pass(self) -> int:
        """Of rows that are drawn pass after pass."""
        return _windows(len(self.data._rows["train"]), self.data.batch_size, self.data._train_placement())

    def deal(self) -> dict[str, Any]:
        """As the data module's own checkpoint says it."""
        rows = self.data._rows["train"]
        return {**self.data._deal(), "rows": len(rows)}

    def resume(self, deal: dict[str, Any], position: int) -> None:
        """By the data module's own rule."""
        self.data.refuse_other_deal(deal, position)


class JointTask(PlannedTask):
    """All rows of several tasks as one."""

    def __init__(self, tasks: Sequence[PlannedTask]) -> None:
        """Args: tasks: in order; the first one's data module deals."""
        first = tasks[0].data
        for task in tasks[1:]:
            for name in ("batch_size", "max_tokens", "packing", "shuffle", "seed"):
                if type(task.data) is not type(first) or getattr(task.data, name) != getattr(first, name):
                    raise Refusal(
                        f"TaskStream.baseline joint deals the rows of all tasks together, and theirs differ in {name} or class; "
                        "give all tasks the same."
                    )
        if any(task.data._is_drawn for task in tasks):
            raise Refusal(
                "TaskStream.baseline joint takes each row once an epoch, and a task has weights or epoch_rows; leave them out."
            )
        parts = [(part, number) for number, task in enumerate(tasks) for part in parts_of(task.data._rows["train"])]
        super().__init__(first, {"train": mixed([part for part, _ in parts])})
        self._ends = np.cumsum([part.report.rows for part, _ in parts])  # numbers of rows go on from part to part
        self._owners = [number for _, number in parts]

    def mask_each(self, classes: int, competing: Sequence[Sequence[int]]) -> None:
        """Lets the classes of its own task compete for each row.

        Args:
            classes: their number.
            competing: those of each task.
        """
        masks = torch.cat([class_mask(classes, competing[owner], 1) for owner in self._owners])  # (parts, classes)

        def of_rows(rows: Tensor) -> Tensor:
            return masks[np.searchsorted(self._ends, rows.clamp(min=0).numpy(), side="right")]  # a filler has row -1

        self._mark(of_rows)


class PlainTask:
    """Rows of a map-style data set behind a DataLoader.

    Attributes:
        loaders: split -> the user's DataLoader.
        rows: split -> (rows,) numbers in its data set.
    """

    def __init__(
        self,
        loaders: dict[Split, DataLoader[Any]],
        rows: dict[Split, np.ndarray],
        trainer: Callable[[], pl.Trainer | None],
    ) -> None:
        """Args: loaders: by split; rows: those of this task; trainer: gives the run's, None before it."""
        self.loaders, self.rows, self.trainer = loaders, rows, trainer

    @property
    def shuffles(self) -> bool:
        """Whether the user's DataLoader shuffles training rows."""
        return isinstance(self.loaders["train"].sampler, RandomSampler)

    def train_loader(self, epoch: Callable[[], int], steps: int | None) -> DealtLoader:
        """One epoch, in an order of its own where the user's DataLoader shuffles."""
        return DealtLoader(
            self.loaders["train"],
            self.rows["train"],
            self._placement,
            epoch=epoch,
            shuffle=self.shuffles,
            steps=steps,
        )

    def loader(self, split: Split) -> DealtLoader | None:
        """In order."""
        if split not in self.loaders:
            return None
        return DealtLoader(self.loaders[split], self.rows[split], lambda: _without_position(self._placement()))

    def first_pass(self) -> int:
        """Of rows that come pass after pass."""
        size = self.loaders["train"].batch_size
        assert size is not None
        return _windows(len(self.rows["train"]), size, self._placement())

    def deal(self) -> dict[str, Any]:
        """Rows, batch size, order, window and ranks."""
        placement = self._placement()
        return {
            "rows": len(self.rows["train"]),
            "batch_size": self.loaders["train"].batch_size,
            "shuffle": self.shuffles,
            "seed": global_seed(),
            "accumulate_grad_batches": placement.accumulate,
            "devices": placement.world_size,
        }

    def resume(self, deal: dict[str, Any], position: int) -> None:
        """All of it must be the same."""
        now = self.deal()
        differs = [f"{name} {deal.get(name)!r} (now {now[name]!r})" for name in now if deal.get(name) != now[name]]
        if position and differs:
            raise Refusal(
                f"The checkpoint was written in the middle of an epoch with {', '.join(differs)}, so the remaining batches would "
                "be others: resume with the same values, or from a checkpoint of an epoch's end."
            )

    def _placement(self) -> Placement:
        trainer = self.trainer()
        if trainer is None:
            return Placement()
        return Placement(
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            position=int(trainer.fit_loop.epoch_loop.batch_progress.current.ready),
        )


def _windows(rows: int, batch_size: int, placement: Placement) -> int:
    """Micro-batches of as many whole accumulation windows as so many rows take: within one they may be sorted."""
    window = batch_size * placement.world_size * placement.accumulate
    return -(-rows // window) * placement.accumulate


def _without_position(placement: Placement) -> Placement:
    return Placement(placement.world_size, placement.rank, placement.accumulate)


def joint_plain(tasks: Sequence[PlainTask], count: int, trainer: Callable[[], pl.Trainer | None]) -> PlainTask:
    """All training rows of several data sets as one; the first one's DataLoader deals.

    Args:
        tasks: those behind plain DataLoaders.
        count: tasks there are.
        trainer: gives the run's.

    Raises:
        Refusal: where some tasks are of this library's data modules.
    """
    if len(tasks) < count:
        raise Refusal(
            "TaskStream.baseline joint deals the rows of all tasks together, and some are of this library's data modules and some "
            "not; give all of one kind."
        )
    first = tasks[0].loaders["train"]
    sets = [Subset(task.loaders["train"].dataset, task.rows["train"].tolist()) for task in tasks]
    whole: ConcatDataset[Any] = ConcatDataset(sets)
    loader = DataLoader(
        whole,
        batch_size=first.batch_size,
        shuffle=tasks[0].shuffles,
        collate_fn=first.collate_fn,
        num_workers=first.num_workers,
        pin_memory=first.pin_memory,
        worker_init_fn=first.worker_init_fn,
    )
    return PlainTask({"train": loader}, {"train": np.arange(len(whole))}, trainer)


_PLAIN: dict[Split, str] = {
    "train": "train_dataloader",
    "val": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


def plain_loaders(data: pl.LightningDataModule, name: str) -> dict[Split, DataLoader[Any]]:
    """The DataLoaders that a user's data module gives, by split.

    Args:
        data: set up already.
        name: of the task, for messages.

    Raises:
        Refusal: one that cannot be dealt by plan.
    """
    found: dict[Split, DataLoader[Any]] = {}
    for split, method in _PLAIN.items():
        if not is_overridden(method, data):
            continue
        try:
            loader = getattr(data, method)()
        except (AttributeError, KeyError):  # rows of another stage, which `setup` did not make
            if split == "train":
                raise
            continue
        if loader is None or (isinstance(loader, (list, tuple)) and not loader):
            continue
        if isinstance(loader, (list, tuple)) and len(loader) == 1:
            loader = loader[0]
        if (
            not isinstance(loader, DataLoader)
            or isinstance(loader.dataset, IterableDataset)
            or loader.batch_size is None
            or loader.drop_last
            or not isinstance(loader.sampler, (RandomSampler, SequentialSampler))
        ):
            raise Refusal(
                f"TaskStream deals the rows of {name} itself, so that a run can be resumed within a task, and its {method} is not "
                "one DataLoader of a map-style data set with a batch_size and without drop_last or a sampler; give it that."
            )
        if len(loader.dataset) or split == "train":  # type: ignore[arg-type]
            found[split] = loader
    if "train" not in found:
        raise Refusal(f"TaskStream found no train_dataloader in the data of {name}.")
    return found


__all__ = [
    "JointTask",
    "PlainTask",
    "PlannedTask",
    "TaskClock",
    "TaskPart",
    "joint_plain",
    "parts_of",
    "plain_loaders",
]
