"""Several files as one data set: what an epoch takes of each, in which order, and that a resumed run finds the same."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_ft.data.mixture import Shares, entries_of, shares_of
from lightning_ft.data.plan import plan_epoch
from lightning_ft.data.sft_data import SFTData
from lightning_ft.functional.errors import Refusal
from tests.data.test_sft_data import TOKENIZER, KeepAll, Recorder, trainer_of

WEIGHTS = st.lists(st.tuples(st.integers(1, 12), st.floats(0.3, 9)), min_size=1, max_size=4)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def files(tmp_path):
    """Chats, prompts with completions and plain texts, each naming its own file and row."""
    chats = [
        {"messages": [{"role": "user", "content": f"yes {n}"}, {"role": "assistant", "content": "no " * (n % 3 + 1)}]}
        for n in range(7)
    ]
    return {
        "chats": write(tmp_path / "chats.jsonl", chats),
        "prompts": write(
            tmp_path / "prompts.jsonl", [{"prompt": f"hello {n}", "completion": " yes"} for n in range(4)]
        ),
        "texts": write(tmp_path / "texts.jsonl", [{"text": f"thank you {n}"} for n in range(11)]),
    }


def data_of(path, tmp_path, **options):
    data = SFTData(path, cache_dir=str(tmp_path / "cache"), **{"batch_size": 3, "seed": 5, **options})
    data.use_tokenizer(TOKENIZER)
    return data


def rows_of_epochs(data, epochs):
    """For each epoch the places (file and line) of all its rows."""
    loader, places = data.train_dataloader(), data._places("train")
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        found.append([places.where(row) for batch in batches for row in batch.rows.tolist()])
    return found


# What an epoch takes


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.integers(0, 5), st.integers(0, 3), st.one_of(st.none(), st.integers(20, 60)))
def test_shares_add_up_and_are_within_a_row_of_exact(files, epoch, seed, epoch_rows):
    sizes, weights = [size for size, _ in files], [weight for _, weight in files]
    rows = epoch_rows or 40
    assume(rows * min(weights) >= sum(weights))
    shares = shares_of([str(n) for n in range(len(files))], sizes, weights, rows)
    assert len(shares) == rows
    for take, weight in zip(shares.takes, weights, strict=True):
        assert abs(take - rows * weight / sum(weights)) < 1
    drawn = shares.rows(seed=seed, epoch=epoch)
    edges = np.cumsum([0, *sizes])
    for number, take in enumerate(shares.takes):
        assert ((drawn >= edges[number]) & (drawn < edges[number + 1])).sum() == take


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 4), st.booleans())
def test_no_row_comes_twice_before_all_have_come(size, take, seed, shuffle):
    """Over the end of an epoch too: the rows of all epochs together are whole passes."""
    shares = Shares((3, size), (1, take))
    epochs = [shares.rows(seed=seed, epoch=epoch, shuffle=shuffle) for epoch in range(6)]
    counts = Counter(row for rows in epochs for row in rows.tolist() if row >= 3)
    assert max(counts.values()) - min(counts.get(row, 0) for row in range(3, 3 + size)) <= 1


def test_a_known_draw():
    """A resume with a newer numpy must find the same rows."""
    shares = shares_of(["a", "b"], [4, 6], [3, 2], 10)
    assert shares.takes == (6, 4)
    assert shares.rows(seed=0, epoch=0).tolist() == KNOWN[0]
    assert shares.rows(seed=0, epoch=1).tolist() == KNOWN[1]


KNOWN = [[8, 4, 6, 0, 3, 0, 1, 1, 2, 9], [7, 7, 5, 3, 2, 2, 0, 8, 3, 1]]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3))
def test_windows_of_drawn_rows_are_exact(batch_size, accumulate, world, epoch):
    lengths = np.arange(2, 12)
    shares = Shares((4, 6), (7, 3))
    rows = shares.rows(seed=1, epoch=epoch)
    plan = plan_epoch(
        lengths, batch_size=batch_size, units={"token": lengths - 1}, accumulate=accumulate, world_size=world, rows=rows
    )
    dealt = [
        np.concatenate([part for micro in plan.micro[i : i + accumulate] for part in micro])
        for i in range(0, len(plan), accumulate)
    ]
    assert np.concatenate(dealt).tolist() == rows.tolist()
    for number, window in enumerate(dealt):
        assert plan.window(number * accumulate) == {"token": float((lengths[window] - 1).sum()), "row": len(window)}


# Files, patterns, kinds


def test_files_of_all_kinds_are_trained_on_together(files, tmp_path):
    data = data_of(list(files.values()), tmp_path)
    first, second = rows_of_epochs(data, 2)
    wanted = [
        f"{files[name]}, line {n + 1}"
        for name, rows in (("chats", 7), ("prompts", 4), ("texts", 11))
        for n in range(rows)
    ]
    assert sorted(first) == sorted(second) == sorted(wanted) and first != second
    report = data.reports()["train"]
    assert (report.rows, report.kept, [part.kept for part in report.parts]) == (22, 22, [7, 4, 11])
    assert report.tokens == sum(part.tokens for part in report.parts)
    assert [part.name for part in report.parts] == list(files.values()) and files["texts"] in str(report)
    # Each as it would be alone.
    for name, path in files.items():
        alone = data_of(path, tmp_path).reports()["train"]
        assert (alone.tokens, alone.scored) == next((p.tokens, p.scored) for p in report.parts if p.name == path), name


def test_a_look_at_the_rows_sees_each_file(files, tmp_path):
    rows = data_of(list(files.values()), tmp_path).preview(5)
    assert [row.where for row in rows] == [
        f"{files['chats']}, line 1",
        f"{files['prompts']}, line 1",
        f"{files['texts']}, line 1",
        f"{files['chats']}, line 2",
        f"{files['prompts']}, line 2",
    ]
    assert "hello 1" in "".join(piece.text for piece in rows[-1].pieces)


def test_a_pattern_is_all_its_files_sorted(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in (2, 0, 1):
        write(shards / f"{number}.jsonl", [{"text": f"yes {number}"}, {"text": "no"}])
    (entry,) = entries_of(str(shards / "*.jsonl"), "SFTData.path")
    assert entry.files == tuple(str(shards / f"{n}.jsonl") for n in range(3))
    (found,) = rows_of_epochs(data_of(str(shards / "?.jsonl"), tmp_path), 1)
    assert len(found) == len(set(found)) == 6
    one = write(tmp_path / "one.jsonl", [{"text": "thank you"}])
    data = data_of({str(shards / "*.jsonl"): 1, one: 1}, tmp_path, epoch_rows=4)
    found = [place for epoch in rows_of_epochs(data, 3) for place in epoch]
    assert sum(place.startswith(one) for place in found) == 6  # half of three epochs
    assert len({place for place in found if not place.startswith(one)}) == 6  # the shards share one weight


def test_weights_are_shares_and_an_epoch_goes_on_where_the_last_ended(files, tmp_path):
    data = data_of({files["chats"]: 1, files["texts"]: 3}, tmp_path, epoch_rows=8)
    epochs = rows_of_epochs(data, 7)
    for rows in epochs:
        assert Counter(row.split(",")[0] for row in rows) == {files["chats"]: 2, files["texts"]: 6}
    chats = Counter(row for rows in epochs for row in rows if row.startswith(files["chats"]))
    assert set(chats.values()) == {2} and len(chats) == 7  # 7 epochs of 2 are two passes over 7 rows
    assert data.reports()["train"].epoch_rows == 8
    whole = data_of({files["chats"]: 1, files["texts"]: 1}, tmp_path)
    assert [len(rows) for rows in rows_of_epochs(whole, 2)] == [18, 18]


def test_epoch_rows_of_one_file_are_parts_of_passes(files, tmp_path):
    epochs = rows_of_epochs(data_of(files["texts"], tmp_path, epoch_rows=5), 11)
    assert [len(rows) for rows in epochs] == [5] * 11
    assert set(Counter(row for rows in epochs for row in rows).values()) == {5}


def test_rows_are_held_out_of_each_file(files, tmp_path):
    data = data_of(list(files.values()), tmp_path, val_fraction=0.25)
    (trained,) = rows_of_epochs(data, 1)
    places = data._places("val")
    held = [places.where(row) for batch in data.val_dataloader() for row in batch.rows.tolist()]
    assert not set(held) & set(trained) and len(held) + len(trained) == 22
    assert Counter(row.split(",")[0] for row in held) == {files["chats"]: 2, files["prompts"]: 1, files["texts"]: 3}
    one = write(tmp_path / "one.jsonl", [{"text": "yes"}])
    with pytest.raises(Refusal, match="one.jsonl has one row, so val_fraction cannot hold one out"):
        data_of([files["texts"], one], tmp_path, val_fraction=0.25).setup("fit")


def test_bins_of_several_files_are_equally_many_in_each_epoch(files, tmp_path):
    data = data_of(list(files.values()), tmp_path, max_tokens=40, max_length=40)
    loader = data.train_dataloader()
    for epoch in range(4):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) and sum(len(batch.rows) for batch in batches) == 22
        assert max(batch.tokens for batch in batches) <= 40


# In a fit


@pytest.mark.filterwarnings("ignore:Total length of `list`")
@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_fit_sees_what_an_unbroken_one_sees(files, tmp_path, packing):
    def data():
        mixture = {files["chats"]: 2, files["texts"]: 1, files["prompts"]: 1}
        return data_of(mixture, tmp_path, epoch_rows=10, packing=packing, batch_size=2)

    keep, straight = KeepAll(tmp_path), Recorder()
    trainer_of(tmp_path, [keep]).fit(straight, data())
    assert len(straight.seen) == 15 and len(keep.kept) > 9
    for file, where, done in keep.kept:
        resumed = Recorder()
        trainer_of(tmp_path).fit(resumed, data(), ckpt_path=file, weights_only=False)
        assert resumed.seen == straight.seen[done:], (where, done)
        assert (resumed.table.weight == straight.table.weight).all(), (where, done)


@pytest.mark.filterwarnings("ignore:Total length of `list`")
def test_resuming_with_other_weights_or_files_is_refused(files, tmp_path):
    keep = KeepAll(tmp_path)
    options = {"batch_size": 2, "epoch_rows": 10}
    mixture = {files["chats"]: 2, files["texts"]: 1}
    trainer_of(tmp_path, [keep], max_epochs=1).fit(Recorder(), data_of(mixture, tmp_path, **options))
    middle = keep.kept[0][0]
    for other, match in [
        ({files["chats"]: 1, files["texts"]: 1}, r"weights \[2.0, 1.0\] .now \[1.0, 1.0\]"),
        ({files["chats"]: 2, files["prompts"]: 1}, "content '"),
        ({files["texts"]: 2, files["chats"]: 1}, "content '"),
    ]:
        with pytest.raises(Refusal, match=match):
            trainer_of(tmp_path).fit(
                Recorder(), data_of(other, tmp_path, **options), ckpt_path=middle, weights_only=False
            )


# What cannot be


@pytest.mark.parametrize(
    "path, options, match",
    [
        ([], {}, "SFTData.path is empty: give a file"),
        ({}, {}, "SFTData.path is empty"),
        (["{chats}", 3], {}, "holds 3, which is not the name of a file"),
        ({"{chats}": 0, "{texts}": 1}, {}, "chats.jsonl the weight 0: leave the file out"),
        ({"{chats}": -1, "{texts}": 1}, {}, "the weight -1: leave the file out"),
        ({"{chats}": "much"}, {}, "the weight 'much': a weight is a number"),
        ({"{chats}": float("nan")}, {}, "the weight nan: a weight is a number"),
        (["{chats}", "{chats}"], {}, "names the file .*chats.jsonl twice"),
        (["{chats}", "{folder}/*s.jsonl"], {}, r"chats.jsonl by .*chats.jsonl and by .*/\*s.jsonl: name it once"),
        ("{folder}/none/*.jsonl", {}, "SFTData.path is the pattern .*, but the folder .*none does not exist"),
        ("{folder}/*.csv", {}, "but no file matches it"),
        ({"{chats}": 1, "{texts}": 1000}, {}, "chats.jsonl would give no row at all to an epoch of 18 rows"),
        (["{chats}", "{texts}"], {"val_path": "{texts}"}, "val_path holds .*texts.jsonl, which SFTData.path holds too"),
        ("{folder}/*.jsonl", {"val_path": ["{texts}"]}, "val_path holds .*texts.jsonl"),
        ({"{chats}": 1}, {"max_tokens": 2048}, "max_tokens fills its bins once"),
        (["{chats}"], {"max_tokens": 2048, "epoch_rows": 3}, "so use batch_size"),
        (["{chats}", "{texts}"], {"loss_on": "assistant"}, "texts.jsonl: loss_on 'assistant' has no meaning for text"),
        (["{chats}", "{folder}/bad.json"], {}, "bad.json, line 1 is not valid JSON"),
    ],
)
def test_refusals(files, tmp_path, path, options, match):
    def named(value):
        if isinstance(value, str):
            return value.format(folder=tmp_path, **files)
        if isinstance(value, dict):
            return {named(key): weight for key, weight in value.items()}
        return [named(item) for item in value] if isinstance(value, list) else value

    (tmp_path / "bad.json").write_text("{'a'}\n")
    with pytest.raises(Refusal, match=match):
        data = data_of(named(path), tmp_path, **{name: named(value) for name, value in options.items()})
        data.check_files("fit")
        data.train_dataloader()


def test_the_same_file_to_train_and_to_validate_on_is_meant(files, tmp_path):
    data = data_of(files["texts"], tmp_path, val_path=files["texts"])
    data.check_files("fit")
    data.setup("fit")
    assert len(data.val_dataloader().dataset) == 11


@pytest.mark.parametrize("form", ["one", "list", "weights", "pattern"])
def test_forms_on_the_command_line(files, tmp_path, form):
    """As flags, and read back from the YAML that a run keeps."""
    from jsonargparse import ArgumentParser

    chats, texts = files["chats"], files["texts"]
    given, wanted = {
        "one": (chats, chats),
        "list": (json.dumps([chats, texts]), [chats, texts]),
        "weights": (f"{{{chats}: 2, {texts}: 0.5}}", {chats: 2, texts: 0.5}),
        "pattern": (str(tmp_path / "*s.jsonl"), str(tmp_path / "*s.jsonl")),
    }[form]
    parser = ArgumentParser()
    parser.add_argument("--cfg", action="config")
    parser.add_class_arguments(SFTData, "data")
    config = parser.parse_args([f"--data.path={given}"])
    assert config.data.path == wanted
    saved = tmp_path / "saved.yaml"
    saved.write_text(parser.dump(config))
    assert parser.parse_args([f"--cfg={saved}"]).data.path == wanted
