"""Several configurations on one budget: what is started, kept, refused, and what the table says."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from lightning_ft.cli import compare, main
from lightning_ft.cli.comparison import Entry, Outcome, markdown, table
from lightning_ft.cli.scores import direction
from lightning_ft.functional.errors import Refusal
from tests.cli import conftest

Run = Callable[..., conftest.Outcome]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of every fit, which runs in this process: the start of another takes seconds."""
    found: list[list[str]] = []

    def in_process(words: list[str], log: Path) -> int:
        found.append(words)
        with open(log, "w") as out, redirect_stdout(out), redirect_stderr(out):
            try:
                main.main(["fit", *words])
            except SystemExit as stop:
                return int(stop.code or 0)
            except RuntimeError as error:  # in a process of its own: a traceback and exit code 1
                print(f"RuntimeError: {error}")
                return 1
        return 0

    monkeypatch.setattr(compare, "fit", in_process)
    return found


def config(folder: Path, name: str, **more: Any) -> str:
    content = {"model": {"base": "b"}, "data": {"path": "d"}, **more}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return f"{name}.yaml"


def found_in(folder: Path, name: str = "compare") -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "compare.json").read_text())


def test_table_and_files(run: Run, started: list[list[str]], tmp_path: Path) -> None:
    slow = config(tmp_path, "slow", model={"base": "b", "lr": 0.001}, trainer={"max_epochs": 1})
    fast = config(tmp_path, "fast", model={"base": "b", "lr": 0.5})
    outcome = run("compare", slow, fast, "--max_steps=6", "--seeds=3", *QUIET)
    assert outcome.code == 0, outcome.err
    found = found_in(tmp_path)
    assert [row["config"] for row in found["rows"]] == ["fast", "slow"]  # the lower loss first
    for row in found["rows"]:
        summaries = [json.loads((tmp_path / folder / "summary.json").read_text()) for folder in row["runs"]]
        scores = [one["metrics"]["val/loss"] for one in summaries]
        assert row["scores"] == scores and len(set(scores)) == 3  # three seeds are three runs
        assert [one["steps"] for one in summaries] == [6, 6, 6]  # also where the configuration has one epoch, of four
        mean = sum(scores) / 3
        assert row["score"] == pytest.approx(mean)
        expected = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(scores))
        assert row["interval"] == pytest.approx(list(expected), rel=1e-6)
        assert (row["trainable_parameters"], row["trainable_share"]) == (3, 1.0)
    text = (tmp_path / "runs/compare/compare.md").read_text()
    assert (
        text in outcome.out + "\n" and "Lower is better. Budget of each run: 6 optimizer steps; 3 seeds each." in text
    )
    assert sorted(path.name for path in (tmp_path / "runs/compare").iterdir() if path.is_dir()) == [
        f"{name}-seed{seed}" for name in ("fast", "slow") for seed in range(3)
    ]
    assert (tmp_path / "runs/compare/fast-seed0/metrics.csv").is_file()


def test_the_same_command_line_goes_on(run: Run, started: list[list[str]], tmp_path: Path) -> None:
    words = ("compare", config(tmp_path, "a"), config(tmp_path, "b"), *QUIET)
    assert run(*words, "--max_steps=4").code == 0 and len(started) == 2
    first = found_in(tmp_path)
    outcome = run(*words, "--max_steps=4")
    assert outcome.code == 0 and len(started) == 2 and outcome.out.count("finished earlier") == 2
    assert found_in(tmp_path) == first
    # One was interrupted: it goes on from its checkpoint, and the finished one is kept.
    file = tmp_path / "runs/compare/b-seed0/summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "stopped"}))
    assert run(*words, "--max_steps=4").code == 0 and len(started) == 3
    assert started[2][-1] == "--ckpt_path=runs/compare/b-seed0/checkpoints/last.ckpt"
    # Another budget, and another content of a file, are other runs.
    assert run(*words, "--max_steps=5").code == 0 and len(started) == 5
    config(tmp_path, "a", model={"base": "b", "lr": 0.2})
    assert run(*words, "--max_steps=5").code == 0 and len(started) == 6
    assert not any("--ckpt_path" in word for word in [*started[3], *started[4], *started[5]])


