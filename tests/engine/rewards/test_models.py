"""Reward models and classifiers as rewards: the numbers they give by themselves, frozen, and in no checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_ft
from lightning_ft import LoRA, Refusal
from lightning_ft.engine.frozen import Frozen
from lightning_ft.engine.rewards import Completions, Rewards
from lightning_ft.engine.rewards.models import after_end
from tests.data.tiny_tokenizers import CHATML, LLAMA3, UNCLOSED, tiny_encoder_tokenizer, tiny_tokenizer
from tests.modules.rewards import SIZE, fit, job, write_base

PROMPTS = ["hello world", "thank you", "hello world"]
TEXTS = [" yes", " no no you", " sentence"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    base = write_base("llama", folder / "base")
    module, data = job(base, folder, normalise="after")
    save = ModelCheckpoint(folder / "saved", filename="last", every_n_train_steps=2)
    fit(folder, module, data, LoRA(r=2), save, enable_checkpointing=True)
    return folder / "saved/last.ckpt"


def drawn(tokenizer: Any, *, ended: tuple[bool, ...] = (True, False, True), chat: bool = False) -> Completions:
    prompts: list[Any] = [[{"role": "user", "content": p}] for p in PROMPTS] if chat else list(PROMPTS)
    render = lambda p: tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)  # noqa: E731
    before = [tokenizer(render(p) if chat else p, add_special_tokens=False)["input_ids"] for p in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    ids = [one + [tokenizer.eos_token_id] * end for one, end in zip(ids, ended, strict=True)]
    return Completions(prompts, TEXTS, before, ids, list(ended), [0, 1, 0], {}, tokenizer)


def test_a_reward_model_reads_the_very_tokens(checkpoint: Path) -> None:
    module = lightning_ft.load(checkpoint)
    some = drawn(module.tokenizer)
    rewards = Rewards({"model": {"checkpoint": str(checkpoint)}})
    rewards.check([])
    found = rewards.score(some)
    expected = module.score(some.prompt_ids, some.ids)
    torch.testing.assert_close(found.total, expected.double())
    assert float(expected.std()) > 1e-3
    held = rewards.sources["model"].held.model  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in held.parameters()) and not any(m.training for m in held.modules())


def test_another_tokenizer_reads_the_texts(checkpoint: Path) -> None:
    """The same texts in the tokens of a model that has others: what it would itself make of them; nothing is no answer."""
    module = lightning_ft.load(checkpoint)
    foreign = tiny_encoder_tokenizer()
    foreign.eos_token = "[SEP]"
    own = drawn(module.tokenizer, ended=(True, True, True))
    rewards = Rewards({"model": {"checkpoint": str(checkpoint)}})
    found = rewards.score(drawn(foreign)).total
    torch.testing.assert_close(found, module.score(own.prompt_ids, own.ids).double())
    empty = Completions(**{**vars(drawn(foreign)), "texts": [TEXTS[0], "", " "]})
    assert rewards.score(empty).total.isnan().tolist() == [False, True, True]


def test_an_encoder_reads_pairs_of_texts_as_in_training(tmp_path: Path) -> None:
    """The reward of a text is what predict gives for the same row, whatever the policy's tokens are."""
    from tests.modules.rewards import pairs, trainer

    base = write_base("bert", tmp_path / "base")
    tokenizer = tiny_encoder_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(base)
    module, data = job(base, tmp_path, data={"packing": False})
    save = ModelCheckpoint(tmp_path / "saved", filename="last", every_n_train_steps=2)
    fit(tmp_path, module, data, save, enable_checkpointing=True)
    rows = pairs()
    data.predict_path = data.path
    predicted = trainer(tmp_path).predict(module, data)
    expected = {
        int(r): float(x) for one in predicted for r, x in zip(one["rows"][::2], one["reward"][::2], strict=True)
    }
    texts = [row["chosen"] for row in rows]
    some = Completions(
        [row["prompt"] for row in rows], texts, [[3]] * 12, [[3]] * 12, [True] * 12, list(range(12)), {}, None
    )
    found = Rewards({"it": {"checkpoint": str(tmp_path / "saved/last.ckpt")}}).score(some).total
    torch.testing.assert_close(found, torch.tensor([expected[n] for n in range(12)]).double(), rtol=1e-4, atol=1e-5)


