"""Runs that kill themselves, for test_06_resume.py: ``python -m tests.invariants.killed_run FOLDER SPECIFICATION``.

The specification is JSON: {"base": ..., "rows": ..., "data": {KIND: arguments of SFTData}, "chains": {NAME: {"data":
KIND, "kills": [[where, batch], ...]}}}. For each kind of data one unbroken run writes ``KIND/unbroken.ckpt``. In each
chain one run after the other starts from the newest checkpoint of the one before and kills itself with SIGKILL at its
place; the last goes to the end and writes ``NAME/resumed.ckpt``. Each run is a process of its own, forked after the
imports, since those take most of the time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ft.callbacks.lora import LoRA
from tests.invariants import ground

EPOCHS = 2


class Kill(Callback):
    """SIGKILL at a place of the run: no handler runs, nothing is flushed.

    Args:
        where: ``start`` and ``end`` of a training batch (after its checkpoint, if it has one), its ``backward``,
            ``validation`` after it, ``save``: while its checkpoint is being written, ``mid``: after a save of its own
            within an accumulation window.
        batch: counted from the beginning of the first epoch.
    """

    def __init__(self, where: str, batch: int, folder: Path) -> None:
        self.where, self.batch, self.folder, self.done = where, batch, folder, -1

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Callbacks that checkpoint come last, so "end" has to come after them.
        if self.where == "end":
            trainer.callbacks.remove(self)
            trainer.callbacks.append(self)

    def at(self, where: str) -> None:
        if where == self.where and self.done == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.done = trainer.current_epoch * trainer.num_training_batches + batch_idx
        self.at("start")
        if self.where == "save" and self.done == self.batch:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.at("backward")

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.at("validation")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.where == "mid" and self.done == self.batch:
            assert trainer.fit_loop.epoch_loop._should_accumulate(), "not within a window"
            trainer.save_checkpoint(self.folder / "mid.ckpt")
        self.at("mid")
        self.at("end")


class Losses(Callback):
    """Appends (optimizer step, train/loss) in full precision, line by line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            with self.file.open("a") as out:
                out.write(f"{trainer.global_step} {float(trainer.callback_metrics['train/loss']).hex()}\n")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            with self.file.open("a") as out:
                out.write(f"{trainer.global_step} val {float(trainer.callback_metrics['val/loss']).hex()}\n")


def train(job: dict[str, Any], kind: str, folder: Path, name: str, kill: list[Any] | None) -> None:
    """One run, from the newest checkpoint in ``folder/files`` if there is one."""
    files = folder / "files"
    newest = max(files.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)
    module = ground.sft(job["base"], lr=0.01, optimizer=None, schedule="cosine", warmup_steps=2)  # None: AdamW
    callbacks: list[Callback] = [
        LoRA(r=4, dropout=0.1),
        ModelCheckpoint(dirpath=files, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        Losses(folder / "losses.txt"),
    ]
    if kill is not None:
        callbacks.append(Kill(*kill, folder=files))
    run = ground.trainer(
        folder,
        *callbacks,
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        val_check_interval=3,
        limit_val_batches=1.0,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
    )
    datamodule = ground.data(job["rows"], folder.parent / "cache", **{"val_fraction": 0.2, **job["data"][kind]})
    run.fit(module, datamodule, ckpt_path=newest)
    assert kill is None, f"{name} was not killed: {kill} never came"
    run.save_checkpoint(folder / f"{name}.ckpt")


def child(*arguments: Any) -> int:
    """Exit status of `train` in a fork of this process; minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            train(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, job: dict[str, Any]) -> None:
    """All chains, one process after the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kind in job["data"]:
        (folder / kind).mkdir()
        assert child(job, kind, folder / kind, "unbroken", None) == 0, f"the unbroken run of {kind} failed"
    for name, chain in job["chains"].items():
        (folder / name).mkdir()
        for kill in chain["kills"]:
            status = child(job, chain["data"], folder / name, "killed", kill)
            assert status == -signal.SIGKILL, f"{name}: the run to be killed at {kill} ended with {status}"
        assert child(job, chain["data"], folder / name, "resumed", None) == 0, f"{name}: the resumed run failed"


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
