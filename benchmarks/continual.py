"""What continual learning keeps, cell by cell: every method between nothing (naive) and everything at once (joint).

    python -m benchmarks.continual                                # all cells that are missing
    python -m benchmarks.continual --only "vader_minilm|ewc|"     # cells whose key contains this
    python -m benchmarks.continual --minutes 75                   # begins none after that time
    python -m benchmarks.continual --render                       # the tables alone, from the kept results

A cell is one run: ``suite|method|strength|seed``. Finished ones are in results/continual.json and are not run again; several
processes may work at once, each on its own methods. Where a method has a strength to choose, three values are tried first on rows
and a seed of their own (``choose`` in place of the seed), and the one with the best average is taken. Digits always run on the
CPU, sentences under autocast to bfloat16 where that is fast.

The digits are scikit-learn's (1,797 of 8 x 8 pixels): five permutations of the pixels, or five tasks of two digits whose classes
all compete. The sentences are VADER's, sign of the rating, in the order tweets, amazon, nyt, movie.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import continual_report
from benchmarks.measure import fast_precision
from benchmarks.silent import silent_trainer
from benchmarks.vader_cells import Kept, quiet
from lightning_ft import (
    AGEM,
    EWC,
    MAS,
    SFT,
    ClassificationData,
    LoRA,
    LwF,
    OrthogonalLoRA,
    Replay,
    SFTData,
    SynapticIntelligence,
    TaskStream,
)
from lightning_ft.data.vader import LABELS, QUESTION, ratings

RESULTS = Path(__file__).parent / "results" / "continual.json"
PAGE = Path(__file__).parents[1] / "docs" / "guides" / "continual.md"
CHOOSE = 99
"""Seed, and rows, of the cells that choose a strength."""
DOMAINS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "movie": "movieReviewSnippets",
}

Maker = Callable[[float], list[pl.Callback]]
METHODS: dict[str, tuple[tuple[float, ...], Maker]] = {
    "naive": ((), lambda _: []),
    "joint": ((), lambda _: []),
    "ewc": ((10.0, 100.0, 1000.0), lambda lam: [EWC(lam)]),
    "si": ((1.0, 10.0, 100.0), lambda lam: [SynapticIntelligence(lam)]),
    "mas": ((0.1, 1.0, 10.0), lambda lam: [MAS(lam)]),
    "lwf": ((0.3, 1.0, 3.0), lambda weight: [LwF(weight)]),
    "er": ((), lambda _: [Replay(200, balance="task")]),
    "der": ((0.01, 0.03, 0.1), lambda alpha: [Replay(200, mode="der", alpha=alpha, balance="task")]),
    "der++": ((0.01, 0.03, 0.1), lambda alpha: [Replay(200, mode="der++", alpha=alpha, balance="task")]),
    "agem": ((), lambda _: [AGEM(200)]),
    "orthogonal_lora": ((0.05, 0.5, 5.0), lambda lam: [OrthogonalLoRA(8, lam=lam)]),
}
FULL = tuple(name for name in METHODS if name != "orthogonal_lora")
SUITES: dict[str, tuple[str, ...]] = {
    "digits_permuted": FULL,
    "digits_split": FULL,
    "vader_minilm": FULL,
    "vader_minilm_lora": ("naive", "joint", "ewc", "er", "orthogonal_lora"),
    "vader_smollm": ("naive", "joint", "ewc", "er", "lwf"),
}


class Net(pl.LightningModule):
    """A user's own module: 64 pixels, two hidden layers, ten digits. (Of ReLUs too many die from task to task.)"""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)  # type: ignore[no-any-return]

    def logits(self, batch: list[Tensor]) -> Tensor:
        """What LwF and der++ compare."""
        return self(batch[0])  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy."""
        right = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("val_acc", right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Begun anew with each task."""
        return torch.optim.Adam(self.parameters(), 1e-3)


