"""Tables of texts whose classes are dealt to splits: which rows of a file belong to which, and how some become a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from lightning_ft.data.collate_labelled import LabelledSegment, collate_labelled
from lightning_ft.data.episode_draw import refuse_shared, split_classes
from lightning_ft.data.frames import Frame
from lightning_ft.data.labelled_rows import LabelledRows, select_labelled, tokenise_labelled
from lightning_ft.data.labels import Asked, Columns, answers_of, asked_of, columns_of
from lightning_ft.data.mixture import mixed
from lightning_ft.data.named_files import Split
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.preview import Piece, pieces_between
from lightning_ft.data.sources import Source, open_source
from lightning_ft.data.token_rows import TokenRows
from lightning_ft.engine.episodes import Rows
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
        of: Split = split if self._own(split) else "train"
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

    def _own(self, split: Split) -> bool:
        """Whether a split has files of its own."""
        return split != "train" and getattr(self, f"{split}_path") is not None

    def _names_in(self, split: Split) -> set[str]:
        """Classes that occur in the files of a split."""
        asked = self._asks()
        found: set[str] = set()
        for file in self._files(split):
            answers = answers_of(self._source(file), self._columns(file).label, asked)
            found |= {asked.names[number] for number in np.unique(answers.values).tolist()}
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
        return open_source(path, any_columns=True)

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
        return super()._places(split if self._own(split) else "train")

    def _pieces(self, segment: Any) -> list[Piece]:
        assert isinstance(segment, LabelledSegment) and segment.target is not None
        shown = self._asks().names[int(segment.target)]
        return [*pieces_between(segment.ids, segment.at, self.resolve_tokenizer()), Piece(f" {shown}", True, 0)]


def without_twins(rows: Any, places: np.ndarray) -> np.ndarray:
    """Of texts that are alike to the model the first, so that none stands in support and query."""
    seen: set[bytes] = set()
    kept = []
    for place, segment in zip(places.tolist(), rows.segments(places), strict=True):
        ids = segment.ids.tobytes()
        if ids not in seen:
            seen.add(ids)
            kept.append(place)
    return np.array(kept, dtype=np.int64)


def parts_of(rows: Any) -> list[LabelledRows]:
    """The rows of each file."""
    return list(rows.parts) if hasattr(rows, "parts") else [rows]


__all__ = ["ClassTexts", "parts_of", "without_twins"]
