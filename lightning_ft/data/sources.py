"""Where rows come from: JSONL, JSON, CSV, Parquet, a starter asset or a Hugging Face data set.

A file of JSON is kept as lines of text in one table column and parsed row by row: no two rows need the same keys, and a
typed table would fill the missing ones with nulls, which templates render. Whatever a user can get wrong about a file
is one sentence with the file and the line.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from lightning_ft.data.json_text import read_line, read_list
from lightning_ft.data.rows import Kind, kind_of, wrong_columns
from lightning_ft.functional.errors import Refusal

_TABLES = (".parquet", ".csv", ".tsv")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w\[\]%:+]+))?")
_MAGIC = {
    b"PAR1": "Parquet",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"ARROW1": "Arrow",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    b"%PDF": "PDF",
    b"\xd0\xcf\x11\xe0": "old Excel or Word",
    b"SQLite format 3": "SQLite",
    b"\x89HDF": "HDF5",
}
_BOM = b"\xef\xbb\xbf"
_JSON, _PLACE = "json", "place"


class Located(Protocol):
    """Something whose rows can be named in a sentence."""

    @property
    def name(self) -> str:
        """As the user wrote it."""

    def where(self, row: int) -> str:
        """Where row number ``row`` (from 0) stands."""


@dataclass(frozen=True)
class Source:
    """Rows of one data set, not yet tokenised.

    Attributes:
        name: as the user wrote it.
        table: memory-mapped or in memory; columns ``json`` and ``place`` for JSON, the row's own ones otherwise.
        key: hash of the content.
        unit: what ``place`` counts from 1: line or row.
    """

    name: str
    table: Dataset
    key: str
    unit: str

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def first(self) -> dict[str, Any]:
        """The first row."""
        return self.batch(self.table[:1])[0] if len(self) else {}

    @cached_property
    def columns(self) -> list[str]:
        """The columns of the first row, which all others share."""
        return list(self.first) if self._is_json else list(self.table.column_names)

    @cached_property
    def kind(self) -> Kind:
        """What a language model learns from the rows, told by their columns.

        Raises:
            Refusal: nothing, since they have other columns.
        """
        kind = kind_of(self.columns)
        if kind is None:
            other = next((mark for mark in (";", "\t", "|", ",") if any(mark in name for name in self.columns)), None)
            if other is not None and len(self.columns) == 1 and not self._is_json:
                raise Refusal(
                    f"{self.name}: found the one header {self.columns[0]!r}, which seems to be split by {other!r}: a .csv "
                    "is split by commas, a .tsv by tabs."
                )
            raise wrong_columns(self.where(0) if self._is_json else self.name, self.columns)
        return kind

    def where(self, row: int) -> str:
        """Where row number ``row`` (from 0) stands, for a sentence."""
        place = self.table[row][_PLACE] if self._is_json else row + 1
        return f"{self.name}, {self.unit} {place}"

    def batch(self, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """The rows of a slice of ``table``, which ``Dataset.map`` passes as columns."""
        if self._is_json:
            return [json.loads(line) for line in columns[_JSON]]
        names = list(columns)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def column(self, name: str) -> list[Any]:
        """The values of one column, None where a row has none."""
        if not self._is_json:
            return list(self.table[name]) if name in self.table.column_names else [None] * len(self)
        return [row.get(name) for row in self.rows()]

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, one after the other."""
        for begin in range(0, len(self.table), 1000):
            yield from self.batch(self.table[begin : begin + 1000])

    @property
    def _is_json(self) -> bool:
        return self.table.column_names == [_JSON, _PLACE]


def open_source(path: str, *, any_columns: bool = False) -> Source:
    """Reads a data set and proves that every row can be read.

    Args:
        path: a file (JSON lines or a JSON list whatever its suffix; ``.parquet``, ``.csv``, ``.tsv``),
            ``starter:vader/train`` or ``starter:vader/test``, or a Hugging Face id ``owner/name[/config][:split]``.
        any_columns: for readers that know what their columns are; else they have to be of a known kind.

    Raises:
        Refusal: missing, empty, malformed, binary or wrongly encoded file; wrong columns; unknown or unreachable data
        set.
    """
    source = _open(path)
    if not any_columns:
        _ = source.kind
    if len(source) == 0:
        raise Refusal(f"{path} has no rows.")
    return source


