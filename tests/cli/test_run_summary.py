"""What a fit says of itself in its folder, and which of its steps it logs."""

import csv
import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ft.cli.run_summary import SECONDS
from lightning_ft.cli.step_log import StepLog, gradient_norm, interval
from tests.cli.conftest import Outcome
from tests.two_ranks import TwoRanks

Run = Callable[..., Outcome]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
FIT = ("fit", "--model.base=b", "--data.path=d", *QUIET)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def logged(folder: Path, name: str) -> dict[int, float]:
    """Step, counted from 1 -> value."""
    with open(folder / "metrics.csv", newline="") as file:
        return {int(row["step"]) + 1: float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_a_real_run(trained: Path, rows: Path) -> None:
    folder = trained.parents[1]
    found = summary_of(folder)
    assert (found["status"], found["module"], found["task"], found["steps"]) == ("finished", "SFT", "causal_lm", 3)
    assert found["epochs"] == 1.5  # eleven rows in batches of eight
    assert found["techniques"] == ["LoRA(r=4)"] and found["learning_rate"] == 0.1 and found["seed"] == 0
    kept = torch.load(trained, weights_only=True)["state_dict"]
    assert found["trainable_parameters"] == sum(tensor.numel() for tensor in kept.values())
    assert found["trainable_share"] == found["trainable_parameters"] / found["total_parameters"] < 0.5
    assert found["val_rows"] == 1  # a tenth of twelve, rounded down
    for name in ("val/loss", "val/accuracy", "val/perplexity"):
        assert found["metrics"][name] == pytest.approx(logged(folder, name)[3], rel=1e-6)
    assert (folder / found["checkpoints"]["last"]).samefile(trained) and found["checkpoints"]["best"] is None
    assert found["train_seconds"] > 0 and found["peak_memory_bytes"] > 1e7
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )


def test_the_row_is_that_of_the_file_with_its_answer_marked(trained: Path) -> None:
    row = json.loads((trained.parents[1] / "row.json").read_text())
    scored = "".join(piece["text"] for piece in row["pieces"] if piece["scored"])
    assert scored.startswith("no ") and "yes" not in scored
    assert "yes" in "".join(piece["text"] for piece in row["pieces"] if not piece["scored"])
    assert 0 < row["scored"] < row["tokens"] and "rows.jsonl" in row["where"]


