"""Where the episodes of a split come from: texts of a table, files in a folder for each class, or a function that makes tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_ft.data.class_folders import FileReader, files_of_splits, pools_of_files
from lightning_ft.data.class_texts import ClassTexts
from lightning_ft.data.episode_draw import TEST, TRAIN, VAL, check_pools, draw_episode
from lightning_ft.data.known_config import known_config
from lightning_ft.data.named_files import Split
from lightning_ft.data.task_functions import DrawnTasks
from lightning_ft.data.text_folders import holds_texts
from lightning_ft.data.text_tasks import TextTasks, reader_of
from lightning_ft.engine.episode_tasks import Asks
from lightning_ft.engine.episodes import Episode
from lightning_ft.functional.dotted import named_function

_STREAMS: dict[Split, int] = {"train": TRAIN, "val": VAL, "test": TEST}


class EpisodeSource(ClassTexts):
    """Makes the episodes of `EpisodeData`, which stores the arguments annotated here and those of `ClassTexts`."""

    tasks: str | None
    tasks_args: dict[str, Any] | None
    eval_tasks_args: dict[str, Any] | None
    way: int
    shot: int
    train_shot: int | None
    query: int
    permute_labels: bool
    small_classes: Literal["error", "drop"]
    image_size: int
    channels: Literal[1, 3]

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Split, Callable[[int, np.ndarray], tuple[Episode, ...] | Episode]] = {}
        self._tasks: dict[Split, DrawnTasks] = {}
        self._shared: dict[Split, int] = {}
        self._folders: bool | None = None
        self.pools: dict[Split, dict[str, np.ndarray]] = {}

    @property
    def reads_no_files(self) -> bool:
        """Whether episodes come from a function, or from folders."""
        return self.tasks is not None or self.folders

    @property
    def folders(self) -> bool:
        """Whether ``path`` is a folder of classes of images or tensors; one of texts is read as a table."""
        if self._folders is None:
            folder = Path(self.path).expanduser() if isinstance(self.path, str) else None
            self._folders = folder is not None and folder.is_dir() and not holds_texts(folder)
        return self._folders

    def _has(self, split: Split) -> bool:
        if split == "train" or self.tasks is not None:
            return True
        return bool(getattr(self, f"{split}_path") or getattr(self, f"{split}_classes"))

    @property
    def has_classes(self) -> bool:
        """Whether targets are classes, not numbers."""
        return self.tasks is None or self._drawn("train").has_classes

    @property
    def asks_for(self) -> Asks:
        """What texts are learned for; of arrays, which no base reads, likewise ``classes``."""
        return (self._drawn("train").kind if self.tasks is not None else None) or "classes"

    def _get_made(self, split: Split) -> Callable[[int, np.ndarray], tuple[Episode, ...] | Episode]:
        self._prepare_split(split)
        return self._made[split]

    def _prepare_split(self, split: Split) -> None:
        if split in self._made or not self._has(split):
            return
        if self.tasks is not None:
            drawn = self._drawn(split)
            if drawn.kind is None:
                self._made[split] = drawn.episodes
            else:
                module = self.trainer.lightning_module if self.trainer is not None else None
                reader = reader_of(
                    drawn.kind,
                    self.resolve_tokenizer(),
                    max_length=self.max_length,
                    truncation=self.truncation,
                    way=self.way,
                    config=known_config(self.trainer, self.tokenizer),
                    judged=getattr(module, "task", None) == "reward",
                )
                self._made[split] = TextTasks(drawn, reader).episodes
        elif self.folders:
            self._prepare_folders(split)
        else:
            self._prepare_texts(split)

    # -- of a function ------------------------------------------------------------------------------------------------

    def _drawn(self, split: Split) -> DrawnTasks:
        if split not in self._tasks:
            assert self.tasks is not None
            given = {**(self.tasks_args or {}), **((self.eval_tasks_args or {}) if split != "train" else {})}
            self._tasks[split] = DrawnTasks(self._function(), given, (self._seed, _STREAMS[split]), self.tasks)
        return self._tasks[split]

    def _function(self) -> Callable[..., Any]:
        assert self.tasks is not None
        return named_function(self.tasks, "EpisodeData.tasks")

    # -- of rows ------------------------------------------------------------------------------------------------------

    def classes_of(self) -> dict[str, set[str]]:
        """The classes of each split of rows; of a function none."""
        if self.tasks is not None:
            return {}
        if self.folders:
            return {split: set(classes) for split, classes in self._class_files().items()}
        return super().classes_of()

    def _class_files(self) -> dict[str, dict[str, list[Path]]]:
        given = {split: path for split, path in (("val", self.val_path), ("test", self.test_path)) if path is not None}
        return files_of_splits(str(self.path), given, self.val_classes, self.test_classes, seed=self._seed)

    def check_classes(self, splits: Iterable[Split]) -> None:
        """Refuses too few classes or rows for an episode, as far as labels or files say it: before a text is tokenised."""
        if self.tasks is not None:
            return
        dealt = self.classes_of()
        files = self._class_files() if self.folders else {}
        for split in splits:
            if not self._has(split):
                continue
            counts = (
                {name: len(found) for name, found in files[split].items()} if files else self._counted(self._of(split))
            )
            pools = {name: np.arange(counts[name]) for name in sorted(dealt[split])}
            self._checked(pools, split, "rows")

    def _prepare_folders(self, split: Split) -> None:
        items, pools = pools_of_files(self._class_files()[split])
        self.pools[split] = self._checked(pools, split)
        reader = FileReader(image_size=self.image_size, channels=self.channels)

        self._made[split] = lambda epoch, numbers: reader.episodes(items, self._draws(split, epoch, numbers))

    def _prepare_texts(self, split: Split) -> None:
        rows, pools, self._shared[split] = self.pools_of(split)
        self.pools[split] = self._checked(pools, split)
        self._rows[split] = rows

        self._made[split] = lambda epoch, numbers: tuple(
            self.episode(rows, draw) for draw in self._draws(split, epoch, numbers)
        )

    def _shot_of(self, split: Split) -> tuple[str, int]:
        if split == "train" and self.train_shot is not None:
            return "train_shot", self.train_shot
        return "shot", self.shot

    def _checked(
        self, pools: Mapping[str, np.ndarray], split: Split, counted: str = "different rows"
    ) -> dict[str, np.ndarray]:
        name, shot = self._shot_of(split)
        return check_pools(
            pools,
            split,
            way=self.way,
            rows=shot + self.query,
            shot=name,
            drop=self.small_classes == "drop",
            owner="EpisodeData",
            counted=counted,
        )

    def _draws(self, split: Split, epoch: int, numbers: np.ndarray) -> list[Any]:
        pools, (_, shot) = list(self.pools[split].values()), self._shot_of(split)
        return [
            draw_episode(
                pools,
                way=self.way,
                shot=shot,
                query=self.query,
                permute=self.permute_labels,
                key=(self._seed, _STREAMS[split], epoch, number),
            )
            for number in numbers.tolist()
        ]


__all__ = ["EpisodeSource"]
