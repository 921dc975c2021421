"""Online DPO: which answers become pairs, the step of a loop over pairs, every placement, and a bandit whose optimum is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from benchmarks.random_model import write_model
from lightning_ft import LoRA, OnlineDPO, PromptData, Refusal
from lightning_ft.objectives.online_dpo import best_and_worst
from tests.modules.preference import weights
from tests.modules.rollouts import FP32, Stir, constant, fit, grpo, on_ranks, play, sevens, write_prompts
from tests.tolerances import assert_gradient

NAN = math.nan


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("online"))


def test_of_each_prompt_the_best_and_the_worst() -> None:
    rewards = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [NAN, 2.0, 1.0], [NAN, 4.0, NAN], [2.0, 2.0, 0.0]])
    best, worst = best_and_worst(rewards)
    assert best.tolist() == [1, -1, 1, -1, 0] and worst.tolist() == [0, -1, 2, -1, 2]


class ByHand(pl.Callback):
    """The loss and the gradients of the first step, by a loop over the round's pairs through the plain model."""

    def __init__(self, loss: str) -> None:
        self.loss = loss

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if hasattr(self, "value"):
            return
        round, module = trainer.datamodule.round, pl_module  # type: ignore[attr-defined]
        losses, self.pairs = [], 0
        judged = round.scores.total.reshape(-1, module.samples)
        for prompt, row in enumerate(judged.tolist()):
            best, worst = row.index(max(row)), row.index(min(row))
            kept = [i for i, one in enumerate(round.kept[prompt * 4 : prompt * 4 + 4].tolist()) if one]
            assert kept == (sorted([best, worst]) if max(row) > min(row) else [])
            if not kept:
                continue
            ids = round.prompts[prompt].ids
            answers = [list(round.answers[prompt * 4 + at].ids) for at in (best, worst)]
            now = [self.logp(module, ids, answer) for answer in answers]
            with module.reference("start"), torch.no_grad():
                before = [self.logp(module, ids, answer) for answer in answers]
            r = [a - b for a, b in zip(now, before, strict=True)]
            if self.loss == "ipo":
                r = [one / len(answer) for one, answer in zip(r, answers, strict=True)]
                losses.append((r[0] - r[1] - 1 / (2 * module.beta)) ** 2)
            else:
                losses.append(-nn.functional.logsigmoid(module.beta * (r[0] - r[1])))
        loss = torch.stack(losses).mean()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        self.value, self.pairs = float(loss.detach()), len(losses)

    @staticmethod
    def logp(module: Any, prompt: Any, answer: Any) -> Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        logits = module.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / module.temperature
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize(
    ("data", "options"),
    [({}, {}), ({"batch_size": 4}, {"accumulate_grad_batches": 4}), ({"packing": False}, {})],
    ids=["packed", "accumulated", "padded"],
)
def test_a_step_is_that_of_a_loop_over_pairs(
    job: Path, tmp_path: Path, loss: str, data: dict[str, Any], options: dict[str, Any]
) -> None:
    hand = ByHand(loss)
    _, watch, _ = play(
        job, tmp_path, LoRA(r=4), Stir(), hand, data=data, options=options, kind=OnlineDPO, loss=loss, beta=0.5
    )
    assert 2 <= hand.pairs <= 4
    total = sum(watch.losses[: options.get("accumulate_grad_batches", 1)])
    assert total == pytest.approx(hand.value, rel=1e-4)
    for name, expected in hand.gradients.items():
        assert_gradient(watch.gradients[0][name], expected, name)
    assert max(float(g.abs().max()) for g in hand.gradients.values()) > 1e-4


def test_what_is_logged(job: Path, tmp_path: Path) -> None:
    _, watch, made = play(job, tmp_path, LoRA(r=4), kind=OnlineDPO)
    metrics, round = made.callback_metrics, watch.rounds[-1]
    judged = round.scores.total.reshape(4, 4)
    gaps = [max(row) - min(row) for row in judged.tolist() if max(row) > min(row)]
    assert float(metrics["train/reward_gap"]) == pytest.approx(sum(gaps) / len(gaps))
    assert float(metrics["train/without_signal"]) == 1 - len(gaps) / 4
    assert {"train/kl", "train/loss", "train/rewards/margins", "train/rewards/accuracies"} <= set(metrics)
    first = watch.logged[0]
    assert first["train/rewards/margins"] == 0.0 and first["train/loss"] == pytest.approx(math.log(2))


