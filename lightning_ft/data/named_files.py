"""Which files a data module reads for which split: what a user named, patterns expanded, each opened once."""

import hashlib
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from lightning_ft.data.mixture import Entry, Files, WeightedFiles, entries_of, places_of, refuse_overlap
from lightning_ft.data.sources import Located, Source, open_source
from lightning_ft.functional.errors import Refusal

Split = Literal["train", "val", "test", "predict"]


class NamedFiles(LightningDataModule):
    """The files of a data module; a subclass stores the arguments annotated here."""

    path: WeightedFiles
    val_path: Files | None
    val_fraction: float
    test_path: Files | None
    predict_path: Files | None
    epoch_rows: int | None = None
    streaming: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[str, Source] = {}
        self._entries: dict[str, tuple[Entry, ...]] = {}

    def _open(self, path: str) -> Source:
        """The rows of a file, refused where their columns are of no known kind."""
        return open_source(path)

    def _paths(self, stage: str | None) -> list[str]:
        """All files that a stage reads, each once."""
        return list(dict.fromkeys(file for split in self._splits(stage) for file in self._files(split)))

    def _splits(self, stage: str | None) -> list[Split]:
        """What a stage reads."""
        splits: list[Split] = ["train"] if stage in ("fit", None) and not self.streaming else []
        if stage in ("fit", "validate", None) and (self.val_fraction > 0 or self.val_path is not None):
            splits.append("val")
        return splits + [split for split in ("test", "predict") if stage in (split, None) and self._names(split)]

    def _names(self, split: Literal["test", "predict"]) -> bool:
        """Whether there are files for it."""
        return (self.test_path if split == "test" else self.predict_path or self.test_path) is not None

    def _files(self, split: Split) -> list[str]:
        return [file for entry in self._entries_of(split) for file in entry.files]

    def _entries_of(self, split: Split) -> tuple[Entry, ...]:
        """What the user named for a split, patterns expanded once: files that appear during a run do not join it."""
        arguments: dict[Split, str] = {
            "train": "path",
            "val": "val_path" if self.val_path is not None else "path",
            "test": "test_path",
            "predict": "predict_path" if self.predict_path is not None else "test_path",
        }
        argument, name = arguments[split], type(self).__name__
        if argument not in self._entries:
            given = getattr(self, argument)
            if given is None:
                raise Refusal(f"{name} has no rows for {split}: set {name}.{split}_path.")
            self._entries[argument] = entries_of(given, f"{name}.{argument}")
        return self._entries[argument]

    def _refuse_overlap(self) -> None:
        if self.val_path is not None:
            refuse_overlap(self._files("train"), self._files("val"), type(self).__name__)

    def _content(self) -> dict[str, Any]:
        """What says in a checkpoint which rows there are, and how often each comes."""
        files = [[self._source(file).key for file in entry.files] for entry in self._entries_of("train")]
        keys = [key for entry in files for key in entry]
        content = keys[0] if len(keys) == 1 else hashlib.sha256(repr(files).encode()).hexdigest()
        weights = [entry.weight for entry in self._entries_of("train")] if isinstance(self.path, dict) else None
        return {"content": content, "weights": weights, "epoch_rows": self.epoch_rows}

    def _places(self, split: Split) -> Located:
        return places_of([self._source(file) for file in self._files(split)])

    def _source(self, path: str) -> Source:
        if path not in self._sources:
            self._sources[path] = self._open(path)
        return self._sources[path]
