"""Killed with SIGKILL while a round is drawn, rewarded, measured or trained on, and resumed: the weights of an unbroken run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.modules.killed_rollouts import KINDS, PLACES
from tests.modules.rollouts import write_prompts


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed(tmp_path: Path, kind: str) -> None:
    job = write_prompts(tmp_path / "job")
    root = Path(__file__).parents[2]
    asked = [sys.executable, "-m", "tests.modules.killed_rollouts", kind, str(job), str(tmp_path)]
    found = subprocess.run(asked, cwd=root, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr

    def end(name: str) -> dict[str, torch.Tensor]:
        file = torch.load(tmp_path / name / "end.ckpt", weights_only=True)
        controller = {f"ppo/{key}": torch.tensor(value) for key, value in file.get("ppo", {}).items()}
        return {**file["state_dict"], **controller}

    whole = end("unbroken")
    assert any(bool(value.any()) for name, value in whole.items() if name.endswith("lora_B"))
    answers = (tmp_path / "unbroken" / "rollouts.jsonl").read_text()
    assert len({json.loads(line)["round"] for line in answers.splitlines()}) == 3
    if kind == "ppo":
        assert whole["ppo/coefficient"] != 0.1, "a coefficient that does not move proves nothing"
        assert any(name.startswith("values.") and bool(value.any()) for name, value in whole.items())
    for place in PLACES:
        resumed = end(place)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items()), place
        assert (tmp_path / place / "rollouts.jsonl").read_text() == answers, place
