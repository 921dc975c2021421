"""Streams of five tasks that kill themselves in the third, for the test beside it: ``python -m tests.data.killed_stream FOLDER``.

Of each set of techniques one unbroken run; then for each place a run that is killed there with SIGKILL and one that goes on from
its newest checkpoint. Each is a fork of this process, since the imports take most of the time.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_ft import EWC, SFT, ClassificationData, LoRA, LwF, OrthogonalLoRA, Replay, TaskStream
from lightning_ft.engine import importance
from tests.contract.subjects import trainer

TASKS = ("one", "two", "three", "four", "five")
PLACES = ("training", "validating", "measuring", "saving")
"""In a backward pass of the third task, in the validation after it, in its Fisher pass, while a checkpoint of it is written."""
TECHNIQUES: dict[str, Callable[[], list[Any]]] = {
    "held": lambda: [LoRA(2, dropout=0.2), EWC(20.0), Replay(7, mode="der++", rows=3), LwF()],
    "orthogonal": lambda: [OrthogonalLoRA(2, dropout=0.2, lam=2.0), Replay(7, balance="task")],
}


def die() -> None:
    """No handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(Callback):
    """Ends the process at one of `PLACES`."""

    def __init__(self, place: str) -> None:
        self.place, self.batches = place, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += trainer.datamodule.begun == 3
        if self.batches == 1 and self.place == "measuring":
            own = importance._Estimate.add

            def add(estimate: Any, rows: Any) -> None:
                own(estimate, rows)
                die()

            importance._Estimate.add = add  # type: ignore[method-assign]
        if self.batches == 3 and self.place == "saving":
            os.replace = lambda *_: die()  # type: ignore[assignment]

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.place == "training" and self.batches == 3:
            die()

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.place == "validating" and self.batches > 1:
            die()


class Losses(Callback):
    """What each step and validation logged, in full precision, line by line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def _write(self, trainer: Any, start: str) -> None:
        found = {n: float(v).hex() for n, v in sorted(trainer.callback_metrics.items()) if n.startswith(start)}
        with self.file.open("a") as out:
            out.write(f"{trainer.global_step} {found}\n")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._write(trainer, "train/loss")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self._write(trainer, "val/")


def train(job: Path, folder: Path, techniques: str, place: str | None) -> None:
    """Five tasks of two epochs, from the newest checkpoint in ``folder/files`` if there is one."""
    newest = max((folder / "files").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)
    module = SFT(str(job / "bert"), task="sequence_classification", lr=5e-3, warmup_steps=1, base_dtype="float32")
    source = ClassificationData(
        str(job / "rows.jsonl"), val_fraction=0.25, batch_size=4, cache_dir=str(job / "cache"), seed=3
    )
    save = ModelCheckpoint(folder / "files", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        folder, *TECHNIQUES[techniques](), save, Losses(folder / "losses.txt"), *([Kill(place)] if place else []),
        max_epochs=-1, max_steps=-1, limit_val_batches=None, accumulate_grad_batches=2, gradient_clip_val=1.0,
        enable_checkpointing=True, log_every_n_steps=1,
    )  # fmt: skip
    run.fit(module, TaskStream(source=source, by="domain", groups=list(TASKS), epochs=2), ckpt_path=newest)
    assert place is None, f"was not killed while {place}"
    run.save_checkpoint(folder / "end.ckpt")
    torch.save(torch.rand(3), folder / "draw.pt")


def child(*arguments: Any) -> int:
    """Exit status of `train` in a fork; minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.manual_seed(7)
            arguments[1].mkdir(exist_ok=True)
            train(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def places(techniques: str) -> list[str]:
    """Where runs with them can be killed: only EWC measures."""
    return [place for place in PLACES if place != "measuring" or techniques == "held"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    for name in TECHNIQUES:
        assert child(where, where / name, name, None) == 0, f"the unbroken run of {name} failed"
        for spot in places(name):
            folder_ = where / f"{name}-{spot}"
            status = child(where, folder_, name, spot)
            assert status == -signal.SIGKILL, f"{name}: the run to be killed while {spot} ended with {status}"
            assert child(where, folder_, name, None) == 0, f"{name}: the run that resumes after {spot} failed"