class Digits(pl.LightningDataModule):
    """Every fifth row is held out for the score; a different fifth of the rest chooses strengths."""

    def __init__(self, seed: int, permutation: np.ndarray | None = None) -> None:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        super().__init__()
        pixels, digits = load_digits(return_X_y=True)
        x = torch.tensor(pixels / 16, dtype=torch.float32)
        if permutation is not None:
            x = x[:, torch.as_tensor(permutation)]
        y, place = torch.tensor(digits), torch.arange(len(digits))
        held = place % 5 == (1 if seed == CHOOSE else 0)
        trained = (place % 5 > 1) if seed == CHOOSE else ~held
        self.train, self.val = TensorDataset(x[trained], y[trained]), TensorDataset(x[held], y[held])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In a new order each epoch."""
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self.val, batch_size=512)


def digits(
    suite: str, seed: int, baseline: str | None, folder: Path
) -> tuple[pl.LightningModule, TaskStream, list[pl.Callback]]:
    """The net and its stream."""
    options: dict[str, Any] = {"metric": "val_acc", "baseline": baseline}
    if suite == "digits_split":
        return Net(), TaskStream(source=Digits(seed), by="class", groups=2, scenario="class", epochs=10, **options), []
    drawn = np.random.default_rng(seed)
    orders = [None, *(drawn.permutation(64) for _ in range(4))]
    tasks = {f"permutation_{n}": Digits(seed, order) for n, order in enumerate(orders)}
    return Net(), TaskStream(dict(tasks), epochs=6, **options), []


def sentences(folder: Path, seed: int, per_domain: int, held: int) -> tuple[Path, Path]:
    """Rows of the four domains with a rating beyond 0.5 either way, to train and to score, in files."""
    files = folder / f"train-{seed}.csv", folder / f"val-{seed}.csv"
    columns = ("text", "label", "domain", "prompt", "completion")
    tables = [[columns], [columns]]
    for name, domain in DOMAINS.items():
        rows = sorted({(text, rating > 0) for rating, text in ratings(domain) if abs(rating) > 0.5 and text})
        random.Random(0).shuffle(rows)
        half = len(rows) // 2  # strengths are chosen on rows that no score ever sees
        rows = rows[:half] if seed == CHOOSE else rows[half:]
        random.Random(seed).shuffle(rows)
        for n, (text, positive) in enumerate(rows[: per_domain + held]):
            label = LABELS[0] if positive else LABELS[1]
            tables[n < held].append((text, label, name, f"{QUESTION}\n{text}", f" {label}"))
    for file, table in zip(files, tables, strict=True):
        with open(file, "w", newline="") as opened:
            csv.writer(opened).writerows(table)
    return files


def vader(
    suite: str, seed: int, baseline: str | None, folder: Path
) -> tuple[pl.LightningModule, TaskStream, list[pl.Callback]]:
    """An encoder that classifies, or a language model that answers."""
    options: dict[str, Any] = {"by": "domain", "groups": list(DOMAINS), "epochs": 1, "baseline": baseline}
    cache = str(folder / "cache")
    if suite == "vader_smollm":
        train, val = sentences(folder, seed, 400, 100)
        source: Any = SFTData(str(train), val_path=str(val), batch_size=16, packing=True, cache_dir=cache)
        return SFT("starter:smollm2-135m", lr=5e-4), TaskStream(source=source, **options), [LoRA(r=8)]
    train, val = sentences(folder, seed, 800, 200)
    source = ClassificationData(str(train), val_path=str(val), batch_size=32, labels=list(LABELS), cache_dir=cache)
    lora = suite == "vader_minilm_lora"
    rate, head = (1e-3, 1e-3) if lora else (1e-4, 5e-4)
    module = SFT("starter:minilm-l6", task="sequence_classification", lr=rate, head_lr=head)
    return module, TaskStream(source=source, **options), [LoRA(r=8)] if lora else []


def seeds_of(suite: str) -> range:
    """The seeds that are scored."""
    return range(1 if suite == "vader_smollm" else 3)


def key_of(suite: str, method: str, strength: float, seed: int) -> str:
    """The key of a cell."""
    return f"{suite}|{method}|{strength:g}|{'choose' if seed == CHOOSE else seed}"


def run(suite: str, method: str, strength: float, seed: int, accelerator: str = "auto") -> dict[str, Any]:
    """One cell."""
    pl.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as place:
        baseline = "joint" if method == "joint" else None
        make = digits if suite.startswith("digits") else vader
        module, stream, parts = make(suite, seed, baseline, Path(place))
        if method == "orthogonal_lora":
            parts = []  # it brings factors of its own
        trainer = silent_trainer(
            None,
            [*parts, *METHODS[method][1](strength)],
            accelerator="cpu" if suite.startswith("digits") else accelerator,
            precision="32-true" if suite.startswith("digits") else fast_precision(),
            devices=1,
            max_epochs=-1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        begin = time.monotonic()
        trainer.fit(module, stream)
    matrix, start = stream.scores.matrix()
    return {
        "metric": stream.scores.chosen(),
        "tasks": stream.scores.columns(),
        "start": start,
        "matrix": matrix,
        "scores": stream.scores.metrics(method == "joint"),
        "seconds": round(time.monotonic() - begin, 1),
        "device": trainer.strategy.root_device.type,
        "precision": str(trainer.precision),
    }


def fill(kept: Kept, suites: list[str], methods: list[str], end: float, accelerator: str) -> None:
    """Runs what is missing of some suites and methods, none after ``end``."""

    def cell(suite: str, method: str, strength: float, seed: int) -> None:
        if time.monotonic() < end:
            key = key_of(suite, method, strength, seed)
            kept.ensure(key, lambda: run(suite, method, strength, seed, accelerator), "average")

    for suite in suites:
        for method in (m for m in SUITES[suite] if m in methods):
            for value in METHODS[method][0]:
                cell(suite, method, value, CHOOSE)
            best = continual_report.strength(kept.cells, suite, method, METHODS[method][0])
            for seed in seeds_of(suite) if best is not None else ():
                cell(suite, method, best, seed)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--accelerator", default="auto", help="of the sentences")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="write the tables from the kept results and run nothing")
    given = parser.parse_args(argv)
    setting = {"buffer": 200, "digits_epochs": {"digits_permuted": 6, "digits_split": 10}, "sentences_epochs": 1}
    kept = Kept(given.output, setting, given.only)
    if not given.render:
        quiet()
        end = time.monotonic() + 60 * given.minutes
        fill(kept, given.suites.split(","), given.methods.split(","), end, given.accelerator)
    grid = {suite: {method: METHODS[method][0] for method in found} for suite, found in SUITES.items()}
    table = given.output.with_suffix(".md")
    table.write_text(continual_report.render(kept.content, grid), encoding="utf-8")
    print(f"Written to {given.output} and {table}.")
    if given.output == RESULTS:
        PAGE.write_text(continual_report.filled(PAGE.read_text(encoding="utf-8"), kept.content, grid), encoding="utf-8")


if __name__ == "__main__":
    main()
