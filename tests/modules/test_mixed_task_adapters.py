"""Adapters of single tasks in batches that hold rows of several: each row is read with the shared one and its own."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ft import EWC, GradientSurgery, LoRA, TaskSampling
from lightning_ft.nn.adapters import set_adapters
from lightning_ft.nn.lora_layers import LoRALinear
from lightning_ft.nn.registry import injected_layers
from lightning_ft.objectives import multitask
from tests.contract.subjects import Steps, differing
from tests.modules.multitask_jobs import by_hand, fit, job, on_ranks, pairs_job, weights
from tests.modules.test_task_adapters import owners
from tests.tolerances import assert_gradient


class Begin(Steps):
    """Factors at random, since those of a fresh adapter do nothing; and what all weights are then."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        draw = torch.Generator().manual_seed(0)
        for layer in injected_layers(pl_module).values():
            for factor in ("lora_A", "lora_B"):
                place = getattr(layer, factor)
                place.data.copy_(0.3 * torch.randn(place.shape, generator=draw))
        self.start = copy.deepcopy(pl_module.state_dict())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["plain", "dora", "embeddings"])
def test_loss_and_gradients_are_those_row_by_row(kind: str, packing: bool, tmp_path: Path) -> None:
    """Beside transformers' own backbone on each row alone, with two adapters on."""
    module, data = job(tmp_path, packing=packing, batch_size=30)
    options: dict[str, Any] = {"target": ["word_embeddings", "query"]} if kind == "embeddings" else {}
    options["dora"] = kind == "dora"  # of the first by name: it stands directly on the weight
    adapters = [LoRA(2, name="classes", **options), LoRA(3, name="numbers"), LoRA(2, name="shared")]
    steps = Begin()
    fit(tmp_path, module, data, *adapters, steps, max_steps=1, limit_val_batches=0)
    (batch,) = steps.batches[:1]
    assert set(batch.columns["task"].tolist()) == {0, 1, 2}
    module.load_state_dict(steps.start)
    module.zero_grad()
    loss = by_hand(module, batch, "rows", own=["classes", "numbers"])
    loss.backward()
    assert steps.losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert_gradient(steps.gradients[0][name], parameter.grad, name, 1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_policies_and_texts_are_learned_as_alone(packing: bool, tmp_path: Path) -> None:
    """Of each task the loss and gradients with its adapter alone, the others off and their rows ignored."""
    module, data = pairs_job(tmp_path, model={"weigh": "tasks"}, batch_size=30, packing=packing)
    names, steps = ["policy", "texts", "numbers"], Begin()
    adapters = [LoRA(2, name=name) for name in ("shared", *names)]
    fit(tmp_path, module, data, *adapters, steps, max_steps=1, limit_val_batches=0)
    module.load_state_dict(steps.start)
    batch, expected, losses = steps.batches[0], {}, {}
    tasks = module._numbered(batch, module._tasks())
    assert {task.name for task in tasks} == set(multitask.present(batch, tasks)) >= set(names)
    for task in tasks:
        set_adapters(module.model, {"shared": 1.0, **{name: float(name == task.name) for name in names}})
        on = {name: layer.enabled for name, layer in injected_layers(module).items()}
        module._adapters.choose = lambda *_: None
        outcome = module._outcomes(batch, tasks)[task.name]
        del module._adapters.choose
        assert on == {name: layer.enabled for name, layer in injected_layers(module).items()}
        module.zero_grad()
        loss = outcome.losses.mean()
        loss.backward()
        losses[task.name] = float(loss.detach())
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0.0) + parameter.grad
    set_adapters(module.model, dict.fromkeys(("shared", *names), 1.0))
    assert steps.losses[0] == pytest.approx(sum(losses.values()), rel=1e-5)
    for name, value in expected.items():
        assert_gradient(steps.gradients[0][name], value, name, 1e-3)


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
def test_the_reference_of_a_policy_has_its_own_adapter_alone(batches: str, tmp_path: Path) -> None:
    """Adapters that begin elsewhere than at zero: before a step the policy is its reference, and each pair costs log 2."""
    names = ("numbers", "policy", "shared")
    module, data = pairs_job(tmp_path)
    run = fit(
        tmp_path, module, data, *(LoRA(2, name=name) for name in names), Begin(), max_steps=1, limit_val_batches=0
    )
    run.save_checkpoint(tmp_path / "before.ckpt")
    module, data = pairs_job(tmp_path, batches=batches)
    begun = [LoRA(2, name=name, init_from=str(tmp_path / "before.ckpt")) for name in names]
    only = {name: float(name == "policy" or batches == "mixed") for name in data.tasks}
    run = fit(tmp_path, module, data, *begun, TaskSampling("weighted", weights=only), max_steps=1, limit_val_batches=0)
    assert float(run.callback_metrics["train/policy"]) == pytest.approx(math.log(2), rel=1e-5)