def test_the_last_step_is_validated(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_steps=3").code == 0  # an epoch has four
    folder = tmp_path / "runs/run"
    weights = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    inputs = torch.arange(16.0).reshape(8, 2) / 16
    expected = (inputs @ weights["layer.weight"].T + weights["layer.bias"]).square().mean()
    assert summary_of(folder)["metrics"]["val/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert logged(folder, "val/loss") == {3: pytest.approx(float(expected), rel=1e-5)}


def test_the_last_validation_leaves_no_trace(
    real: Run, tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves, weights, optimizer, counters and random numbers, is what a run without it leaves."""
    words = [
        "fit",
        f"--model.base={tiny_model}",
        f"--data.path={rows}",
        "--data.val_fraction=0.1",
        "--lora.r=2",
        *QUIET,
    ]
    words += ["--data.batch_size=3", "--model.lr=0.01", "--lora.dropout=0.3", "--model.schedule=constant"]
    for name in ("with", "without"):
        assert real(*words, "--trainer.max_steps=2", f"--name={name}").code == 0
        last = f"runs/{name}/checkpoints/last.ckpt"
        assert real("fit", "--ckpt_path", last, "--trainer.max_steps=5").code == 0
        monkeypatch.setattr(StepLog, "on_train_batch_end", lambda *args: None)
    assert list(logged(tmp_path / "runs/with", "val/loss")) == [2, 4, 5]
    assert list(logged(tmp_path / "runs/without", "val/loss")) == [4]  # the end of the epoch alone
    for name in ("train/loss", "train/grad_norm"):
        assert logged(tmp_path / "runs/with", name) == logged(tmp_path / "runs/without", name)
    one, other = (
        torch.load(tmp_path / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("with", "without")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_short_run_leaves_curves_and_no_warning(run: Run, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*logging interval.*")
        assert run(*FIT, "--trainer.max_steps=2", "--trainer.max_epochs=1").code == 0
    folder = tmp_path / "runs/run"
    assert list(logged(folder, "train/loss")) == [1, 2]
    assert logged(folder, "train/lr") == {1: pytest.approx(0.1), 2: pytest.approx(0.1)}
    assert list(logged(folder, "train/grad_norm")) == [1, 2]


def test_a_longer_run_logs_fewer_steps_as_it_goes_on(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_epochs=30", "--trainer.limit_val_batches=0").code == 0
    expected = [*range(1, 21), *range(22, 51, 2), *range(55, 101, 5), 110, 120]
    assert list(logged(tmp_path / "runs/run", "train/loss")) == expected
    assert list(logged(tmp_path / "runs/run", "train/grad_norm")) == expected
    assert [interval(step) for step in (1, 20, 21, 51, 101, 10**6)] == [1, 1, 2, 5, 10, 10]


def test_the_users_interval_stands(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=3").code == 0
    assert list(logged(tmp_path / "runs/run", "train/loss")) == [3, 6]


def test_the_norm_is_that_of_all_gradients() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert gradient_norm(module) is None
    module(torch.randn(5, 3)).square().sum().backward()
    module[0].bias.grad = None
    every = torch.cat([p.grad.double().reshape(-1) for p in module.parameters() if p.grad is not None])
    norm = gradient_norm(module)
    assert norm is not None and float(norm) == pytest.approx(float(every.norm()), rel=1e-6)


def test_the_logged_norm_is_the_step_that_sgd_takes(run: Run, tmp_path: Path) -> None:
    """With SGD the weights move by rate x gradient: from two runs' weights, without looking at a gradient."""
    for steps in (1, 2):
        assert run(*FIT, f"--trainer.max_steps={steps}", f"--name=s{steps}", "--model.lr=0.5").code == 0
    one, two = (
        torch.load(tmp_path / f"runs/s{steps}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for steps in (1, 2)
    )
    moved = torch.cat([(one[key] - two[key]).reshape(-1) for key in one]).norm() / 0.5
    assert logged(tmp_path / "runs/s2", "train/grad_norm")[2] == pytest.approx(float(moved), rel=1e-4)


def test_seconds_of_a_resumed_run_go_on(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_epochs=1").code == 0
    file = tmp_path / "runs/run/checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    earlier = checkpoint[SECONDS]
    assert 0 < earlier <= summary_of(tmp_path / "runs/run")["train_seconds"]
    checkpoint[SECONDS] = 1000.0
    torch.save(checkpoint, file)
    assert run("fit", "--ckpt_path", str(file), "--trainer.max_epochs=2").code == 0
    assert 1000 < summary_of(tmp_path / "runs/run")["train_seconds"] < 1100


def test_an_interrupted_run_has_a_summary(run: Run, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    callback = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1")
    try:
        run(*FIT, "--model.base=ctrl-c", "--trainer.val_check_interval=2", *callback)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    found = summary_of(tmp_path / "runs/run")
    assert (found["status"], found["steps"], found["trainable_parameters"]) == ("stopped", 3, 3)
    assert "val/loss" in found["metrics"] and found["checkpoints"]["last"] == "checkpoints/epoch=0-step=3.ckpt"
    assert not list((tmp_path / "runs/run").glob(".*"))  # nothing half-written


def test_a_monitored_checkpoint_is_the_best(run: Run, tmp_path: Path) -> None:
    words = (
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks.filename=low",
    )
    assert run(*FIT, "--trainer.max_epochs=2", *words).code == 0
    assert summary_of(tmp_path / "runs/run")["checkpoints"]["best"] == "checkpoints/low.ckpt"


def test_what_is_no_number_is_null(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_epochs=3", "--model.lr=1e30").code == 0
    assert summary_of(tmp_path / "runs/run")["metrics"]["val/loss"] is None


def fit_here(words: list[str]) -> None:
    """A job of both ranks: the command line as a launcher would start it on each."""
    from lightning_ft.cli.training import run as train

    train("fit", words)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_say_what_one_says(
    two_ranks: TwoRanks, real: Run, tiny_model: Path, rows: Path, tmp_path: Path, strategy: str
) -> None:
    chosen = {"ddp": "ddp", "fsdp2": {"class_path": "lightning_ft.engine.strategies.FSDP2Strategy"}}[strategy]
    if isinstance(chosen, dict):
        chosen["init_args"] = {"process_group_backend": "gloo"}  # type: ignore[assignment]
    file = tmp_path / "two.yaml"
    file.write_text(json.dumps({"trainer": {"strategy": chosen, "devices": 2}}))
    words = [f"--model.base={tiny_model}", f"--data.path={rows}", "--data.val_fraction=0.3", "--lora.r=2", *QUIET]
    words += ["--model.lr=0.01", "--model.base_dtype=float32", "--trainer.max_steps=2"]
    words += [f"--data.cache_dir={tmp_path / 'cache'}", f"--trainer.default_root_dir={tmp_path}"]
    assert real("fit", *words, "--data.batch_size=4", "--name=one").code == 0
    together = ["--config", str(file), *words, "--data.batch_size=2", "--name=two"]
    two_ranks.run("tests.cli.test_run_summary:fit_here", words=together)
    one, two = (summary_of(tmp_path / "runs" / name) for name in ("one", "two"))
    assert (two["status"], two["devices"], two["steps"]) == ("finished", 2, 2)
    for key in ("val_rows", "epochs", "trainable_parameters", "total_parameters"):
        assert two[key] == one[key], key
    assert two["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], rel=1e-5)
    for name in ("train/grad_norm", "train/loss", "train/lr"):
        assert logged(tmp_path / "runs/two", name) == pytest.approx(logged(tmp_path / "runs/one", name), rel=1e-4), name
