"""A fit that is held to the one before it, as the pages of ewc, si and mas show the command."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


def penalty(folder: Path) -> float:
    """What the first step paid for being away from the weights of the fit before."""
    with open(folder / "metrics.csv", newline="") as file:
        return next(float(row["train/ewc"]) for row in csv.DictReader(file) if row["train/ewc"])


@pytest.mark.parametrize("trained", ["adapter", "full"])
def test_the_next_command_begins_with_the_weights_that_it_is_held_to(
    real: Run, tiny_model: Path, rows: Path, trained: str
) -> None:
    words = [f"--data.path={rows}", "--data.val_fraction=0.1", "--model.base_dtype=float32", "--model.lr=0.01"]
    words += ["--model.warmup_steps=0", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--ewc.lam=10"]
    words += [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    base, adapter = f"--model.base={tiny_model}", ["--lora.r=2"] if trained == "adapter" else []

    def fit(name: str, *more: str) -> Path:
        outcome = real("fit", *words, *more, "--name", name)
        assert outcome.code == 0, outcome.err
        return Path("runs") / name

    file = fit("first", base, *adapter) / "checkpoints" / "last.ckpt"
    held = f"--ewc.load_from={file}"
    if trained == "adapter":
        second = fit("second", base, f"--lora.init_from={file}", held)
    else:
        assert real("merge", f"--ckpt_path={file}", "--output=merged").code == 0
        second = fit("second", "--model.base=merged", held)
    assert 0.0 <= penalty(second) < 1e-9
    assert penalty(fit("astray", base, *adapter, held)) > 1e-6, (
        "of importances alone, which pull away from where it begins"
    )
