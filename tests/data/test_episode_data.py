"""Episodes: classes disjoint, rows never shared, the same however they are dealt; tables, folders, functions; refusals."""

import csv
import json

import numpy as np
import pytest
import torch

from lightning_ft import EpisodeData, Refusal
from lightning_ft.data.class_folders import FileReader, classes_in
from lightning_ft.data.episode_draw import draw_episode, split_classes
from lightning_ft.data.loader import Placement
from tests.data.tiny_tokenizers import tiny_encoder_tokenizer
from tests.modules.episodes import SINES, sines, write_words

CLASSES, ROWS = 12, 9


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("table"), classes=8, rows=ROWS)


def data(path, folder, **options):
    given = {"way": 3, "shot": 2, "query": 3, "val_classes": 3, "batch_size": 2, "episodes": 5, "seed": 1}
    made = EpisodeData(str(path), **{**given, "small_classes": "drop", "cache_dir": str(folder / "cache"), **options})
    made.use_tokenizer(tiny_encoder_tokenizer())
    return made


def test_a_draw_keeps_what_it_promises():
    pools = [np.arange(10 * k, 10 * k + 7) for k in range(9)]
    seen = set()
    for number in range(200):
        d = draw_episode(pools, way=4, shot=2, query=3, permute=True, key=(0, number))
        assert len(set(d.support) | set(d.query)) == 20 and not set(d.support) & set(d.query)
        for rows, labels, each in ((d.support, d.support_labels, 2), (d.query, d.query_labels, 3)):
            assert np.bincount(labels).tolist() == [each] * 4
            assert all(row // 10 == d.classes[label] for row, label in zip(rows.tolist(), labels.tolist(), strict=True))
        seen.add(tuple(d.classes.tolist()))
        again = draw_episode(pools, way=4, shot=2, query=3, permute=True, key=(0, number))
        assert all(np.array_equal(getattr(d, name), getattr(again, name)) for name in ("support", "query", "classes"))
        fixed = draw_episode(pools, way=4, shot=2, query=3, permute=False, key=(0, number))
        assert sorted(d.classes.tolist()) == fixed.classes.tolist()
    assert len(seen) > 190  # of 3,024 ordered choices
    counts = np.bincount([c for classes in seen for c in classes], minlength=9)
    expected = counts.sum() / 9
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1  # chi squared, 8 degrees, p = 0.001


def test_classes_are_dealt_once():
    names = [f"c{k}" for k in range(10)]
    dealt = split_classes(names, 3, ["c4", "c5"], seed=0, owner="E")
    assert dealt["test"] == ["c4", "c5"] and len(dealt["val"]) == 3 and len(dealt["train"]) == 5
    assert sorted(name for part in dealt.values() for name in part) == names
    assert dealt == split_classes(names[::-1], 3, ["c4", "c5"], seed=0, owner="E")
    assert dealt["val"] != split_classes(names, 3, ["c4", "c5"], seed=1, owner="E")["val"]


def texts(episode, side):
    rows = getattr(episode, side)
    lengths = rows.inputs.mask.sum(1).tolist() if rows.inputs.mask is not None else [rows.inputs.ids.shape[1]] * 99
    return [tuple(ids[:n]) for ids, n in zip(rows.inputs.ids.tolist(), lengths, strict=False)]


def test_texts_of_an_episode(table, tmp_path):
    made = data(table, tmp_path, episodes=20)
    made.setup("fit")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    tokenizer = tiny_encoder_tokenizer()
    label = {tuple(tokenizer(row["text"])["input_ids"]): row["label"] for row in rows}
    train, val = ({*made.pools[split]} for split in ("train", "val"))
    assert not train & val and len(train | val) == 8
    for loader, classes in ((made.train_dataloader(), train), (made.val_dataloader(), val)):
        met = set()
        for batch in loader:
            for episode in batch.episodes():
                support, query = texts(episode, "support"), texts(episode, "query")
                assert not set(support) & set(query) and len(set(support)) == 6 and len(set(query)) == 9
                names = {}
                for text, target in zip(
                    support + query, [*episode.support.targets.tolist(), *episode.query.targets.tolist()], strict=True
                ):
                    names.setdefault(target, set()).add(label[text])
                assert sorted(names) == [0, 1, 2] and all(len(found) == 1 for found in names.values())
                met |= set.union(*names.values())
        assert met <= classes


def test_training_may_take_more_rows_of_a_class(table, tmp_path):
    """Those of validation, and which classes are kept, stay as they are without it."""
    plain = data(table, tmp_path, shot=1)
    made = data(table, tmp_path, shot=1, train_shot=4)
    for one in (plain, made):
        one.setup("fit")
    for batch in made.train_dataloader():
        for episode in batch.episodes():
            support, query = texts(episode, "support"), texts(episode, "query")
            assert np.bincount(episode.support.targets).tolist() == [4] * 3 and len(set(support)) == 12
            assert np.bincount(episode.query.targets).tolist() == [3] * 3 and not set(support) & set(query)
    ours, theirs = (
        [texts(episode, "support") for batch in one.val_dataloader() for episode in batch.episodes()]
        for one in (made, plain)
    )
    assert ours == theirs and len(ours[0]) == 3
    with pytest.raises(
        Refusal, match="train. has 8 different rows, and .* train_shot \\+ query = 10 .* or train_shot,"
    ):
        data(table, tmp_path, shot=1, train_shot=7, small_classes="error").setup("fit")


def numbers(made, epoch=0, **placement):
    """Support ids of each episode of an epoch, by rank."""
    loader = made.train_dataloader()
    loader.placement = lambda: Placement(**placement)
    loader.set_epoch(epoch)
    return [[texts(episode, "support") for episode in batch.episodes()] for batch in loader], loader


def test_the_same_episodes_however_they_are_dealt(table, tmp_path):
    flat = [episode for batch in numbers(data(table, tmp_path))[0] for episode in batch]
    assert len(flat) == 5
    larger = [episode for batch in numbers(data(table, tmp_path, batch_size=5))[0] for episode in batch]
    ranks = [numbers(data(table, tmp_path, batch_size=1), world_size=2, rank=rank)[0] for rank in range(2)]
    dealt = [episode for pair in zip(*ranks, strict=True) for batch in pair for episode in batch]
    assert flat == larger == dealt
    other = [episode for batch in numbers(data(table, tmp_path), epoch=1)[0] for episode in batch]
    assert other != flat
    resumed, _ = numbers(data(table, tmp_path), position=1)
    assert resumed == numbers(data(table, tmp_path))[0][1:]
    made = data(table, tmp_path)
    first, second = ([texts(e, "support") for b in made.val_dataloader() for e in b.episodes()] for _ in range(2))
    assert first == second


def test_windows_are_counted(table, tmp_path):
    made = data(table, tmp_path, batch_size=1)
    loader = made.train_dataloader()
    loader.placement = lambda: Placement(world_size=2, rank=1, accumulate=2)
    batches = list(loader)
    assert [batch.counts["task"] for batch in batches] == [1, 1, 0]
    assert [batch.window["task"] for batch in batches] == [4, 4, 1]


def test_twins_never_meet(tmp_path):
    """Three different texts of a class, each five times: an episode of four rows has no other than these three."""
    rows = [{"text": f"{word} {'hello ' * k}", "label": f"c{k}"} for k in range(4) for word in ("yes", "no", "you")]
    path = tmp_path / "twins.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    made = data(path, tmp_path, val_classes=0, way=2, shot=1, query=2)
    made.setup("fit")
    assert {len(pool) for pool in made.pools["train"].values()} == {3}
    with pytest.raises(Refusal, match="has 3 different rows, and an episode takes shot \\+ query = 4"):
        data(path, tmp_path, val_classes=0, way=2, shot=1, query=3, small_classes="error").setup("fit")


def test_a_text_of_several_classes_is_left_out(tmp_path):
    """Else "hello" could be support of one class and query of another."""
    rows = [{"text": f"{word} {'hello ' * k}", "label": f"c{k}"} for k in range(4) for word in ("yes", "no", "you")]
    rows += [{"text": "hello", "label": "c1"}, {"text": "hello", "label": "c2"}, {"text": "hello", "label": "c2"}]
    path = tmp_path / "shared.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = data(path, tmp_path, val_classes=0, way=2, shot=1, query=2, episodes=40)
    made.setup("fit")
    assert {len(pool) for pool in made.pools["train"].values()} == {3}
    for batch in made.train_dataloader():
        for episode in batch.episodes():
            assert not set(texts(episode, "support")) & set(texts(episode, "query"))
    assert made.reports()["train"].facts["left out, since several classes have the text"] == "3"


def test_own_files_of_validation_share_no_class(table, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text(table.read_text().replace("class ", "other "))
    made = data(table, tmp_path, val_classes=0, val_path=str(other))
    made.setup("fit")
    assert all(name.startswith("other") for name in made.pools["val"]) and len(made.pools["train"]) == 8
    with pytest.raises(Refusal, match="trained on and in the validation too"):
        data(table, tmp_path, val_classes=0, val_path=str(table)).setup("fit")
    with pytest.raises(Refusal, match="in the validation and in the test too"):
        data(table, tmp_path, val_classes=0, val_path=str(other), test_path=str(other)).setup("fit")
    (preview,) = made.preview(1)
    assert preview.pieces[-1].text == " class 0" and set(made.reports()) == {"train", "val"}


# ---- folders


@pytest.mark.parametrize("kind", ["png", "npy", "pt"])
def test_folders_of_classes(tmp_path, kind):
    if kind == "png":
        image = pytest.importorskip("PIL.Image")
    for k in range(5):
        (tmp_path / f"c{k}").mkdir()
        for n in range(4):
            file = tmp_path / f"c{k}/{n}.{kind}"
            if kind == "png":
                image.new("RGB", (8, 6), (40 * k, n, 0)).save(file)
            elif kind == "npy":
                np.save(file, np.array([k, n], dtype=np.float64))
            else:
                torch.save(torch.tensor([float(k), float(n)]), file)
    made = EpisodeData(str(tmp_path), way=2, shot=1, query=2, val_classes=2, batch_size=3, episodes=6, image_size=4)
    made.check_files("fit")
    made.setup("fit")
    for loader, classes in ((made.train_dataloader(), made.pools["train"]), (made.val_dataloader(), made.pools["val"])):
        numbers = {int(name[1:]) for name in classes}
        for batch in loader:
            episode = batch.stacked
            x = episode.support.inputs
            assert x.dtype == torch.float32 and x.shape[:2] == (int(batch.counts["task"]), 2)
            if kind == "png":
                assert x.shape[2:] == (3, 4, 4) and float(x.max()) <= 1
                colour = (x[:, :, 0, 0, 0] * 255 / 40).round()
                assert {int(value) for value in colour.flatten()} <= numbers
            else:
                assert x.shape[2:] == (2,) and {int(value) for value in x[..., 0].flatten()} <= numbers
                both = torch.cat([x, episode.query.inputs], 1)
                assert all(len({tuple(row) for row in rows.tolist()}) == 6 for rows in both)
    assert made.reports() == {} and made.preview() == []


def test_folders_of_their_own_share_no_class(tmp_path):
    for folder, names in (("a", "xyz"), ("b", "uvw"), ("c", "wxt")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            for n in range(2):
                np.save(tmp_path / folder / name / f"{n}.npy", np.array([ord(name), n]))
    made = EpisodeData(str(tmp_path / "a"), val_path=str(tmp_path / "b"), way=2, shot=1, query=1)
    made.setup("fit")
    assert (set(made.pools["train"]), set(made.pools["val"])) == (set("xyz"), set("uvw"))
    with pytest.raises(Refusal, match="the class 'x' is trained on and in the test too"):
        EpisodeData(str(tmp_path / "a"), test_path=str(tmp_path / "c"), way=2, shot=1, query=1).setup("test")


def test_hidden_files_are_passed_over(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / ".hidden").mkdir(parents=True)
        for n in range(2):
            np.save(tmp_path / name / f"{n}.npy", np.zeros(2))
        (tmp_path / name / "._1.npy").write_bytes(b"of macOS")
        (tmp_path / name / ".hidden/2.npy").write_bytes(b"neither")
    assert {name: [file.name for file in files] for name, files in classes_in(tmp_path).items()} == {
        "a": ["0.npy", "1.npy"],
        "b": ["0.npy", "1.npy"],
    }


def test_what_was_read_is_kept_up_to_a_number_of_bytes(tmp_path, monkeypatch):
    files = []
    for n in range(4):
        np.save(tmp_path / f"{n}.npy", np.full(10, n, dtype=np.float32))
        files.append(tmp_path / f"{n}.npy")
    reader, read = FileReader(image_size=4, channels=1, kept_bytes=100), []
    original = reader._item
    monkeypatch.setattr(reader, "_item", lambda file: read.append(file.name) or original(file))
    for number in (0, 1, 0, 2, 0, 1, 3):  # two of 40 bytes stay: 1 gives way to 2, which gives way to 1, and 0 to 3
        assert reader.batch([files[number]])[0, 0] == number
    assert read == ["0.npy", "1.npy", "2.npy", "1.npy", "3.npy"]
    assert reader._bytes == sum(item.nbytes for item in reader._kept.values()) == 80


def test_folders_that_are_refused(tmp_path):
    (tmp_path / "only").mkdir()
    np.save(tmp_path / "only/a.npy", np.zeros(2))
    with pytest.raises(Refusal, match="each class needs one"):
        EpisodeData(str(tmp_path)).check_files("fit")
    (tmp_path / "second").mkdir()
    np.save(tmp_path / "second/a.npy", np.zeros(3))
    made = EpisodeData(str(tmp_path), way=2, shot=1, query=1)
    with pytest.raises(Refusal, match="has 1 rows"):
        made.check_files("fit")
    with pytest.raises(Refusal, match="has 1 different rows"):
        made.setup("fit")
    for name, size in (("only", 2), ("second", 3)):
        np.save(tmp_path / name / "b.npy", np.ones(size))
    made = EpisodeData(str(tmp_path), way=2, shot=1, query=1)
    made.setup("fit")
    with pytest.raises(Refusal, match="all must be alike"):
        list(made.train_dataloader())


# ---- functions


def test_a_function_of_tasks():
    flat = torch.cat([batch.stacked.support.inputs for batch in sines(batch_size=8, episodes=150).train_dataloader()])
    other = torch.cat(
        [batch.stacked.support.inputs for batch in sines(batch_size=150, episodes=150).train_dataloader()]
    )
    assert flat.shape == (150, 4, 1) and torch.equal(flat, other) and len(flat.unique()) == 600
    (batch,) = sines(batch_size=64, episodes=64).train_dataloader()
    x, y = batch.stacked.support.inputs.double(), batch.stacked.support.targets.double()
    # y = a sin(x - p) = c sin x + d cos x: two numbers fit all points of a task.
    for points, values in zip(x, y, strict=True):
        basis = torch.cat([points.sin(), points.cos()], 1)
        fitted = torch.linalg.lstsq(basis, values).solution
        torch.testing.assert_close(basis @ fitted, values, rtol=0, atol=1e-5)
        assert 0.1 <= float(fitted.norm()) <= 5
    assert not sines().has_classes


def wrong(rng, count):
    return (rng.random((count, 2)),) * 3


def fails(rng, count):
    return len(rng)  # a TypeError of its own


def test_tasks_are_copies_in_the_order_asked_for():
    """Side by side, apart and over a block's end; what a net writes into them reaches no later epoch."""
    drawn = sines()._drawn("train")
    x = drawn.episodes(0, np.arange(130)).support.inputs
    for numbers in ([5], [3, 4, 5], [62, 63, 64, 65], [3, 5, 9], [9, 5]):
        found = drawn.episodes(0, np.array(numbers))
        assert torch.equal(found.support.inputs, torch.stack([x[n] for n in numbers]))
        found.support.inputs.zero_()
    assert torch.equal(drawn.episodes(0, np.arange(130)).support.inputs, x)


def test_an_error_inside_a_function_stays_what_it_is():
    with pytest.raises(TypeError, match="has no len"):
        list(EpisodeData(tasks=f"{__name__}.fails").train_dataloader())


def test_functions_that_are_refused():
    with pytest.raises(Refusal, match="cannot be imported"):
        EpisodeData(tasks="nowhere.at_all").check_files("fit")
    with pytest.raises(Refusal, match="must give support x"):
        list(EpisodeData(tasks=f"{__name__}.wrong").train_dataloader())
    with pytest.raises(Refusal, match="cannot be called"):
        list(EpisodeData(tasks=SINES, tasks_args={"no_such": 1}).train_dataloader())
    with pytest.raises(Refusal, match="give one of them"):
        EpisodeData()
    with pytest.raises(Refusal, match="in training from tasks_args"):
        EpisodeData(tasks=SINES, train_shot=15)
    with pytest.raises(Refusal, match="tasks_args are arguments"):
        EpisodeData("x.csv", tasks_args={"shot": 1})


def test_tables_that_are_refused(table, tmp_path):
    with pytest.raises(Refusal, match="val_classes names 'nobody'"):
        data(table, tmp_path, val_classes=["nobody"]).setup("fit")
    with pytest.raises(Refusal, match="none is left to train on"):
        data(table, tmp_path, val_classes=8).setup("fit")
    with pytest.raises(Refusal, match="train has 5 classes .* and an episode takes 6"):
        data(table, tmp_path, way=6).setup("fit")
    with pytest.raises(Refusal, match="no classes for test"):
        data(table, tmp_path).test_dataloader()


def test_a_pickled_array_is_not_opened(tmp_path):
    for k in range(2):
        (tmp_path / f"c{k}").mkdir()
        for n in range(2):
            np.save(tmp_path / f"c{k}/{n}.npy", np.array([{"a": (k, n)}], dtype=object), allow_pickle=True)
    made = EpisodeData(str(tmp_path), way=2, shot=1, query=1)
    with pytest.raises(Refusal, match="cannot be read"):
        list(made.train_dataloader())
