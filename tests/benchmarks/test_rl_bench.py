"""Each side of the GRPO benchmark plays two rounds of a tiny model, and the driver makes a table of them."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import grpo, turns
from benchmarks.pairs import short_pairs
from benchmarks.random_model import write_model
from benchmarks.rows import write_adapter
from benchmarks.side_by_side import render

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
    importlib.import_module(grpo.COMPARISON.sides[side]).run(spec)
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
        "rows": {"short": {"prompt_tokens": 20.0}},
        "settings": {**SIZES, "rounds": 2, "warmup": 1, "batch": 2},
        "runs": {**runs, "short|grid|trl bf16": {"failed": "no"}},
    }
    page = render(grpo.COMPARISON, data)
    assert "- end to end: 2.00 (one pair) x (aim 2)" in page and "- writing: 4.00 (one pair) x" in page
    assert "| trl bf16 | could not run |" in page and "| 0: ours | 8.0 | 32.0 | 10.7 | 2.00 | 4.0 |" in page


def test_a_comparison_that_was_stopped_goes_on(workspace, tmp_path, monkeypatch, capsys):
    """Each setting once, TRL's best in turn with this library; what is kept is not run again, and other rows are refused."""
    ran = []

    def launch(module, arguments):
        if module == "benchmarks.pairs":
            (tmp_path / "rows").mkdir(exist_ok=True)
            folder = Path(arguments[1])
            (folder / "short.jsonl").write_text(rows)
            return {"model": "m", "short": {"prompt_tokens": 20.0}}
        spec = json.loads(arguments[0])
        ran.append((module.rpartition("_")[2], spec["options"].get("precision")))
        if spec["options"].get("precision") == "bf16":
            raise RuntimeError("no bf16 here")
        seconds = 2.0 if module.endswith("ours") else 4.0 if spec["options"]["precision"] == "fp32" else 5.0
        run = {"step_seconds": [9.0, seconds], "step_tokens": [8, 16], "warmup": 1, "peak_memory_bytes": 2e9}
        return {**run, "options": {"writing_seconds": [9.0, 1.0]}}

    rows = "one"
    monkeypatch.setattr(turns, "launch", launch)
    words = ["--workloads=short", "--repeats=1", f"--output={tmp_path / 'grpo.json'}"]
    grid = {name: {"precision": name} for name in ("fp32", "bf16", "bf16-base-plain")}
    what = replace(grpo.COMPARISON, grid=grid)
    monkeypatch.setattr(grpo, "COMPARISON", what)
    grpo.main(words)
    trl = [("trl", "fp32"), ("trl", "bf16"), ("trl", "bf16-base-plain"), ("trl", "fp32")]
    assert ran == [*trl, ("ours", None), ("ours", None)]
    page = (tmp_path / "grpo.md").read_text()
    assert "at its best setting, `fp32`" in page and "| trl bf16 | could not run |" in page
    assert "- end to end: 2.00 (one pair) x (aim 2)" in page
    ran.clear()
    grpo.main([*words, "--repeats=2"])
    assert ran == [("trl", "fp32"), ("ours", None)], "the second turn alone"
    rows = "other"
    with pytest.raises(SystemExit, match="holds runs on other rows"):
        grpo.main(words)
