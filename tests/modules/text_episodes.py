"""Tasks of prompts and answers for a tiny language model: in each task every word has another answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightning_ft import MAML, EpisodeData
from tests.modules.tasks import WORDS

CODES = "tests.modules.text_episodes.codes"


def codes(rng: np.random.Generator, count: int, *, shot: int = 3, query: int = 2) -> list[dict[str, Any]]:
    """Of each task its own word for each word; a row asks for those of two or three."""
    tasks = []
    for _ in range(count):
        code = dict(zip(WORDS, rng.permutation(WORDS).tolist(), strict=True))
        rows = {}
        while len(rows) < shot + query:
            words = rng.choice(WORDS, size=rng.integers(2, 4)).tolist()
            rows[" ".join(words)] = "".join(f" {code[word]}" for word in words)
        made = [{"prompt": prompt, "completion": answer} for prompt, answer in rows.items()]
        tasks.append({"support": made[:shot], "query": made[shot:]})
    return tasks


def answers(**options: Any) -> EpisodeData:
    """Four tasks an epoch, two a micro-batch."""
    given: dict[str, Any] = {"batch_size": 2, "episodes": 4, "val_episodes": 3, "seed": 3, **options}
    return EpisodeData(tasks=CODES, **given)


def writer(base: Path, **options: Any) -> MAML:
    """MAML of a language model over what callbacks inject."""
    given: dict[str, Any] = {"inner": "adapter", "inner_lr": 0.5, "steps": 2, "lr": 0.1, "eval_steps": [0], **options}
    return MAML(str(base), task="causal_lm", **given)
