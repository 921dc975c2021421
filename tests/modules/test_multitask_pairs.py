"""Pairs of answers as tasks of MultiTask: their losses are RewardModel's and DPO's own, and the trunk reads all rows once."""

import json
from pathlib import Path

import pytest
import torch

from lightning_ft import DPO, LoRA, MultiTaskData, PreferenceData, Refusal, RewardModel
from lightning_ft.engine.attachment import Attachment
from tests.contract.subjects import Steps, differing
from tests.modules.multitask_jobs import fit, job, pairs_job, pairs_on_ranks, weights


def pair_data(folder: Path, **options) -> PreferenceData:
    return PreferenceData(
        str(folder / "pairs.jsonl"), val_path=str(folder / "pairs.jsonl"), cache_dir=str(folder / "cache"), **options
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_losses_are_those_of_the_modules_of_one_task(tmp_path: Path, packing: bool, lora: bool) -> None:
    """After three steps, on the same pairs with the same weights, row by row: reward with margins, and dpo."""
    module, data = pairs_job(tmp_path, batch_size=40, packing=packing)
    seen: dict[str, dict[int, float]] = {"liked": {}, "policy": {}}
    found: dict[str, torch.Tensor] = {}

    class Watch(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step < 3:
                return
            tasks = pl_module._tasks()
            with torch.no_grad():
                outcomes = pl_module._outcomes(batch, tasks)
            for name in seen:
                number = batch.rows[batch.columns[f"rows/{pl_module.task_names.index(name)}"]][::2]
                begin = int(data._train_rows._begins[pl_module.task_names.index(name)])
                seen[name] = dict(zip((number - begin).tolist(), outcomes[name].losses.tolist(), strict=True))
            found.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})
            found["start"] = Attachment.of(pl_module).references.snapshots["start"]

    callbacks = [LoRA(2, name="shared")] if lora else []
    fit(tmp_path, module, data, *callbacks, Watch(), max_steps=4, max_epochs=4, limit_val_batches=0)
    assert all(len(losses) > 3 for losses in seen.values())

    class Compare(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            own = dict(pl_module.named_parameters())
            with torch.no_grad():
                for name, value in found.items():
                    if name in own:
                        own[name].copy_(value)
                if isinstance(pl_module, RewardModel):
                    pl_module.view.output_layer()[1].weight.copy_(found["heads.liked.out.weight"])
            if isinstance(pl_module, RewardModel):
                chosen, rejected = pl_module._pairs(batch)
                losses = -torch.nn.functional.logsigmoid(chosen - rejected - batch.columns["margin"])
            else:
                snapshot = Attachment.of(pl_module).references.snapshots["start"]
                snapshot.off = set(found["start"].off)
                snapshot.tensors = {n: t for n, t in found["start"].tensors.items() if n in own}
                pairs = pl_module._pairs(batch)
                z = 0.3 * (pairs.chosen_ratio - pairs.rejected_ratio)
                losses = -torch.nn.functional.logsigmoid(z)
            self.losses = dict(zip(batch.rows[::2].tolist(), losses.tolist(), strict=True))

    base = str(tmp_path / "llama")
    alone = {"liked": RewardModel(base, base_dtype="float32"), "policy": DPO(base, beta=0.3, base_dtype="float32")}
    for name, other in alone.items():
        compare = Compare()
        rows = pair_data(tmp_path, batch_size=30, packing=packing)
        fit(
            tmp_path,
            other,
            rows,
            *([LoRA(2, name="shared")] if lora else []),
            compare,
            max_steps=1,
            limit_val_batches=0,
        )
        for row, loss in seen[name].items():
            assert loss == pytest.approx(compare.losses[row], rel=2e-5), (name, row)
    assert any(abs(loss - 0.6931) > 1e-3 for loss in seen["policy"].values()), "the policy has left its reference"


def test_the_trunk_reads_a_mixed_batch_once(tmp_path: Path) -> None:
    """And the reference reads the rows of dpo once more, no others."""
    module, data = pairs_job(tmp_path, batch_size=40)
    passes: list[tuple[bool, int]] = []

    class Watch(Steps):
        def on_train_start(self, trainer, pl_module):
            layer = pl_module.view.backbone.layers[0]
            layer.register_forward_hook(
                lambda _, args, kwargs, out: passes.append((torch.is_grad_enabled(), out.shape[1])), with_kwargs=True
            )

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            passes.clear()
            self.tokens = batch.tokens
            mine = batch.columns[f"rows/{pl_module.task_names.index('policy')}"]
            self.policy = sum(batch.bounds[n + 1] - batch.bounds[n] for n in mine.tolist())

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert passes == [(False, self.policy), (True, self.tokens)]

    fit(tmp_path, module, data, Watch(), max_steps=2, limit_val_batches=0)
    assert passes


def test_pairs_are_measured_and_the_first_step_of_dpo_costs_ln_2(tmp_path: Path) -> None:
    module, data = pairs_job(tmp_path, batch_size=40, model={"weigh": "tasks"})
    first = {}

    class Watch(Steps):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            first.setdefault("policy", float(trainer.callback_metrics["train/policy"]))

    run = fit(tmp_path, module, data, LoRA(2), Watch(), max_steps=4, val_check_interval=1, limit_val_batches=1.0)
    assert first["policy"] == pytest.approx(0.693147, abs=1e-5)
    measured = run.callback_metrics
    for name in ("liked", "policy"):
        assert {f"val/{name}/{what}" for what in ("loss", "accuracy", "margin")} <= set(measured)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert "heads.liked.out.weight" in trained and "heads.policy.out.weight" not in trained


def test_weights_after_four_steps_do_not_depend_on_the_number_of_ranks(tmp_path: Path, two_ranks) -> None:
    """DDP and FSDP2 with micro-batches of two rows, so that a rank often has no pair while the other has."""
    whole = pairs_on_ranks(str(tmp_path), 4)
    for fsdp2 in (False, True):
        for ranks in two_ranks.run(
            "tests.modules.multitask_jobs:pairs_on_ranks", folder=str(tmp_path), batch_size=2, devices=2, fsdp2=fsdp2
        ):
            assert set(ranks) == set(whole)
            for name, value in whole.items():
                assert torch.allclose(ranks[name], value, rtol=1e-4, atol=1e-5), name


def test_refusals(tmp_path: Path) -> None:
    module, data = pairs_job(tmp_path, model={"objectives": {"policy": "dpo"}})
    with pytest.raises(
        Refusal, match=r"'liked' has pairs of answers, .*: set model\.objectives\.liked to reward or to dpo"
    ):
        fit(tmp_path, module, data)
    module, data = pairs_job(tmp_path)
    with pytest.raises(Refusal, match=r"LoRA\.dropout is 0\.1, which would change the policy at random"):
        fit(tmp_path, module, data, LoRA(2, dropout=0.1))
    with pytest.raises(Refusal, match=r"MultiTask\.dpo_loss must be counted in pairs, and orpo is in tokens, too"):
        pairs_job(tmp_path, model={"dpo_loss": "orpo"})
    with pytest.raises(Refusal, match="There is no preference loss named 'sigmod'; did you mean sigmoid"):
        pairs_job(tmp_path, model={"dpo_loss": "sigmod"})
    with pytest.raises(
        Refusal, match=r"MultiTaskData\.tasks\.p\.share_prompts cannot be had among rows of several tasks"
    ):
        MultiTaskData({"p": pair_data(tmp_path, share_prompts=True)})
    module, data = job(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "hello", "chosen": " yes", "rejected": " no"}) + "\n")
    rows = MultiTaskData({**data.tasks, "policy": pair_data(tmp_path)})
    module.objectives = {"policy": "dpo"}
    with pytest.raises(Refusal, match="is no causal language model|BertModel|language"):
        fit(tmp_path, module, rows)


def test_a_task_of_pairs_alone(tmp_path: Path) -> None:
    """One task by name trains what its own module would: only its rows come, and resuming is exact elsewhere."""
    module, data = pairs_job(tmp_path, only="liked")
    before = {}

    class Start(Steps):
        def on_train_start(self, trainer, pl_module):
            before.update(weights(pl_module))

    fit(tmp_path, module, data, Start(), max_steps=2, limit_val_batches=0)
    assert module.task_names == ["liked"] and "heads.liked.out.weight" in differing(before, weights(module))