def test_answers_that_were_cut_lose(job: Path, tmp_path: Path) -> None:
    """With a penalty larger than any reward the better answer of a pair has ended wherever one of the two has."""
    stop = {"stop_strings": ["a", "e", "i", "o", "u"], "missing_end_penalty": 10.0}
    _, watch, _ = play(job, tmp_path, LoRA(r=4), kind=OnlineDPO, **stop)
    round = watch.rounds[0]
    owner, better = round.owner, round.tokens["better"]
    seen = 0
    for prompt in range(4):
        pair = [n for n in range(prompt * 4, prompt * 4 + 4) if bool(round.kept[n])]
        ended = {n: bool(round.ended[n]) for n in pair}
        if len(set(ended.values())) == 2:
            seen += 1
            assert all(bool(better[owner == n].all()) == ended[n] for n in pair)
    assert seen


def test_a_round_without_pairs_changes_nothing(job: Path, tmp_path: Path) -> None:
    _, watch, made = play(job, tmp_path, LoRA(r=4), kind=OnlineDPO, rewards={"constant": constant})
    assert float(made.callback_metrics["train/without_signal"]) == 1.0
    assert all(loss == 0.0 for loss in watch.losses)
    assert all(not bool(gradient.any()) for step in watch.gradients for gradient in step.values())


def test_over_four_bits(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    _, watch, _ = play(job, tmp_path, LoRA(r=4), kind=OnlineDPO, quantize="nf4")
    assert any(bool(gradient.any()) for gradient in watch.gradients[-1].values())


@pytest.mark.parametrize(("strategy", "full"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_two_ranks(job: Path, tmp_path: Path, two_ranks: Any, strategy: str, full: bool) -> None:
    """The same answers, pairs and weights as one process with the joint batch."""
    asked = {"job": str(job), "full": full, "kind": OnlineDPO, "beta": 0.5, "lr": 0.02}
    one = on_ranks(folder=str(tmp_path / "one"), devices=1, strategy="auto", **asked)
    for found in two_ranks.run(
        "tests.modules.rollouts:on_ranks", folder=str(tmp_path / strategy), devices=2, strategy=strategy, **asked
    ):
        assert found["answers"] == one["answers"]
        for name, value in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert found["metrics"]["train/loss"] == pytest.approx(one["metrics"]["train/loss"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_resumes_within_its_round(job: Path, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    options = {"data": {"batch_size": 8}, "kind": OnlineDPO}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _, _ = play(job, tmp_path / "whole", LoRA(r=4), saver, options={"enable_checkpointing": True}, **options)
    module, rows = grpo(job, tmp_path / "again", **options)
    fit(tmp_path / "again", module, rows, LoRA(r=4), ckpt_path=tmp_path / "step=3.ckpt")
    for name, value in weights(whole).items():
        assert torch.equal(weights(module)[name], value), name


TABLE = {"a": (1.0, 0.2, 0.0), "b": (0.1, 0.0, 0.8), "c": (0.3, 0.9, 0.5)}


def test_a_bandit_with_three_states_is_learned(tmp_path: Path) -> None:
    """One token an answer; which of three actions it is its number says."""
    write_model(tmp_path / "model", initializer_range=0.2, hidden_size=16, num_attention_heads=2)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": s, "state": s}) + "\n" for s in TABLE))

    def pays(completion_ids: Any, state: Any, **columns: Any) -> list[float]:
        return [TABLE[s][ids[0] % 3] for ids, s in zip(completion_ids, state, strict=True)]

    module = OnlineDPO(
        str(tmp_path / "model"), rewards={"pays": pays}, samples=16, max_new_tokens=1, temperature=1.0, lr=0.01, **FP32
    )
    data = PromptData(str(tmp_path / "prompts.jsonl"), prompts=3, batch_size=48, cache_dir=str(tmp_path / "cache"))
    fit(tmp_path, module, data, max_epochs=110)
    total = 0.0
    for state, row in TABLE.items():
        ids = torch.tensor([module.tokenizer(state)["input_ids"]])
        with torch.no_grad():
            chances = module.model(ids).logits[0, -1].double().softmax(-1)
        total += sum(row[action] * float(chances[action::3].sum()) for action in range(3)) / 3
    best = sum(max(row) for row in TABLE.values()) / 3
    assert total > 0.98 * best, f"{total:.3f} of {best:.3f}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 1}, "OnlineDPO.samples must be at least 2"),
        ({"loss": "orpo"}, "OnlineDPO.loss must be one of"),
        ({"beta": 0.0}, "OnlineDPO.beta must be greater than 0"),
        ({"rewards": {}}, "at least one reward"),
    ],
)
def test_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        OnlineDPO("base", **{"rewards": {"sevens": sevens}, **given})
