"""Tasks of tags, of answers by an encoder-decoder, and of two answers, for tiny bases; and MAML over each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import lightning_ft
from lightning_ft import EpisodeData, LoRA
from tests.modules.episodes import fit
from tests.modules.tasks import WORDS

BASES = {"token_classification": "bert", "seq2seq_lm": "t5", "reward": "llama", "dpo": "llama"}
"""Task -> kind of base."""
HERE = "tests.modules.objective_episodes"


def tags(rng: np.random.Generator, count: int, *, shot: int = 3, query: int = 2) -> list[dict[str, Any]]:
    """Of each task its own tag for each word, one of two."""
    tasks = []
    for _ in range(count):
        code = {word: f"tag {rng.integers(2)}" for word in WORDS}
        rows = [
            {"tokens": words, "tags": [code[word] for word in words]}
            for words in (rng.choice(WORDS, size=rng.integers(2, 6)).tolist() for _ in range(shot + query))
        ]
        tasks.append({"support": rows[:shot], "query": rows[shot:]})
    return tasks


def pairs(rng: np.random.Generator, count: int, *, shot: int = 3, query: int = 2) -> list[dict[str, Any]]:
    """Of each task the word that should be said, whatever is asked."""
    tasks = []
    for _ in range(count):
        liked, disliked = rng.choice(WORDS, size=2, replace=False).tolist()
        rows = []
        for n in range(shot + query):
            prompt = " ".join([WORDS[n], *rng.choice(WORDS, size=2).tolist()])
            rows.append({"prompt": prompt, "chosen": f" {liked}", "rejected": f" {disliked} no"})
        tasks.append({"support": rows[:shot], "query": rows[shot:]})
    return tasks


FUNCTIONS = {
    "token_classification": f"{HERE}.tags",
    "seq2seq_lm": "tests.modules.text_episodes.codes",
    "reward": f"{HERE}.pairs",
    "dpo": f"{HERE}.pairs",
}


def data(task: str, **options: Any) -> EpisodeData:
    """Four tasks an epoch, two a micro-batch."""
    given: dict[str, Any] = {
        "batch_size": 2,
        "episodes": 4,
        "val_episodes": 3,
        "test_episodes": 2,
        "seed": 3,
        **options,
    }
    if task == "token_classification":
        given.setdefault("way", 2)
    return EpisodeData(tasks=FUNCTIONS[task], **given)


def learner(base: Path, task: str, kind: str = "MAML", **options: Any) -> Any:
    """MAML (Reptile) over a base and what callbacks inject."""
    language = task in ("seq2seq_lm", "dpo")
    given: dict[str, Any] = {"inner_lr": 0.1, "steps": 2, "lr": 0.05, "eval_steps": [0], **options}
    if kind == "MAML":
        given.setdefault("inner", "adapter" if language else "adapter_and_head")
    return getattr(lightning_ft, kind)(str(base), task=task, optimizer=torch.optim.SGD, **given)


def on_ranks(base: str, task: str, folder: str, devices: int) -> Any:
    """(metrics, trained weights) of two steps of four tasks on one rank or on each of two."""
    torch.set_num_threads(1)
    made = learner(Path(base), task)
    ranks: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    given = data(task, batch_size=4 // devices, val_batch_size=2, episodes=8)
    _, runner = fit(Path(folder), made, given, LoRA(r=2), max_steps=2, limit_val_batches=None, **ranks)
    measured = {name: float(value) for name, value in runner.callback_metrics.items()}
    return measured, {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}
