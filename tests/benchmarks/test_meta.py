"""The benchmarks of meta-learning run on small jobs, keep what is done, and name what they keep."""

import json

import pytest

from benchmarks import meta_sinusoid, meta_text
from tests.modules.episodes import write_words
from tests.modules.tasks import write_base

# A long run's own warnings (no validation loop, few workers) are no part of this.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("row", meta_sinusoid.ROWS)
def test_sine_waves(row, tmp_path, monkeypatch):
    monkeypatch.setattr(meta_sinusoid, "RESULTS", tmp_path / "results.json")
    monkeypatch.setitem(meta_sinusoid.ROWS[row], "iterations", 2)
    meta_sinusoid.main([row])
    found = json.loads((tmp_path / "results.json").read_text())[row]
    assert found["expected"].keys() <= found["mse"].keys()
    monkeypatch.setattr(meta_sinusoid, "run", lambda row: pytest.fail("it was done before"))
    meta_sinusoid.main([row])


def test_speed():
    found = meta_sinusoid.speed(3, rounds=1)
    assert all(value > 0 for value in found["milliseconds"].values())


def test_the_clone_and_loop_takes_the_same_step():
    """What is timed beside the library's step computes the same: the losses of both loops agree over some steps."""
    import torch

    losses = {}
    for name in ("plain_loop", "clone_and_loop"):
        torch.manual_seed(0)
        seen = losses[name] = []
        original = torch.optim.Adam.step
        try:
            torch.optim.Adam.step = lambda self, seen=seen, original=original: (
                seen.append(sum(float(p.grad.abs().sum()) for p in self.param_groups[0]["params"])),
                original(self),
            )
            getattr(meta_sinusoid, name)(2)
        finally:
            torch.optim.Adam.step = original
    assert len(losses["plain_loop"]) == 12 and losses["plain_loop"] == pytest.approx(losses["clone_and_loop"], rel=1e-3)


def test_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(meta_text, "RESULTS", tmp_path / "results.json")
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path, classes=8, rows=9)
    monkeypatch.setattr(meta_text, "WAY", 2)
    words = ["--data", str(path), "--base", str(base), "--seeds", "1", "--shots", "1", "--test_classes", "3"]
    rows = ["probe", "protonet", "maml_lora", "reptile"]
    meta_text.main([*words, "--episodes", "2", "--test_episodes", "2", *rows])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert len(kept) == len(rows) and all(0 <= found["accuracy"] <= 1 for found in kept.values())
    assert "1 seeds" in capsys.readouterr().out
