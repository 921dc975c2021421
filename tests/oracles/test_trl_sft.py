"""TRL's SFTTrainer as an oracle: the same rows score the same tokens, cost the same, and are learned alike.

A random fp32 Llama, LoRA factors (B not zero) that reach PEFT through our own export, prompt / completion chats of
uneven length, four rows a step, no shuffling, AdamW at a constant rate, no clipping. TRL pads, we pack or pad.
"""

import json

import pytest
import torch

from benchmarks.random_model import write_model
from tests.tolerances import TOL

# TRL, PEFT and transformers warn about one another; this test is about their numbers.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, BATCH, RATE, RANK, ALPHA = 20, 4, 1e-2, 4, 8


def conversations():
    """Rows of uneven length; the answer is a function of the question, so that 20 steps have something to learn."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Count from {n % 7}{' please' * (n % 3)}."}],
            "completion": [{"role": "assistant", "content": " ".join(str(n % 7 + k) for k in range(2 + n % 5))}],
        }
        for n in range(STEPS * BATCH)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with ``model``, ``rows.jsonl`` and ``adapter``, the last written by our PEFT export."""
    from transformers import AutoModelForCausalLM

    from lightning_ft.formats.peft import export_peft
    from lightning_ft.nn.lora import LoRAConfig, inject_lora

    folder = tmp_path_factory.mktemp("trl")
    # After an end of turn this template writes nothing: TRL also scores what follows it, we stop at the end of turn.
    write_model(folder / "model", turn_end="", initializer_range=0.1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    inject_lora(model, LoRAConfig(r=RANK, alpha=ALPHA))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    export_peft(model, folder / "adapter")
    return folder


def plain_name(name):
    """``...layers.0.self_attn.q_proj.lora_A`` however the owner wraps it."""
    parts = [part for part in name.split(".") if part not in ("base_model", "model", "base", "default", "weight")]
    return ".".join(parts[parts.index("layers") :])


@pytest.fixture(scope="module")
def trl(files, tmp_path_factory):
    """What TRL did: its labels, the gradients of the first step, the loss of each step."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen = {"losses": [], "gradients": {}}

    class Recording(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen["losses"].append(loss.item())
            return loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not seen["gradients"]:
                trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
                seen["gradients"] = {plain_name(name): p.grad.clone() for name, p in trained}

    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("out")),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_steps=STEPS,
        max_length=None,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Recording(
        model=PeftModel.from_pretrained(base, files / "adapter", is_trainable=True),
        args=config,
        train_dataset=Dataset.from_list(conversations()),
        processing_class=AutoTokenizer.from_pretrained(files / "model"),
        callbacks=[Gradients()],
    )
    seen["rows"] = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    trainer.train()
    return seen


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "padded"])
def ours(request, files, tmp_path_factory):
    """The same of this library."""
    from lightning import Callback, Trainer

    from lightning_ft import SFT, LoRA, SFTData

    seen = {"batches": [], "losses": [], "gradients": {}}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen["batches"].append(batch)

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            seen["losses"].append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))

        def on_before_optimizer_step(self, trainer, module, optimizer):
            if not seen["gradients"]:
                trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
                seen["gradients"] = {plain_name(name): p.grad.clone() for name, p in trained}

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[LoRA(r=RANK, alpha=ALPHA, init_from=str(files / "adapter")), Watch()],
        default_root_dir=tmp_path_factory.mktemp("ours"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SFT(str(files / "model"), lr=RATE, warmup_steps=0, schedule="constant", base_dtype="float32")
    data = SFTData(
        path=str(files / "rows.jsonl"),
        batch_size=BATCH,
        packing=request.param,
        shuffle=False,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )
    trainer.fit(module, datamodule=data)
    return seen


def rows_of(batch):
    """(ids, labels with -100 on what is not scored) of each segment in TRL's form, by data-set row."""
    ids = batch.ids.reshape(-1)
    labels = torch.full_like(ids, -100)
    labels[batch.scored + 1] = batch.labels
    if batch.bounds is not None:
        pieces = list(zip(batch.bounds, batch.bounds[1:], strict=False))
    else:
        width = batch.ids.shape[1]
        pieces = [(n * width, n * width + int(length)) for n, length in enumerate(batch.mask.sum(1))]
    found = {
        int(row): (ids[a:b].tolist(), labels[a:b].tolist()) for row, (a, b) in zip(batch.rows, pieces, strict=True)
    }
    return [found[row] for row in sorted(found)]  # a padded batch is sorted by length


def test_same_rows_and_masks(trl, ours):
    mine = [row for batch in ours["batches"] for row in rows_of(batch)]
    assert len(mine) == STEPS * BATCH
    assert mine == trl["rows"]


def test_same_loss_of_one_batch(trl, ours):
    assert ours["losses"][0] == pytest.approx(trl["losses"][0], abs=TOL[torch.float32])


def test_same_lora_gradients_of_one_batch(trl, ours):
    assert ours["gradients"].keys() == trl["gradients"].keys()
    assert len(trl["gradients"]) == 2 * 2 * 7
    for name, expected in trl["gradients"].items():
        assert expected.abs().max() > 1e-4, f"the oracle's gradient of {name} is too small to prove anything"
        torch.testing.assert_close(ours["gradients"][name], expected, rtol=0, atol=TOL[torch.float32], msg=name)


def test_same_curve_over_twenty_steps(trl, ours):
    assert len(trl["losses"]) == len(ours["losses"]) == STEPS
    assert trl["losses"][-1] < trl["losses"][0] - 0.5, "nothing was learned, so the curve proves nothing"
    gaps = [abs(a - b) for a, b in zip(ours["losses"], trl["losses"], strict=True)]
    assert max(gaps) < 1e-3, gaps
