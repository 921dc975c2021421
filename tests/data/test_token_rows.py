"""The cache, the truncation policies and their accounts."""

import json

import numpy as np
import pytest

from lightning_ft.data.sources import from_rows
from lightning_ft.data.spans import render
from lightning_ft.data.token_rows import select
from lightning_ft.data.tokenise import tokenise, tokenizer_hash
from lightning_ft.functional.errors import Refusal
from tests.data.tiny_tokenizers import CHATML, LLAMA3, tiny_tokenizer

ROWS = [{"prompt": "hello" + " world" * n, "completion": " yes" * (n % 3 + 1)} for n in range(7)]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(CHATML, puts_bos=True)


def table_of(rows, tokenizer, folder, **options):
    source = from_rows("mine", rows)
    return tokenise(source, tokenizer, cache_dir=folder, **options), source


def test_the_table_holds_what_render_gives(tokenizer, tmp_path):
    table, _ = table_of(ROWS, tokenizer, tmp_path)
    for row, kept in zip(ROWS, table, strict=True):
        want = render(tokenizer, row)
        assert kept["ids"] == want.ids and kept["spans"] == [edge for span in want.spans for edge in span]
        assert (kept["length"], kept["scored"]) == (len(want.ids), want.scored)
    assert table["row"][:] == list(range(7))
    assert table.cache_files  # on disk, memory-mapped


def test_a_second_run_tokenises_nothing_and_another_tokenizer_does(tokenizer, tmp_path, monkeypatch):
    table_of(ROWS, tokenizer, tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 1  # and no temporary folder
    tokenizer(
        ["something else"], padding="max_length", max_length=9, truncation=True
    )  # leaves its traces in the backend

    def never(*args, **kwargs):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_ft.data.tokenise.render_rows", never)
        table_of(ROWS, tokenizer, tmp_path)
    table_of(ROWS, tokenizer, tmp_path, loss_on="all")
    tokenizer.chat_template = LLAMA3
    table_of(ROWS, tokenizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert tokenizer_hash(tiny_tokenizer(CHATML)) == tokenizer_hash(tiny_tokenizer(CHATML))
    assert tokenizer_hash(tiny_tokenizer(CHATML)) != tokenizer_hash(tiny_tokenizer(CHATML, eos="<|eot_id|>"))


def test_an_unfit_row_is_named_or_dropped_and_counted(tokenizer, tmp_path):
    rows = [*ROWS[:2], {"prompt": "hello", "completion": ""}, *ROWS[2:]]
    with pytest.raises(Refusal, match="mine, row 3: completion is empty"):
        table_of(rows, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())
    table, source = table_of(rows, tokenizer, tmp_path, keep_bad_rows=True)
    with pytest.raises(Refusal, match="mine, row 3: completion is empty"):
        table_of(rows, tokenizer, tmp_path)  # found in the cache of the run that dropped it
    kept = select(table, source, bad_rows="drop")
    assert kept.index.tolist() == [0, 1, 3, 4, 5, 6, 7] and kept.report.dropped == {"unfit": 1}
    with pytest.raises(Refusal, match="mine, row 3: completion is empty"):
        select(table, source)
    table, source = table_of(rows[2:3], tokenizer, tmp_path, keep_bad_rows=True)
    with pytest.raises(Refusal, match="no row is left to use .1 unfit"):
        select(table, source, bad_rows="drop")


def brute(tokenizer, row, max_length, keep_end):
    """Ids and learned flags of a cut row, token by token."""
    want = render(tokenizer, row)
    flags = [any(a <= t < b for a, b in want.spans) for t in range(len(want.ids))]
    pairs = list(zip(want.ids, flags, strict=True))
    if len(pairs) > max_length:
        pairs = [pairs[0], *pairs[len(pairs) - max_length + 1 :]] if keep_end else pairs[:max_length]
    return [i for i, _ in pairs], [flag and t > 0 for t, (_, flag) in enumerate(pairs)]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [4, 6, 8, 12])
def test_cut_rows_equal_the_brute_force(tokenizer, tmp_path, truncation, max_length):
    table, source = table_of(ROWS, tokenizer, tmp_path)
    kept = select(
        table, source, max_length=max_length, truncation=truncation, bad_rows="drop", bos=tokenizer.bos_token_id
    )
    seen = []
    for place, segment in enumerate(kept.segments(np.arange(len(kept)))):
        ids, flags = brute(tokenizer, ROWS[segment.row], max_length, truncation == "keep_end")
        found = [any(a <= t < b for a, b in segment.spans) and t > 0 for t in range(len(segment.ids))]
        assert segment.ids.tolist() == ids and found == flags
        assert kept.lengths[place] == len(ids) and kept.scored[place] == sum(flags)
        seen.append(segment.row)
    void = [n for n, row in enumerate(ROWS) if not any(brute(tokenizer, row, max_length, truncation == "keep_end")[1])]
    assert sorted(seen + void) == list(range(7))
    report = kept.report
    assert report.rows == 7 and report.kept == len(seen) and sum(report.dropped.values()) == len(void)
    assert report.truncated == sum(len(render(tokenizer, ROWS[n]).ids) > max_length for n in seen)
    assert (report.tokens, report.scored) == (kept.lengths.sum(), kept.scored.sum())


def test_long_rows_are_refused_with_their_number_or_dropped(tokenizer, tmp_path):
    table, source = table_of(ROWS, tokenizer, tmp_path)
    lengths = [len(render(tokenizer, row).ids) for row in ROWS]
    long = [n for n, length in enumerate(lengths) if length > 8]
    with pytest.raises(
        Refusal,
        match=f"row {long[0] + 1} has {lengths[long[0]]} tokens.*{len(long)} of 7 rows.*longest has {max(lengths)}",
    ):
        select(table, source, max_length=8)
    kept = select(table, source, max_length=8, truncation="drop")
    assert kept.report.dropped == {"longer than 8 tokens": len(long)} and kept.lengths.max() <= 8
    with pytest.raises(Refusal, match="leaves no token to learn"):
        select(table, source, max_length=3, truncation="keep_start")


def test_the_report_is_one_line(tokenizer, tmp_path):
    table, source = table_of(ROWS, tokenizer, tmp_path)
    text = str(select(table, source, max_length=8, truncation="drop").report)
    assert "mine: " in text and "dropped (longer than 8 tokens)" in text and "\n" not in text


def test_a_full_disk_is_one_sentence(tokenizer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.Dataset.map", full)
    with pytest.raises(Refusal, match="the disk is full"):
        table_of(ROWS, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_messages_as_a_typed_table_equal_messages_as_lines(tokenizer, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    from lightning_ft.data.sources import open_source

    rows = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes", "name": "x"}]}
    ] * 2
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = [
        tokenise(open_source(str(tmp_path / f"a.{s}")), tokenizer, cache_dir=tmp_path / "c")
        for s in ("parquet", "jsonl")
    ]
    assert tables[0].to_dict() == tables[1].to_dict()


def test_rows_of_a_table_in_several_chunks_are_found(tokenizer, tmp_path):
    rows = [{"text": "yes" + " no" * (n % 7) + str(n)} for n in range(2500)]  # written a thousand at a time
    table, source = table_of(rows, tokenizer, tmp_path)
    assert table.data.column("ids").num_chunks > 1
    kept = select(table, source)
    for place in (0, 999, 1000, 1001, 1999, 2000, 2499):
        (segment,) = kept.segments([place])
        assert segment.ids.tolist() == render(tokenizer, rows[place]).ids and segment.row == place