def test_one_that_fails_midway_is_in_the_table(run: Run, started: list[list[str]], tmp_path: Path) -> None:
    good = config(tmp_path, "good")
    bad = config(tmp_path, "bad", model={"base": "bug"})
    refused = config(tmp_path, "refused", model={"base": "missing"})
    outcome = run("compare", bad, refused, good, "--max_steps=3", "--seeds=2", *QUIET)
    assert outcome.code == 1
    rows = {row["config"]: row for row in found_in(tmp_path)["rows"]}
    assert list(rows) == ["good", "bad", "refused"]
    assert rows["good"]["seeds"] == [0, 1] and rows["bad"]["seeds"] == [] and rows["bad"]["score"] is None
    assert "RuntimeError: a bug of ours" in rows["bad"]["failed"][0] and len(rows["bad"]["failed"]) == 2
    assert "There is no model 'missing'" in rows["refused"]["failed"][0]
    assert len(started) == 5  # a refusal is not repeated with another seed
    assert "bad failed, seed 0: exit code 1: RuntimeError: a bug of ours" in outcome.out


def test_a_metric_that_nobody_logged(run: Run, started: list[list[str]], tmp_path: Path) -> None:
    outcome = run("compare", config(tmp_path, "a"), "--max_steps=1", "--metric=val/accuracy", *QUIET)
    assert outcome.code == 1 and "it logged no val/accuracy, but val/loss." in outcome.out


