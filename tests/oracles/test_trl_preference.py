"""TRL's DPOTrainer and KTOTrainer as oracles: the same loss and LoRA gradients of one batch, and 20 steps learned alike.

A random fp32 Llama, LoRA factors (B not zero) that reach PEFT through our own export, answers of uneven length, four rows a
step, no shuffling, AdamW at a constant rate, no clipping. TRL pads and runs a prompt twice; we pack and run it once. The
reference is the adapter as it was: TRL copies it, we keep a snapshot.
"""

import json

import pytest
import torch

from benchmarks.random_model import write_model
from tests.oracles.test_trl_sft import plain_name
from tests.tolerances import TOL

# TRL, PEFT and transformers warn about one another; this test is about their numbers.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, BATCH, RATE, RANK, ALPHA, BETA = 20, 4, 5e-3, 4, 8, 0.1


def text(n, kind):
    words = {"chosen": "yes " * (1 + n % 5), "rejected": "no, " * (1 + n * 3 % 7)}
    return [{"role": "assistant", "content": f"{words[kind]}{n % 7}"}]


def rows(kind):
    """Pairs, or single answers of which every other one is good."""
    asked = [[{"role": "user", "content": f"Is it {n % 7}{' please' * (n % 3)}?"}] for n in range(STEPS * BATCH)]
    if kind == "dpo":
        return [
            {"prompt": p, "chosen": text(n, "chosen"), "rejected": text(n, "rejected")} for n, p in enumerate(asked)
        ]
    good = [n % 3 != 0 for n in range(len(asked))]
    kinds = ["chosen" if label else "rejected" for label in good]
    return [
        {"prompt": p, "completion": text(n, k), "label": label}
        for n, (p, k, label) in enumerate(zip(asked, kinds, good, strict=True))
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with ``model``, ``dpo.jsonl``, ``kto.jsonl`` and ``adapter``, the last written by our PEFT export."""
    from transformers import AutoModelForCausalLM

    from lightning_ft.formats.peft import export_peft
    from lightning_ft.nn.lora import LoRAConfig, inject_lora

    folder = tmp_path_factory.mktemp("trl_preference")
    # After an end of turn this template writes nothing: TRL also scores what follows it, we stop at the end of turn.
    write_model(folder / "model", turn_end="", initializer_range=0.1)
    for kind in ("dpo", "kto"):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    inject_lora(model, LoRAConfig(r=RANK, alpha=ALPHA))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    export_peft(model, folder / "adapter")
    return folder


@pytest.fixture(scope="module", params=["dpo", "kto"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(kind, files, tmp_path_factory):
    """What TRL did: the loss of each step, the gradients of the first, what it logged of it."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    configured, trains = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}[kind]
    seen = {"losses": [], "gradients": {}, "logged": {}}

    class Recording(trains):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen["losses"].append(loss.item())
            return loss

        def log(self, logs, *args, **kwargs):
            seen["logged"] = seen["logged"] or {name: values[0] for name, values in self._metrics["train"].items()}
            super().log(logs, *args, **kwargs)

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not seen["gradients"]:
                trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
                seen["gradients"] = {plain_name(name): p.grad.clone() for name, p in trained}

    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    config = configured(
        output_dir=str(tmp_path_factory.mktemp("out")),
        use_cpu=True,
        bf16=False,
        beta=BETA,
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
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Recording(
        model=PeftModel.from_pretrained(base, files / "adapter", is_trainable=True),
        args=config,
        train_dataset=Dataset.from_list(rows(kind)),
        processing_class=AutoTokenizer.from_pretrained(files / "model"),
        callbacks=[Gradients()],
    )
    trainer.train()
    return seen


@pytest.fixture(scope="module")
def ours(kind, files, tmp_path_factory):
    """The same of this library, prompts shared."""
    from lightning import Callback, Trainer

    from lightning_ft import DPO, KTO, LoRA, PreferenceData, UnpairedPreferenceData

    seen = {"losses": [], "gradients": {}, "logged": {}, "shared": []}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            seen["losses"].append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
            seen["logged"] = seen["logged"] or {k: float(v) for k, v in trainer.callback_metrics.items()}
            seen["shared"].append(batch.shared)

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
    made, data = {"dpo": (DPO, PreferenceData), "kto": (KTO, UnpairedPreferenceData)}[kind]
    module = made(str(files / "model"), beta=BETA, lr=RATE, warmup_steps=0, schedule="constant", base_dtype="float32")
    cache = str(tmp_path_factory.mktemp("cache"))
    trainer.fit(module, datamodule=data(str(files / f"{kind}.jsonl"), batch_size=BATCH, shuffle=False, cache_dir=cache))
    assert all(seen["shared"]), "prompts were not shared"
    return seen


def test_same_loss_of_one_batch(theirs, ours):
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=TOL[torch.float32])


def test_same_lora_gradients_of_one_batch(theirs, ours):
    trained = {name: grad for name, grad in theirs["gradients"].items()}
    assert ours["gradients"].keys() == trained.keys() and len(trained) == 2 * 2 * 7
    for name, expected in trained.items():
        assert expected.abs().max() > 1e-4, f"the oracle's gradient of {name} is too small to prove anything"
        torch.testing.assert_close(ours["gradients"][name], expected, rtol=0, atol=TOL[torch.float32], msg=name)


def test_same_curve_over_twenty_steps(theirs, ours):
    assert len(theirs["losses"]) == len(ours["losses"]) == STEPS
    assert theirs["losses"][-1] < theirs["losses"][0] - 0.1, "nothing was learned, so the curve proves nothing"
    gaps = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    assert max(gaps) < 1e-3, gaps


def test_same_numbers_logged(theirs, ours):
    names = [name for name in ours["logged"] if name.startswith(("train/rewards", "train/logps"))]
    assert len(names) >= 5
    for name in names:
        assert ours["logged"][name] == pytest.approx(theirs["logged"][name.removeprefix("train/")], abs=1e-4), name
