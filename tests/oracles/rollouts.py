"""A run of ours whose answers TRL is given.

A random fp32 Llama with LoRA factors (B not zero) that reach PEFT through our own export. Plain SGD, since
AdamW's first steps are the signs of gradients and so of rounding errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_model import write_model
from tests.modules.rollouts import Watch

PROMPTS, SAMPLES, NEW, RANK, ALPHA, ROUNDS = 4, 4, 7, 4, 8, 2


def lines() -> list[dict[str, str]]:
    """Prompts of uneven length."""
    return [{"prompt": f"tell {n} " + "more " * (n % 3)} for n in range(PROMPTS * ROUNDS)]


def write_files(folder: Path) -> Path:
    """A folder with ``model``, ``prompts.jsonl`` and ``adapter``, the last written by our PEFT export."""
    from transformers import AutoModelForCausalLM

    from lightning_ft.formats.peft import export_peft
    from lightning_ft.nn.lora import LoRAConfig, inject_lora

    write_model(folder / "model", initializer_range=0.1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    inject_lora(model, LoRAConfig(r=RANK, alpha=ALPHA))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    export_peft(model, folder / "adapter")
    return folder


def play_ours(files: Path, folder: Path, reward: Any, passes: int = 1, **settings: Any) -> Watch:
    """What our run wrote and found, one step a pass, prompts in the order of the file."""
    from lightning import Trainer

    from lightning_ft import GRPO, LoRA, PromptData

    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=ROUNDS,
        callbacks=[LoRA(r=RANK, alpha=ALPHA, init_from=str(files / "adapter")), watch],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = GRPO(
        str(files / "model"),
        rewards={"it": reward},
        samples=SAMPLES,
        max_new_tokens=NEW,
        drop_without_signal=False,
        optimizer=torch.optim.SGD,
        warmup_steps=0,
        schedule="constant",
        base_dtype="float32",
        **settings,
    )
    data = PromptData(
        str(files / "prompts.jsonl"),
        prompts=PROMPTS,
        passes=passes,
        batch_size=PROMPTS * SAMPLES,
        shuffle=False,
        cache_dir=str(folder / "cache"),
    )
    trainer.fit(module, datamodule=data)
    assert all(batch.shared for batch in watch.batches), "prompts were not shared"
    return watch


def their_settings(folder: Path, steps: int, rate: float) -> dict[str, Any]:
    """Of TRL's configuration: one step a pass, plain SGD, nothing that is not learning."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "num_generations": SAMPLES,
        "max_completion_length": NEW,
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": steps,
        "learning_rate": rate,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def their_policy(files: Path) -> Any:
    """The same model and factors in PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, files / "adapter", is_trainable=True)


def asked(round: Any) -> list[list[int]]:
    """The prompt of each answer of a round, as token ids."""
    return [list(prompt.ids) for prompt in round.prompts for _ in range(SAMPLES)]


def train_theirs(
    kind: Any, config: Any, files: Path, reward: Any, gradients: list[dict[str, torch.Tensor]], **more: Any
) -> None:
    """Trains as ours did: the same start, prompts in the same order; gradients of each step are kept.

    Args:
        kind: of TRL's trainers, given our answers.
        config: made of `their_settings`.
        files: as `write_files` has made them.
        reward: of both.
        gradients: where they are kept.
        more: of the trainer.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    kind(
        model=their_policy(files),
        reward_funcs=[reward],
        args=config,
        train_dataset=Dataset.from_list(lines()),
        processing_class=AutoTokenizer.from_pretrained(files / "model"),
        callbacks=[recording(gradients)],
        **more,
    ).train()


def recording(into: list[dict[str, torch.Tensor]]) -> Any:
    """A callback of transformers that keeps the gradients of each step."""
    from transformers import TrainerCallback

    from tests.oracles.test_trl_sft import plain_name

    class Gradients(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            into.append({plain_name(name): p.grad.clone() for name, p in trained})

    return Gradients()
