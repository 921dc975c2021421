"""Invariant 10: adapters mean the same here and in PEFT, proven by logits with trained factors."""

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lightning_ft.callbacks.lora import LoRA
from lightning_ft.cli.export import export_command, merge_command
from tests.invariants import ground
from tests.tolerances import TOL

IDS = torch.arange(3, 60)[None]
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
# ours -> PEFT's that mean the same
WAYS = {
    "lora": ({"r": 4}, {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}),
    "rslora": (
        {"r": 4, "rslora": True, "alpha": 3.0, "target": ["q_proj", "down_proj"]},
        {"r": 4, "use_rslora": True, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    ),
    "dora": (
        {"r": 4, "dora": True, "target": ["v_proj"]},
        {"r": 4, "use_dora": True, "lora_alpha": 16, "target_modules": ["v_proj"]},
    ),
    "patterns": (
        {"r": 4, "target": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5.0}},
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 5},
        },
    ),
}


def plain(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def near(found, truth, base):
    torch.testing.assert_close(found, truth, rtol=TOL[torch.float32], atol=TOL[torch.float32])
    assert (truth - logits(plain(base))).abs().max() > 100 * TOL[torch.float32]  # else zero factors would pass too


@pytest.mark.parametrize("way", WAYS)
def test_trained_here_read_by_peft(base, rows, cache, tmp_path, way):
    module = ground.sft(base, lr=0.02, optimizer=None)
    saver = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2)
    run = ground.trainer(tmp_path, LoRA(**WAYS[way][0]), saver, max_steps=2)
    run.fit(module, ground.data(rows, cache))
    export_command([f"--ckpt_path={tmp_path / 'two.ckpt'}", f"--output={tmp_path / 'adapter'}"])
    there = peft.PeftModel.from_pretrained(plain(base), str(tmp_path / "adapter"))
    near(logits(there), logits(module.model), base)
    merge_command([f"--ckpt_path={tmp_path / 'two.ckpt'}", f"--output={tmp_path / 'merged'}"])
    near(logits(plain(tmp_path / "merged")), logits(module.model), base)


@pytest.mark.parametrize("way", WAYS)
def test_from_peft_trained_on_here_and_back(base, rows, cache, tmp_path, way):
    there = peft.get_peft_model(plain(base), peft.LoraConfig(task_type="CAUSAL_LM", **WAYS[way][1]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in there.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(std=0.2, generator=generator)
    there.save_pretrained(tmp_path / "theirs")
    module = ground.sft(base, lr=0.02, optimizer=None)
    start = LoRA(init_from=str(tmp_path / "theirs"))
    ground.trainer(tmp_path, start, limit_val_batches=1.0).validate(
        module, ground.data(rows, cache, val_fraction=0.2), verbose=False
    )
    near(logits(module.model), logits(there), base)
    # Two more steps here, exported, read by PEFT again.
    saver = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2)
    more = ground.sft(base, lr=0.02, optimizer=None)
    ground.trainer(tmp_path, LoRA(init_from=str(tmp_path / "theirs")), saver, max_steps=2).fit(
        more, ground.data(rows, cache)
    )
    assert (logits(more.model) - logits(module.model)).abs().max() > 1e-3
    export_command([f"--ckpt_path={tmp_path / 'two.ckpt'}", f"--output={tmp_path / 'ours'}"])
    back = peft.PeftModel.from_pretrained(plain(base), str(tmp_path / "ours"))
    near(logits(back), logits(more.model), base)


def test_a_checkpoint_starts_a_run_like_the_adapter_exported_from_it(base, rows, cache, tmp_path):
    first = ground.sft(base, lr=0.02, optimizer=None)
    saver = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2)
    ground.trainer(tmp_path, LoRA(r=4), saver, max_steps=2).fit(first, ground.data(rows, cache))
    export_command([f"--ckpt_path={tmp_path / 'two.ckpt'}", f"--output={tmp_path / 'adapter'}"])
    for start in ("two.ckpt", "adapter"):
        module = ground.sft(base)
        run = ground.trainer(tmp_path, LoRA(init_from=str(tmp_path / start)), limit_val_batches=1.0)
        run.validate(module, ground.data(rows, cache, val_fraction=0.2), verbose=False)
        assert torch.equal(logits(module.model), logits(first.model))
