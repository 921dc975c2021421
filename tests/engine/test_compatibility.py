"""What cannot work together: each rule refuses in its own words, and a Trainer is read right."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_ft.callbacks.lora import LoRA
from lightning_ft.callbacks.samples import SampleGenerations
from lightning_ft.engine.compatibility import RULES, WORDS, Rule, Situation, check, situation, table
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.engine.traits import Cannot, Traits
from lightning_ft.functional.errors import Refusal
from tests.seams.parts import Decay, Noise, Small
from tests.seams.test_gradients import PCGrad
from tests.seams.toy import Data, Module, Shape, trainer_of

ALL = [Noise(), Small(), Decay()]  # edits the model, the loss, the gradients


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "+".join(sorted(rule.words)))
def test_each_rule_refuses_in_its_own_words(rule: Rule) -> None:
    with pytest.raises(Refusal) as refused:
        check(ALL, Situation(rule.words))
    said = str(refused.value)
    assert rule.why in said and rule.fix in said and all(WORDS[word] in said for word in rule.words)
    assert said.startswith(("Noise", "Small", "Decay")) and said.endswith(".")
    harmless = [t for t in ALL if rule.edits and not rule.edits & t.traits.edits]
    check(harmless if rule.edits else [], Situation(rule.words - {next(iter(rule.words))}))
    if harmless:
        check(harmless, Situation(rule.words))


def test_a_technique_s_own_limits_are_refused() -> None:
    samples = SampleGenerations(["hello"])
    check([samples], Situation(frozenset({"ddp"})))
    with pytest.raises(Refusal, match="SampleGenerations cannot work with FSDP2, because .*gathered inside a step"):
        check([samples], Situation(frozenset({"fsdp2"})))

    class Alone(Small):
        traits: ClassVar[Traits] = Traits(
            slot="alone", edits=frozenset({"loss"}), cannot=(Cannot("decay", "both pull", "leave one out"),)
        )

    with pytest.raises(Refusal, match="Alone cannot work with the decay technique, because both pull; leave one out"):
        check([Alone(), Decay()], Situation(frozenset()))


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(Refusal, match="Two LoRA callbacks are both named 'default'"):
        check([LoRA(2), LoRA(4)], Situation(frozenset()))
    check([LoRA(2), LoRA(4, name="other")], Situation(frozenset()))


def test_the_table_has_every_refusal() -> None:
    rows = table([SampleGenerations, LoRA])
    assert len(rows) == len(RULES) + len(SampleGenerations.traits.cannot) + len(LoRA.traits.cannot)
    assert all(all(cell.strip() for cell in row) and len(row) == 4 for row in rows)
    assert ("SampleGenerations", "FSDP2") in {row[:2] for row in rows}
    assert {word for rule in RULES for word in rule.words} <= set(WORDS)


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Iterates(LightningModule):
    def training_step(self, dataloader_iter):
        return next(dataloader_iter)


def words(module: LightningModule | None = None, **options: Any) -> frozenset[str]:
    quiet = {"logger": False, "enable_checkpointing": "callbacks" in options, "accelerator": "cpu", "devices": 2}
    trainer = Trainer(**{**quiet, "enable_model_summary": False, "enable_progress_bar": False, **options})
    return situation(trainer, module or Module()).words


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"devices": 1}, set()),
        ({"devices": 1, "module": ByHand()}, {"manual_optimization"}),
        ({"devices": 1, "module": Iterates()}, {"dataloader_iter"}),
        ({"strategy": "ddp"}, {"ddp", "several_ranks"}),
        ({"strategy": "ddp_spawn"}, {"ddp", "several_ranks", "spawn"}),
        ({"strategy": "ddp_fork"}, {"ddp", "several_ranks", "spawn"}),
        ({"strategy": FSDP2Strategy()}, {"fsdp2", "several_ranks"}),
        (
            {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)},
            {"fsdp2", "several_ranks", "stock_fsdp2_files"},
        ),
        (
            {"strategy": FSDP2Strategy(data_parallel_size=1, tensor_parallel_size=2)},
            {"fsdp2", "several_ranks", "tensor_parallel"},
        ),
        (
            {
                "strategy": "ddp",
                "accumulate_grad_batches": 2,
                "callbacks": [ModelCheckpoint(train_time_interval=timedelta(minutes=1))],
            },
            {"ddp", "several_ranks", "time_saves_in_window"},
        ),
        (
            {"devices": 1, "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
            {"fp16"},
        ),
    ],
)
def test_a_trainer_is_read(options: dict[str, Any], expected: set[str]) -> None:
    assert words(**options) == expected


def test_fsdp1_is_read() -> None:
    strategy = FSDPStrategy(precision_plugin=FSDPPrecision("32-true"))  # a Trainer takes it on GPUs only
    trainer: Any = SimpleNamespace(strategy=strategy, world_size=1, callbacks=[])
    assert situation(trainer, Module()).words == {"fsdp1"}


def test_a_run_is_refused_before_anything_is_edited() -> None:
    module = ByHand()
    with pytest.raises(Refusal, match="Small cannot work with manual optimization"):
        trainer_of(Shape(8), [Small()]).fit(module, datamodule=Data(8))
    assert "training_step" not in module.__dict__ and "configure_model" not in module.__dict__


def test_surgery_under_fp16_is_refused() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(Refusal, match="Gradient surgery cannot work with fp16 gradient scaling"):
        trainer_of(Shape(8), [PCGrad()], plugins=[plugin]).fit(Module(), datamodule=Data(8))
