"""Everything that people hand to a fine-tuning tool by mistake, in one table: a sentence with its place, or right handling.

A case of `FILES` is a file, and what must be said of it (a regular expression) or the rows that must come of it. Rows are
in test_broken_rows.py.
"""

import gzip
import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from lightning_ft import SFTData
from lightning_ft.data.sources import from_rows, open_source
from lightning_ft.data.token_rows import select
from lightning_ft.data.tokenise import tokenise
from lightning_ft.functional.errors import Refusal
from tests.cli.conftest import call
from tests.data.tiny_tokenizers import tiny_tokenizer

PAIR = {"prompt": "hello", "completion": " yes"}
TEXT = {"text": "hello world"}
LINE = json.dumps(PAIR).encode() + b"\n"
WIDE = '{"text": "wörld"}\n'


def turns(*said: str, roles: str = "ua") -> dict[str, Any]:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return {"messages": [{"role": names[role], "content": text} for role, text in zip(roles, said, strict=True)]}


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, LINE)
    return buffer.getvalue()


def as_parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def two_columns_alike() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), buffer)
    return buffer.getvalue()


FILES: list[tuple[str, str, bytes | Callable[[], bytes], str | list[dict[str, Any]]]] = [
    # encodings
    ("utf-16", "a.jsonl", WIDE.encode("utf-16"), "is UTF-16 .byte-order mark at byte 0.*save it as UTF-8"),
    ("utf-16 without a mark", "a.jsonl", WIDE.encode("utf-16-le"), "is a binary file .zero at byte 1., or not UTF-8"),
    ("utf-32", "a.jsonl", WIDE.encode("utf-32"), "not UTF-8"),
    ("latin-1", "a.jsonl", WIDE.encode("latin-1"), "line 1 is not UTF-8: byte 0xf6 at offset 11; save"),
    (
        "a byte in the middle",
        "a.jsonl",
        LINE * 9 + b'{"text": "\xff"}',
        f"line 10 is not UTF-8: byte 0xff at offset {len(LINE) * 9 + 10}",
    ),
    ("latin-1 in a list", "a.json", b'[{"text": "\xf6"}]', "is not UTF-8: byte 0xf6 at offset 11"),
    ("latin-1 csv", "a.csv", "text\nwörld\n".encode("latin-1"), "cannot be read as csv: it is not UTF-8"),
    ("utf-16 csv", "a.csv", "text\nwörld\n".encode("utf-16"), "is UTF-16"),
    ("byte-order mark", "a.jsonl", WIDE.encode("utf-8-sig"), [{"text": "wörld"}]),
    ("byte-order marks of joined files", "a.jsonl", WIDE.encode("utf-8-sig") * 2, [{"text": "wörld"}] * 2),
    ("byte-order mark before a list", "a.json", '[{"text": "ö"}]'.encode("utf-8-sig"), [{"text": "ö"}]),
    ("byte-order mark of a csv", "a.csv", "text\nö\n".encode("utf-8-sig"), [{"text": "ö"}]),
    ("only a byte-order mark", "a.jsonl", b"\xef\xbb\xbf", "no rows, only white space"),
    ("zeros", "a.jsonl", LINE + b"\0\0\0\n", "is a binary file .zero at byte"),
    ("zeros after a block", "a.jsonl", LINE * 200 + b"\0\0\0\n", "line 201 is not valid JSON"),
    (
        "line separators inside strings",
        "a.jsonl",
        '{"text": "a\u2028b\x0b"}\n'.encode().replace(b"\x0b", b"\\u000b"),
        [{"text": "a\u2028b\x0b"}],
    ),
    # JSON
    ("half an object", "a.jsonl", LINE + LINE[:20], "line 2 is not valid JSON: .*a row that goes on or was cut short"),
    (
        "an object over several lines",
        "a.jsonl",
        json.dumps(PAIR, indent=1).encode(),
        "line 1 is not valid JSON: .*each line holds one whole object",
    ),
    (
        "two objects on a line",
        "a.jsonl",
        LINE.strip() * 2,
        f"line 1 is not valid JSON: Extra data at column {len(LINE)}, several rows on one line",
    ),
    ("old line ends", "a.jsonl", (LINE * 2).replace(b"\n", b"\r"), "Extra data at column .*several rows on one line"),
    ("trailing comma", "a.jsonl", b'{"text": "a",}\n', "line 1 is not valid JSON"),
    ("commas between lines", "a.jsonl", LINE.strip() + b",\n" + LINE, "line 1 is not valid JSON: Extra data"),
    ("single quotes", "a.jsonl", b"{'text': 'a'}\n", "line 1 is not valid JSON: .*single quotes"),
    (
        "a key twice",
        "a.jsonl",
        LINE + b'{"text": "a", "text": "b"}',
        "line 2 is not valid JSON: the key 'text' is given twice",
    ),
    (
        "a key twice in a message",
        "a.json",
        b'[{"messages": [{"role": "user", "role": "assistant"}]}]',
        "the key 'role' is given twice",
    ),
    (
        "deep",
        "a.jsonl",
        LINE + b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "line 2 is not valid JSON: it is nested too deeply",
    ),
    ("deep list", "a.json", b'[{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]", "nested too deeply"),
    (
        "a number of ten thousand digits",
        "a.jsonl",
        b'{"text": ' + b"9" * 10_000 + b"}",
        "line 1 is not valid JSON: a number is too long",
    ),
    (
        "not a number, unused",
        "a.jsonl",
        b'{"text": "a", "score": NaN, "top": -Infinity}\n',
        [{"text": "a", "score": math.nan, "top": -math.inf}],
    ),
    (
        "windows line ends and empty lines",
        "a.jsonl",
        LINE.strip() + b"\r\n\r\n \n" + LINE.strip() + b"\r\n",
        [PAIR, PAIR],
    ),
    ("no last line end", "a.jsonl", LINE + LINE.strip(), [PAIR, PAIR]),
    ("a list in jsonl", "a.jsonl", json.dumps([PAIR, PAIR], indent=2).encode(), [PAIR, PAIR]),
    ("lines in json", "a.json", LINE * 2, [PAIR, PAIR]),
    ("a list a line", "a.jsonl", b'["hello", "yes"]\n["a", "b"]\n', "line 2 is not valid JSON: Extra data"),
    ("a list of lists", "a.json", b'[["hello", "yes"]]', "row 1 is not an object with columns"),
    (
        "a list in an object",
        "a.json",
        json.dumps({"data": [PAIR]}).encode(),
        "line 1: found the columns data, expected messages",
    ),
    ("a string", "a.json", b'"hello"', "line 1 is not an object with columns"),
    ("a web page", "a.jsonl", b"<!DOCTYPE html>\n<html>", "line 1 is not valid JSON"),
    ("a merge conflict", "a.jsonl", LINE + b"<<<<<<< HEAD\n" + LINE, "line 2 is not valid JSON"),
    (
        "a pointer of git lfs",
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "line 1 is not valid JSON",
    ),
    # other formats under this name
    ("gzip", "a.jsonl", gzip.compress(LINE), "is gzip data, not JSON lines: unpack or convert"),
    ("gzip as csv", "a.csv", gzip.compress(b"text\na\n"), "is gzip data, not csv"),
    ("zip", "a.jsonl", zipped("a.jsonl"), "is zip data, not JSON lines"),
    ("xlsx as csv", "a.csv", zipped("xl/workbook.xml"), "is zip data, not csv: unpack or convert it first"),
    ("pdf", "a.txt", b"%PDF-1.7\n%\xe2\xe3", "is PDF data, not JSON lines"),
    (
        "parquet as jsonl",
        "a.jsonl",
        lambda: as_parquet(text=["a"]),
        "is Parquet data, not JSON lines: name it with the suffix .parquet",
    ),
    (
        "parquet as csv",
        "a.csv",
        lambda: as_parquet(text=["a"]),
        "is Parquet data, not csv: name it with the suffix .parquet",
    ),
    ("jsonl as parquet", "a.parquet", LINE, "is JSON, not parquet: name it with the suffix .jsonl"),
    ("jsonl as csv", "a.csv", LINE, "is JSON, not csv: name it with the suffix .jsonl"),
    ("half a parquet", "a.parquet", lambda: as_parquet(text=["a"] * 99)[:-20], "cannot be read as parquet"),
    # tables
    (
        "semicolons",
        "a.csv",
        b"prompt;completion\na;b\n",
        "the one header 'prompt;completion', which seems to be split by ';'",
    ),
    (
        "tabs in a csv",
        "a.csv",
        b"prompt\tcompletion\na\tb\n",
        r"split by '\\t': a .csv is split by commas, a .tsv by tabs",
    ),
    ("commas in a tsv", "a.tsv", b"prompt,completion\na,b\n", "split by ','"),
    ("ragged", "a.csv", b"prompt,completion\na,b\nc\n", "cannot be read as csv: .*Expected 2 columns, got 1"),
    (
        "unquoted comma",
        "a.csv",
        b"prompt,completion\na,b, c\n",
        "Row #2.*Expected 2 columns, got 3.*goes into double quotes",
    ),
    ("open quote", "a.csv", b'prompt,completion\n"a,b\nc,d\n', "cannot be read as csv"),
    ("empty header", "a.csv", b",completion\na,b\n", "found the columns , completion, expected messages"),
    ("a header twice", "a.csv", b"prompt,completion,completion\na,b,c\n", "two columns called 'completion'"),
    ("a column twice in parquet", "a.parquet", two_columns_alike, "two columns called 'text'"),
    ("only a header", "a.csv", b"prompt,completion\n", "has no rows"),
    ("no header", "a.csv", b"hello,yes\na,b\n", "found the columns hello, yes, expected messages"),
    (
        "quoted line breaks and commas",
        "a.csv",
        b'prompt,completion\r\n"a\n""b"", c",null\r\n',
        [{"prompt": 'a\n"b", c', "completion": "null"}],
    ),
    ("empty parquet", "a.parquet", lambda: as_parquet(text=pa.array([], pa.string())), "has no rows"),
    # columns
    ("empty", "a.jsonl", b"", "a.jsonl is empty"),
    ("white space", "a.jsonl", b" \n\t\n", "no rows, only white space"),
    ("an empty list", "a.json", b"[]", "is an empty list"),
    ("an empty object", "a.jsonl", b"{}\n", "line 1: found the columns none, expected messages"),
    ("a near column", "a.jsonl", b'{"mesages": []}', "is 'mesages' meant to be 'messages'?"),
    (
        "a column in capitals",
        "a.csv",
        b"Prompt, COMPLETION\na,b\n",
        "is ' COMPLETION' meant to be 'completion'.*is 'Prompt' meant to be 'prompt'",
    ),
    (
        "prompt alone",
        "a.jsonl",
        b'{"prompt": "a"}',
        "found the columns prompt, expected messages . prompt . completion",
    ),
    ("question and answer", "a.jsonl", b'{"question": "a", "answer": "b"}', "found the columns answer, question"),
]


def written(folder: Path, name: str, content: bytes | Callable[[], bytes]) -> str:
    file = folder / name
    file.write_bytes(content() if callable(content) else content)
    return str(file)


def said(caught: pytest.ExceptionInfo[Refusal]) -> str:
    """The sentence: one line, not longer than people read."""
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and text.strip()[-1] in ".?", text
    return text


@pytest.mark.parametrize("name, content, wanted", [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_files(tmp_path: Path, name: str, content: bytes, wanted: str | list[dict[str, Any]]) -> None:
    file = written(tmp_path, name, content)
    if isinstance(wanted, list):
        assert repr(list(open_source(file).rows())) == repr(wanted)  # NaN equals itself in a repr
        return
    with pytest.raises(Refusal, match=wanted) as caught:
        open_source(file)
    assert said(caught).startswith(file)


def test_there_are_enough_of_them() -> None:
    assert len({case[0] for case in FILES}) == len(FILES) >= 60


def test_long_rows(tmp_path: Path) -> None:
    long = {"text": "hello " * (10_000_000 // 6)}
    source = open_source(written(tmp_path, "a.jsonl", json.dumps(long).encode()))
    assert len(next(source.rows())["text"]) > 9_999_990
    source = open_source(written(tmp_path, "a.jsonl", json.dumps({"text": "hello " * 200_000}).encode()))
    table = tokenise(source, tiny_tokenizer(), cache_dir=tmp_path / "cache")
    with pytest.raises(Refusal, match=r"a.jsonl, line 1 has \d{6} tokens, more than max_length 1024") as caught:
        select(table, source, max_length=1024)
    assert len(said(caught)) < 400


# sizes ----------------------------------------------------------------------------------------------------------------


def test_a_maximal_length_below_the_prompt(tmp_path: Path) -> None:
    source, tokenizer = from_rows("mine", [PAIR, {"prompt": "hello" * 9, "completion": " yes"}]), tiny_tokenizer()
    table = tokenise(source, tokenizer, cache_dir=tmp_path)
    with pytest.raises(Refusal, match="mine, row 2 has 11 tokens, more than max_length 8, as have 1 of 2 rows"):
        select(table, source, max_length=8)
    with pytest.raises(Refusal, match="mine, row 2: truncation to max_length 8 .keep_start. leaves no token to learn"):
        select(table, source, max_length=8, truncation="keep_start")
    assert select(table, source, max_length=8, truncation="keep_end").lengths.tolist()[1] == 8
    with pytest.raises(Refusal, match="no row is left to use"):
        select(table, source, max_length=2, truncation="drop")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "SFTData.batch_size must be at least 1, got 0"),
        ({"batch_size": -4}, "batch_size must be at least 1, got -4"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"batch_size": "8"}, "batch_size must be a number, got '8'"),
        ({"batch_size": True}, "batch_size must be a number, got True"),
        ({"max_length": -1}, "max_length must be at least 2, got -1"),
        ({"max_length": 0}, "max_length must be at least 2, got 0"),
        ({"max_tokens": 1}, "max_tokens must be greater than 1, got 1"),
        ({"val_fraction": 1}, "val_fraction must be less than 1, got 1"),
        ({"val_fraction": -0.1}, "val_fraction must be at least 0, got -0.1"),
        ({"val_fraction": math.nan}, "val_fraction must be .*, got nan"),
        ({"val_fraction": 0.1, "val_path": "b"}, "both name validation rows"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"loss_on": "answers"}, "loss_on must be one of 'auto', 'assistant'"),
        ({"truncation": True}, "truncation must be one of 'error'"),
        ({"max_tokens": 64, "packing": False}, "max_tokens fills packed rows"),
    ],
)
def test_sizes(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(Refusal, match=match) as caught:
        SFTData("a.jsonl", **arguments)
    assert "None" not in said(caught)


# places ---------------------------------------------------------------------------------------------------------------


def refused_path(path: str, match: str) -> None:
    with pytest.raises(Refusal, match=match) as caught:
        open_source(path)
    said(caught)


def test_places(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", LINE)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / "good.jsonl").symlink_to(tmp_path / "train.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert len(open_source(str(tmp_path / "good.jsonl"))) == 1
    refused_path(str(tmp_path / "loop.jsonl"), "loop.jsonl is a symbolic link that leads nowhere")
    refused_path(str(tmp_path / "gone.jsonl"), "gone.jsonl is a symbolic link that leads nowhere")
    refused_path(str(tmp_path / "pipe.jsonl"), "is a pipe or a device")
    refused_path(str(tmp_path), "is a folder, not a data file; it holds .*train.jsonl")
    refused_path(str(tmp_path / "*.jsonl"), "patterns are not expanded, so name one file")
    refused_path(str(tmp_path / "train.jsonl" / "x.jsonl"), "does not exist|cannot be read|not a folder")
    refused_path(str(tmp_path / "trian.jsonl"), "the nearest in that folder: train.jsonl")
    refused_path("https://example.org/a.jsonl", "is an address, not a file: download it")
    refused_path("~nobody-here/a.jsonl", "cannot be read as a data file")
    refused_path("a" * 5000 + ".jsonl", "cannot be read as a data file: File name too long")
    refused_path("a\0b.jsonl", "cannot be read as a data file|There is no data file")
    refused_path("", "The name of the data file is empty")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "a.jsonl", LINE)

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # a superuser may read everything, so no file mode denies it to all
        patch.setattr("lightning_ft.data.sources.open", denied, raising=False)
        refused_path(file, "a.jsonl cannot be read: Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", denied)
        refused_path(file, "cannot be read as a data file: Permission denied")


# the command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"\x1f\x8b\x08\x00", ["rows.jsonl is gzip data, not JSON lines"]),
        (LINE + b'{"prompt": "a"\n', ["rows.jsonl, line 2 is not valid JSON"]),
        (b'{"promt": "a", "completion": "b"}', ["rows.jsonl, line 1", "is 'promt' meant to be 'prompt'?"]),
        (b"", ["rows.jsonl is empty."]),
    ],
)
def test_a_fit_ends_with_code_2_before_a_model_is_sought(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "rows.jsonl", content)
    outcome = call(capsys, "fit", "--model.base=nowhere", "--data.path=rows.jsonl")
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert outcome.code == 2 and len(lines) == 1 and all(part in lines[0] for part in parts), outcome.err
    assert [one.name for one in tmp_path.iterdir()] == ["rows.jsonl"]