def test_behind_the_end_stands_what_the_template_puts_there() -> None:
    chatml = tiny_tokenizer(CHATML, eos="<|im_end|>")
    assert chatml.decode(after_end(chatml)) == "\n"
    assert after_end(tiny_tokenizer(LLAMA3, eos="<|eot_id|>")) == []
    assert after_end(tiny_tokenizer(UNCLOSED)) == after_end(tiny_tokenizer()) == []


def test_a_chat_is_read_as_in_training(tmp_path: Path) -> None:
    """The tokens of an ended answer in a chat equal those that preference rows have, the newline after the end too."""
    from lightning_ft.data.preference_rows import pair_of
    from lightning_ft.data.preference_tokens import RenderedExchange, render_exchanges
    from lightning_ft.engine.rewards.models import as_written

    tokenizer = tiny_tokenizer(CHATML, eos="<|im_end|>")
    some = drawn(tokenizer, ended=(True, True, True), chat=True)
    rows = [
        {"prompt": p, "chosen": [{"role": "assistant", "content": t}], "rejected": [{"role": "assistant", "content": "x"}]}
        for p, t in zip(some.prompts, TEXTS, strict=True)
    ]  # fmt: skip
    rendered = render_exchanges(tokenizer, [pair_of(row, margins=False) for row in rows])
    written = as_written(some)
    for number, one in enumerate(rendered):
        assert isinstance(one, RenderedExchange)
        assert some.prompt_ids[number] == one.prompt
        assert written[number] == list(one.answers[0].ids)


def test_behind_a_stop_string_stands_nothing() -> None:
    """The template's newline follows an end of turn, which an answer does not have that a stop string has ended."""
    from lightning_ft.engine.rewards.models import as_written

    tokenizer = tiny_tokenizer(CHATML, eos="<|im_end|>")
    some = drawn(tokenizer, ended=(True, False, False), chat=True)
    some = Completions(**{**vars(some), "ended": [True, True, False]})
    first, second, third = (tokenizer.decode(ids) for ids in as_written(some))
    assert first == " yes<|im_end|>\n" and second == " no no you" and third == " sentence"


def test_a_reward_model_that_fails_names_the_answer(checkpoint: Path) -> None:
    """As functions do: here a token that the model has not, and a turn that it cannot render."""
    module = lightning_ft.load(checkpoint)
    some = drawn(module.tokenizer)
    rewards = Rewards({"model": {"checkpoint": str(checkpoint)}})
    unknown = Completions(**{**vars(some), "ids": [some.ids[0], [10**6], some.ids[2]]})
    with pytest.raises(
        Refusal, match=r"The reward model raised IndexError .*at the answer 'no no you' to 'thank you' \(row 1 of"
    ):
        rewards.score(unknown)
    chat: list[Any] = [PROMPTS[0], [{"role": "user", "content": "a"}], PROMPTS[2]]
    foreign = tiny_encoder_tokenizer()
    foreign.eos_token = "[SEP]"
    with pytest.raises(Refusal, match=r"The reward model refused, at the answer .* to 'a' \(row 1 of the data\): "):
        rewards.score(Completions(**{**vars(drawn(foreign)), "prompts": chat}))


def test_a_classifier_that_fails_names_the_answer(tmp_path: Path) -> None:
    rewards = Rewards({"good": {"classifier": str(write_classifier(tmp_path / "c", 3)), "label": "good"}})

    def picky(module: nn.Module, given: Any) -> None:
        if " no no you" in given[0]:
            raise RuntimeError("too much of no")

    rewards.sources["good"].held.model.register_forward_pre_hook(picky)  # type: ignore[attr-defined]
    with pytest.raises(
        Refusal,
        match=r"The reward good raised RuntimeError \(too much of no\), at the answer 'no no you' .*\(row 1 of",
    ):
        rewards.score(drawn(tiny_tokenizer()))


