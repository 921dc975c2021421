"""Every way in which a data file can be wrong is one sentence that says where."""

import json

import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from lightning_ft.data.sources import from_rows, open_source
from lightning_ft.functional.errors import Refusal

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ä", "completion": "1"}]


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_the_same_rows_from_every_format(tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    table = pa.Table.from_pylist(ROWS)
    if suffix == "jsonl":
        file.write_text("\n" + lines(ROWS), encoding="utf-8")
    elif suffix == "json":
        file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif suffix == "parquet":
        parquet.write_table(table, file)
    else:
        csv.write_csv(table, file, csv.WriteOptions(delimiter="\t" if suffix == "tsv" else ","))
    source = open_source(str(file))
    assert list(source.rows()) == ROWS
    assert source.kind == "prompt_completion"
    place = {"jsonl": "line 3", "json": "row 2"}.get(suffix, "row 2")
    assert source.where(1) == f"{file}, {place}"


def test_a_list_in_a_jsonl_file_and_lines_in_a_json_file_and_a_byte_order_mark(tmp_path):
    assert list(open_source(written(tmp_path, "a.jsonl", json.dumps(ROWS))).rows()) == ROWS
    assert list(open_source(written(tmp_path, "a.json", lines(ROWS))).rows()) == ROWS
    assert list(open_source(written(tmp_path, "b.jsonl", b"\xef\xbb\xbf" + lines(ROWS).encode())).rows()) == ROWS


def test_rows_need_not_have_the_same_keys(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "x": 1}]},
        {"messages": [{"role": "user", "content": "b"}], "id": "q"},
    ]
    assert list(open_source(written(tmp_path, "a.jsonl", lines(rows))).rows()) == rows


def test_the_key_is_the_content(tmp_path):
    first = open_source(written(tmp_path, "a.jsonl", lines(ROWS))).key
    assert open_source(written(tmp_path, "b.jsonl", lines(ROWS))).key == first
    assert open_source(written(tmp_path, "c.jsonl", lines(ROWS[:1]))).key != first


GOOD = lines(ROWS[:1])


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", " \n\n", "no rows, only white space"),
        (
            "a.jsonl",
            GOOD + '{"prompt": "a"\n',
            r"a.jsonl, line 2 is not valid JSON: Expecting ',' delimiter at column 15",
        ),
        ("a.jsonl", GOOD + "\n\n[1]\n", r"a.jsonl, line 4 is not an object with columns, found '\[1\]'"),
        ("a.jsonl", "hello\n", "line 1 is not valid JSON"),
        (
            "a.jsonl",
            GOOD.encode() + b'{"prompt": "\xe4"}\n',
            f"line 2 is not UTF-8: byte 0xe4 at offset {len(GOOD) + 12}",
        ),
        ("a.jsonl", GOOD.encode("utf-16"), "is UTF-16"),
        ("a.jsonl", b"\x7fELF\0\0\1", "binary file .zero at byte 4"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "is gzip data"),
        ("a.jsonl", b"PAR1\0\0", "is Parquet data, not JSON lines: name it with the suffix .parquet"),
        (
            "a.jsonl",
            lines([{"promt": "a", "completion": "b"}]),
            "line 1: found the columns completion, promt, expected messages",
        ),
        ("a.jsonl", lines([{"promt": "a", "completion": "b"}]), "is 'promt' meant to be 'prompt'?"),
        ("a.json", "[]", "is an empty list"),
        ("a.json", '[\n{"text": "a"},\n{"text": }]', "a.json, line 3 is not valid JSON"),
        ("a.json", '[{"text": "a"}, 3]', "row 2 is not an object"),
        ("a.parquet", "hello", "cannot be read as parquet"),
        ("a.csv", "promt,completion\na,b\n", "found the columns completion, promt"),
        ("a.csv", "prompt,completion\n", "no rows"),
        ("a.csv", "prompt,completion\na,b,c\n", "cannot be read as csv"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, content, match):
    with pytest.raises(Refusal, match=match) as caught:
        open_source(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    written(tmp_path, "train.jsonl", GOOD)
    with pytest.raises(Refusal, match="There is no data file .*trian.jsonl; the nearest in that folder: train.jsonl"):
        open_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(Refusal, match="its folder .*none does not exist"):
        open_source(str(tmp_path / "none" / "train.jsonl"))
    with pytest.raises(Refusal, match="is a folder, not a data file; it holds train.jsonl"):
        open_source(str(tmp_path))


def test_a_hub_id_without_network_is_refused_at_once():
    with pytest.raises(Refusal, match="neither a file nor a data set that can be fetched"):
        open_source("someone/something:test")


def test_an_unknown_starter_data_set_is_refused():
    with pytest.raises(Refusal, match="choose starter:vader/train"):
        open_source("starter:vader/trian")


def test_rows_in_memory():
    source = from_rows("mine", ROWS)
    assert list(source.rows()) == ROWS and source.where(1) == "mine, row 2"
    with pytest.raises(Refusal, match="mine has no rows"):
        from_rows("mine", [])
