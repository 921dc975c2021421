"""What the Fisher information costs, beside an ordinary forward and backward pass over the same rows.

Run: python -m benchmarks.fisher_cost [--base starter:smollm2-135m] [--batches 6]
Without a base it is a random Llama of four layers of width 256; with --encoder starter:minilm-l6 a classifier.
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
from lightning_ft import SFT, ClassificationData, LoRA, SFTData
from lightning_ft.data.vader import ratings
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
                with trainer.precision_plugin.forward_context():
                    loss = pl_module._term(batch.to(pl_module.device)).sum / 100
                loss.backward()
                pl_module.zero_grad()
            self.seconds["ordinary"].append(time.process_time() - begin)
            begin = time.process_time()
            importance(trainer, pl_module, batches, LogLikelihood("sample", 0))
            self.seconds["fisher"].append(time.process_time() - begin)


def chats(folder: Path) -> SFTData:
    """Rows of a language model: 256 short chats in batches of eight."""
    rows = [
        {"prompt": f"Question {n}: " + "what comes next " * (1 + n % 7), "completion": " It is " + "so " * (4 + n % 9)}
        for n in range(256)
    ]
    return SFTData(written(folder / "rows.jsonl", rows), batch_size=8, cache_dir=str(folder / "cache"))


def sentences(folder: Path) -> ClassificationData:
    """Rows of an encoder: 512 of VADER's sentences in batches of 32."""
    rows = [{"text": text, "label": int(rating > 0)} for rating, text in ratings("movieReviewSnippets")[:512]]
    return ClassificationData(written(folder / "rows.jsonl", rows), batch_size=32, cache_dir=str(folder / "cache"))


def measure(module: SFT, data: Any, batches: int, techniques: list[Any], precision: Any = None) -> dict[str, float]:
    """Median seconds of both and their ratio; the first batch of an estimate, which is proven, counts."""
    cost = Cost(batches)
    fitter = silent_trainer(
        None, [*techniques, cost], accelerator="cpu", precision=precision, max_steps=1, limit_val_batches=0
    )
    fitter.fit(module, data)
    ordinary, fisher = (sorted(values)[len(values) // 2] for values in cost.seconds.values())
    return {"ordinary": ordinary, "fisher": fisher, "ratio": fisher / ordinary, "batches": batches}


def main() -> None:
    """Prints one line a trained part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None)
    parser.add_argument("--encoder", default=None, help="instead, a classifier of sentences on this base")
    parser.add_argument("--precision", default=None, help="of the Trainer")
    parser.add_argument("--batches", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, techniques in (("lora r=16", [LoRA(16)]), ("all parameters", [])):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if given.encoder is not None:
                module, data = SFT(given.encoder, task="sequence_classification"), sentences(folder)
            else:
                module, data = SFT(given.base or str(write_model(folder / "model", **SIZES))), chats(folder)
            found = measure(module, data, given.batches, techniques, given.precision)
        print(
            f"{name:16s} ordinary {found['ordinary']:.2f} s, fisher {found['fisher']:.2f} s, ratio {found['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
