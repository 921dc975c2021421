"""Prompts that leave the model no room for an answer are refused before the first round, on all ranks."""

import json

import pytest

from benchmarks.random_model import write_model
from lightning_ft import GRPO, LoRA, PromptData, Refusal
from tests.contract.subjects import trainer
from tests.modules.rollouts import fit, sevens, write_prompts


def test_prompts_that_do_not_fit_are_refused_before_the_first_round(tmp_path):
    """With the row, in every stage; those that fit exactly are answered."""
    model = write_model(tmp_path / "model", initializer_range=0.2, max_position_embeddings=40)
    rows = [{"prompt": "tell"}, {"prompt": "x" * 34}, {"prompt": "y" * 35}, {"prompt": "more"}]
    for name, some in (("fits", rows[:2]), ("long", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))

    def of(path, **more):
        given = {"prompts": 2, "cache_dir": str(tmp_path / "cache"), **more}
        asked = {"rewards": {"sevens": sevens}, "samples": 2, "max_new_tokens": 6, "base_dtype": "float32"}
        return GRPO(str(model), **asked), PromptData(str(tmp_path / f"{path}.jsonl"), **given)

    fit(tmp_path, *of("fits"), LoRA(r=4), max_epochs=1)
    long = str(tmp_path / "long.jsonl")
    said = (
        r"long.jsonl, line 3 has a prompt of 35 tokens, and GRPO.max_new_tokens 6 more do not fit into the model's 40 positions: "
        "lower max_new_tokens, or PromptData.max_length to 34 with truncation drop or keep_end"
    )
    with pytest.raises(Refusal, match=said):
        fit(tmp_path, *of("long"), LoRA(r=4))
    with pytest.raises(Refusal, match=said):
        fit(tmp_path, *of("fits", val_path=long), LoRA(r=4), limit_val_batches=1.0)
    fit(tmp_path, *of("fits", val_path=long), LoRA(r=4), max_epochs=1)  # which does not validate
    for stage, column in (("validate", "val_path"), ("test", "test_path"), ("predict", "predict_path")):
        with pytest.raises(Refusal, match=said):
            getattr(trainer(tmp_path, max_steps=-1), stage)(*of("fits", **{column: long}))


def test_on_all_ranks(tmp_path, two_ranks):
    """The rank that would not have read the row, too."""
    found = two_ranks.run(
        "tests.modules.rollouts:refused_on_ranks",
        job=str(write_prompts(tmp_path / "job")),
        folder=str(tmp_path),
        long=500,
    )
    assert all("line 5 has a prompt of 2505 tokens" in said for said in found)
