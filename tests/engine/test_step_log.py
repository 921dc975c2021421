"""What a step logs by the short way is what it logs through Lightning, in whatever trainer."""

import csv
import math

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_ft.engine.step_log import StepLog
from tests.contract.subjects import trainer
from tests.modules.episodes import module, sines

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Seen(Callback):
    """What callbacks and the progress bar are told after each batch; logs a number of its own in other hooks."""

    def __init__(self):
        self.told = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % 2:
            pl_module.log("other", float(batch_idx), on_step=True, on_epoch=True, batch_size=1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        told = ({k: float(v) for k, v in trainer.callback_metrics.items()}, dict(trainer.progress_bar_metrics))
        self.told.append((told, {k: float(v) for k, v in trainer.logged_metrics.items()}))


TRAINERS = {
    "each step": {"log_every_n_steps": 1},
    "each third step": {"log_every_n_steps": 3},
    "accumulated": {"accumulate_grad_batches": 2, "log_every_n_steps": 1},
    "validated within an epoch": {"val_check_interval": 2, "limit_val_batches": 1, "log_every_n_steps": 2},
    "never": {"log_every_n_steps": 0},
}


def logged(folder, options, resume=None):
    """(rows of the CSV file, what callbacks saw) of three epochs of five micro-batches."""
    seen, rates = Seen(), LearningRateMonitor("step")
    saver = ModelCheckpoint(folder / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=3)
    logger = CSVLogger(folder, name="", version="")
    given = {
        "limit_val_batches": 0,
        "max_epochs": 3,
        "max_steps": -1,
        "logger": logger,
        "enable_checkpointing": True,
        **options,
    }
    runner = trainer(folder, seen, rates, saver, **given)
    made = module(steps=1, rates="per_step", optimizer=None)
    runner.fit(made, sines(batch_size=2, episodes=10), ckpt_path=resume)
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file)), seen.told


@pytest.mark.parametrize("kind", [*TRAINERS, "resumed"])
def test_the_same_is_logged(tmp_path, monkeypatch, kind):
    options = TRAINERS.get(kind, {"log_every_n_steps": 1})
    counts, original = [], StepLog._handed_over

    def counted(self, *given):
        counts.append(original(self, *given))
        return counts[-1]

    resume = None
    if kind == "resumed":
        logged(tmp_path / "whole", options)
        resume = tmp_path / "whole/saved/step=6.ckpt"
    monkeypatch.setattr(StepLog, "_handed_over", counted)
    short, told = logged(tmp_path / "short", options, resume)
    assert sum(counts) > len(counts) / 2  # else nothing would be compared
    monkeypatch.setattr(StepLog, "_handed_over", lambda *_: False)
    plain, expected = logged(tmp_path / "plain", options, resume)
    assert short == plain and told == expected
    assert any(row.get("train/loss") for row in short) == (kind != "never")
    assert "train/loss" in told[-1][0][0] and "train/loss" in told[-1][0][1]


def test_a_log_of_the_user_is_called(tmp_path):
    made, names = module(steps=1), []

    class Own(type(made)):
        def log(self, name, *given, **options):
            names.append(name)
            super().log(name, *given, **options)

    made.__class__ = Own
    trainer(tmp_path, limit_val_batches=0, max_epochs=2, max_steps=-1).fit(made, sines(batch_size=2))
    assert names.count("train/loss") == 8
    assert math.isfinite(float(made.trainer.callback_metrics["train/loss"]))


class Moved(Callback):
    """Asks, while a step runs, whether a value elsewhere than its metric would be handed over."""

    def on_before_backward(self, trainer, pl_module, loss):
        results, self.answers = trainer._results, []
        log, fx, asked = StepLog(), pl_module._current_fx_name, ("train/loss", True, False, "sum")
        if "training_step.train/loss" in results:
            pl_module._current_fx_name = "training_step"
            log._known[asked] = results["training_step.train/loss"]
            for device in ("meta", "cpu"):
                self.answers.append(log._handed_over(pl_module, asked, loss.detach().to(device)))
            pl_module._current_fx_name = fx


def test_a_value_elsewhere_goes_through_lightning(tmp_path):
    """Which moves the metric to it."""
    moved = Moved()
    trainer(tmp_path, moved, limit_val_batches=0, max_epochs=1).fit(module(steps=1), sines(batch_size=2))
    assert moved.answers == [False, True]
