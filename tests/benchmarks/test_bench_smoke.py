"""Each side of the SFT benchmark trains a tiny model for two steps and prints one JSON line for the driver."""

import importlib
import json

import pytest

from benchmarks import gpu, report, sft, turns
from benchmarks.measure import StepClock
from benchmarks.random_model import byte_tokenizer, write_model
from benchmarks.rows import encode, facts, row, write_adapter
from benchmarks.trl_side import GRID

# TRL, PEFT and transformers warn about one another; a benchmark of them is not the place to fix that.
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [row(f"What follows {n}?" + " Think." * (n % 3), f"{n + 1}" * (1 + n % 4)) for n in range(8)]
# Rank 4 in each of two layers: q, o are 32x32, k, v 16x32, gate, up, down 64x32.
FACTORS = 2 * 4 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (32 + 64))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_model(folder / "model")
    write_adapter(folder / "model", folder / "adapter", r=4, alpha=8)
    (folder / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ROWS))
    return folder


def specification(workspace, **options):
    return {
        "model": str(workspace / "model"),
        "rows": str(workspace / "rows.jsonl"),
        "adapter": str(workspace / "adapter"),
        "batch_size": 4,
        "steps": 2,
        "warmup": 1,
        "r": 4,
        "alpha": 8,
        "options": options,
    }


def run_side(module, spec, capsys, monkeypatch):
    from benchmarks.measure import Spec

    monkeypatch.setenv("BENCHMARK_MATMUL_SIZE", "64")
    capsys.readouterr()
    importlib.import_module(module).run(Spec.from_argv([json.dumps(spec)]))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(printed) == 1
    return json.loads(printed[0])


def expected_tokens():
    tokenizer = byte_tokenizer()
    lengths = [len(encode(tokenizer, item)[0]) for item in ROWS]
    return [sum(lengths[:4]), sum(lengths[4:])]


SIDES = [
    ("benchmarks.trl_side", {**GRID["fp32-padded"]}),
    ("benchmarks.trl_side", {**GRID["bf16-base-plain-packed-sdpa"]}),
    ("benchmarks.our_side", {}),
    ("benchmarks.plain_loop", {}),
]


@pytest.mark.parametrize(("module", "options"), SIDES, ids=["trl-padded", "trl-packed", "ours", "plain"])
def test_a_side_prints_one_parsable_line(module, options, workspace, capsys, monkeypatch):
    result = run_side(module, specification(workspace, **options), capsys, monkeypatch)
    assert len(result["step_seconds"]) == len(result["losses"]) == len(result["step_tokens"]) == 2
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 10_000_000
    assert set(result["matmul_gflops"]) == {"bfloat16", "float32"}
    assert result["trainable_parameters"] == FACTORS
    if options.get("layout") != "packed":  # best-fit packing chooses its own rows for a step
        assert result["step_tokens"] == expected_tokens()


def test_all_sides_start_from_the_same_loss(workspace, capsys, monkeypatch):
    first = {
        module: run_side(module, specification(workspace, **options), capsys, monkeypatch)["losses"][0]
        for module, options in (SIDES[0], SIDES[2], SIDES[3])
    }
    trl = first["benchmarks.trl_side"]
    # fp32 against the CPU's own choice of dtype: a loss of about ln 259 to bf16 rounding
    assert all(loss == pytest.approx(trl, abs=2e-2) for loss in first.values()), first


def test_the_useful_work_of_a_token(workspace):
    """By hand for two layers of 32 dimensions: q, o 32x32; k, v 16x32; three of 64x32; a head of 259."""
    told = facts(byte_tokenizer(), ROWS[:1], workspace / "model", r=4)
    ids, labels = encode(byte_tokenizer(), ROWS[0])
    t, n = len(ids), len(ROWS[0]["completion"][0]["content"]) + 1  # one token a byte, and the end of turn
    assert sum(label != -100 for label in labels) == n
    frozen = 2 * (2 * 1024 + 2 * 512 + 3 * 2048)
    flops = (4 * frozen + 6 * FACTORS) * t + 6 * t * t * 32 * 2 + 4 * 259 * 32 * n
    assert told["useful_gflop_per_token"] == pytest.approx(flops / t / 1e9)
    assert told["scored_tokens"] == n


def test_all_sides_train_on_the_tokens_that_the_library_scores():
    from lightning_ft.data.spans import render

    tokenizer = byte_tokenizer()
    for item in ROWS:
        ids, labels = encode(tokenizer, item)
        rendered = render(tokenizer, item)
        assert rendered.ids == ids
        scored = [k for begin, end in rendered.spans for k in range(begin, end)]
        assert scored == [k for k, label in enumerate(labels) if label != -100]


def test_warm_up_steps_are_not_timed():
    clock = StepClock(warmup=2)
    clock.seconds, clock.tokens, clock.losses = [9.0, 9.0, 1.0, 3.0], [5, 5, 10, 10], [4.0, 3.0, 2.0, 1.0]
    assert clock.summary()["tokens_per_second"] == 5.0


def fake_run(speed, memory, losses=(3.0, 2.0)):
    return {
        "tokens_per_second": speed,
        "peak_memory_bytes": memory,
        "step_seconds": [1.0, 1.0],
        "step_tokens": [10, 10],
        "losses": list(losses),
        "warmup": 1,
        "threads": 2,
        "matmul_gflops": {"bfloat16": 700.0, "float32": 190.0},
    }


def test_the_driver_skips_finished_cells_and_renders(tmp_path, monkeypatch, capsys):
    launched = []

    def launch(module, arguments, timeout=0):
        if module == "benchmarks.rows":
            (sft.Path(arguments[1]) / "long.jsonl").write_text("{}\n")
            about = {"rows": 64, "tokens": 100, "mean_tokens": 174.0, "longest": 300, "scored_tokens": 55}
            return {"model": "m", "long": {**about, "useful_gflop_per_token": 0.6}}
        launched.append(module)
        if json.loads(arguments[0])["options"].get("precision") == "fp32":
            raise RuntimeError("no such setting")
        return fake_run(
            *{"benchmarks.trl_side": (100, 8e9), "benchmarks.our_side": (260, 3.6e9)}.get(module, (265, 3e9))
        )

    monkeypatch.setattr(turns, "launch", launch)
    flags = ["--workloads", "long", "--repeats", "2", "--grid", "fp32-padded,bf16-base-padded"]
    flags += ["--output", str(tmp_path / "sft.json")]
    sft.main(flags)
    assert len(launched) == 2 + 2 * 3
    table = (tmp_path / "sft.md").read_text()
    assert "speed: 2.60 (2.60 to 2.60) x; reaches the aim" in table
    assert "peak memory: 0.45 (0.45 to 0.45) x; reaches the aim" in table
    assert "bare PyTorch loop: 1.9 (1.9 to 1.9) %" in table
    assert "could not run: no such setting" in table
    sft.main(flags)
    assert len(launched) == 8  # all kept
    sft.main([*flags, "--redo", "turn 1|ours"])
    assert len(launched) == 9
    with pytest.raises(SystemExit, match="other settings"):
        sft.main([*flags, "--steps", "5"])


def test_the_gpu_script_says_one_sentence_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 0
    assert capsys.readouterr().out.count(".\n") == 1
    assert not (tmp_path / "gpu.json").exists()


def test_a_ratio_is_judged_by_bar_and_aim():
    assert report.verdict("speed", 2.3).startswith("reaches the bar, not the aim")
    assert report.verdict("memory", 0.6).startswith("misses the bar")
