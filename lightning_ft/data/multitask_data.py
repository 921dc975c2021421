"""Data of several tasks: each a data module of its own, dealt together."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol, cast

import numpy as np
from annotated_types import Ge

from lightning_ft.data.classification_data import ClassificationData
from lightning_ft.data.loader import PlannedLoader
from lightning_ft.data.named_files import Split
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.preference_data import PreferenceData
from lightning_ft.data.preview import Preview
from lightning_ft.data.sft_data import SFTData
from lightning_ft.data.task_rows import Draw, OneTaskLoader, Part, TaskCollate, TaskRows
from lightning_ft.data.token_rows import Report
from lightning_ft.engine.arguments import check_arguments
from lightning_ft.engine.task_list import BY_TOKEN, PAIRS, check_task_name
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.task_sampling import probabilities


class Sampling(Protocol):
    """What decides how often each task comes; `lightning_ft.TaskSampling` is one."""

    @property
    def in_turn(self) -> bool:
        """Whether tasks come in turn, and none is drawn."""

    def chances(self, names: Sequence[str], sizes: Sequence[int], epoch: int) -> np.ndarray:
        """(K,) probability of each task in an epoch."""


class MultiTaskData(PlannedData):
    """Rows of several tasks, each read by a data module of its own, in batches that hold several tasks or one.

    An epoch has ``epoch_rows`` rows, by default as many as all tasks have together. The task of each row (of each batch, where
    batches are homogeneous) is drawn with replacement, in proportion to the tasks' sizes unless `TaskSampling` says otherwise.
    Within an epoch no row of a task comes twice before all of them came once; a small task that is drawn often comes around again,
    a large one may not be seen whole. What comes where is a function of (seed, epoch, place), the same on all ranks and after a
    resume.

    Args:
        tasks: name -> its data: `ClassificationData` (classes of rows or words, numbers), `SFTData`, or `PreferenceData` (pairs,
            each laid out as two rows and counted as one). Their files, columns, lengths and hold-out are used; their batch size,
            packing, order and seed are not, but those given here.
        batches: ``mixed``: rows of all tasks in one batch, which the model reads at once; ``homogeneous``: a batch of all ranks
            holds one task, which adapters of single tasks need unless they are `LoRA`.
        batch_size: rows a micro-batch on one device. With mixed batches steps stay the same where ``batch_size *
            accumulate_grad_batches * devices`` does, with homogeneous ones where ``batch_size * devices`` does.
        val_batch_size: rows a batch in validation and test, which go through task after task; None: ``batch_size``.
        epoch_rows: rows an epoch, with homogeneous batches rounded up to whole ones; fewer make ends of epochs, where samplers
            look at losses, come sooner.
        only: one task's name: the others are left out, as for the single-task baseline that a comparison needs; adapters and
            teachers of theirs sit out. None: all.
        packing: lay rows end to end, each seeing only itself. None: where the model was proven to take such rows.
        shuffle: a new order of each task's rows in each epoch.
        seed: of the draws; None: the seed of ``seed_everything``, else 0.
        tokenizer: a model id, folder or starter asset; None: the tokenizer of the module that is trained.

    Raises:
        Refusal: an argument out of bounds; data of another kind than those named; whatever is wrong with a task's files.

    Example:
        >>> data = MultiTaskData({"stars": ClassificationData("stars.csv"), "chat": SFTData("chat.jsonl")}, batch_size=16)
        >>> data.task_names
        ['stars', 'chat']

    References:
        Raffel et al., 2020, section 3.5.2: what an epoch of a mixture may be.
    """

    max_tokens: int | None = None
    val_path = None
    val_fraction = 0.0
    path = "tasks"

    def __init__(
        self,
        tasks: dict[str, PlannedData],
        *,
        batches: Literal["mixed", "homogeneous"] = "mixed",
        batch_size: Annotated[int, Ge(1)] = 8,
        val_batch_size: Annotated[int, Ge(1)] | None = None,
        epoch_rows: Annotated[int, Ge(1)] | None = None,
        only: str | None = None,
        packing: bool | None = None,
        shuffle: bool = True,
        seed: Annotated[int, Ge(0)] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.batches = batches
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.epoch_rows = epoch_rows
        self.only = only
        self.packing = packing
        self.shuffle = shuffle
        self.seed = seed
        self.tokenizer = tokenizer
        self._sampling: Sampling | None = None
        self.check()

    def check(self) -> None:
        """Refuses arguments out of bounds, and data that cannot be a task."""
        check_arguments(self)
        if not self.tasks:
            raise Refusal("MultiTaskData.tasks is empty: give at least one name with its data.")
        for name, data in self.tasks.items():
            check_task_name(name, "MultiTaskData.tasks")
            if not isinstance(data, (ClassificationData, SFTData, PreferenceData)):
                raise Refusal(
                    f"MultiTaskData.tasks.{name} must be ClassificationData, SFTData or PreferenceData, got {type(data).__name__}."
                )
            for option in ("streaming", "max_tokens", "share_prompts"):
                if getattr(data, option, None):
                    raise Refusal(
                        f"MultiTaskData.tasks.{name}.{option} cannot be had among rows of several tasks; leave it out."
                    )
        if self.only is not None and self.only not in self.tasks:
            raise Refusal(f"MultiTaskData.only must be one of {', '.join(self.tasks)}, got {self.only!r}.")

    # For the module that is trained, and for TaskSampling

    @property
    def _used(self) -> dict[str, PlannedData]:
        return self.tasks if self.only is None else {self.only: self.tasks[self.only]}

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks in the order of their numbers."""
        return list(self._used)

    def task_objectives(self) -> dict[str, str]:
        """Task -> what it learns, as told by its data; pairs of answers leave it open."""

        def told(data: PlannedData) -> str:
            if isinstance(data, ClassificationData):
                return data.resolved_task()
            return PAIRS if isinstance(data, PreferenceData) else "causal_lm"

        return {name: told(data) for name, data in self._used.items()}

    def task_labels(self) -> dict[str, list[str]]:
        """Task -> names of its classes, of those that have classes."""
        found = {name: data.label_names() for name, data in self._used.items() if isinstance(data, ClassificationData)}
        return {name: labels for name, labels in found.items() if labels is not None}

    def several_labels(self) -> list[str]:
        """Tasks whose rows may have several classes."""
        return [n for n, data in self._used.items() if isinstance(data, ClassificationData) and data.multi_label()]

    def tasks_with(self, split: Split) -> list[str]:
        """Tasks that have rows of a split."""
        return [name for name, data in self._used.items() if len(data._rows.get(split, ()))]

    def use_sampling(self, sampling: Sampling | None) -> None:
        """Lets this decide how often each task comes; None: its size."""
        self._sampling = sampling

    # What Lightning and the command line ask

    def check_files(self, stage: str | None = None) -> None:
        """Reads every file that the stage needs, of every task."""
        for name, data in self._used.items():
            try:
                data.check_files(stage)
            except Refusal as error:
                raise Refusal(f"The task {name!r} of MultiTaskData: {error}") from error

    def prepare_data(self) -> None:
        """Tokenises every task into the cache, on one process of each node."""
        self._lend_tokenizer()
        fn = self.trainer.state.fn if self.trainer is not None else None
        for data in self._used.values():
            for path in data._paths(fn.value if fn is not None else None):
                data._tokenised(path)

    def setup(self, stage: str | None = None) -> None:
        """Opens the rows of this stage, of every task."""
        if stage in ("fit", None):
            self._clock = type(self._clock)()
        self._lend_tokenizer()
        for data in self._used.values():
            data.setup(stage)
        self.__dict__.pop("_train_rows", None)

    def train_dataloader(self) -> PlannedLoader:
        """Micro-batches of an epoch with the totals of their accumulation window."""
        if self.trainer is not None and bool(getattr(self.trainer, "overfit_batches", 0)):
            raise Refusal(
                "Trainer.overfit_batches sees the same batches again and again, and MultiTaskData draws its tasks anew in each "
                "epoch; give files of a few rows instead."
            )
        kind = PlannedLoader if self.batches == "mixed" else OneTaskLoader
        return kind(
            self._train_rows,
            batch_size=self.batch_size,
            packed=self._packs,
            shuffle=self.shuffle,
            seed=self._seed,
            placement=self._train_placement,
            collate=self._collate,
            shares=Draw(self._train_rows, self.epoch_rows or len(self._train_rows), self._chances, self._in_turn),
            clock=self._clock,
        )

    def val_dataloader(self) -> list[PlannedLoader]:  # type: ignore[override]
        """The validation rows of one task after the other."""
        return self._in_turn_loaders("val")

    def test_dataloader(self) -> list[PlannedLoader]:  # type: ignore[override]
        """The test rows of one task after the other."""
        return self._in_turn_loaders("test")

    def predict_dataloader(self) -> list[PlannedLoader]:  # type: ignore[override]
        """The rows to predict, of one task after the other."""
        return self._in_turn_loaders("predict")

    def in_order(self) -> dict[Split, PlannedLoader]:
        """The rows of every split that is set up, each once, task after task: to measure them."""
        splits = {split for data in self._used.values() for split in data._rows}
        return {split: cast("PlannedLoader", _InTurn(self._in_turn_loaders(split))) for split in sorted(splits)}

    def reports(self) -> dict[str, Report]:
        """What became of the rows of each task and split."""
        self._lend_tokenizer()
        found: dict[str, Report] = {}
        for name, data in self._used.items():
            found |= {f"{name}, {split}": replace(r, packing_efficiency=None) for split, r in data.reports().items()}
        return found

    def preview(self, n: int = 3, split: Split = "train") -> list[Preview]:
        """Rows as the model will see them, from the tasks in turn."""
        self._lend_tokenizer()
        seen = [data.preview(n, split) for data in self._used.values()]
        return [rows[i] for i in range(n) for rows in seen if i < len(rows)][:n]

    # How rows are dealt

    @cached_property
    def _train_rows(self) -> TaskRows:
        return TaskRows({name: cast("Part", data._get("train")) for name, data in self._used.items()})

    @property
    def _collate(self) -> TaskCollate:
        told = self.task_objectives()
        by_token, paired = ([n for n, what in told.items() if what in kinds] for kinds in (BY_TOKEN, (PAIRS,)))
        return TaskCollate(tuple(self.task_names), frozenset(by_token), frozenset(paired))

    @property
    def _in_turn(self) -> bool:
        return self._sampling is not None and self._sampling.in_turn

    def _chances(self, epoch: int) -> np.ndarray:
        if self._sampling is None:
            return probabilities(self._train_rows.sizes)
        return self._sampling.chances(self.task_names, self._train_rows.sizes, epoch)

    def _in_turn_loaders(self, split: Split) -> list[PlannedLoader]:
        loaders = []
        for name, data in self._used.items():
            if split not in data._rows:
                continue
            # The other tasks have no rows here, but keep their numbers.
            rows = {n: cast("Part", data._rows[split] if n == name else _Nobody()) for n in self._used}
            loaders.append(
                PlannedLoader(
                    TaskRows(rows),
                    batch_size=self.val_batch_size or self.batch_size,
                    packed=self._packs,
                    seed=self._seed,
                    placement=self._placement,
                    collate=self._collate,
                    task=name,
                )
            )
        return loaders

    def _lend_tokenizer(self) -> None:
        for data in self._used.values():
            if data.tokenizer is None:
                data.use_tokenizer(self.resolve_tokenizer())

    def _deal(self) -> dict[str, Any]:
        place = self._train_placement()
        content = {
            name: {**data._content(), **{k: getattr(data, k) for k in data.decides}}
            for name, data in self.tasks.items()
        }
        return {
            "content": hashlib.sha256(repr(content).encode()).hexdigest(),
            "tasks": self.task_names,
            "batches": self.batches,
            "epoch_rows": self.epoch_rows,
            "sampling": repr(self._sampling) if self._sampling is not None else None,
            "packing": self._packs,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self._seed,
            "accumulate_grad_batches": place.accumulate,
            "devices": place.world_size,
        }


class _InTurn:
    """Loaders one after the other."""

    def __init__(self, loaders: Sequence[PlannedLoader]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            yield from loader


class _Nobody:
    """A task without rows."""

    lengths = scored = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return 0

    def segments(self, numbers: Any) -> list[Any]:
        return []