def _open(path: str) -> Source:
    if path.startswith("starter:"):
        return _starter(path)
    file, exists = find_file(path)
    if not exists:
        if (hub := _HUB.fullmatch(path)) and file.suffix.lower() not in (*_TABLES, ".json", ".jsonl", ".txt", ".gz"):
            return _hub(path, hub)
        raise missing_file(path, file)
    try:
        suffix = file.suffix.lower()
        with open(file, "rb") as handle:
            refuse_magic(path, suffix, handle.read(64))
        return _table(path, file) if suffix in _TABLES else _json(path, file)
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror or error}.") from error
    except RecursionError:
        raise Refusal(f"{path} cannot be read: a row is nested too deeply.") from None


def find_file(path: str) -> tuple[Path, bool]:
    """The file of this name, and whether it is there.

    Raises:
        Refusal: an empty name, a folder, a pipe or a device, an empty file, a broken link, a file that may not be seen.
    """
    if not path.strip():
        raise Refusal("The name of the data file is empty; give a file, starter:NAME or a Hugging Face id.")
    try:
        file = Path(path).expanduser()
        found = file.stat() if file.exists() or file.is_symlink() else None
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a loop, no such home, a name that cannot be
        if _is_broken_link(error):
            raise Refusal(f"{path} is a symbolic link that leads nowhere.") from error
        reason = getattr(error, "strerror", None) or error
        raise Refusal(f"{path[:200]!r} cannot be read as a data file: {reason}.") from error
    if found is None:
        return file, False
    if stat.S_ISDIR(found.st_mode):
        raise Refusal(f"{path} is a folder, not a data file{_listing(file)}.")
    if not stat.S_ISREG(found.st_mode):
        raise Refusal(f"{path} is a pipe or a device, not a data file: write its rows to a file first.")
    if found.st_size == 0:
        raise Refusal(f"{path} is empty.")
    return file, True


def _is_broken_link(error: Exception) -> bool:
    """Whether a path is a symbolic link without an end (or, from ``stat``, without a target)."""
    return isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENOENT)


def refuse_magic(path: str, suffix: str, head: bytes) -> None:
    """Refuses a file whose first bytes are those of another format than its name says."""
    kind = suffix.removeprefix(".") if suffix in _TABLES else "JSON lines"
    for magic, name in _MAGIC.items():
        if head.startswith(magic) and name.lower() != kind:
            advice = "name it with the suffix .parquet" if name == "Parquet" else "unpack or convert it first"
            raise Refusal(f"{path} is {name} data, not {kind}: {advice}.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Refusal(f"{path} is UTF-16 (byte-order mark at byte 0), not UTF-8: save it as UTF-8.")
    if kind != "JSON lines" and head.removeprefix(_BOM).lstrip()[:1] in (b"{", b"["):
        raise Refusal(f"{path} is JSON, not {kind}: name it with the suffix .jsonl.")


def from_rows(name: str, rows: Sequence[dict[str, Any]], unit: str = "row") -> Source:
    """A source of rows that are already in memory."""
    if not rows:
        raise Refusal(f"{name} has no rows.")
    lines = [json.dumps(row) for row in rows]  # in ASCII: a table cannot hold halves of characters
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    source = _source_of_lines(name, lines, list(range(1, len(lines) + 1)), key, unit)
    _ = source.kind
    return source


def _source_of_lines(name: str, lines: list[str], places: list[int], key: str, unit: str) -> Source:
    schema = pa.schema([(_JSON, pa.large_string()), (_PLACE, pa.int64())])
    return Source(name, Dataset(pa.table([lines, places], schema=schema)), key, unit)


def _json(path: str, file: Path) -> Source:
    with open(file, "rb") as handle:
        head = handle.read(4096)
        if (zero := head.find(b"\0")) >= 0:
            raise Refusal(f"{path} is a binary file (zero at byte {zero}), or not UTF-8; rows are JSON lines in UTF-8.")
        handle.seek(len(_BOM) if head.startswith(_BOM) else 0)
        if head.removeprefix(_BOM).lstrip()[:1] == b"[":
            lines, places, digest = *read_list(path, handle.read(), handle.tell()), digest_of(file)
            return _source_of_lines(path, lines, places, digest, "row")
        lines, places, digest = _json_lines(path, handle)
    if not lines:
        raise Refusal(f"{path} has no rows, only white space.")
    return _source_of_lines(path, lines, places, digest, "line")


def _json_lines(path: str, handle: Any) -> tuple[list[str], list[int], str]:
    lines, places, digest, offset = [], [], hashlib.sha256(), handle.tell()
    for number, raw in enumerate(handle, 1):
        digest.update(raw)
        read = read_line(path, number, raw, offset)
        offset += len(raw)
        if read is not None:
            lines.append(read[0])
            places.append(number)
    return lines, places, digest.hexdigest()


def _table(path: str, file: Path) -> Source:
    from pyarrow import csv, parquet  # type: ignore[import-untyped]

    kind = file.suffix.lower().removeprefix(".")
    try:
        if kind == "parquet":
            _refuse_alike(path, parquet.read_schema(file).names)
            table = parquet.read_table(file, memory_map=True)
        else:
            # Strings stay strings: a completion of "1" is text, and "null" is a word. One thread, which counts rows.
            parsing = csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True)
            reading = csv.ReadOptions(use_threads=False)
            names = csv.open_csv(file, read_options=reading, parse_options=parsing).schema.names
            _refuse_alike(path, names)
            convert = csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
            table = csv.read_csv(file, read_options=reading, parse_options=parsing, convert_options=convert)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise Refusal(f"{path} cannot be read as {kind}: {_table_problem(str(error), kind)}") from error
    return Source(path, Dataset(table), digest_of(file), "row")


