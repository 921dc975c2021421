"""What the Fisher information costs, beside an ordinary forward and backward pass over the same rows.

Run: python -m benchmarks.fisher_cost [--base starter:smollm2-135m] [--batches 6]
Without a base it is a random Llama of four layers of width 256.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.random_model import write_model
from benchmarks.row_files import written
from benchmarks.silent import silent_trainer
from lightning_ft import SFT, LoRA, SFTData
from lightning_ft.engine.importance import importance
from lightning_ft.engine.likelihood import LogLikelihood

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}


class Cost(pl.Callback):
    """At the end of a fit: seconds of this process for an ordinary pass and for an estimate, in turn."""

    def __init__(self, batches: int, rounds: int = 3) -> None:
        self.batches, self.rounds = batches, rounds
        self.seconds: dict[str, list[float]] = {"ordinary": [], "fisher": []}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        batches = [b for _, b in zip(range(self.batches), trainer.datamodule.in_order()["train"], strict=False)]  # type: ignore[attr-defined]
        for _ in range(self.rounds):
            begin = time.process_time()
            for batch in batches:
                (pl_module._term(batch.to(pl_module.device)).sum / 100).backward()
                pl_module.zero_grad()
            self.seconds["ordinary"].append(time.process_time() - begin)
            begin = time.process_time()
            importance(trainer, pl_module, batches, LogLikelihood("sample", 0))
            self.seconds["fisher"].append(time.process_time() - begin)


def measure(base: str, batches: int, folder: Path, techniques: list[Any], batch_size: int = 8) -> dict[str, float]:
    """Median seconds of both and their ratio; the first batch of an estimate, which is proven, counts."""
    chats = [
        {"prompt": f"Question {n}: " + "what comes next " * (1 + n % 7), "completion": " It is " + "so " * (4 + n % 9)}
        for n in range(256)
    ]
    path = written(folder / "rows.jsonl", chats)
    cost = Cost(batches)
    data = SFTData(path, batch_size=batch_size, cache_dir=str(folder / "cache"))
    fitter = silent_trainer(None, [*techniques, cost], accelerator="cpu", max_steps=1, limit_val_batches=0)
    fitter.fit(SFT(base), data)
    ordinary, fisher = (sorted(values)[len(values) // 2] for values in cost.seconds.values())
    return {"ordinary": ordinary, "fisher": fisher, "ratio": fisher / ordinary, "batches": batches}


def main() -> None:
    """Prints one line a trained part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None)
    parser.add_argument("--batches", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, techniques in (("lora r=16", [LoRA(16)]), ("all parameters", [])):
        with tempfile.TemporaryDirectory() as folder:
            base = given.base or str(write_model(Path(folder) / "model", **SIZES))
            found = measure(base, given.batches, Path(folder), techniques)
        print(
            f"{name:16s} ordinary {found['ordinary']:.2f} s, fisher {found['fisher']:.2f} s, ratio {found['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