def after_one(folder: Path, method: str, start: dict[str, Tensor] | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    module, data = job(folder, batch_size=30, model={"weigh": "tasks"})
    adapters = [LoRA(2, name=name) for name in ("shared", "classes", "numbers")]
    fit(folder, module, data, *adapters, Begin(), GradientSurgery(method), max_steps=1, limit_val_batches=0)
    return module, weights(module)


def test_surgery_leaves_what_is_a_tasks_own(tmp_path: Path) -> None:
    """Their gradients of other tasks are zeros in a mixed batch, not missing: they are out of the compromise all the same."""
    module, plain = after_one(tmp_path, "sum")
    _, cut = after_one(tmp_path, "mgda")
    changed = {owners(module)[name] for name in differing(plain, cut)}
    assert changed == {"shared"}


def test_ewc_measures_them(tmp_path: Path) -> None:
    """Its rows come task by task; an adapter has importance from its task's rows, however batches were mixed in training."""
    module, data = job(tmp_path, batch_size=8)
    ewc = EWC(1.0, labels="empirical")
    adapters = [LoRA(2, name=name) for name in ("shared", "classes", "numbers")]
    fit(tmp_path, module, data, *adapters, Begin(), ewc, max_steps=2, limit_val_batches=0)
    found = ewc._next.importance
    of = {name: owner for name, owner in owners(module).items() if "lora_" in name}
    assert set(of) <= set(found)
    assert all(float(found[name].abs().sum()) > 0 for name in of)


@pytest.mark.parametrize(("fsdp2", "batches"), [(False, "mixed"), (True, "mixed"), (True, "homogeneous")])
def test_two_ranks_are_one_process(fsdp2: bool, batches: str, tmp_path: Path, two_ranks: Any) -> None:
    """Without FSDP2 under surgery, too; in mixed batches ranks may meet different tasks."""
    job(tmp_path)
    asked = {"folder": str(tmp_path), "adapters": True, "batches": batches, "surgery": None if fsdp2 else "upgrad"}
    whole = on_ranks(batch_size=8, **asked)
    asked |= {"batch_size": 4, "devices": 2, "fsdp2": fsdp2}
    for ranks in two_ranks.run("tests.modules.multitask_jobs:on_ranks", **asked):
        assert ranks.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(ranks[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_layer_that_sees_another_layout_is_refused() -> None:
    """A pooler, an expert: nobody knows whose rows its inputs are."""
    from lightning_ft import Refusal

    layer = LoRALinear(nn.Linear(4, 3), r=2, alpha=2.0, adapter_name="tone")
    layer.own_rows = torch.tensor([[1.0, 0.0, 1.0]])
    inputs = torch.randn(1, 3, 4)
    torch.testing.assert_close(layer(inputs)[0], layer(inputs[0]))
    with pytest.raises(
        Refusal, match=r"The adapter 'tone' is for some rows of a batch, and Linear in it sees .* \(1, 2\)"
    ):
        layer(inputs[:, :2])
