"""Prompts and completions as batches: against what transformers makes of them, and its own shift to the right."""

import json

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from lightning_ft.data.seq2seq_data import Seq2SeqData
from lightning_ft.functional.errors import Refusal
from tests.data.tiny_tokenizers import tiny_seq2seq_tokenizer, tiny_tokenizer

TOKENIZER = tiny_seq2seq_tokenizer()
WORDS = ["hello", "world", "sentence", "positive", "yes", "no", "thank", "you"]


def rows_of(n):
    return [
        {
            "prompt": " ".join(WORDS[(i + k) % 8] for k in range(i % 7 + 1)),
            "completion": " ".join(WORDS[(i * 3 + k) % 8] for k in range(i % 3 + 1)),
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 of two layers with its tokenizer; 0, the padding's number, begins what it writes."""
    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(
        vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def data_of(tmp_path, folder, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"batch_size": 4, "shuffle": False, "tokenizer": str(folder), **options}
    return Seq2SeqData(str(path), cache_dir=str(tmp_path / "cache"), **options)


def batches(data):
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize("prefix", ["", "summarize: "])
def test_batches_are_what_transformers_makes_of_the_rows(tmp_path, folder, prefix):
    rows, model = rows_of(13), T5ForConditionalGeneration.from_pretrained(folder)
    data, seen = data_of(tmp_path, folder, rows, prefix=prefix), []
    for batch in batches(data):
        numbers = batch.rows.tolist()
        read = TOKENIZER([prefix + rows[n]["prompt"] for n in numbers], padding=True, return_tensors="pt")
        written = TOKENIZER(text_target=[rows[n]["completion"] for n in numbers], padding=True, return_tensors="pt")
        mask = written["attention_mask"].bool()
        assert torch.equal(batch.source.ids, read["input_ids"])
        assert torch.equal(batch.source.mask, read["attention_mask"].bool())
        assert torch.equal(batch.mask, mask) and batch.bounds is None
        labels = written["input_ids"].masked_fill(~mask, -100)
        shifted = model.prepare_decoder_input_ids_from_labels(labels)
        assert torch.equal(batch.ids[mask], shifted[mask])
        assert torch.equal(batch.labels, labels[mask]) and torch.equal(batch.scored, mask.reshape(-1).nonzero()[:, 0])
        assert batch.counts == {"token": float(mask.sum()), "row": float(len(numbers))} == batch.window
        loss = model(**read, labels=labels).loss
        logits = model(
            input_ids=batch.source.ids, attention_mask=batch.source.mask, decoder_input_ids=batch.ids
        ).logits.reshape(-1, len(TOKENIZER))[batch.scored]
        torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, batch.labels), loss)
        seen += numbers
    assert sorted(seen) == list(range(13))
    report = data.reports()["train"]
    assert report.scored == sum(len(TOKENIZER(row["completion"])["input_ids"]) for row in rows)


@pytest.mark.parametrize("truncation, side", [("keep_start", "right"), ("keep_end", "left")])
def test_cut_rows(tmp_path, folder, truncation, side):
    rows, tokenizer = rows_of(14), tiny_seq2seq_tokenizer()
    tokenizer.truncation_side = side
    data = data_of(tmp_path, folder, rows, truncation=truncation, max_length=6, max_target_length=3, batch_size=1)
    for batch in batches(data):
        row = rows[int(batch.rows)]
        whole = tokenizer(row["prompt"], truncation=True, max_length=6)["input_ids"]
        assert batch.source.ids[0].tolist() == whole and whole[-1] == 1
        target = TOKENIZER(row["completion"])["input_ids"]
        assert batch.labels.tolist() == target[:3]  # no end token where the end was cut away
    report = data.reports()["train"]
    long = [
        len(TOKENIZER(r["prompt"])["input_ids"]) > 6 or len(TOKENIZER(r["completion"])["input_ids"]) > 3 for r in rows
    ]
    assert report.truncated == sum(long) > 3


@pytest.mark.parametrize(
    "options, match",
    [
        ({"max_length": 4}, r"line \d+ has \d+ tokens to read, more than max_length 4"),
        ({"max_target_length": 2}, r"line \d+ has \d+ tokens to write, more than max_target_length 2"),
    ],
)
def test_long_rows_are_refused_or_left_out(tmp_path, folder, options, match):
    with pytest.raises(Refusal, match=match):
        batches(data_of(tmp_path, folder, rows_of(9), **options))
    kept = data_of(tmp_path, folder, rows_of(9), truncation="drop", **options)
    assert 0 < sum(len(batch.rows) for batch in batches(kept)) < 9
    assert sum(kept.reports()["train"].dropped.values()) + kept.reports()["train"].kept == 9


def test_columns(tmp_path, folder):
    rows = [{"source": "yes", "target": "no"}, {"source": "hello", "target": "world"}]
    (batch,) = batches(data_of(tmp_path, folder, rows))
    assert TOKENIZER.decode(batch.labels) in ("no</s>world</s>", "world</s>no</s>")
    rows = [{"text": "yes", "summary": "no"}]
    (batch,) = batches(data_of(tmp_path, folder, rows, prompt_column="text", completion_column="summary"))
    assert len(batch.rows) == 1
    with pytest.raises(Refusal, match="no column 'prompt'; it has summary, text"):
        data_of(tmp_path, folder, rows).check_files()
    with pytest.raises(Refusal, match="no column 'sumary'.*perhaps 'summary'"):
        data_of(tmp_path, folder, rows, prompt_column="text", completion_column="sumary").check_files()
    with pytest.raises(Refusal, match="belong together"):
        Seq2SeqData("rows.jsonl", prompt_column="text")
    with pytest.raises(Refusal, match="line 1: prompt must be a string, found a list"):
        data_of(tmp_path, folder, [{"prompt": [], "completion": []}]).check_files()


def test_unfit_rows_are_refused_or_counted(tmp_path, folder):
    rows = [*rows_of(5), {"prompt": "yes", "completion": ""}, {"prompt": None, "completion": "no"}]
    with pytest.raises(Refusal, match="line 6: completion is empty"):
        batches(data_of(tmp_path, folder, rows))
    data = data_of(tmp_path, folder, rows, bad_rows="drop")
    assert sum(len(batch.rows) for batch in batches(data)) == 5 and data.reports()["train"].dropped == {"unfit": 2}


def test_an_end_token_is_added_where_the_tokenizer_puts_none(tmp_path, folder):
    data = data_of(tmp_path, folder, rows_of(3))
    data.use_tokenizer(tiny_tokenizer())
    (batch,) = batches(data)
    ends = [batch.labels[batch.segment_of_scored == k][-1].item() for k in range(3)]
    assert ends == [1, 1, 1]
    data = data_of(tmp_path, folder, rows_of(3))
    data.use_tokenizer(tiny_tokenizer(eos=None, pad="<s>"))
    with pytest.raises(Refusal, match="has no EOS token"):
        batches(data)


def test_what_the_decoder_begins_with_is_never_guessed(tmp_path, folder):
    bare = tmp_path / "tokenizer"
    TOKENIZER.save_pretrained(bare)
    data = data_of(tmp_path, bare, rows_of(3))
    data.preview(1)  # needs no model
    with pytest.raises(Refusal, match="config.json"):
        batches(data)
    data = data_of(tmp_path, folder, rows_of(3), tokenizer=None)
    data.use_tokenizer(TOKENIZER)
    with pytest.raises(Refusal, match="cannot tell what the decoder begins with"):
        batches(data)


def test_filler_and_preview(tmp_path, folder):
    data = data_of(tmp_path, folder, rows_of(3))
    batch = data.collate([], packed=False, window=None, task=None)
    assert batch.ids.shape == batch.source.ids.shape == (1, 2) and batch.mask.all() and batch.source.mask.all()
    assert batch.rows.tolist() == [-1] and len(batch.scored) == len(batch.labels) == 0
    assert batch.counts == {"token": 0.0, "row": 0.0}
    moved = batch.to("cpu")
    assert moved.source is not None and torch.equal(moved.source.ids, batch.source.ids)
    (row,) = data.preview(1)
    assert [(piece.text, piece.scored) for piece in row.pieces] == [("hello</s>", False), (" hello</s>", True)]
    assert data.packing is False and data.max_tokens is None
