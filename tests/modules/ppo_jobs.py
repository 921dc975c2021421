"""PPO on a tiny random model that writes a few tokens, whose fits are compared across layouts, ranks and interruptions."""

from __future__ import annotations

from pathlib import Path
from string import ascii_letters
from typing import Any

import torch

from lightning_ft import PPO, LoRA, PromptData
from lightning_ft.engine.strategies import FSDP2Strategy
from tests.modules.preference import FP32, weights
from tests.modules.rollouts import Watch, fit, sevens


def ppo(job: Path, folder: Path, *, data: dict[str, Any] | None = None, **model: Any) -> tuple[PPO, PromptData]:
    """Six prompts a round, two answers of at most five tokens each, two passes of two steps; plain SGD in fp32.

    Any letter ends an answer: of 259 tokens the model's own end is drawn too seldom.
    """
    made: dict[str, Any] = {
        "rewards": {"sevens": sevens},
        "samples": 2,
        "max_new_tokens": 5,
        "missing_end_penalty": 0.5,
    }
    made |= {"lr": 0.3, "value_lr": 0.05, "optimizer": torch.optim.SGD, "stop_strings": list(ascii_letters)}
    rows = {
        "prompts": 6,
        "batch_size": 6,
        "passes": 2,
        "draw_batch": 4,
        "cache_dir": str(folder / "cache"),
        **(data or {}),
    }
    return PPO(str(job / "model"), **{**FP32, **made, **model}), PromptData(str(job / "prompts.jsonl"), **rows)


def play(
    job: Path, folder: Path, *callbacks: Any, data: Any = None, options: Any = None, **model: Any
) -> tuple[Any, Watch, Any]:
    """(module, what was watched, trainer) of two rounds with LoRA, unless other callbacks are given."""
    module, rows = ppo(job, folder, data=data, **model)
    watch = Watch()
    made = fit(folder, module, rows, *(callbacks or (LoRA(r=4),)), watch, **(options or {}))
    return module, watch, made


def on_ranks(
    job: str, folder: str, devices: int, strategy: str, full: bool = False, accumulate: int = 1, **model: Any
) -> dict[str, Any]:
    """Rounds, metrics and trained weights of two rounds, six answers a step in all."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    if devices > 1:
        given = FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "fsdp2" else strategy
        options |= {"devices": devices, "strategy": given}
    module, rows = ppo(Path(job), Path(folder), data={"batch_size": 6 // devices // accumulate}, **model)
    watch = Watch()
    made = fit(Path(folder), module, rows, *([] if full else [LoRA(r=4)]), watch, **options)
    return {
        "answers": [[list(a.ids) for a in round.answers] for round in watch.rounds],
        "advantages": [round.tokens["advantages"] for round in watch.rounds],
        "metrics": {name: float(value) for name, value in made.callback_metrics.items()},
        "weights": weights(module),
    }
