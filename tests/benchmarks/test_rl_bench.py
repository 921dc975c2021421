"""Each side of the GRPO benchmark plays two rounds of a tiny model, and the driver makes a table of them."""

import importlib
import json

import pytest

from benchmarks import grpo
from benchmarks.pairs import short_pairs
from benchmarks.random_model import write_model
from benchmarks.rows import write_adapter

# TRL, PEFT and transformers warn about one another; a benchmark of them is not the place to fix that.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"prompts": 2, "samples": 2, "new_tokens": 4}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl_bench")
    write_model(folder / "model")
    write_adapter(folder / "model", folder / "adapter", r=4, alpha=8)
    (folder / "short.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in short_pairs(8)))
    return folder


@pytest.mark.parametrize("side", ["trl", "ours"])
def test_a_side(workspace, side, capsys, monkeypatch):
    from benchmarks.measure import Spec

    monkeypatch.setenv("BENCHMARK_MATMUL_SIZE", "64")
    spec = Spec(
        str(workspace / "model"), str(workspace / "short.jsonl"), str(workspace / "adapter"), batch_size=2, steps=2, warmup=1,
        r=4, alpha=8, options={**SIZES, **({"precision": "fp32"} if side == "trl" else {})},
    )  # fmt: skip
    capsys.readouterr()
    importlib.import_module(grpo.SIDES[side]).run(spec)
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = json.loads(printed)
    assert len(found["step_seconds"]) == len(found["step_tokens"]) == len(found["options"]["writing_seconds"]) == 2
    assert all(4 <= tokens <= 16 for tokens in found["step_tokens"])
    rates = grpo.rates(found)
    assert rates["writing"] > rates["round"] and rates["learning"] > rates["round"]


def test_the_table():
    def run(seconds, writing):
        return {
            "step_seconds": [9.0, seconds],
            "step_tokens": [8, 16],
            "warmup": 1,
            "options": {"writing_seconds": [9.0, writing]},
            "peak_memory_bytes": 2e9,
        }

    runs = {
        "short|turn 0|trl fp32": run(4.0, 2.0),
        "short|turn 0|ours": run(2.0, 0.5),
        "short|grid|trl fp32": run(4.0, 2.0),
    }
    for one in runs.values():
        one["rates"] = grpo.rates(one)
    assert runs["short|turn 0|ours"]["rates"] == {"round": 8.0, "writing": 32.0, "learning": pytest.approx(16 / 1.5)}
    data = {
        "machine": {"cpu": "some", "cores": 2, "features": [], "versions": {"torch": "2"}},
        "rows": {"short": 20.0},
        "settings": {**SIZES, "rounds": 2, "warmup": 1, "batch": 2},
        "runs": {**runs, "short|grid|trl bf16": {"failed": "no"}},
    }
    page = grpo.render(data)
    assert "- end to end: 2.00 (one pair) x (aim 2)" in page and "- writing: 4.00 (one pair) x" in page
    assert "| trl bf16 | could not run |" in page and "| 0: ours | 8.0 | 32.0 | 10.7 | 2.00 | 4.0 |" in page
