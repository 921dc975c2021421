"""Runs of GRPO or PPO that kill themselves: ``python -m tests.modules.killed_rollouts KIND JOB FOLDER``.

One unbroken run; then for each place a run that is killed there and one that goes on from its newest checkpoint. Each is a fork of
this process, since the imports take most of the time.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_ft import LoRA
from tests.modules.ppo_jobs import ppo
from tests.modules.rollouts import fit, grpo, sevens

PLACES = ("drawing", "rewarding", "measuring", "updating")


KINDS: dict[str, Any] = {
    "grpo": lambda *job, **more: grpo(*job, data={"batch_size": 8}, beta=0.1, **more),
    # The KL's coefficient moves, so that it has to be restored, too; two passes of two steps.
    "ppo": lambda *job, **more: ppo(*job, beta=0.1, kl_target=0.5, kl_horizon=20.0, **more),
}


def die() -> None:
    """No handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(Callback):
    """At the third token of the second round, while that round is measured, or before its second update."""

    def __init__(self, place: str) -> None:
        self.place = place

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.place == "drawing":
            read: list[int] = []

            def note(module: Any, args: Any, kwargs: Any) -> None:
                if trainer.current_epoch == 1 and kwargs.get("past_key_values") is not None:
                    read.append(1)
                    if len(read) == 3:
                        die()

            pl_module.view.backbone.register_forward_pre_hook(note, with_kwargs=True)
        if self.place != "measuring":
            return
        own = pl_module.measure

        def measure(batch: Any) -> Any:
            if trainer.current_epoch == 1:
                die()
            return own(batch)

        pl_module.measure = measure

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.place == "updating" and trainer.current_epoch == 1 and trainer.fit_loop.batch_idx == 1:
            die()


def train(kind: str, job: Path, folder: Path, place: str | None) -> None:
    """Three rounds of several steps, from the newest checkpoint in ``folder/files`` if there is one."""
    rounds: list[int] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        rounds.append(len(completions))
        if place == "rewarding" and len(rounds) == 2:
            die()
        return sevens(completions)

    newest = max((folder / "files").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)
    module, data = KINDS[kind](job, folder, rewards={"reward": reward}, optimizer=None, lr=0.01, schedule="cosine")
    save = ModelCheckpoint(folder / "files", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    made = fit(
        folder, module, data, LoRA(r=4), save, *([Kill(place)] if place else []),
        max_epochs=3, enable_checkpointing=True, gradient_clip_val=1.0, ckpt_path=newest,
    )  # fmt: skip
    assert place is None, f"was not killed while {place}"
    made.save_checkpoint(folder / "end.ckpt")


def child(*arguments: Any) -> int:
    """Exit status of `train` in a fork; minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            train(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kind_, job_, folder_ = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    assert child(kind_, job_, folder_ / "unbroken", None) == 0, "the unbroken run failed"
    for where in PLACES:
        assert child(kind_, job_, folder_ / where, where) == -signal.SIGKILL, (
            f"the run to be killed while {where} was not"
        )
        if (log := folder_ / where / "rollouts.jsonl").exists():
            log.write_bytes(log.read_bytes() + b'{"round": 9, "pro')  # as a kill in the midst of a line leaves it
        assert child(kind_, job_, folder_ / where, None) == 0, f"the run that resumes after {where} failed"
