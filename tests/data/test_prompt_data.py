"""PromptData: what a prompt is, which a round takes, and what is refused."""

from __future__ import annotations

import json

import pytest

from benchmarks.random_model import byte_tokenizer
from lightning_ft import PromptData, Refusal

TALK = [{"role": "user", "content": "1+1?"}]


def write(folder, *rows, name="prompts.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def opened(path, folder, **given):
    data = PromptData(path, cache_dir=str(folder / "cache"), **given)
    data.use_tokenizer(byte_tokenizer())
    data.check_files("fit")
    data.setup("fit")
    return data


def first(data):
    rows = data._get("train")
    (prompt,) = data._prompts("train", rows.segments([0]))
    return prompt, data.resolve_tokenizer().decode(prompt.ids)


@pytest.mark.parametrize(
    ("row", "given", "text", "asked"),
    [
        ({"prompt": "go on "}, {}, "go on ", "go on "),
        ({"prompt": TALK}, {}, "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", TALK),
        ({"prompt": "1+1?"}, {"chat": True}, "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", TALK),
        ({"question": "1+1?"}, {"chat": True}, "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", TALK),
        (
            {"prompt": TALK},
            {"system": "be short"},
            "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
            [{"role": "system", "content": "be short"}, *TALK],
        ),
    ],
)
def test_what_is_asked(tmp_path, row, given, text, asked):
    prompt, read = first(opened(write(tmp_path, {**row, "answer": "2"}), tmp_path, **given))
    assert read == text and prompt.given == asked
    assert prompt.columns["answer"] == "2" and prompt.row == 0


def test_rows_keep_their_columns_across_files(tmp_path):
    write(tmp_path, {"prompt": "a", "n": 0}, {"prompt": "b", "n": 1}, name="one.jsonl")
    write(tmp_path, {"prompt": "c", "n": 2, "more": 1}, {"prompt": "d", "n": 3, "more": 1}, name="two.jsonl")
    data = opened(str(tmp_path / "*.jsonl"), tmp_path)
    assert data.columns == ["n"]
    rows = data._get("train")
    prompts = data._prompts("train", rows.segments([3, 0, 2]))
    assert [(p.given, p.columns["n"], p.row) for p in prompts] == [("d", 3, 3), ("a", 0, 0), ("c", 2, 2)]


def test_a_round_takes_the_next_prompts(tmp_path):
    data = opened(write(tmp_path, *({"prompt": f"{n}"} for n in range(10))), tmp_path, prompts=4, seed=1)
    shares = data._shares()
    taken = [shares.rows(seed=1, epoch=epoch).tolist() for epoch in range(5)]
    assert all(len(rows) == 4 for rows in taken)
    flat = [row for rows in taken for row in rows]
    assert sorted(flat[:10]) != flat[:10]
    assert sorted(flat) == sorted([*range(10)] * 2), "each comes once before any comes again"


def test_long_prompts(tmp_path):
    path = write(tmp_path, {"prompt": "abcdefgh"}, {"prompt": "ij"})
    with pytest.raises(Refusal, match="line 1 has 8 tokens, more than max_length 4"):
        opened(path, tmp_path, max_length=4)
    assert first(opened(path, tmp_path, max_length=4, truncation="keep_end"))[1] == "efgh"
    dropped = opened(path, tmp_path, max_length=4, truncation="drop")
    assert len(dropped._get("train")) == 1 and first(dropped)[0].row == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"promt": "a"}, "is 'promt' meant to be 'prompt'"),
        ({"prompt": 3}, "line 1: prompt must be a string or a list of messages, found a number"),
        ({"prompt": " "}, "only white space"),
        ({"prompt": [*TALK, {"role": "assistant", "content": "2"}]}, "ends with an assistant turn"),
    ],
)
def test_bad_rows(tmp_path, row, said):
    with pytest.raises(Refusal, match=said):
        PromptData(write(tmp_path, row)).check_files("fit")


def test_bad_rows_are_dropped_where_so_asked(tmp_path):
    path = write(tmp_path, {"prompt": "a"}, {"prompt": None}, {"prompt": "b"})
    with pytest.raises(Refusal, match="line 2"):
        opened(path, tmp_path)
    assert len(opened(path, tmp_path, bad_rows="drop")._get("train")) == 2


def test_refusals(tmp_path):
    path = write(tmp_path, {"prompt": "a"})
    with pytest.raises(Refusal, match="PromptData.prompts must be at least 1"):
        PromptData(path, prompts=0)
    with pytest.raises(Refusal, match="set PromptData.packing true or null"):
        PromptData(path, packing=False, share_prompts=True)
    with pytest.raises(Refusal, match="No round has begun"):
        _ = PromptData(path).round
    with pytest.raises(Refusal, match="asks the module how many answers"):
        opened(path, tmp_path).train_dataloader()


def test_preview_shows_the_prompt(tmp_path):
    data = opened(write(tmp_path, {"prompt": "go on"}), tmp_path)
    (preview,) = data.preview(1)
    assert "".join(piece.text for piece in preview.pieces) == "go on" and preview.scored == 0