def write_classifier(folder: Path, labels: int, problem: str = "single_label_classification") -> Path:
    tokenizer = tiny_encoder_tokenizer()
    torch.manual_seed(0)
    config = hf.BertConfig(
        **SIZE, vocab_size=len(tokenizer), num_labels=labels, problem_type=problem if labels > 1 else "regression",
        initializer_range=0.5, max_position_embeddings=16,
    )  # fmt: skip
    if labels > 1:
        config.id2label = {0: "bad", 1: "good", 2: "odd"}
    hf.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("reads", ["answer", "both"])
def test_a_classifier_gives_a_probability(tmp_path: Path, problem: str, reads: str) -> None:
    folder = write_classifier(tmp_path / "c", 3, problem)
    some = drawn(tiny_tokenizer())
    rewards = Rewards({"good": {"classifier": str(folder), "label": "good", "reads": reads}})
    rewards.check([])
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(prompt + text if reads == "both" else text, return_tensors="pt")).logits[0]
        expected.append(float((logits.sigmoid() if problem.startswith("multi") else logits.softmax(-1))[1]))
    assert rewards.score(some).total.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_model_with_one_output_and_texts_that_are_too_long(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "c", 1)
    some = drawn(tiny_tokenizer())
    long = Completions(**{**vars(some), "texts": ["no " * 40 + "yes", "yes", ""]})
    found = Rewards({"value": {"classifier": str(folder)}}).score(long).total
    assert found.isfinite().all() and float(found[0]) != float(found[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classifier": "{}/c"}, "needs the label of .* bad, good, odd; none is given"),
        ({"classifier": "{}/c", "label": "nice"}, "bad, good, odd; not 'nice'"),
        ({"classifier": "{}/none"}, "There is no folder"),
        ({"checkpoint": "{}/none.ckpt"}, "There is no checkpoint"),
    ],
)
def test_what_cannot_reward_is_said_before_a_model_is_loaded(
    tmp_path: Path, fields: dict[str, str], message: str
) -> None:
    write_classifier(tmp_path / "c", 3)
    with pytest.raises(Refusal, match=message):
        Rewards({"it": {k: v.format(tmp_path) for k, v in fields.items()}}).check()


def test_a_checkpoint_of_something_else(tmp_path: Path, chat: Path) -> None:
    from tests.contract.subjects import chat_job
    from tests.contract.subjects import trainer as quiet

    module, data = chat_job(chat, tmp_path)
    trainer = quiet(tmp_path, LoRA(r=2), max_steps=1, limit_val_batches=0)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    with pytest.raises(Refusal, match="takes a checkpoint of RewardModel, and .* is one of SFT"):
        Rewards({"it": {"checkpoint": str(tmp_path / "sft.ckpt")}}).check()


def test_a_body_without_a_trained_head(tmp_path: Path) -> None:
    tokenizer = tiny_encoder_tokenizer()
    hf.BertModel(hf.BertConfig(**SIZE, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    with pytest.raises(Refusal, match="rewards would be random|has no head"):
        rewards = Rewards({"it": {"classifier": str(tmp_path / "body"), "label": "LABEL_1"}})
        rewards.check()
        rewards.score(drawn(tiny_tokenizer()))


def test_frozen_is_no_part_of_what_holds_it() -> None:
    loads = []

    def load() -> nn.Linear:
        loads.append(1)
        return nn.Linear(2, 1).train()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.judge = Frozen(load)

    holder = Holder()
    assert not loads
    with torch.autocast("cpu", dtype=torch.bfloat16), holder.judge.on("cpu") as model:
        assert model(torch.ones(1, 2)).dtype == torch.float32
        assert not model.training and not model(torch.ones(1, 2)).requires_grad
    assert len(loads) == 1 and not list(holder.parameters()) and not holder.state_dict() and not list(holder.children())
    assert copy.deepcopy(holder).judge is holder.judge
    assert Frozen(nn.Linear(2, 1).train()).model.weight.requires_grad is False
