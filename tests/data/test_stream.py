"""Streaming: the same rows as planned data, exact windows, bounded memory, and a resume at the same row."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from lightning_ft.data.loader import Placement
from lightning_ft.data.mixture import entries_of
from lightning_ft.data.sft_data import SFTData
from lightning_ft.data.stream import open_stream
from lightning_ft.data.stream_loader import Mark
from lightning_ft.functional.errors import Refusal
from tests.data.test_sft_data import TOKENIZER, KeepAll, Recorder, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list`")


def row_of(n):
    return {
        "messages": [
            {"role": "user", "content": "hello " * (n % 5 + 1) + str(n)},
            {"role": "assistant", "content": "yes " * (n % 4 + 1)},
        ]
    }


def write(file, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(lines) if file.suffix == ".gz" else lines)
    return str(file)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rows.jsonl", [row_of(n) for n in range(23)])


def data_of(path, **options):
    data = SFTData(path, streaming=True, **{"batch_size": 3, "shuffle_buffer": 5, "seed": 4, **options})
    data.use_tokenizer(TOKENIZER)
    return data


def order_of(path, n, **options):
    """The first rows of the order: pass, row of it, file and line."""
    settings = {"seed": 0, "shuffle": True, "buffer": 5, **options}
    stream = open_stream(entries_of(path, "path"), **settings)
    return [
        (number, row.where().removeprefix(os.path.dirname(path if isinstance(path, str) else next(iter(path))) + "/"))
        for number, row in islice(stream.rows(), n)
    ]


# The order


def test_each_pass_gives_every_row_once_in_a_new_order(path):
    order = order_of(path, 69)
    assert [number for number, _ in order] == [(k // 23, k % 23) for k in range(69)]
    passes = [[place for _, place in order[k : k + 23]] for k in (0, 23, 46)]
    assert all(sorted(rows) == sorted(passes[0]) and len(set(rows)) == 23 for rows in passes)
    assert passes[0] != passes[1] != passes[2]
    assert order == order_of(path, 69) != order_of(path, 69, seed=1)
    plain = [place for _, place in order_of(path, 46, shuffle=False)]
    assert plain == [f"rows.jsonl, line {k % 23 + 1}" for k in range(46)]


def test_a_known_order(path):
    """A resume with a newer numpy must find the same rows."""
    assert [int(place.split()[-1]) for _, place in order_of(path, 23)] == KNOWN


KNOWN = [4, 6, 1, 8, 3, 10, 7, 11, 12, 2, 5, 13, 16, 18, 14, 17, 21, 20, 22, 9, 23, 19, 15]


def test_all_kinds_of_files_give_the_same_rows(path, tmp_path):
    rows = [row_of(n) for n in range(23)]
    packed = write(tmp_path / "rows.jsonl.gz", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    (tmp_path / "gaps.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(row).encode() for row in rows))
    wanted = batches_of(data_of(path, shuffle=False), 7)
    for other in (packed, str(tmp_path / "rows.parquet"), str(tmp_path / "gaps.jsonl")):
        found = batches_of(data_of(other, shuffle=False), 7)
        assert all(torch.equal(a.ids, b.ids) and a.counts == b.counts for a, b in zip(found, wanted, strict=True))


def test_files_are_read_in_turn_by_size(tmp_path):
    long = write(tmp_path / "long.jsonl", [{"text": f"{n:03}"} for n in range(300)])
    short = write(tmp_path / "short.jsonl", [{"text": f"{n:03}"} for n in range(100)])
    order = [place for _, place in order_of([long, short], 400, buffer=1)]
    assert len(set(order)) == 400
    for begin in range(0, 400, 40):
        assert 8 <= sum(place.startswith("short") for place in order[begin : begin + 40]) <= 12


def test_weighted_files_keep_their_shares_and_begin_again(tmp_path):
    small = write(tmp_path / "small.jsonl", [{"text": f"{n}"} for n in range(5)])
    large = write(tmp_path / "large.jsonl", [{"text": f"{n}"} for n in range(100)])
    order = [place for _, place in order_of({small: 1, large: 2}, 90, buffer=4)]
    found = Counter(order)
    assert 28 <= sum(count for place, count in found.items() if place.startswith("small")) <= 32
    assert {count for place, count in found.items() if place.startswith("large")} == {1}
    assert set(found[f"small.jsonl, line {n}"] for n in range(1, 6)) <= {5, 6, 7}


def test_more_files_than_are_read_at_once(tmp_path):
    for number in range(70):
        write(tmp_path / f"{number:02}.jsonl", [{"text": "yes"}, {"text": "no"}])
    order = [place for _, place in order_of(str(tmp_path / "*.jsonl"), 140)]
    assert len(set(order)) == 140 and order != sorted(order)


# Batches


def batches_of(data, n, placement=None):
    loader = data.train_dataloader()
    loader.placement = lambda: placement or Placement()
    return list(islice(loader, n))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size, accumulate, world", [(6, 1, 1), (3, 2, 1), (3, 1, 2), (1, 3, 2)])
def test_batches_are_those_of_planned_data(path, tmp_path, packing, batch_size, accumulate, world):
    """Unshuffled, and as long as there are whole windows: the oracle tokenises first and knows all rows."""
    options = {"shuffle": False, "packing": packing, "batch_size": batch_size}
    for rank in range(world):
        placement = Placement(world_size=world, rank=rank, accumulate=accumulate)
        planned = SFTData(path, cache_dir=str(tmp_path / "cache"), **options)
        planned.use_tokenizer(TOKENIZER)
        loader = planned.train_dataloader()
        loader.placement = lambda placement=placement: placement
        n = 23 // 6 * accumulate
        for want, found in zip(islice(loader, n), batches_of(data_of(path, **options), n, placement), strict=True):
            assert torch.equal(want.ids, found.ids) and torch.equal(want.scored, found.scored)
            assert (want.rows.tolist(), want.window, want.bounds) == (found.rows.tolist(), found.window, found.bounds)


@pytest.mark.parametrize("options", [{"packing": True}, {"packing": False}, {"max_tokens": 70, "max_length": 70}])
def test_windows_are_exact_and_no_row_is_lost(path, options):
    data, accumulate, world = data_of(path, **options), 2, 2
    ranks = [
        batches_of(data, 40, Placement(world_size=world, rank=rank, accumulate=accumulate)) for rank in range(world)
    ]
    for begin in range(0, 40, accumulate):
        window = [batch for batches in ranks for batch in batches[begin : begin + accumulate]]
        counts = {unit: sum(batch.counts[unit] for batch in window) for unit in ("token", "row")}
        assert all(batch.window == counts for batch in window)
    seen = Counter(row for batches in ranks for batch in batches for row in batch.rows.tolist())
    assert set(seen) == set(range(23))
    # Each row is in a batch or waits for one: with those that wait these are whole passes and a part of one.
    seen += Counter(segment.row for _, segment in data._loader._pool)
    assert max(seen.values()) - min(seen.values()) <= 1
    if "max_tokens" in options:
        assert all(batch.tokens <= 70 for batches in ranks for batch in batches)


def test_bins_are_full(tmp_path):
    rows = [{"text": "yes " * (n * 7919 % 60 + 1)} for n in range(3000)]
    batches = batches_of(data_of(write(tmp_path / "rows.jsonl", rows), max_tokens=512, max_length=512), 100)
    assert sum(batch.tokens for batch in batches) / (100 * 512) > 0.95


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"max_tokens": 200, "max_length": 100}])
def test_few_rows_are_held(tmp_path, options, monkeypatch):
    """However many there are: the buffer, two windows, and what is rendered together."""
    path = write(tmp_path / "rows.jsonl", [{"text": f"yes {n}"} for n in range(20_000)])
    loader = data_of(path, shuffle_buffer=50, **options).train_dataloader()
    loader.placement = lambda: Placement(accumulate=2)
    held = []
    for batch in islice(loader, 300):
        held.append(loader.held)
        assert batch.counts["row"]
    assert 50 <= max(held) <= 50 + 64 + 2 * 2 * 200 // 4


def test_rows_are_rendered_only_when_they_are_used(path):
    data = data_of(path, batch_size=2)
    seen = []
    render = data._render
    data._render = lambda rows, kind: seen.append(len(rows)) or render(rows, kind)
    batches_of(data, 4)
    assert sum(seen) == 8


# Resume


@pytest.mark.filterwarnings("error:.*not resumable.*")
@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens": 60, "max_length": 60}, {"packing": False, "bad_rows": "drop"}, {"shuffle": False}],
    ids=["rows", "bins", "padded", "in order"],
)
@pytest.mark.parametrize("placing", [{}, {"limit_train_batches": 5}], ids=["plain", "limit"])
def test_a_resumed_fit_sees_what_an_unbroken_one_sees(path, tmp_path, options, placing):
    with open(path, "a") as file:
        file.write(json.dumps({"messages": []}) + "\n" if "bad_rows" in options else "")
    placing = {"max_steps": 9, "max_epochs": -1, **placing}
    keep, straight = KeepAll(tmp_path), Recorder()
    val = {"val_path": path, "bad_rows": "drop", "cache_dir": str(tmp_path / "cache")}
    trainer_of(tmp_path, [keep], num_sanity_val_steps=0, **placing).fit(straight, data_of(path, **{**val, **options}))
    assert {where for _, where, _ in keep.kept} == {"batch", "validation", "epoch"}
    assert len(straight.seen) == (18 if "limit_train_batches" not in placing else 15)
    for file, where, done in keep.kept:
        resumed = Recorder()
        trainer = trainer_of(tmp_path, num_sanity_val_steps=0, **placing)
        trainer.fit(resumed, data_of(path, **{**val, **options}), ckpt_path=file, weights_only=False)
        assert resumed.seen == straight.seen[done:], (where, done)
        assert torch.equal(resumed.table.weight, straight.table.weight), (where, done)


def test_epochs_go_on_where_the_last_ended(path, tmp_path):
    module = Recorder()
    trainer_of(tmp_path, limit_train_batches=2, max_epochs=3, max_steps=100).fit(module, data_of(path))
    rows = [row for _, _, rows, _ in module.seen for row in rows]
    assert len(rows) == len(set(rows)) == 18 and {epoch for epoch, *_ in module.seen} == {0, 1, 2}


def test_a_finished_run_goes_on_at_the_next_row(path, tmp_path):
    def fit(steps, **more):
        module = Recorder()
        trainer = trainer_of(tmp_path, max_steps=steps, max_epochs=-1)
        trainer.fit(module, data_of(path), **more)
        return trainer, module

    trainer, first = fit(3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    _, further = fit(6, ckpt_path=tmp_path / "end.ckpt", weights_only=False)
    _, whole = fit(6)
    rows = [[rows for _, _, rows, _ in module.seen] for module in (first, further, whole)]
    assert rows[0] + rows[1] == rows[2]


def test_a_place_is_found_by_reading_alone(path):
    data = data_of(path, max_tokens=60, max_length=60)
    loader = data.train_dataloader()
    want = list(islice(loader, 30))
    mark = Mark.of(json.loads(json.dumps(loader.mark(29).state())))
    assert mark.next[0] >= 1 and mark.waiting
    again = data_of(path, max_tokens=60, max_length=60)
    seen, render = [], again._render
    again._render = lambda rows, kind: seen.append(len(rows)) or render(rows, kind)
    loader = again.train_dataloader()
    loader.placement = lambda: Placement(position=29)
    loader.begin = lambda: mark
    found = next(iter(loader))
    assert found.rows.tolist() == want[29].rows.tolist() and torch.equal(found.ids, want[29].ids)
    assert sum(seen) <= len(mark.waiting) + 64


KILLED = """
import sys, json, os, signal
from tests.data.test_stream import *