def test_fragments_are_stacked(run: Run, started: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("tiny:\n  r: 3\n")
    base = config(tmp_path, "base")
    assert run("compare", base, f"{base}+part.yaml", "--max_steps=1", *QUIET).code == 0
    saved = [tmp_path / f"runs/compare/{name}-seed0/config.yaml" for name in ("base", "base-part")]
    plain, with_part = (yaml.safe_load(path.read_text()) for path in saved)
    assert plain["tiny"] is None and with_part["tiny"]["init_args"]["r"] == 3


def test_a_real_fit(real: Run, started: list[list[str]], tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("lora:\n  r: 2\n")
    words = (f"--model.base={tiny_model}", "--data.path", str(rows), "--data.val_fraction=0.3", *QUIET)
    outcome = real("compare", "sft.yaml", "--max_steps=1", "--metric=val/accuracy", "--name=mine", "--", *words)
    assert outcome.code == 0, outcome.out + outcome.err
    (row,) = found_in(tmp_path, "mine")["rows"]
    summary = json.loads((tmp_path / "runs/mine/sft-seed0/summary.json").read_text())
    assert row["score"] == summary["metrics"]["val/accuracy"] and row["val_rows"] == 4
    assert row["interval_over"] == "rows" and "Wilson's over the 4 validation rows" in outcome.out
    assert row["peak_memory_bytes"] == summary["peak_memory_bytes"]


def test_each_fit_is_a_process_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert compare.fit(["--config", str(tmp_path / "gone.yaml")], log) == 2
    assert compare.last_words(log, 2).startswith(f"The configuration {tmp_path / 'gone.yaml'} does not exist")


# ---------------------------------------------------------------- refused before the first run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Say what to compare"),
        (("a.yaml", "missing.yaml"), "The configuration missing.yaml does not exist"),
        (("a.yaml", "wrong.yaml"), "wrong: Unknown key model.lrr (wrong.yaml, line 1)"),
        (
            ("a.yaml", "type.yaml"),
            "type: model.lr (type.yaml, line 1) must be a number, greater than 0, or null, got x.",
        ),
        (("a.yaml", "refused.yaml"), "refused: TinyAdapter.targets must not be refused."),
        (("a.yaml", "a.yaml"), "a.yaml is given twice"),
        (("a.yaml", "--metric=val/x"), "say --mode min or max"),
        (("a.yaml", "--max_time=90"), "max_time is written DD:HH:MM:SS"),
        (("a.yaml", "--max_steps=0"), "max_steps must be a whole number, greater than 0"),
        (("a.yaml", "--seeds=0"), "seeds must be a whole number, at least 1"),
        (("a.yaml", "--seed_everything=3"), "--seeds says how many"),
        (("a.yaml", "--", "--name=x"), "--name cannot be given to the fits"),
        (("a.yaml", "--max_step=3"), "--max_step"),
        (("a.yaml", "--max_time=00:00:01:00"), "add --trainer.max_epochs beside --max_time"),
        (("--", "a.yaml"), "a.yaml is none"),
    ],
)
def test_refusals(run: Run, started: list[list[str]], tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    config(tmp_path, "a")
    (tmp_path / "wrong.yaml").write_text("model: {base: b, lrr: 1}\ndata: {path: d}\n")
    (tmp_path / "type.yaml").write_text("model: {base: b, lr: x}\ndata: {path: d}\n")
    (tmp_path / "refused.yaml").write_text("model: {base: b}\ndata: {path: d}\ntiny: {targets: refused}\n")
    outcome = run("compare", *words)
    assert outcome.code == 2 and says in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err
    assert started == [] and not (tmp_path / "runs").exists()


def test_without_rows_held_out_there_is_no_score(
    real: Run, started: list[list[str]], tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "sft.yaml").write_text(f"model: {{base: {tiny_model}}}\ndata: {{path: {rows}}}\n")
    outcome = real("compare", "sft.yaml", "--max_steps=1")
    assert outcome.code == 2 and "add --data.val_fraction 0.1" in outcome.err
    outcome = real("compare", "sft.yaml", "--max_steps=1", "--data.path=gone.jsonl", "--data.val_fraction=0.1")
    assert outcome.code == 2 and "sft: " in outcome.err and "gone.jsonl" in outcome.err
    assert started == []


# ---------------------------------------------------------------- pieces


def test_words_are_told_apart() -> None:
    words = [
        "a.yaml",
        "--max_steps",
        "5",
        "b.yaml",
        "--data.path",
        "x.jsonl",
        "--lora.r=3",
        "c.yaml",
        "--trainer.max_epochs",
        "-1",
    ]
    configs, own, shared = compare.split(words)
    assert configs == ["a.yaml", "b.yaml", "c.yaml"] and own == ["--max_steps", "5"]
    assert shared == ["--data.path", "x.jsonl", "--lora.r=3", "--trainer.max_epochs", "-1"]
    with pytest.raises(Refusal, match="interrupted go on by themselves"):
        compare.split(["a.yaml", "--ckpt_path=x"])


def test_names_of_two_files_alike(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        config(tmp_path / folder, "sft")
    files = [str(tmp_path / folder / "sft.yaml") for folder in ("x", "y")]
    assert list(compare.labelled(files)) == ["sft", "y-sft"]


def outcome(seed: int, **metrics: float | None) -> Outcome:
    facts = {"metrics": {f"val/{name}": value for name, value in metrics.items()}, "val_rows": 10}
    return Outcome(Path(f"run{seed}"), seed, summary=facts)


def test_one_seed_of_a_share_has_wilsons_interval() -> None:
    (row,) = table([Entry("a", [outcome(0, accuracy=0.9)])], "val/accuracy", "max")
    assert row["interval"] == pytest.approx((0.59585, 0.98213), abs=1e-4)
    assert stats.binomtest(9, 10).proportion_ci(method="wilson") == pytest.approx(row["interval"], abs=1e-6)
    (row,) = table([Entry("a", [outcome(0, f1=0.9)])], "val/f1", "max")
    assert row["interval"] is None
    said = markdown([row], "val/f1", "max", limit="x", seeds=1)
    assert "No interval: one seed says nothing about another; give --seeds 3." in said and "Higher is better." in said


def test_scores_that_are_no_numbers_come_last_and_are_told() -> None:
    entries = [
        Entry("nan", [outcome(0, loss=None)]),
        Entry("high", [outcome(0, loss=2.0)]),
        Entry("low", [outcome(0, loss=1.0)]),
    ]
    rows = table(entries, "val/loss", "min")
    assert [row["config"] for row in rows] == ["low", "high", "nan"]
    assert rows[-1]["failed"] == ["seed 0: its last val/loss is not a finite number."]
    assert [row["config"] for row in table(entries, "val/loss", "max")] == ["high", "low", "nan"]


def test_directions() -> None:
    low = ("val/loss", "val/perplexity", "val/mse", "val/loss_hard")
    high = (
        "val/accuracy",
        "val/f1",
        "val/f1_macro",
        "val/macro_f1",
        "val/rougeL",
        "val/bleu",
        "val/exact_match",
        "val/spearman",
    )
    assert {direction(name) for name in low} == {"min"} and {direction(name) for name in high} == {"max"}
    assert direction("val/x") is None and direction("val/lossy") is None


def test_the_last_words_of_a_failed_fit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Seed set to 0\nlightning-ft: The disk is full.\n")
    assert compare.last_words(log, 2) == "The disk is full."
    log.write_text("Traceback\n  x\nValueError: no\n\n")
    assert compare.last_words(log, 1) == f"exit code 1: ValueError: no (see {log})"
    log.write_text("")
    assert "nothing was said" in compare.last_words(log, -9)


def test_ctrl_c_waits_for_the_fit_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[int] = []

    class Process:
        def __init__(self, command: list[str], **more: object) -> None:
            assert command[:4] == [sys.executable, "-m", "lightning_ft", "fit"]

        def wait(self) -> int:
            waits.append(1)
            if len(waits) == 1:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(compare.subprocess, "Popen", Process)
    monkeypatch.setattr(main, "_load", lambda command: lambda argv: compare.fit([], tmp_path / "log"))
    with pytest.raises(SystemExit) as stop:
        main.main(["compare"])
    assert stop.value.code == 130 and len(waits) == 2
    assert capsys.readouterr().err == "lightning-ft: Stopped by Ctrl-C; the same command line goes on from here.\n"
