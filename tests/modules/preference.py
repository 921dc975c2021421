"""Pairs and single answers of uneven length on a tiny random chat model, and fits of DPO and KTO on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from benchmarks.random_model import write_model
from lightning_ft import DPO, KTO, LoRA, PreferenceData, UnpairedPreferenceData
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.functional.kto import kl_estimate
from lightning_ft.nn.registry import injected_layers
from lightning_ft.objectives import kto as objective
from tests.contract.subjects import trainer

ROWS = 12
FP32: dict[str, Any] = {"base_dtype": "float32", "warmup_steps": 0, "schedule": "constant"}


def write_job(folder: Path, rows: int = ROWS) -> Path:
    """``model``, ``pairs.jsonl`` and ``rated.jsonl`` in a folder."""
    write_model(folder / "model", initializer_range=0.2)
    words = random.Random(2)

    def text(most: int) -> str:
        return "".join(words.choices("abcdefgh ", k=words.randint(1, most))) + "."

    pairs = [
        {"prompt": text(20) + str(n), "chosen": " " + text(8) + "!", "rejected": " " + text(14)} for n in range(rows)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rated = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n % 3 > 0} for n, p in enumerate(pairs)]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    return folder


def dpo(job: Path, folder: Path, *, data: dict[str, Any] | None = None, **model: Any) -> tuple[DPO, PreferenceData]:
    """The module with plain SGD in fp32, and its rows in order, which are validated on too."""
    rows = str(job / "pairs.jsonl")
    given: dict[str, Any] = {"val_path": rows, "batch_size": 6, "shuffle": False, "cache_dir": str(folder / "cache")}
    module = DPO(str(job / "model"), **{**FP32, "lr": 0.5, "optimizer": torch.optim.SGD, **model})
    return module, PreferenceData(rows, **{**given, **(data or {})})


def kto(job: Path, folder: Path, *, data: dict[str, Any] | None = None, **model: Any) -> tuple[KTO, Any]:
    """The same of KTO."""
    rows = str(job / "rated.jsonl")
    given: dict[str, Any] = {"val_path": rows, "batch_size": 6, "shuffle": False, "cache_dir": str(folder / "cache")}
    module = KTO(str(job / "model"), **{**FP32, "lr": 0.5, "optimizer": torch.optim.SGD, **model})
    return module, UnpairedPreferenceData(rows, **{**given, **(data or {})})


def stir_(module: torch.nn.Module, scale: float = 0.1, seed: int = 7) -> None:
    """Gives injected parameters seeded values, so that the policy is not its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in sorted(injected_layers(module).items()):
            for _, parameter in sorted(layer.injected_parameters().items()):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def fit(folder: Path, module: Any, data: Any, *callbacks: Any, **options: Any) -> Any:
    """Two steps without validation unless said otherwise; the trainer."""
    made = trainer(folder, *callbacks, **{"max_steps": 2, "limit_val_batches": 0, **options})
    made.fit(module, data)
    return made


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained tensors, whole."""
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {name: p.detach().clone() for name, p in whole.items() if p.requires_grad}


def on_ranks(
    job: str, folder: str, kind: str, devices: int, strategy: str, model: dict[str, Any], full: bool = False
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(what was logged and validated, trained weights) of two steps of six rows, on one rank or two."""
    torch.set_num_threads(1)
    make = dpo if kind == "dpo" else kto
    module, data = make(
        Path(job), Path(folder), data={"batch_size": 6 // devices, "val_batch_size": 5 if kind == "dpo" else 6}, **model
    )
    ranks: dict[str, Any] = {}
    if devices > 1:
        given = FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "fsdp2" else strategy
        ranks = {"devices": devices, "strategy": given}
    made = fit(
        Path(folder), module, data, *([] if full else [LoRA(r=4)]), limit_val_batches=None, log_every_n_steps=1, **ranks
    )
    measured = {name: float(value) for name, value in made.callback_metrics.items()}
    return measured, weights(module)


class Estimates(pl.Callback):
    """Of each step of KTO what this rank had measured, and the estimate that it went on with."""

    def __init__(self) -> None:
        self.found: list[tuple[tuple[float, float], float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        own = objective.mismatched_sum

        def spy(answers: objective.Answers) -> torch.Tensor:
            self.total = own(answers)
            self.before = (float(self.total[0]), float(self.total[1]))
            return self.total

        objective.mismatched_sum, self.own = spy, own

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.found.append((self.before, float(kl_estimate(self.total[0], self.total[1]))))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        objective.mismatched_sum = self.own


class Stirred(pl.Callback):
    """Moves the policy away from its reference before the first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stir_(pl_module, seed=5)


def estimates(job: str, folder: str, rows: str, model: dict[str, Any]) -> list[tuple[tuple[float, float], float]]:
    """What `Estimates` finds on this rank in an epoch of batches of three rows a rank."""
    torch.set_num_threads(1)
    module, _ = kto(Path(job), Path(folder), **{**model, "lr": 1e-3})
    data = UnpairedPreferenceData(rows, batch_size=3, shuffle=False, cache_dir=str(Path(folder) / "cache"))
    watch = Estimates()
    fit(Path(folder), module, data, LoRA(r=4), Stirred(), watch, devices=2, strategy="ddp")
    return watch.found
