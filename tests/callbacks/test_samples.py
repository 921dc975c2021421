"""SampleGenerations: the contract, and what only it does."""

import json

import pytest

from lightning_ft import LoRA, Refusal
from lightning_ft.callbacks.samples import SampleGenerations
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, SpeakingNet, chat_job, fit, loader, trainer

SMALL = {"prompts": ["ask 1:", "ask 2:"], "max_new_tokens": 3}
CASE = Case(SampleGenerations, small=SMALL, idle=SMALL)


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def written(folder, name="samples"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_at_the_start_after_validations_and_at_the_end(tmp_path):
    fit(tmp_path, SpeakingNet(), SampleGenerations(["abc", "déf"]), max_steps=5, max_epochs=2)
    # An epoch has four steps; the validation after the last one is the end's.
    assert [(row["step"], row["prompt"], row["answer"]) for row in written(tmp_path)] == [
        (step, prompt, prompt[::-1]) for step in (0, 4, 5) for prompt in ("abc", "déf")
    ]


def test_a_validation_right_before_the_end_is_not_repeated(tmp_path):
    fit(tmp_path, SpeakingNet(), SampleGenerations(["abc"]), max_steps=4)
    assert [row["step"] for row in written(tmp_path)] == [0, 4]


def test_validation_alone_writes_nothing(tmp_path):
    trainer(tmp_path, SampleGenerations(["abc"])).validate(SpeakingNet(), loader(), verbose=False)
    assert not (tmp_path / "samples.jsonl").exists()


def test_two_of_them_write_two_files(tmp_path):
    two = [SampleGenerations(["a"], name="one"), SampleGenerations(["b"], name="two")]
    fit(tmp_path, SpeakingNet(), *two)
    assert {row["prompt"] for row in written(tmp_path, "one")} == {"a"}
    assert {row["prompt"] for row in written(tmp_path, "two")} == {"b"}


def test_the_model_is_in_the_mode_it_was_in(chat, tmp_path):
    """Generation needs eval mode; a fit whose dropout was off from then on would be a silent loss."""
    seen = []

    class Watching(SampleGenerations):
        def _write(self, trainer, pl_module):
            pl_module.model.model.layers[0].eval()
            before = [module.training for module in pl_module.modules()]
            super()._write(trainer, pl_module)
            seen.append(before == [module.training for module in pl_module.modules()])
            seen.append(any(before) and not all(before))

    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, Watching(**SMALL), LoRA(2), max_steps=1).fit(module, data)
    assert seen[:2] == [True, True] and all(seen[::2])
    rows = written(tmp_path)
    assert [row["step"] for row in rows] == [0, 0, 1, 1] and all(isinstance(row["answer"], str) for row in rows)


def test_a_chat_template_is_used_where_there_is_one(tmp_path):
    class Chatting(SpeakingNet):
        class tokenizer:
            chat_template = "a template"

        def generate(self, prompts, **more):
            return [json.dumps(prompt) for prompt in prompts]

    fit(tmp_path, Chatting(), SampleGenerations(["a"]), SampleGenerations(["a"], chat=False, name="plain"))
    assert json.loads(written(tmp_path)[0]["answer"]) == [{"role": "user", "content": "a"}]
    assert json.loads(written(tmp_path, "plain")[0]["answer"]) == "a"


def test_no_prompts_and_no_generate_are_refused(tmp_path):
    with pytest.raises(Refusal, match="SampleGenerations.prompts is empty"):
        SampleGenerations([])
    with pytest.raises(Refusal, match=r"SampleGenerations needs a module with generate.*PlainNet has none"):
        fit(tmp_path, PlainNet(), SampleGenerations(["a"]))
