"""Killed with SIGKILL inside task 3 of 5 and resumed: weights, optimizer, buffer, Fisher and scores of an unbroken run, in each
bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.data.killed_stream import PLACES, TASKS, TECHNIQUES, places
from tests.invariants.test_06_resume import same
from tests.modules.tasks import WORDS, write_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; about two seconds each."""
    folder = tmp_path_factory.mktemp("killed")
    write_base("bert", folder / "bert")
    rows = []
    for number in range(60):
        words = [WORDS[(number * 7 + k * 3) % len(WORDS)] for k in range(3 + number % 5)]
        rows.append({"text": " ".join(words), "label": "abc"[number // 5 % 3], "domain": TASKS[number % 5]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "tests.data.killed_stream", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@pytest.mark.parametrize("techniques", TECHNIQUES)
@pytest.mark.parametrize("place", PLACES)
def test_killed_and_resumed(folder: Path, techniques: str, place: str) -> None:
    if place not in places(techniques):
        assert techniques == "orthogonal" and place == "measuring"
        return
    whole, resumed = (
        torch.load(folder / name / "end.ckpt", weights_only=True) for name in (techniques, f"{techniques}-{place}")
    )
    for key in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "epoch",
        "global_step",
        "TaskStream",
        "lightning_ft",
    ):
        same(whole[key], resumed[key], key)
    kept = {key: state for key, state in whole["callbacks"].items() if not key.startswith("ModelCheckpoint")}
    assert len(kept) >= 2
    for key, state in kept.items():
        same(state, resumed["callbacks"][key], key)
    memory = next(state for key, state in kept.items() if key.startswith("Replay"))
    assert memory and whole["TaskStream"]["ended"] == 5
    lines = [(folder / name / "losses.txt").read_text().splitlines() for name in (techniques, f"{techniques}-{place}")]
    missing = set(lines[0]) - set(lines[1])
    assert set(lines[1]) <= set(lines[0]) and len(set(lines[0])) > 20
    # Lightning does not take up a validation within a task that was broken off; that of a task's end is measured again.
    assert all("val/" in line for line in missing) and len(missing) <= (place == "validating")
    draws = [torch.load(folder / name / "draw.pt") for name in (techniques, f"{techniques}-{place}")]
    assert torch.equal(*draws)


def test_the_runs_were_killed_in_the_third_task(folder: Path) -> None:
    """The checkpoints that were left show where; nothing half written stands under a checkpoint's name."""
    for techniques in TECHNIQUES:
        for place in places(techniques):
            files = folder / f"{techniques}-{place}" / "files"
            assert len(list(files.glob(".*.part"))) == (place == "saving")
            for file in files.glob("*.ckpt"):
                assert torch.load(file, weights_only=True)["state_dict"]
