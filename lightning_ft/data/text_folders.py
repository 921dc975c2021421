"""A folder with one folder of text files for each class, read as a table of text and label."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from lightning_ft.data.class_folders import IMAGES, TENSORS, class_files, classes_in
from lightning_ft.data.sources import Source
from lightning_ft.functional.errors import Refusal

TEXTS = (".txt",)


@dataclass(frozen=True)
class TextFolder(Source):
    """The texts of a folder, whose rows are files.

    Attributes:
        files: of each row.
    """

    files: tuple[Path, ...] = ()

    def where(self, row: int) -> str:
        """The file that row number ``row`` (from 0) is."""
        return str(self.files[row])


def holds_texts(folder: Path) -> bool:
    """Whether a folder's classes are of texts: where there are images or tensors, a text beside them describes them."""
    return bool(class_files(folder, TEXTS)) and not class_files(folder, (*IMAGES, *TENSORS))


def open_texts(path: str) -> TextFolder:
    """Reads a folder of classes of texts.

    Raises:
        Refusal: fewer than two classes, or a file that is not UTF-8.
    """
    classes = classes_in(Path(path).expanduser(), TEXTS, "texts")
    files = tuple(file for found in classes.values() for file in found)
    labels = [name for name, found in classes.items() for _ in found]
    texts = [_text(file) for file in files]
    table = pa.table({"text": pa.array(texts, pa.large_string()), "label": pa.array(labels, pa.string())})
    key = hashlib.sha256(repr(list(zip(labels, texts, strict=True))).encode()).hexdigest()
    return TextFolder(path, Dataset(table), key, "file", files)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Refusal(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise Refusal(f"{file} cannot be read: {error.strerror or error}.") from error


__all__ = ["TextFolder", "holds_texts", "open_texts"]
