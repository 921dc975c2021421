"""Where rows come from: JSONL, JSON, CSV, Parquet, a starter asset or a Hugging Face data set.

A file of JSON is kept as lines of text in one table column and parsed row by row: no two rows need the same keys, and a
typed table would fill the missing ones with nulls, which templates render. Whatever a user can get wrong about a file
is one sentence with the file and the line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

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
}
_JSON, _PLACE = "json", "place"


@dataclass(frozen=True)
class Source:
    """Rows of one data set, not yet tokenised.

    Attributes:
        name: as the user wrote it.
        table: memory-mapped or in memory; columns ``json`` and ``place`` for JSON, the row's own ones otherwise.
        key: hash of the content.
        kind: of all rows, by the columns of the first.
        unit: what ``place`` counts from 1: line or row.
    """

    name: str
    table: Dataset
    key: str
    kind: Kind
    unit: str

    def __len__(self) -> int:
        return len(self.table)

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

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, one after the other."""
        for begin in range(0, len(self.table), 1000):
            yield from self.batch(self.table[begin : begin + 1000])

    @property
    def _is_json(self) -> bool:
        return self.table.column_names == [_JSON, _PLACE]


def open_source(path: str) -> Source:
    """Reads a data set and proves that every row can be read.

    Args:
        path: a file (JSON lines or a JSON list whatever its suffix; ``.parquet``, ``.csv``, ``.tsv``),
            ``starter:vader/train`` or ``starter:vader/test``, or a Hugging Face id ``owner/name[/config][:split]``.

    Raises:
        Refusal: missing, empty, malformed, binary or wrongly encoded file; wrong columns; unknown or unreachable data
        set.
    """
    if path.startswith("starter:"):
        return _starter(path)
    file = Path(path).expanduser()
    if file.is_dir():
        raise Refusal(f"{path} is a folder, not a data file{_listing(file)}.")
    if not file.exists():
        if (hub := _HUB.fullmatch(path)) and file.suffix.lower() not in (*_TABLES, ".json", ".jsonl", ".txt", ".gz"):
            return _hub(path, hub)
        raise _missing(path, file)
    if file.stat().st_size == 0:
        raise Refusal(f"{path} is empty.")
    try:
        return _table(path, file) if file.suffix.lower() in _TABLES else _json(path, file)
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror or error}.") from error


def from_rows(name: str, rows: Sequence[dict[str, Any]], unit: str = "row") -> Source:
    """A source of rows that are already in memory."""
    if not rows:
        raise Refusal(f"{name} has no rows.")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    key = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    return _source_of_lines(name, lines, list(range(1, len(lines) + 1)), key, unit)


def _source_of_lines(name: str, lines: list[str], places: list[int], key: str, unit: str) -> Source:
    first = json.loads(lines[0])
    kind = kind_of(first)
    if kind is None:
        raise wrong_columns(f"{name}, {unit} {places[0]}", first)
    schema = pa.schema([(_JSON, pa.large_string()), (_PLACE, pa.int64())])
    return Source(name, Dataset(pa.table([lines, places], schema=schema)), key, kind, unit)


def _json(path: str, file: Path) -> Source:
    with open(file, "rb") as handle:
        head = handle.read(4096)
        for magic, name in _MAGIC.items():
            if head.startswith(magic):
                advice = "name it with the suffix .parquet" if name == "Parquet" else "unpack or convert it first"
                raise Refusal(f"{path} is {name} data, not JSON lines: {advice}.")
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise Refusal(f"{path} is UTF-16 (byte-order mark at byte 0), not UTF-8: save it as UTF-8.")
        if (zero := head.find(b"\0")) >= 0:
            raise Refusal(f"{path} is a binary file (zero at byte {zero}), not JSON lines.")
        handle.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            lines, places, digest = *_json_list(path, handle.read(), handle.tell()), _digest(file)
            return _source_of_lines(path, lines, places, digest, "row")
        lines, places, digest = _json_lines(path, handle)
    if not lines:
        raise Refusal(f"{path} has no rows, only white space.")
    return _source_of_lines(path, lines, places, digest, "line")


def _json_lines(path: str, handle: Any) -> tuple[list[str], list[int], str]:
    lines, places, digest, offset = [], [], hashlib.sha256(), handle.tell()
    for number, raw in enumerate(handle, 1):
        digest.update(raw)
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}, line {number}", offset + error.start, raw[error.start]) from error
        offset += len(raw)
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip())
        except (json.JSONDecodeError, RecursionError) as error:
            raise Refusal(f"{path}, line {number} is not valid JSON: {_json_problem(error)}.") from error
        if not isinstance(value, dict):
            raise Refusal(f"{path}, line {number} is not an object with columns, found {line.strip()[:40]!r}.")
        lines.append(line.strip())
        places.append(number)
    return lines, places, digest.hexdigest()


def _json_list(path: str, raw: bytes, end: int) -> tuple[list[str], list[int]]:
    try:
        values = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, end - len(raw) + error.start, raw[error.start]) from error
    except (json.JSONDecodeError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Refusal(f"{path}{line} is not valid JSON: {_json_problem(error)}.") from error
    if not values:
        raise Refusal(f"{path} is an empty list.")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise Refusal(f"{path}, row {number} is not an object with columns, found {json.dumps(value)[:40]}.")
    return [json.dumps(value, ensure_ascii=False) for value in values], list(range(1, len(values) + 1))


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "it is nested too deeply"


def _not_utf8(where: str, offset: int, byte: int) -> Refusal:
    return Refusal(f"{where} is not UTF-8: byte 0x{byte:02x} at offset {offset}; save the file as UTF-8.")


def _table(path: str, file: Path) -> Source:
    from pyarrow import csv, parquet  # type: ignore[import-untyped]

    try:
        if file.suffix.lower() == ".parquet":
            table = parquet.read_table(file, memory_map=True)
        else:
            # Strings stay strings: a completion of "1" is text, and "null" is a word.
            parse = csv.ParseOptions(delimiter="\t" if file.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
            names = csv.open_csv(file, parse_options=parse).schema.names
            convert = csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
            table = csv.read_csv(file, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        kind = file.suffix.lower().removeprefix(".")
        raise Refusal(f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}") from error
    return _typed(path, Dataset(table), _digest(file))


def _typed(name: str, table: Dataset, key: str) -> Source:
    if len(table) == 0:
        raise Refusal(f"{name} has no rows.")
    kind = kind_of(table.column_names)
    if kind is None:
        raise wrong_columns(name, table.column_names)
    return Source(name, table, key, kind, "row")


def _digest(file: Path) -> str:
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


def _missing(path: str, file: Path) -> Refusal:
    folder = file.parent
    if not folder.is_dir():
        return Refusal(f"There is no data file {path}: its folder {folder} does not exist.")
    near = difflib.get_close_matches(file.name, os.listdir(folder), n=3, cutoff=0.5)
    hint = f"; the nearest in that folder: {', '.join(near)}." if near else "."
    return Refusal(f"There is no data file {path}{hint}")


def _listing(folder: Path) -> str:
    files = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in (".json", ".jsonl", *_TABLES))
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
    return _typed(path, table, hashlib.sha256(f"{path}|{table._fingerprint}".encode()).hexdigest())
