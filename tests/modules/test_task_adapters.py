"""An adapter of one task beside a shared one: whose rows move it, what is predicted with it, and how many numbers there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_ft import LoRA, TaskSampling
from lightning_ft.nn.adapters import set_adapters
from lightning_ft.nn.registry import injected_layers
from tests.contract.subjects import Steps, differing, trainer
from tests.modules.multitask_jobs import fit, job, weights

ADAMW = {"optimizer": torch.optim.AdamW, "lr": 5e-3, "weight_decay": 0.1}


def alone(task: str) -> TaskSampling:
    """Rows of one task alone."""
    return TaskSampling("weighted", weights={name: float(name == task) for name in ("classes", "words", "numbers")})


def owners(module: nn.Module) -> dict[str, str]:
    """Name of a trained parameter -> the adapter, or the head's task, that it belongs to."""
    layers = injected_layers(module).values()
    of = {id(p): layer.adapter_name for layer in layers for p in layer.injected_parameters().values()}
    found = {n: of.get(id(p), n.split(".")[1]) for n, p in module.named_parameters() if p.requires_grad}
    assert set(found.values()) <= {"shared", "classes", "words", "numbers"}
    return found


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """What has changed, by whose it is."""
    return {owners(module)[name] for name in differing(before, weights(module))}


def adapters(*names: str) -> list[LoRA]:
    return [LoRA(2, name=name) for name in names]


def test_rows_of_another_task_do_not_touch_it(tmp_path: Path) -> None:
    """First rows of one task alone, then of another, under AdamW with decay: bit for bit what it was, and so is the head."""
    module, data = job(tmp_path, batches="homogeneous", batch_size=4, model=ADAMW)
    of = adapters("shared", "classes", "numbers")
    fit(tmp_path, module, data, *of, alone("classes"), max_steps=3, limit_val_batches=0)
    first = weights(module)
    shared_b = [n for n, owner in owners(module).items() if owner != "shared" and "lora_B" in n]
    zero = {owners(module)[n] for n in shared_b if not first[n].any()}
    assert zero == {"numbers"}, "an adapter without rows is where it began"
    fit(tmp_path, module, data, *of, alone("numbers"), max_steps=3, limit_val_batches=0)
    assert moved(module, first) == {"shared", "numbers"}


def test_neither_momentum_nor_decay_of_a_step_without_its_rows_moves_it(tmp_path: Path) -> None:
    """Tasks in turn, so that AdamW has moments of each."""
    module, data = job(tmp_path, batches="homogeneous", batch_size=4, model=ADAMW)
    seen: list[tuple[set[str], set[str]]] = []

    class Watch(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = weights(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            here = {("classes", "words", "numbers")[k] for k in batch.columns["task"].tolist() if k >= 0}
            seen.append((here, moved(pl_module, self.before)))

    run = (*adapters("shared", "classes", "numbers"), TaskSampling("round_robin"), Watch())
    fit(tmp_path, module, data, *run, max_steps=6, limit_val_batches=0)
    assert [len(here) for here, _ in seen] == [1] * 6 and len(set().union(*(here for here, _ in seen))) == 3
    assert all(changed == {"shared", *here} for here, changed in seen)


def predictions(folder: Path, module, data, task: str) -> Tensor:
    """(rows or words, C) of one task, in the order of its file, by ``predict``."""
    for one in data.tasks.values():
        one.predict_path = one.val_path
    found: dict[int, Tensor] = {}
    for batches in trainer(folder, use_distributed_sampler=False).predict(module, data):
        for said in batches:
            if said["task"] == task:
                values = said["probabilities"] if "probabilities" in said else said["value"][:, None]
                found |= dict(zip(said["rows"].tolist(), values, strict=True))
    return torch.stack([found[row] for row in sorted(found)])


def by_hand(module, data, on: list[str]) -> Tensor:
    """Classes by transformers' backbone, row by row, with these adapters alone."""
    set_adapters(module.model, dict.fromkeys(on, 1.0))
    found = []
    with torch.no_grad():
        for row in range(24):
            ids = torch.tensor(data.tasks["classes"]._get("predict").segments([row])[0].ids.tolist())
            hidden = module.view.backbone(input_ids=ids[None]).last_hidden_state[0, 0]
            found.append(module.heads["classes"].out(hidden).softmax(-1))
    set_adapters(module.model, dict.fromkeys(("shared", "classes", "numbers"), 1.0))
    return torch.stack(found)


def test_predictions_are_made_with_the_shared_one_and_its_own(tmp_path: Path) -> None:
    module, data = job(tmp_path, batches="homogeneous", batch_size=4, model=ADAMW)
    fit(tmp_path, module, data, *adapters("shared", "classes", "numbers"), max_steps=6, limit_val_batches=0)
    module.eval()
    draw = torch.Generator().manual_seed(0)
    for layer in injected_layers(module).values():  # six steps leave them nearly alike
        layer.lora_B.data.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=draw))
    said = predictions(tmp_path, module, data, "classes")
    torch.testing.assert_close(said, by_hand(module, data, ["shared", "classes"]), rtol=1e-4, atol=1e-5)
    for others in (["shared"], ["classes"], ["shared", "numbers"], ["shared", "classes", "numbers"]):
        assert float((said - by_hand(module, data, others)).abs().max()) > 1e-2, others


@pytest.mark.parametrize("shared", [False, True])
def test_what_one_task_says_is_kept_while_another_is_learned(shared: bool, tmp_path: Path) -> None:
    """Bit for bit without a shared adapter; one that is shared moves with the rows of the other."""
    names = ["classes", "numbers", *(["shared"] if shared else [])]
    module, data = job(tmp_path, batches="homogeneous", batch_size=4, model=ADAMW)
    fit(tmp_path, module, data, *adapters(*names), alone("classes"), max_steps=3, limit_val_batches=0)
    before = {task: predictions(tmp_path, module, data, task) for task in ("classes", "numbers")}
    fit(tmp_path, module, data, *adapters(*names), alone("numbers"), max_steps=3, limit_val_batches=0)
    after = {task: predictions(tmp_path, module, data, task) for task in ("classes", "numbers")}
    assert torch.equal(after["classes"], before["classes"]) != shared
    assert not torch.equal(after["numbers"], before["numbers"])


def test_how_many_numbers_are_trained(tmp_path: Path) -> None:
    """r (in + out) for each layer and adapter, and the heads; the base is there once."""
    module, data = job(tmp_path, batches="homogeneous", batch_size=4)
    plain, other = job(tmp_path, batches="homogeneous", batch_size=4)
    fit(tmp_path, plain, other, max_steps=1, limit_val_batches=0)
    fit(tmp_path, module, data, *adapters("shared", "classes", "numbers"), max_steps=1, limit_val_batches=0)
    linear = [m for m in plain.view.backbone.encoder.modules() if isinstance(m, nn.Linear)]
    of_one = 2 * sum(m.in_features + m.out_features for m in linear)
    each = dict.fromkeys(("shared", "classes", "numbers"), 0)
    for layer in injected_layers(module).values():
        each[layer.adapter_name] += sum(p.numel() for p in layer.injected_parameters().values())
    heads = {"classes": 33 * 3, "words": 33 * 3, "numbers": 33}
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert set(each.values()) == {of_one} and trained == 3 * of_one + sum(heads.values())
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in plain.parameters()) + sum(
        each.values()
    )
