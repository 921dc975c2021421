"""Tables of texts whose classes are dealt to splits: which rows of a file belong to which, and how some become a batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lightning_ft.data.collate_labelled import LabelledSegment, collate_labelled
from lightning_ft.data.episode_draw import Draw, refuse_known, refuse_shared, split_classes, without_twins
from lightning_ft.data.frames import Frame
from lightning_ft.data.labelled_rows import LabelledRows, select_labelled, tokenise_labelled
from lightning_ft.data.labels import Asked, Columns, answers_of, asked_of, columns_of
from lightning_ft.data.mixture import mixed
from lightning_ft.data.named_files import Split
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.preview import Piece, pieces_between
from lightning_ft.data.sources import Source, open_source
from lightning_ft.data.text_folders import open_texts
from lightning_ft.data.token_rows import TokenRows
from lightning_ft.engine.episodes import Episode, Rows
from lightning_ft.functional.errors import Refusal

_EVALUATED: tuple[Split, ...] = ("val", "test")


class ClassTexts(PlannedData):
    """The texts of `EpisodeData`, which stores the arguments annotated here and `PlannedData`'s."""

    val_classes: int | list[str]
    test_classes: int | list[str]
    text_column: str | None
    label_column: str | None
    cache_dir: str | None
    _asked: Asked | None
    _dealt: dict[str, list[str]] | None = None
    _first_seed: int | None = None

    @property
    def _seed(self) -> int:
        """As given, else that of ``seed_everything`` at the first use: a later call of it does not deal the classes anew."""
        if self._first_seed is None:
            self._first_seed = super()._seed
        return self._first_seed

    @property
    def reads_no_files(self) -> bool:
        """Whether rows come from elsewhere than from tables."""
        return False

    def side(self, rows: Any, places: np.ndarray, labels: np.ndarray) -> Rows:
        """Rows with the labels of their episode, padded."""
        segments = [
            replace(segment, target=np.asarray(label, dtype=np.int64))
            for segment, label in zip(rows.segments(places), labels.tolist(), strict=True)
        ]
        batch = collate_labelled(segments, packed=False)
        assert batch.targets is not None
        return Rows(batch, batch.targets)

    def texts_of(self, split: Split) -> tuple[Any, list[str]]:
        """The rows of a split, and the names of its classes."""
        of = self._of(split)
        chosen = sorted(self.classes_of()[split])
        asked = self._asks()
        numbers = np.array([asked.names.index(name) for name in chosen])
        kept = []
        for file in self._files(of):
            part = self._select(file)
            assert isinstance(part, LabelledRows)
            kept.append(part.subset(np.flatnonzero(np.isin(part.classes(), numbers))))
        kept = [part for part in kept if len(part)]
        if not kept:
            raise Refusal(
                f"EpisodeData has no rows for {split}: {', '.join(self._files(of))} hold none of its classes."
            )
        return mixed(kept), chosen

    def pools_of(self, split: Split) -> tuple[Any, dict[str, np.ndarray], int]:
        """The rows of a split; class -> places of the different ones; how many another class has too, see `without_twins`."""
        rows, chosen = self.texts_of(split)
        names = self._asks().names
        classes = np.concatenate([part.classes() for part in parts_of(rows)])
        places = {name: np.flatnonzero(classes == names.index(name)) for name in chosen}
        # Alike to the model are texts whose tokens are, once they were cut.
        tokens = (segment.ids.tobytes() for segment in rows.segments(np.arange(len(rows))))
        pools, shared = without_twins(places, list(tokens))
        return rows, pools, shared

    def episode(self, rows: Any, draw: Draw) -> Episode:
        """The texts that were drawn."""
        return Episode(
            self.side(rows, draw.support, draw.support_labels), self.side(rows, draw.query, draw.query_labels)
        )

    def check_tables(self, stage: str | None = None) -> None:
        """Reads the tables that a stage needs and refuses what is wrong with them, however few their classes and rows are."""
        super().check_files(stage)
        self._asks()

    def everything(self) -> tuple[Rows, list[str]]:
        """All rows of ``path`` as one support set, and the names of its classes in the order of their labels."""
        self.check_tables("fit")
        files = self._files("train")
        if len(files) > 1:
            raise Refusal("A support set is one file; put its rows together.")
        rows = self._select(files[0])
        assert isinstance(rows, LabelledRows)
        return self.side(rows, np.arange(len(rows)), rows.classes()), list(self._asks().names)

    def classes_of(self) -> dict[str, set[str]]:
        """The classes of each split, no two of which share one."""
        dealt = split_classes(
            sorted(self._names_in("train")), self.val_classes, self.test_classes, seed=self._seed, owner="EpisodeData"
        )
        found = {name: set(classes) for name, classes in dealt.items()}
        for split in _EVALUATED:
            if self._own(split):
                found[split] = self._names_in(split)
        refuse_shared(found, "EpisodeData")
        return found

    def state_dict(self) -> dict[str, Any]:
        """Also the classes of each split, so that no later run takes one for new that was trained on."""
        if self._dealt is None:
            self._dealt = {split: sorted(classes) for split, classes in self.classes_of().items()}
        return {**super().state_dict(), "classes": self._dealt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also refuses to measure on classes that were trained on, and to train on those that were kept to be measured on.

        Raises:
            Refusal: naming one.
        """
        super().load_state_dict(state_dict)
        known = {split: set(classes) for split, classes in state_dict.get("classes", {}).items()}
        stage = self.trainer.state.fn if self.trainer is not None else None
        if known and stage is not None:
            refuse_known(self.classes_of(), known, stage.value, f"{state_dict.get('seed')}", f"{self._seed}")

    def _own(self, split: Split) -> bool:
        """Whether a split has files of its own."""
        return split != "train" and getattr(self, f"{split}_path") is not None

    def _of(self, split: Split) -> Split:
        """Whose files a split's rows stand in."""
        return split if self._own(split) else "train"

    def _names_in(self, split: Split) -> set[str]:
        """Classes that occur in the files of a split."""
        return set(self._counted(split))

    def _counted(self, split: Split) -> Counter[str]:
        """How many rows of each class there are in the files of a split, alike or not."""
        asked = self._asks()
        found: Counter[str] = Counter()
        for file in self._files(split):
            answers = answers_of(self._source(file), self._columns(file).label, asked)
            numbers, counts = np.unique(answers.values, return_counts=True)
            found.update({asked.names[n]: int(count) for n, count in zip(numbers, counts, strict=True)})
        return found

    def _paths(self, stage: str | None) -> list[str]:
        """All files: that classes are disjoint needs a look at each."""
        if self.reads_no_files:
            return []
        splits: tuple[Split, ...] = ("train", *_EVALUATED)
        given = [split for split in splits if split == "train" or self._own(split)]
        return list(dict.fromkeys(file for split in given for file in self._files(split)))

    def _refuse_overlap(self) -> None:
        """One file for two splits has the same classes in both, which is refused when they are known."""

    def _check(self, source: Source) -> None:
        answers = answers_of(source, self._columns(source.name).label, self._asks())
        if answers.problems and self.bad_rows == "error":
            row = min(answers.problems)
            raise Refusal(f"{source.where(row)}: {answers.problems[row]}")

    def _open(self, path: str) -> Source:
        return open_texts(path) if Path(path).expanduser().is_dir() else open_source(path, any_columns=True)

    def _columns(self, path: str) -> Columns:
        source = self._source(path)
        return columns_of(source, "sequence_classification", self.text_column, None, self.label_column, labelled=True)

    def _asks(self) -> Asked:
        if self._asked is None:
            files = self._paths(None)
            sources, columns = [self._source(file) for file in files], [self._columns(file) for file in files]
            self._asked = asked_of(sources, columns, "sequence_classification", None)
            if self._asked.multi_label:
                raise Refusal("EpisodeData takes rows of one class each, and these have lists of classes.")
        return self._asked

    def _tokenised(self, path: str) -> Dataset:
        return tokenise_labelled(
            self._source(path),
            self.resolve_tokenizer(),
            self._columns(path),
            keep_bad_rows=self.bad_rows == "drop",
            cache_dir=self.cache_dir,
        )

    def _select(self, path: str) -> TokenRows:
        return select_labelled(
            self._tokenised(path),
            self._source(path),
            Frame.of(self.resolve_tokenizer(), pair=False),
            self._asks(),
            answers_of(self._source(path), self._columns(path).label, self._asks()),
            max_length=self.max_length,
            truncation=self.truncation,
            bad_rows=self.bad_rows,
        )

    def _places(self, split: Split) -> Any:
        return super()._places(self._of(split))

    def _pieces(self, segment: Any) -> list[Piece]:
        assert isinstance(segment, LabelledSegment) and segment.target is not None
        shown = self._asks().names[int(segment.target)]
        return [*pieces_between(segment.ids, segment.at, self.resolve_tokenizer()), Piece(f" {shown}", True, 0)]


def parts_of(rows: Any) -> list[LabelledRows]:
    """The rows of each file."""
    return list(rows.parts) if hasattr(rows, "parts") else [rows]


__all__ = ["ClassTexts"]
