"""A tiny student, a larger teacher of the same tokens, prompts with answers, and fits of on-policy distillation on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers as hf
from torch.distributed.tensor import DTensor

from benchmarks.random_model import write_model
from lightning_ft import LoRA, OnPolicyDistillation, PromptData
from lightning_ft.engine.strategies import FSDP2Strategy
from tests.modules.preference import FP32, weights
from tests.modules.rollouts import Watch, fit


def write_job(folder: Path, rows: int = 12) -> Path:
    """``model``, ``teacher`` (deeper, wider, with a padded vocabulary) and ``prompts.jsonl`` in a folder."""
    folder.mkdir(exist_ok=True)
    write_model(folder / "model", initializer_range=0.2)
    config = hf.AutoConfig.from_pretrained(folder / "model")
    config.num_hidden_layers, config.vocab_size = 3, config.vocab_size + 5
    config.hidden_size = 2 * config.hidden_size
    torch.manual_seed(3)
    hf.LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    hf.AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "teacher")
    lines = [{"prompt": f"tell {n} " + "more " * (n % 3), "completion": "ok " * (1 + n % 4)} for n in range(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def gkd(
    job: Path, folder: Path, *, data: dict[str, Any] | None = None, **model: Any
) -> tuple[OnPolicyDistillation, PromptData]:
    """Six prompts a round with an answer of at most five tokens each, in fp32, with plain SGD unless said otherwise."""
    rows = {"prompts": 6, "batch_size": 6, "draw_batch": 4, "cache_dir": str(folder / "cache"), **(data or {})}
    made: dict[str, Any] = {"teacher": str(job / "teacher"), "teacher_dtype": "float32", "max_new_tokens": 5}
    made |= {"lr": 0.1, "optimizer": torch.optim.SGD}
    path = str(job / "prompts.jsonl")
    return OnPolicyDistillation(str(job / "model"), **{**FP32, **made, **model}), PromptData(path, **rows)


def play(
    job: Path, folder: Path, *callbacks: Any, data: Any = None, options: Any = None, **model: Any
) -> tuple[Any, Watch, Any]:
    """(module, what was watched, trainer) of two rounds."""
    module, rows = gkd(job, folder, data=data, **model)
    watch = Watch()
    made = fit(folder, module, rows, *callbacks, watch, **(options or {}))
    return module, watch, made


class Held(pl.Callback):
    """Which of the teacher's tensors lie on this rank in part, as the first step begins and after the last."""

    def __init__(self) -> None:
        self.divided: list[set[str]] = []
        self.blocks: set[str] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)

    def look(self, module: Any) -> None:
        """Notes their names, and those of all tensors in blocks."""
        named = dict(module._teacher.observer.view.model.named_parameters())
        self.blocks = {name for name in named if ".layers." in name}
        self.divided.append({name for name, p in named.items() if isinstance(p, DTensor)})


def on_ranks(
    job: str, folder: str, devices: int, strategy: str, full: bool, rounds: int = 4, **model: Any
) -> dict[str, Any]:
    """Answers, facts, last metrics and trained weights of a few rounds, six answers a step in all."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"max_epochs": rounds}
    if devices > 1:
        given = FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "fsdp2" else strategy
        options |= {"devices": devices, "strategy": given}
    data = {"batch_size": 6 // devices, "prompts": 5, "draw_batch": 2, "val_path": str(Path(job) / "prompts.jsonl")}
    options["limit_val_batches"] = None
    parts = [] if full else [LoRA(r=4)]
    held = Held()
    module, watch, made = play(Path(job), Path(folder), *parts, held, data=data, options=options, **model)
    return {
        "answers": [[list(answer.ids) for answer in round.answers] for round in watch.rounds],
        "writers": [module.writer(number) for number in range(rounds)],
        "metrics": {name: float(value) for name, value in made.callback_metrics.items()},
        "weights": weights(module),
        "divided": held.divided,
        "blocks": held.blocks,
    }