def _refuse_alike(path: str, names: list[str]) -> None:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise Refusal(f"{path} has two columns called {twice[0]!r}: rename one.")


def _table_problem(problem: str, kind: str) -> str:
    if "UTF8" in problem or "utf-8" in problem:
        return "it is not UTF-8; save the file as UTF-8."
    first = problem.splitlines()[0].rstrip(".")
    if kind != "parquet" and "Expected" in first:
        first += "; a value that holds the delimiter, a quote or a line break goes into double quotes"
    return f"{first}."


def digest_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _starter(path: str) -> Source:
    splits: dict[str, Literal["train", "test"]] = {"starter:vader/train": "train", "starter:vader/test": "test"}
    if path not in splits:
        raise Refusal(f"There is no starter data set {path!r}: choose starter:vader/train or starter:vader/test.")
    from lightning_ft.data.vader import vader_rows

    return from_rows(path, vader_rows(splits[path]))


def missing_file(path: str, file: Path) -> Refusal:
    """The refusal for a file that is not there."""
    folder = file.parent
    if "://" in path:
        return Refusal(f"{path} is an address, not a file: download it and name the file.")
    if any(character in path for character in "*?["):
        return Refusal(f"There is no data file {path}: patterns are not expanded, so name one file.")
    if not folder.is_dir():
        return Refusal(f"There is no data file {path}: its folder {folder} does not exist.")
    near = difflib.get_close_matches(file.name, _names_in(folder), n=3, cutoff=0.5)
    hint = f"; the nearest in that folder: {', '.join(near)}." if near else "."
    return Refusal(f"There is no data file {path}{hint}")


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # a folder that may be entered but not read
        return []


def _listing(folder: Path) -> str:
    files = sorted(name for name in _names_in(folder) if Path(name).suffix.lower() in (".json", ".jsonl", *_TABLES))
    return f"; it holds {', '.join(files[:5])}" if files else ""


def _hub(path: str, hub: re.Match[str]) -> Source:
    """A data set of the hub: from its cache when offline, and never waiting for a network that is not there."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    offline = f"{path} is neither a file nor a data set that can be fetched"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=3)
        except Exception as error:  # whatever the http library raises: name resolution, proxy, time out ...
            raise Refusal(f"{offline}: {constants.ENDPOINT} cannot be reached; give a local file.") from error
    try:
        table = datasets.load_dataset(hub["repo"], hub["config"], split=hub["split"] or "train")
    except Exception as error:  # a hub raises many kinds, all of which mean: not this name, not now
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set and the cache does not hold it"
        raise Refusal(f"{offline}: {reason}; give a local file or another id.") from error
    return Source(path, table, hashlib.sha256(f"{path}|{table._fingerprint}".encode()).hexdigest(), "row")
