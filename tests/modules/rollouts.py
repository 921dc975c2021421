"""Prompts for a tiny random model, fits of GRPO on them, and what its rounds were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.random_model import write_model
from lightning_ft import GRPO, LoRA, PromptData, Refusal
from lightning_ft.engine.rollouts.round import Round
from lightning_ft.engine.strategies import FSDP2Strategy
from tests.contract.subjects import trainer
from tests.modules.preference import stir_, weights

FP32: dict[str, Any] = {"base_dtype": "float32", "warmup_steps": 0, "schedule": "constant"}


def sevens(completions: list[str], **columns: Any) -> list[float]:
    """A number that depends on every character, on a grid of eighths."""
    return [sum(ord(c) for c in text) % 9 / 8 for text in completions]


def constant(completions: list[str], **columns: Any) -> list[float]:
    """The same for every answer."""
    return [0.5] * len(completions)


def write_prompts(folder: Path, rows: int = 12) -> Path:
    """``model`` and ``prompts.jsonl`` in a folder: prompts of uneven length."""
    folder.mkdir(exist_ok=True)
    write_model(folder / "model", initializer_range=0.2)
    lines = [{"prompt": f"tell {n} " + "more " * (n % 3), "answer": str(n)} for n in range(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def grpo(
    job: Path, folder: Path, *, data: dict[str, Any] | None = None, kind: type[Any] = GRPO, **model: Any
) -> tuple[Any, PromptData]:
    """Four prompts a round with four answers of at most six tokens, in fp32, with plain SGD unless said otherwise."""
    given = {"prompts": 4, "batch_size": 16, "draw_batch": 4, "cache_dir": str(folder / "cache"), **(data or {})}
    made = {"rewards": {"sevens": sevens}, "samples": 4, "max_new_tokens": 6, "lr": 0.5, "optimizer": torch.optim.SGD}
    return kind(str(job / "model"), **{**FP32, **made, **model}), PromptData(str(job / "prompts.jsonl"), **given)


class Stir(pl.Callback):
    """Moves the adapter away from zero before the first round."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stir_(pl_module)


class Watch(pl.Callback):
    """Every round, and of every micro-batch what it was and what was logged; of every step the gradients."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        round = trainer.datamodule.round  # type: ignore[attr-defined]
        if not self.rounds or self.rounds[-1] is not round:
            self.rounds.append(round)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        grads = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is not None}
        self.gradients.append(grads)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(folder: Path, module: Any, data: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    """Two rounds without validation unless said otherwise; the trainer."""
    made = trainer(
        folder,
        *callbacks,
        **{"max_steps": -1, "max_epochs": 2, "limit_val_batches": 0, "log_every_n_steps": 1, **options},
    )
    made.fit(module, data, ckpt_path=ckpt_path)
    return made


def play(
    job: Path, folder: Path, *callbacks: Any, data: Any = None, options: Any = None, **model: Any
) -> tuple[Any, Watch, Any]:
    """(module, what was watched, trainer) of two rounds."""
    module, rows = grpo(job, folder, data=data, **model)
    watch = Watch()
    made = fit(folder, module, rows, *callbacks, watch, **(options or {}))
    return module, watch, made


def answers(round: Round) -> list[tuple[list[int], bool]]:
    """Token ids, and whether they ended."""
    return [(list(answer.ids), answer.ended) for answer in round.answers]


def on_ranks(job: str, folder: str, devices: int, strategy: str, full: bool, **model: Any) -> dict[str, Any]:
    """Rounds, last metrics and trained weights of two rounds on one rank or two, sixteen answers a step in all."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {}
    if devices > 1:
        given = FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "fsdp2" else strategy
        options = {"devices": devices, "strategy": given}
    data = {
        "batch_size": 8 // devices,
        "draw_batch": 3,
        "prompts": 5,
        "passes": 2,
        "val_path": str(Path(job) / "prompts.jsonl"),
    }
    parts = [] if full else [LoRA(r=4)]
    options["limit_val_batches"] = None
    module, watch, made = play(Path(job), Path(folder), *parts, data=data, options=options, **model)
    return {
        "answers": [answers(round) for round in watch.rounds],
        "metrics": {name: float(value) for name, value in made.callback_metrics.items()},
        "weights": weights(module),
    }


def refused_on_ranks(job: str, folder: str, long: int) -> str:
    """What is said on a rank of two where one prompt has so many words more than fit; nothing but the fit's beginning runs."""
    torch.set_num_threads(1)
    rows = [{"prompt": "tell " + "more " * (long if n == 4 else 1)} for n in range(5)]
    path = Path(folder) / f"long{torch.distributed.get_rank()}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module, _ = grpo(Path(job), Path(folder))
    data = PromptData(str(path), prompts=5, max_length=None, shuffle=False, cache_dir=str(Path(folder) / "cache"))
    try:
        fit(Path(folder), module, data, LoRA(r=4), devices=2, strategy="ddp")
    except Refusal as refusal:
        return str(refusal)
    return "nothing"


def resumed_on_ranks(
    job: str, folder: str, step: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[int]]:
    """Trained weights of an unbroken run on two ranks, of one that goes on from its ``step``, and the rounds that this one drew."""
    torch.set_num_threads(1)
    drawn: list[int] = []

    def play_(folder: Path, *callbacks: Any, **options: Any) -> dict[str, torch.Tensor]:
        module, data = grpo(Path(job), folder, data={"batch_size": 4}, optimizer=None, lr=0.01, beta=0.1)
        own = module.roll_out
        module.roll_out = lambda prompts, number, **more: (drawn.append(number), own(prompts, number, **more))[1]  # type: ignore
        fit(folder, module, data, LoRA(r=4), *callbacks, devices=2, strategy="ddp", **options)
        return weights(module)

    save = ModelCheckpoint(Path(folder), filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = play_(Path(folder) / "whole", save, enable_checkpointing=True)
    drawn.clear()
    return whole, play_(Path(folder) / "resumed", ckpt_path=str(Path(folder) / f"step={step}.ckpt")), drawn
