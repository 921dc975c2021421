"""Invariant 2: what is learned is known from the rendering, row by row; a row that breaks it is refused by its place."""

import json

import pytest
import torch

from benchmarks.random_model import write_model
from lightning_ft.data.sft_data import SFTData
from lightning_ft.functional.errors import Refusal
from tests.data.tiny_tokenizers import CHATML, MISTRAL, THINKING, UNCLOSED, tiny_tokenizer
from tests.invariants import ground


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


GOOD = chat("hello world", "yes")
SPLIT = {"prompt": "hello", "completion": " world"}
# name -> (tokenizer, rows, options, the line that is bad, words of the refusal)
BAD = {
    "nothing supervised": (dict(template=CHATML), [GOOD, GOOD, chat("hello")], {}, 3, "no assistant turn"),
    "empty answer": (dict(template=CHATML), [GOOD, chat("hello", " ")], {}, 2, "nothing to learn"),
    "all of it cut away": (
        dict(template=CHATML),
        [GOOD, chat("hello " * 40, "yes")],
        {"max_length": 30, "truncation": "keep_start"},
        2,
        "no token to learn",
    ),
    "no end of turn": (dict(template=UNCLOSED), [GOOD], {}, 1, "no end of turn"),
    "two BOS": (
        dict(template=None, puts_bos=True),
        [{"text": "hello"}, {"text": "<s>hello"}],
        {},
        2,
        "two BOS tokens",
    ),
    "prompt no prefix in characters": (
        dict(template=THINKING),
        [GOOD, chat("hello", "yes", "thank you", "no")],
        {},
        2,
        "not prefix-stable",
    ),
    "prompt no prefix in tokens": (
        dict(template=None),
        [SPLIT, {"prompt": "hello ", "completion": "world"}],
        {},
        2,
        "not a prefix of the row in tokens",
    ),
}


def write(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("good_first", [True, False])
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, case, good_first):
    tokenizer, rows, options, line, words = BAD[case]
    if not good_first:  # the place follows the row
        rows, line = rows[::-1], len(rows) + 1 - line
    tiny_tokenizer(**tokenizer).save_pretrained(tmp_path / "tokenizer")
    file = write(tmp_path, rows)
    data = SFTData(str(file), tokenizer=str(tmp_path / "tokenizer"), cache_dir=str(tmp_path / "cache"), **options)
    with pytest.raises(Refusal, match=words) as refused:
        data.setup("fit")
    assert str(file) in str(refused.value) and f"line {line}" in str(refused.value)
    good = [row for n, row in enumerate(rows, 1) if n != line]
    if good:  # and the others are not the reason
        data = SFTData(str(write(tmp_path, good)), tokenizer=data.tokenizer, cache_dir=data.cache_dir, **options)
        data.setup("fit")
        assert len(next(iter(data.train_dataloader())).rows) == len(good)


@pytest.mark.parametrize("packing", [True, False])
def test_pad_that_equals_eos_costs_no_eos(tmp_path, packing):
    tokenizer = tiny_tokenizer(MISTRAL, eos="</s>", pad="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    answers = ["yes", "no no no", "hello world hello world", "no </s> yes"]  # the last writes the mark in mid-answer
    file = write(tmp_path, [chat("thank you", answer) for answer in answers])
    data = SFTData(
        str(file), tokenizer=str(tmp_path / "tokenizer"), cache_dir=str(tmp_path), packing=packing, shuffle=False
    )
    (batch,) = data.train_dataloader()
    for row, answer in enumerate(answers):
        labels = batch.labels[batch.segment_of_scored == batch.rows.tolist().index(row)].tolist()
        # Tokens as the tokenizer gives them for the answer alone, then exactly one end of turn; no padding is scored.
        assert labels == tokenizer(f" {answer}</s>", add_special_tokens=False)["input_ids"]
        assert labels[-1] == tokenizer.eos_token_id
    ids = batch.ids.reshape(-1)
    assert torch.equal(ids[batch.scored + 1], batch.labels)


@pytest.mark.parametrize("packing", [True, False])
def test_the_model_learns_to_stop_where_pad_equals_eos(tmp_path, packing):
    base = write_model(tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["pad_token"] = settings["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = write(tmp_path, [chat("a", "yes"), chat("bb", "no no no")])
    module = ground.sft(base, lr=0.01, optimizer=torch.optim.AdamW)
    assert module.tokenizer.pad_token_id == module.tokenizer.eos_token_id
    ground.trainer(tmp_path, max_epochs=60).fit(module, ground.data(rows, tmp_path / "cache", packing=packing))
    asked = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "bb"}]]
    assert module.generate(asked, max_new_tokens=20) == ["yes", "no no no"]
