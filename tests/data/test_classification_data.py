"""Labelled rows as batches: against what the tokenizer makes of them by itself, dealt, resumed, on two ranks."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ft.data.classification_data import ClassificationData
from lightning_ft.data.frames import Frame, shares
from lightning_ft.data.plan import split_rows
from lightning_ft.functional.errors import Refusal
from tests.data.tiny_tokenizers import tiny_encoder_tokenizer, tiny_tokenizer

TOKENIZER = tiny_encoder_tokenizer()
WORDS = ["hello", "world", "sentence", "positive", "yes", "no", "thank", "you"]


def write(tmp_path, rows, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts(n, **more):
    return [
        {"text": " ".join(WORDS[(i + k) % 8] for k in range(i % 7 + 1)), "label": "even" if i % 3 else "odd", **more}
        for i in range(n)
    ]


def data_of(tmp_path, rows, tokenizer=TOKENIZER, **options):
    path = rows if isinstance(rows, (str, list)) and not isinstance(rows[0], dict) else write(tmp_path, rows)
    data = ClassificationData(path, cache_dir=str(tmp_path / "cache"), **{"batch_size": 4, **options})
    data.use_tokenizer(tokenizer)
    return data


def batches(data, loader="train"):
    data.setup({"train": "fit", "val": "validate"}.get(loader, loader))
    return list(getattr(data, f"{loader}_dataloader")())


def test_rows_are_what_the_tokenizer_makes_of_them(tmp_path):
    rows = texts(13)
    data = data_of(tmp_path, rows, shuffle=False)
    seen = 0
    for batch in batches(data):
        numbers = batch.rows.tolist()
        whole = TOKENIZER([rows[n]["text"] for n in numbers], padding=True, return_tensors="pt")
        assert torch.equal(batch.ids, whole["input_ids"]) and torch.equal(batch.mask, whole["attention_mask"].bool())
        assert batch.targets.tolist() == [["even", "odd"].index(rows[n]["label"]) for n in numbers]
        assert batch.targets.dtype == torch.int64 and batch.types is None
        assert len(batch.scored) == len(batch.labels) == 0
        assert batch.counts == {"token": 0.0, "row": float(len(numbers))} == batch.window
        seen += len(numbers)
    assert seen == 13
    assert data.label_names() == ["even", "odd"] and data.class_counts() == [8, 5]
    assert data.resolved_task() == "sequence_classification" and not data.multi_label()
    assert "classes: even 8, odd 5" in str(data.reports()["train"])


def test_pairs_have_types_and_both_end_tokens(tmp_path):
    rows = texts(9, other="no thank you")
    for batch in batches(data_of(tmp_path, rows, pair_column="other")):
        numbers = batch.rows.tolist()
        pair = [rows[n]["text"] for n in numbers], [rows[n]["other"] for n in numbers]
        whole = TOKENIZER(*pair, padding=True, return_tensors="pt")
        assert torch.equal(batch.ids, whole["input_ids"]) and torch.equal(batch.types, whole["token_type_ids"])


@pytest.mark.parametrize("truncation, side", [("keep_start", "right"), ("keep_end", "left")])
@pytest.mark.parametrize("pair", [False, True])
def test_cut_rows_keep_their_special_tokens_as_the_tokenizer_cuts_them(tmp_path, truncation, side, pair):
    rows = texts(14, other="yes hello you world")
    tokenizer = tiny_encoder_tokenizer()
    tokenizer.truncation_side = side
    options = {"pair_column": "other"} if pair else {}
    data = data_of(tmp_path, rows, max_length=8, truncation=truncation, shuffle=False, batch_size=1, **options)
    for batch in batches(data):
        row = rows[int(batch.rows)]
        given = (row["text"], row["other"]) if pair else (row["text"],)
        whole = tokenizer(*given, truncation=True, max_length=8)
        assert batch.ids[0].tolist() == whole["input_ids"]
        assert not pair or batch.types[0].tolist() == whole["token_type_ids"]
    report = data.reports()["train"]
    assert report.longest == 8 and report.truncated == sum(
        row["text"].count(" ") + 1 > (1 if pair else 6) for row in rows
    )


def test_long_rows_are_refused_or_left_out(tmp_path):
    rows = texts(14)
    with pytest.raises(Refusal, match=r"rows.jsonl, line 6 has 8 tokens, more than max_length 7, as have 4 of 14 rows"):
        batches(data_of(tmp_path, rows, max_length=7))
    data = data_of(tmp_path, rows, max_length=7, truncation="drop")
    assert sum(len(batch.rows) for batch in batches(data)) == 10
    assert data.reports()["train"].dropped == {"longer than 7 tokens": 4}
    with pytest.raises(Refusal, match="max_length 2 leaves no room beside the 2 special tokens"):
        batches(data_of(tmp_path, rows, max_length=2, truncation="keep_start"))


def test_several_classes_and_numbers(tmp_path):
    rows = [{"text": "yes", "label": label} for label in (["b", "a"], [], ["c"], ["a", "c"])]
    (batch,) = batches(data_of(tmp_path, rows, shuffle=False))
    expected = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1]])
    order = batch.rows.tolist()
    assert torch.equal(batch.targets, expected[order]) and batch.targets.dtype == torch.float32
    rows = [{"text": "yes", "label": label} for label in (0.5, -1, 2, 3.25)]
    data = data_of(tmp_path, rows, shuffle=False)
    (batch,) = batches(data)
    assert batch.targets.tolist() == [0.5, -1, 2, 3.25] and batch.targets.dtype == torch.float32
    assert data.label_names() is None and data.resolved_task() == "regression"
    with pytest.raises(Refusal, match="A regression has no classes to count"):
        data.class_counts()


def tagged():
    return [
        {"tokens": ["hello", "bright", "world"], "tags": ["A", "B", None]},
        {"tokens": ["xyz", "\u200b", "no"], "tags": ["B", "A", "A"]},
        {"tokens": ["yes"], "tags": ["B"]},
    ]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("make", [tiny_encoder_tokenizer, tiny_tokenizer])
def test_the_first_token_of_each_word_has_its_class(tmp_path, make, packing):
    tokenizer, rows = make(), tagged()
    data = data_of(tmp_path, rows, tokenizer, packing=packing, shuffle=False, batch_size=3)
    (batch,) = batches(data)
    flat, expected = batch.ids.reshape(-1), []
    for place, n in enumerate(batch.rows.tolist()):
        words = rows[n]["tokens"]
        spaced = words if make is tiny_encoder_tokenizer else [words[0], *(" " + word for word in words[1:])]
        encoded = tokenizer(spaced, is_split_into_words=True)
        begin = batch.bounds[place] if packing else place * batch.ids.shape[1]
        assert flat[begin : begin + len(encoded["input_ids"])].tolist() == encoded["input_ids"]
        firsts = {word: at for at, word in reversed(list(enumerate(encoded.word_ids()))) if word is not None}
        tags = [(firsts.get(word), tag) for word, tag in enumerate(rows[n]["tags"])]
        expected += [(begin + at, "AB".index(tag), place) for at, tag in tags if tag is not None and at is not None]
    found = zip(batch.scored.tolist(), batch.labels.tolist(), batch.segment_of_scored.tolist(), strict=True)
    assert list(found) == expected
    assert batch.counts["token"] == len(expected) and batch.targets is None
    assert sum(data.class_counts()) == len(expected) == data.reports()["train"].scored
    if packing:  # words read as they do in a text
        first = flat[: batch.bounds[1]].tolist()
        assert tokenizer(" ".join(rows[int(batch.rows[0])]["tokens"]))["input_ids"] == first


@pytest.mark.parametrize("truncation, left", [("keep_start", [["A", "B"], ["B"]]), ("keep_end", [["A"], ["A"]])])
def test_cut_words_lose_their_classes(tmp_path, truncation, left):
    rows = [
        {"tokens": ["hello", "world", "yes"], "tags": ["A", "B", "A"]},
        {"tokens": ["no", "xyz", "you"], "tags": ["B", None, "A"]},
    ]
    most = 4 if truncation == "keep_start" else 3
    data = data_of(tmp_path, rows, max_length=most, truncation=truncation, shuffle=False, batch_size=1)
    for batch, tags in zip(batches(data), left, strict=True):
        assert ["AB"[k] for k in batch.labels.tolist()] == tags
        assert batch.ids[0, [0, -1]].tolist() == [2, 3]
    assert data.class_counts() == [sum(tags.count(name) for tags in left) for name in "AB"]


def test_unfit_rows_are_refused_or_counted(tmp_path):
    rows = [*texts(6), {"text": "yes", "label": None}, {"text": "", "label": "odd"}, {"text": 3, "label": "odd"}]
    with pytest.raises(Refusal, match="line 7: the row has no label"):
        data_of(tmp_path, rows).check_files()
    with pytest.raises(Refusal, match="line 8: text is empty"):
        batches(data_of(tmp_path, texts(7) + rows[7:]))
    data = data_of(tmp_path, rows, bad_rows="drop")
    data.check_files()
    assert sum(len(batch.rows) for batch in batches(data)) == 6
    assert data.reports()["train"].dropped == {"unfit": 2, "no label to learn": 1}
    rows = [*tagged(), {"tokens": ["a", "b"], "tags": ["A"]}, {"tokens": ["a"], "tags": [None]}]
    with pytest.raises(Refusal, match="line 4: the row has 2 words and 1 tags"):
        batches(data_of(tmp_path, rows))
    with pytest.raises(Refusal, match="line 4: the row has no word with a label"):
        batches(data_of(tmp_path, [*tagged(), rows[4]]))
    data = data_of(tmp_path, rows, bad_rows="drop")
    assert len(batches(data)) == 1
    assert data.reports()["train"].dropped == {"not one tag a word": 1, "no word with a label": 1}


def test_a_class_that_training_rows_lack_is_refused_by_line(tmp_path):
    val = write(tmp_path, [{"text": "yes", "label": "even"}, {"text": "no", "label": "evn"}], "val.jsonl")
    with pytest.raises(
        Refusal, match=r"val.jsonl, line 2: the label 'evn' is none of the 2 classes even, odd: is 'even' "
    ):
        data_of(tmp_path, texts(6), val_path=val, bad_rows="drop").check_files("fit")


def test_rows_to_predict_need_no_labels(tmp_path):
    bare = write(tmp_path, [{"text": "yes"}, {"text": "no thank you"}], "bare.jsonl")
    data = data_of(tmp_path, texts(6), predict_path=bare)
    data.check_files()
    (batch,) = batches(data, "predict")
    assert batch.targets.tolist() == [0, 0] and batch.counts["row"] == 2
    with pytest.raises(Refusal, match="bare.jsonl has no column 'label'"):
        data_of(tmp_path, texts(6), test_path=bare).check_files()
    words = write(tmp_path, [{"tokens": ["yes", "you"]}], "words.jsonl")
    (batch,) = batches(data_of(tmp_path, tagged(), predict_path=words), "predict")
    assert batch.scored.tolist() == [1, 2]


def test_classes_keep_their_shares_in_what_is_held_out(tmp_path):
    rows = [{"text": WORDS[n % 8], "label": "abc"[min(n % 10, 2)]} for n in range(100)]  # 10, 10 and 80 rows
    for seed in range(5):
        data = data_of(tmp_path, rows, val_fraction=0.2, seed=seed)
        held = [row for batch in batches(data, "val") for row in batch.rows.tolist()]
        assert Counter(rows[n]["label"] for n in held) == {"a": 2, "b": 2, "c": 16}
        assert data.class_counts() == [8, 8, 64]


def test_strata_give_what_they_owe_and_always_keep_a_row():
    for seed in range(20):
        generator = np.random.default_rng(seed)
        strata = generator.integers(0, 6, int(generator.integers(2, 60)))
        fraction = float(generator.uniform(0.05, 0.6))
        kept, held = split_rows(len(strata), fraction, seed=seed, strata=strata)
        assert sorted([*kept, *held]) == list(range(len(strata)))
        sizes, left = Counter(strata.tolist()), Counter(strata[kept].tolist())
        if len(held) <= len(strata) - len(sizes):
            assert all(left[k] >= 1 for k in sizes)
            wanted = min(max(1, round(len(strata) * fraction)), len(strata) - 1) / len(strata)
            assert all(sizes[k] - left[k] <= np.ceil(sizes[k] * wanted) + 1 for k in sizes)


def test_shares_of_a_pair_are_those_of_the_tokenizer():
    for first in range(1, 9):
        for second in range(1, 9):
            for room in range(2, first + second + 2):
                row = TOKENIZER("a " * first, "b " * second, truncation=True, max_length=room + 3)["input_ids"]
                border = row.index(3)
                assert shares(first, second, room) == (border - 1, len(row) - border - 2)


def test_frames_of_other_kinds_of_tokenizers():
    frame = Frame.of(tiny_tokenizer(puts_bos=True), pair=False)
    assert (frame.before, frame.after, frame.size, frame.types) == ((0,), (), 1, None)
    assert Frame.of(tiny_tokenizer(), pair=False).size == 0
    frame = Frame.of(TOKENIZER, pair=True)
    assert (frame.before, frame.between, frame.after) == ((2,), (3,), (3,))
    assert frame.types_of(1, 2).tolist() == TOKENIZER("yes", "no you")["token_type_ids"]


def test_a_slow_tokenizer_and_the_cache(tmp_path, monkeypatch):
    rows = tagged()
    (fast,) = batches(data_of(tmp_path, rows, shuffle=False))
    monkeypatch.setattr(type(TOKENIZER), "is_fast", False)
    options = {"cache_dir": str(tmp_path / "slow"), "shuffle": False, "batch_size": 4}
    slow = ClassificationData(write(tmp_path, rows), **options)
    slow.use_tokenizer(TOKENIZER)
    (batch,) = batches(slow)
    assert torch.equal(batch.ids, fast.ids) and torch.equal(batch.scored, fast.scored)
    again = ClassificationData(write(tmp_path, rows), label_column="tags", max_length=20, **options)
    again.use_tokenizer(TOKENIZER)
    batches(again)
    assert len(list((tmp_path / "slow").iterdir())) == 1  # another max_length or label costs nothing


def test_preview_shows_text_and_label(tmp_path):
    (row,) = data_of(tmp_path, texts(6)).preview(1)
    assert [(p.text, p.scored) for p in row.pieces] == [("[CLS] hello [SEP]", False), (" odd", True)]
    assert row.where.endswith("rows.jsonl, line 1") and row.tokens == 3
    (row,) = data_of(tmp_path, tagged()).preview(1)
    assert [p.text for p in row.pieces if p.scored] == ["hello/A", "b/B"]
    assert row.tokens == len(TOKENIZER("hello bright world")["input_ids"])
    (row,) = data_of(tmp_path, [{"text": "yes", "label": k} for k in ([], ["a"])]).preview(1)
    assert row.pieces[-1].text == " none"
    (row,) = data_of(tmp_path, [{"text": "yes", "label": 1.5}]).preview(1)
    assert row.pieces[-1].text == " 1.5"


def test_several_files_share_their_classes(tmp_path):
    first, second = (
        write(tmp_path, texts(6), "a.jsonl"),
        write(tmp_path, [{"text": "yes", "label": "third"}], "b.jsonl"),
    )
    data = data_of(tmp_path, [first, second])
    assert data.label_names() == ["even", "odd", "third"]
    assert sum(len(batch.rows) for batch in batches(data)) == 7 and data.class_counts() == [4, 2, 1]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"task": "regression", "labels": ["a"]}, "labels names classes, and a regression has none"),
        ({"task": "token_classification", "pair_column": "b"}, "pair_column has no meaning for words"),
        ({"labels": ["a", "a"]}, "labels must be names, each once"),
        ({"labels": []}, "labels must be names"),
        ({"task": "causal_lm"}, "ClassificationData.task must be one of"),
        ({"max_tokens": 64}, "set packing true"),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(options, match):
    with pytest.raises(Refusal, match=match):
        ClassificationData("rows.jsonl", **options)


class Bag(LightningModule):
    """Learns from targets and from labels of words, so that its weights depend on every batch."""

    def __init__(self, task=None):
        super().__init__()
        self.table = torch.nn.Embedding(len(TOKENIZER), 2)
        torch.nn.init.zeros_(self.table.weight)
        self.seen = []
        if task is not None:
            self.task = task

    @property
    def tokenizer(self):
        return TOKENIZER

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, tuple(batch.rows.tolist())))
        real = (batch.rows >= 0).float()
        logits = (self.table(batch.ids) * batch.mask[..., None]).sum(1)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        nominal = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return (loss * real).sum() / batch.window["row"] * nominal

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(tmp_path, module, data, callbacks=(), ckpt_path=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "default_root_dir": tmp_path, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(**quiet, enable_checkpointing=False, callbacks=list(callbacks), **options)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return module


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_a_run_resumed_in_mid_epoch_ends_alike(tmp_path):
    file, rows = tmp_path / "middle.ckpt", texts(23)
    straight = fit(tmp_path, Bag(), data_of(tmp_path, rows, batch_size=2), [SaveAt(2, file)])
    resumed = fit(tmp_path, Bag(), data_of(tmp_path, rows, batch_size=2), ckpt_path=file)
    assert torch.equal(resumed.table.weight, straight.table.weight) and len(resumed.seen) < len(straight.seen)
    with pytest.raises(Refusal, match="middle of an epoch with labels None .now .'odd', 'even'"):
        fit(tmp_path, Bag(), data_of(tmp_path, rows, batch_size=2, labels=["odd", "even"]), ckpt_path=file)


def test_a_module_of_another_task_is_refused(tmp_path):
    with pytest.raises(Refusal, match="Bag.task is regression, but the rows of .* are for sequence_classification"):
        fit(tmp_path, Bag("regression"), data_of(tmp_path, texts(6)))
    fit(tmp_path, Bag("sequence_classification"), data_of(tmp_path, texts(6)), max_epochs=1)


def test_two_ranks_learn_what_one_does(tmp_path, two_ranks):
    rows = texts(9)  # 2 ranks x 2 rows x 2: the last window leaves a rank without rows
    alone = fit(tmp_path, Bag(), data_of(tmp_path, rows, batch_size=8), accumulate_grad_batches=1)
    job = "tests.data.classification_data_jobs:fit_on_two"
    (seen, weight), (other_seen, other) = two_ranks.run(job, folder=str(tmp_path), rows=rows)
    assert torch.equal(weight, other)
    torch.testing.assert_close(weight, alone.table.weight, atol=1e-6, rtol=1e-5)
    drawn = [row for part in (seen, other_seen) for _, found in part for row in found]
    assert sorted(row for row in drawn if row >= 0) == sorted(list(range(9)) * 2) and -1 in drawn


def test_fillers_have_targets_of_the_right_kind(tmp_path):
    for label, shape, dtype in (("a", (1,), torch.int64), (1.5, (1,), torch.float32), (["a"], (1, 1), torch.float32)):
        rows = [{"text": "yes", "label": label}, {"text": "yes", "label": "b" if label == "a" else label}]
        data = data_of(tmp_path, rows)
        batch = data.collate([], packed=False, window=None, task=None)
        assert batch.targets.shape == shape and batch.targets.dtype == dtype and batch.counts["row"] == 0
        assert batch.rows.tolist() == [-1] and torch.isfinite(batch.targets.float()).all()