class Kill(Recorder):
    def training_step(self, batch, batch_idx):
        if batch_idx == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

folder, path = sys.argv[1:]
from lightning.pytorch.callbacks import ModelCheckpoint
saver = ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")
trainer_of(folder, [saver], enable_checkpointing=True, max_steps=6, max_epochs=-1).fit(Kill(), data_of(path))
"""


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_killed_in_mid_run_and_resumed(path, tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "kept"), path], timeout=120)
    assert done.returncode == -9
    (newest,) = (tmp_path / "kept").glob("step=3.ckpt")
    resumed, straight = Recorder(), Recorder()
    settings = {"max_steps": 6, "max_epochs": -1}
    trainer_of(tmp_path, **settings).fit(resumed, data_of(path), ckpt_path=newest, weights_only=False)
    trainer_of(tmp_path, **settings).fit(straight, data_of(path))
    assert resumed.seen == straight.seen[6:] and torch.equal(resumed.table.weight, straight.table.weight)


def test_resuming_another_stream_is_refused(path, tmp_path):
    keep = KeepAll(tmp_path)
    settings = {"max_steps": 4, "max_epochs": -1}
    trainer_of(tmp_path, [keep], **settings).fit(Recorder(), data_of(path))
    middle = keep.kept[0][0]
    other = write(tmp_path / "other.jsonl", [row_of(n) for n in range(22)])
    planned = SFTData(path, batch_size=3, seed=4, cache_dir=str(tmp_path / "cache"))
    for data, match in [
        (data_of(path, shuffle_buffer=6), "shuffle_buffer 5 .now 6"),
        (data_of(other), "middle of an epoch with content"),
        (planned, "middle of an epoch with content"),
    ]:
        with pytest.raises(Refusal, match=match):
            trainer_of(tmp_path, **settings).fit(Recorder(), data, ckpt_path=middle, weights_only=False)


def test_two_ranks_share_each_window(path, tmp_path, two_ranks):
    alone = Recorder()
    settings = {"max_steps": 5, "max_epochs": -1}
    trainer_of(tmp_path, accumulate_grad_batches=1, **settings).fit(alone, data_of(path, batch_size=8))
    job = "tests.data.stream_jobs:fit"
    (seen, weight), (other, other_weight) = two_ranks.run(
        job, path=path, folder=str(tmp_path), trainer={"accumulate_grad_batches": 2, **settings}, batch_size=2
    )
    assert torch.equal(weight, other_weight)
    for step in range(5):
        rows = [row for part in (seen, other) for *_, rows, _ in part[2 * step : 2 * step + 2] for row in rows]
        assert sorted(rows) == sorted(alone.seen[step][2]) and seen[2 * step][3] == alone.seen[step][3]
    torch.testing.assert_close(weight, alone.table.weight, atol=1e-6, rtol=1e-5)


# Bad rows


@pytest.mark.parametrize(
    "line, match",
    [
        (b'{"text": ', r"rows.jsonl, line 24 is not valid JSON"),
        (b'{"text": "\xff"}', r"rows.jsonl, line 24 is not UTF-8: byte 0xff at offset"),
        (b"[1]", r"rows.jsonl, line 24 is not an object"),
        (b'{"messages": []}', r"rows.jsonl, line 24: messages is empty"),
        (b'{"text": "yes"}', r"rows.jsonl, line 24: the row is one of text in a file"),
        (json.dumps(row_of(0) | {"tools": 3}).encode(), r"rows.jsonl, line 24: tools"),
    ],
)
def test_a_bad_row_is_named_or_counted(path, line, match):
    with open(path, "ab") as file:
        file.write(line + b"\n" + json.dumps(row_of(0)).encode())
    with pytest.raises(Refusal, match=match):
        batches_of(data_of(path), 9)
    loader = data_of(path, bad_rows="drop").train_dataloader()
    rows = [row for batch in islice(loader, 24) for row in batch.rows.tolist()]
    assert len(rows) == 72 and len(set(rows)) == 24 and 23 not in rows
    assert loader.fit.dropped == {"unfit": 3}


def test_long_rows(path):
    with pytest.raises(Refusal, match="line [0-9]+ has [0-9]+ tokens, more than max_length 20: raise max_length"):
        batches_of(data_of(path, max_length=20), 9)
    loader = data_of(path, max_length=20, truncation="drop").train_dataloader()
    assert all(batch.counts["row"] == 3 for batch in islice(loader, 9))
    assert list(loader.fit.dropped) == ["longer than 20 tokens"]
    (batch,) = batches_of(data_of(path, max_length=20, truncation="keep_end"), 1)
    assert max(b - a for a, b in zip(batch.bounds, batch.bounds[1:], strict=False)) == 20
    with pytest.raises(Refusal, match="leaves no token to learn of its"):
        batches_of(data_of(path, max_length=5, truncation="keep_start"), 1)
    with pytest.raises(Refusal, match="cannot go into a batch of max_tokens 20"):
        batches_of(data_of(path, max_tokens=20, max_length=None), 1)
    with pytest.raises(Refusal, match="this row and [0-9,]+ before it were all left out .*longer than 5 tokens"):
        batches_of(data_of(path, max_length=5, truncation="drop", batch_size=500), 1)


# Before a run


def test_a_run_needs_an_end(path, tmp_path):
    with pytest.raises(Refusal, match="SFTData.streaming reads rows .* set trainer.max_steps"):
        trainer_of(tmp_path, max_epochs=1).fit(Recorder(), data_of(path))
    with pytest.raises(Refusal, match="overfit_batches sees the same batches"):
        trainer_of(tmp_path, max_steps=3, overfit_batches=2).fit(Recorder(), data_of(path))


def test_lengths_are_known_to_lightning(path, tmp_path):
    module = Recorder()
    trainer = trainer_of(tmp_path, max_steps=8, max_epochs=1, val_check_interval=0.25, num_sanity_val_steps=0)
    trainer.fit(module, data_of(path, val_path=path, cache_dir=str(tmp_path / "cache")))
    assert trainer.estimated_stepping_batches == trainer.global_step == 8
    assert len(module.seen) == 16 and len(module.validated) == 4 * 23
    with pytest.raises(TypeError, match="no length"):
        len(data_of(path).train_dataloader())


def test_a_look_at_the_first_rows(path, tmp_path):
    texts = write(tmp_path / "texts.jsonl", [{"text": "thank you"}] * 300)
    data = data_of([path, texts])
    assert [row.where for row in data.preview(3)] == [f"{path}, line 1", f"{texts}, line 1", f"{path}, line 2"]
    (report,) = data.reports().values()
    assert report.name == f"{path}, {texts} (its first 100 rows)" and report.kept == 100
    with pytest.raises(Refusal, match="rows.jsonl, line 1 has .* more than max_length 8, as have 23 of 100 rows"):
        data_of([path, texts], max_length=8).reports()


@pytest.mark.parametrize(
    "given, options, match",
    [
        ("{rows}", {"val_fraction": 0.1}, "SFTData.val_fraction holds rows of the training files out"),
        ("{rows}", {"epoch_rows": 10}, "epoch_rows has no meaning for a stream"),
        ("{rows}", {"shuffle_buffer": 0}, "SFTData.shuffle_buffer must be at least 1"),
        ("{rows}", {"loss_on": "completion"}, "rows.jsonl: loss_on 'completion' has no meaning for messages"),
        ("{folder}/none.jsonl", {}, "There is no data file"),
        ("owner/name", {}, "a data set of the hub cannot be streamed, since its stream could not be resumed"),
        ("starter:vader/train", {}, "is small and cannot be streamed"),
        ("{folder}/pipe", {}, "pipe or a device"),
        ("{folder}/a.csv", {}, "only JSON lines .plain or .gz. and Parquet can"),
        ("{folder}/list.json", {}, "is one JSON list, which cannot be read row by row"),
        ("{folder}/bad.gz", {}, "bad.gz is not gzip data"),
        ("{folder}/bad.parquet", {}, "bad.parquet is JSON, not parquet"),
        ("{folder}/short.parquet", {}, "short.parquet cannot be read as parquet after row 0"),
        ("{folder}/zip.jsonl", {}, "zip.jsonl is zip data"),
        ("{folder}/blank.jsonl", {}, "blank.jsonl has no rows"),
        ("{folder}/columns.jsonl", {}, "columns.jsonl, line 1: found the columns txt"),
        ("{folder}", {}, "is a folder"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_a_run(given, tmp_path, options, match):
    rows = write(tmp_path / "rows.jsonl", [row_of(1)])
    os.mkfifo(tmp_path / "pipe")
    contents = {
        "a.csv": b"text\nyes\n",
        "list.json": b'[{"text": "yes"}]',
        "bad.gz": b'{"text": "yes"}',
        "bad.parquet": b'{"text": "yes"}',
        "short.parquet": b"PAR1",
        "zip.jsonl": b"PK\x03\x04",
        "blank.jsonl": b"\n \n",
        "columns.jsonl": b'{"txt": "yes"}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=match):
        data_of(given.format(rows=rows, folder=tmp_path), **options).check_files("fit")


def test_a_file_that_breaks_off_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write(path, [row_of(n) for n in range(2000)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(Refusal, match=r"rows.jsonl.gz cannot be read on after line \d+: .*end-of-stream"):
        batches_of(data_of(str(path)), 2000)
