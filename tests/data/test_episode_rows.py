"""Rows of episodes: files that are alike, folders of texts, and what is refused before anything expensive begins."""

import sys

import numpy as np
import pytest

from lightning_ft import MAML, EpisodeData, Refusal
from lightning_ft.data.class_folders import contents_of
from lightning_ft.data.class_texts import ClassTexts
from tests.contract.subjects import trainer
from tests.data.tiny_tokenizers import tiny_encoder_tokenizer
from tests.modules.episodes import write_words
from tests.modules.tasks import WORDS

# ---- files that are alike


def test_files_that_are_alike_never_meet(tmp_path):
    """Three contents in five files of each class, one of them in both: two of each class stay."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for n, value in enumerate((0, 0, 1, 2, 2)):
            np.save(tmp_path / name / f"{n}.npy", np.array([value if value == 2 else value + 10 * ord(name)]))
    made = EpisodeData(str(tmp_path), way=2, shot=1, query=1, episodes=20, batch_size=20)
    made.setup("fit")
    assert {name: numbers.tolist() for name, numbers in made.pools["train"].items()} == {"a": [0, 2], "b": [5, 7]}
    (batch,) = made.train_dataloader()
    for episode in batch.episodes():
        support, query = (set(side.inputs.flatten().tolist()) for side in (episode.support, episode.query))
        assert not support & query and len(support | query) == 4 and 2.0 not in support | query
    with pytest.raises(Refusal, match="has 2 different rows"):
        EpisodeData(str(tmp_path), way=2, shot=2, query=1).setup("fit")


def test_files_of_a_size_of_their_own_are_not_read(tmp_path, monkeypatch):
    files = [tmp_path / f"{n}.pt" for n in range(4)]
    for file, content in zip(files, (b"one", b"two", b"one", b"three"), strict=True):
        file.write_bytes(content)
    read = []
    module = sys.modules["lightning_ft.data.class_folders"]
    original = module.digest_of
    monkeypatch.setattr(module, "digest_of", lambda file: read.append(file) or original(file))
    one, two, again, three = contents_of(files)
    assert one == again and len({one, two, three}) == 3 and read == files[:3]


# ---- folders of texts


@pytest.fixture
def folder(tmp_path):
    """Four classes of five texts, one of which comes twice; and files that are passed over."""
    for k in range(4):
        (tmp_path / f"texts/class {k}").mkdir(parents=True)
        for n in range(5):
            (tmp_path / f"texts/class {k}/{n}.txt").write_text(f"{WORDS[k]} {WORDS[n % 4]}\n")
        (tmp_path / f"texts/class {k}/.hidden.txt").write_text("hello")
    (tmp_path / "texts/README.txt").write_text("not of a class")
    return tmp_path / "texts"


def texts_of(path, tmp_path, **options):
    given = {"way": 2, "shot": 1, "query": 2, "val_classes": 2, "batch_size": 3, "episodes": 6, "seed": 1}
    made = EpisodeData(str(path), **{**given, "cache_dir": str(tmp_path / "cache"), **options})
    made.use_tokenizer(tiny_encoder_tokenizer())
    return made


def test_a_folder_of_texts_for_each_class(folder, tmp_path):
    made = texts_of(folder, tmp_path)
    made.check_files("fit")
    made.prepare_data()
    made.setup("fit")
    assert not made.folders and sorted({*made.pools["train"], *made.pools["val"]}) == [f"class {k}" for k in range(4)]
    assert all(len(numbers) == 4 for pools in made.pools.values() for numbers in pools.values())
    tokenizer = tiny_encoder_tokenizer()
    for loader, split in ((made.train_dataloader(), "train"), (made.val_dataloader(), "val")):
        for batch in loader:
            for episode in batch.episodes():
                support, query = episode.support.inputs.ids.tolist(), episode.query.inputs.ids.tolist()
                assert not {tuple(ids) for ids in support} & {tuple(ids) for ids in query}
                first = {tokenizer.decode(ids[1:2]) for ids in support}
                assert first <= {WORDS[int(name[-1])] for name in made.pools[split]}
    (preview,) = made.preview(1)
    assert preview.where.endswith(".txt") and preview.pieces[-1].text.startswith(" class ")


def test_texts_beside_images_describe_them(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", np.array([ord(name)]))
        (tmp_path / name / "0.txt").write_text("what it shows")
    assert EpisodeData(str(tmp_path)).folders


def test_folders_of_texts_that_are_refused(folder, tmp_path):
    (folder / "class 0/0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(Refusal, match=r"class 0/0.txt is not UTF-8 \(byte 3\)"):
        texts_of(folder, tmp_path).check_files("fit")
    (folder / "class 0/0.txt").write_text(" \n")
    with pytest.raises(Refusal, match=r"class 0/0.txt"):
        texts_of(folder, tmp_path).setup("fit")


# ---- refused early


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Eight classes of nine rows, which nobody may tokenise."""
    monkeypatch.setattr(ClassTexts, "_tokenised", lambda *_: pytest.fail("texts were tokenised"))
    return write_words(tmp_path)


EARLY = {
    "way": ({"way": 60}, "train has 8 classes with at least shot . query = 3 rows, and an episode takes 60"),
    "validation": ({"way": 3, "val_classes": 2}, "val has 2 classes .* and an episode takes 3"),
    "all taken": ({"val_classes": 4, "test_classes": 4}, "take all 8 classes of path"),
    "rows": ({"query": 20}, "'class 0' .train. has 9 rows, and an episode takes shot . query = 21"),
    "a path": ({"val_path": True, "way": 9}, "train has 8 classes"),
}


@pytest.mark.parametrize("case", EARLY)
def test_too_few_classes_are_told_by_the_labels(table, tmp_path, case):
    options, said = EARLY[case]
    if options.get("val_path"):
        other = tmp_path / "other.csv"
        other.write_text(table.read_text().replace("class ", "other "))
        options = {**options, "val_path": str(other)}
    given = {"way": 2, "shot": 1, "query": 2, **options}
    with pytest.raises(Refusal, match=said):
        EpisodeData(str(table), **given).check_files("fit")
    with pytest.raises(Refusal, match=said):
        trainer(tmp_path, max_epochs=1).fit(MAML("no/such_base"), EpisodeData(str(table), **given))


@pytest.mark.parametrize(("run", "split"), [("validate", "val"), ("test", "test"), ("predict", "test")])
def test_nothing_to_measure_on(table, tmp_path, run, split):
    said = f"no classes for {split}: set EpisodeData.{split}_path or {split}_classes"
    with pytest.raises(Refusal, match=said):
        EpisodeData(str(table), way=2, shot=1, query=2).check_files(run)
    with pytest.raises(Refusal, match=said):
        getattr(trainer(tmp_path), run)(MAML("no/such_base"), EpisodeData(str(table), way=2, shot=1, query=2))
