"""Invariant 6: killed with SIGKILL at any step and resumed, a run ends bit for bit as an unbroken one.

LoRA with dropout, AdamW, cosine with warm-up, clipping, accumulation 2, validation every three batches (so also within
a window), two epochs whose last window is incomplete, a checkpoint at each optimizer step.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft import LoRA
from tests.invariants import ground

ROOT = Path(__file__).resolve().parents[2]
ROWS = 33  # 0.2 held out: 26 rows, 13 batches of two an epoch, 7 windows of which the last has one batch
BATCHES = 26
RANDOM = random.Random(20)
# Three random batches in three thirds of the run, each at another place in the batch.
THREE = [
    [place, RANDOM.randrange(low, high)]
    for place, (low, high) in zip(["backward", "start", "end"], [(2, 9), (10, 17), (18, 26)], strict=True)
]
DATA = {"rows": {}, "bins": {"max_tokens": 150}}
CHAINS = {
    "three random steps": {"data": "rows", "kills": THREE},
    # In mid-window right after a save of its own, while a checkpoint is being written, and in a validation.
    "other places": {"data": "rows", "kills": [["mid", 4], ["save", 7], ["validation", 15]]},
    "packed bins": {"data": "bins", "kills": [["mid", 4]]},
}


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """All runs of all chains; about a second each."""
    folder = tmp_path_factory.mktemp("killed")
    rows = ground.write_rows(folder / "rows.jsonl", ROWS)
    job = {"base": str(base), "rows": str(rows), "data": DATA, "chains": CHAINS}
    command = [sys.executable, "-m", "tests.invariants.killed_run", str(folder), json.dumps(job)]
    environment = os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PL_GLOBAL_SEED", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def same(left, right, where=""):
    """Equal in every leaf, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            same(a, b, f"{where}[{number}]")
    else:
        assert left == right, f"{where}: {left} {right}"


def ends(folder, chain):
    """The last checkpoints of the unbroken and of the resumed run."""
    files = folder / CHAINS[chain]["data"] / "unbroken.ckpt", folder / chain / "resumed.ckpt"
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("chain", CHAINS)
def test_weights_optimizer_and_schedule(folder, chain):
    unbroken, resumed = ends(folder, chain)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "SFTData", "lightning_ft"):
        same(unbroken[key], resumed[key], key)
    assert unbroken["global_step"] > 5 and unbroken["lightning_ft"]["partial"] is None
    assert unbroken["lightning_ft"]["techniques"][0]["init_args"]["dropout"] == 0.1
    moments = unbroken["optimizer_states"][0]["state"]
    assert moments and all(bool(state["exp_avg_sq"].any()) for state in moments.values())


@pytest.mark.parametrize("chain", CHAINS)
def test_every_logged_loss(folder, chain):
    """A killed run may have logged a step already; the value is the same each time, and so is each validation's."""
    unbroken = (folder / CHAINS[chain]["data"] / "losses.txt").read_text().splitlines()
    resumed = (folder / chain / "losses.txt").read_text().splitlines()
    assert set(unbroken) == set(resumed)
    assert len(unbroken) == len(set(unbroken)) and sum(" val " in line for line in unbroken) >= 4


def test_the_kills_came_where_they_should(folder):
    assert 0 < THREE[0][1] < THREE[1][1] < THREE[2][1] < BATCHES
    assert len(list((folder / "rows" / "files").glob("*.ckpt"))) == 14  # one an optimizer step
    assert len(list((folder / "packed bins" / "files").glob("mid.ckpt"))) == 1
    # Killed while it was writing, a run leaves a part beside the whole files, and no half file under their name.
    other = folder / "other places" / "files"
    assert len(list(other.glob(".*.part"))) == 1
    for file in other.glob("*.ckpt"):
        assert torch.load(file, weights_only=True)["state_dict"]
    mid = torch.load(other / "mid.ckpt", weights_only=True)["lightning_ft"]["partial"]
    assert any(bool(grad.any()) for grad in mid["grads"].values())


class Rows(Callback):
    """Which rows each micro-batch held."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch.rows.tolist())


@pytest.mark.parametrize("stop", [2, 6])
def test_a_run_that_gets_more_steps_goes_on_in_the_middle_of_its_epoch(base, rows, tmp_path, stop):
    """Lightning counts the epoch that ``max_steps`` has cut short as done: the rows that follow are of that epoch still."""
    outcomes = []
    for limits in ((9,), (stop, 9)):
        file, seen = None, []
        for steps in limits:
            taken = Rows()
            module = ground.sft(base, schedule="constant")
            data = ground.data(rows, tmp_path / "cache", batch_size=4)
            made = ground.trainer(tmp_path, LoRA(2), taken, max_steps=steps, max_epochs=-1, accumulate_grad_batches=2)
            made.fit(module, data, ckpt_path=file)
            file = tmp_path / f"{limits}-{steps}.ckpt"
            made.save_checkpoint(file)
            seen += taken.seen
        outcomes.append((seen, torch.load(file, weights_only=True)["state_dict"]))
    (whole, weights), (parts, resumed) = outcomes
    assert len(whole) == 15 and whole[:5] != whole[5:10] != whole[10:], (
        "three epochs of five batches, each in its own order"
    )
    assert whole == parts
    same(weights, resumed)
