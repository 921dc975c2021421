"""``fit --baselines true``: each task of a MultiTask run alone for as many of its rows, and what sharing has brought."""

import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lightning_ft import ClassificationData, GradientSurgery, MultiTaskData, SampleGenerations
from lightning_ft.cli import baselines, compare, main
from lightning_ft.cli.report_parts.beside_baselines import beside_baselines
from lightning_ft.cli.report_parts.run_files import RunFiles
from lightning_ft.functional.errors import Refusal
from tests.cli import conftest
from tests.modules.multitask_jobs import job

Run = Callable[..., conftest.Outcome]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@pytest.fixture
def real(tmp_path: Path) -> str:
    """The configuration of a tiny run of three tasks."""
    _, data = job(tmp_path)
    tasks = {}
    for name, one in data.tasks.items():
        options = {"path": one.path, "val_path": one.val_path, "cache_dir": str(tmp_path / "cache")}
        options |= {"task": "regression"} if name == "numbers" else {}
        tasks[name] = {"class_path": "lightning_ft.ClassificationData", "init_args": options}
    config = {
        "seed_everything": 3,
        "model": {"class_path": "lightning_ft.MultiTask", "init_args": {"base": str(tmp_path / "bert"), "lr": 0.01}},
        "data": {"class_path": "lightning_ft.MultiTaskData", "init_args": {"tasks": tasks, "batch_size": 8}},
        "trainer": {"max_epochs": 4},
        "task_sampling": {"method": "uniform"},
    }
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "several.yaml")


def test_each_task_alone_then_the_table(
    real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps are those of its rows, the scores those of the runs, the second time nothing is trained again."""
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []

    def in_process(words: list[str], log: Path) -> int:
        started.append(words)
        with open(log, "w") as out, redirect_stdout(out), redirect_stderr(out):
            main.main(["fit", *words])
        return 0

    monkeypatch.setattr(compare, "fit", in_process)
    words = ["fit", "--config", real, "--baselines", "true", *QUIET]
    main.main(words)
    said = capsys.readouterr().out
    assert len(started) == 3 and "| mean (Delta m) |" in said
    found = json.loads((tmp_path / "runs/several/baselines.json").read_text())
    together = json.loads((tmp_path / "runs/several/summary.json").read_text())["metrics"]
    rows = 0
    for one in found["tasks"]:
        summary = json.loads((tmp_path / f"runs/several-alone/{one['task']}-seed3/summary.json").read_text())
        metric = f"val/{one['task']}/{one['measure']}"
        assert summary["steps"] == one["steps"] and summary["metrics"][metric] == pytest.approx(one["alone"])
        assert together[metric] == pytest.approx(one["together"])
        assert one["delta"] == pytest.approx((one["together"] - one["alone"]) / abs(one["alone"]))
        checkpoint = torch.load(
            tmp_path / f"runs/several-alone/{one['task']}-seed3/checkpoints/last.ckpt", weights_only=True
        )
        assert checkpoint["lightning_ft_rows_seen"] == {one["task"]: one["steps"] * 8.0}
        assert not any("TaskSampling" in technique for technique in summary["techniques"])
        rows += one["steps"] * 8
    assert found["mean_delta"] == pytest.approx(sum(one["delta"] for one in found["tasks"]) / 3)
    assert abs(rows - 4 * 41) <= 3 * 8  # as many rows as four epochs have, but for what rounding to whole steps takes
    main.main(words)
    assert len(started) == 3 and "finished earlier" in capsys.readouterr().out
    checkpoint = str(tmp_path / "runs/several/checkpoints/last.ckpt")
    main.main(["validate", "--ckpt_path", checkpoint, *QUIET])  # a saved config has the flag
    assert "val/macro" in capsys.readouterr().out


def test_the_last_line_says_what_works(real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    main.main(["fit", "--config", real, "--trainer.max_epochs=1", *QUIET])
    said = "".join(capsys.readouterr())
    assert "Measure it: lightning-ft validate --ckpt_path" in said and "generate" not in said


def test_a_baseline_of_zero_leaves_a_table(tmp_path: Path) -> None:
    """An f1 of 0 has no relative improvement; what the others brought is told all the same."""
    found = [baselines.Single("words", "f1", 0.4, 0.0, 3), baselines.Single("tone", "accuracy", 0.6, 0.5, 3)]
    said = baselines.table(found)
    assert (
        "| words | f1 | 0.4 | 0 | 3 | – |" in said and "| +20.0% |" in said and "| mean (Delta m) | | | | | – |" in said
    )
    baselines.write(tmp_path, found)
    told = json.loads((tmp_path / "baselines.json").read_text(), parse_constant=pytest.fail)
    assert told["mean_delta"] is None and [one["delta"] for one in told["tasks"]] == [None, pytest.approx(0.2)]


def test_a_baseline_is_told_nothing_of_the_ranks_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fit with DDP the environment has them, and a child would wait for ranks that are gone."""
    ranks = {"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**ranks, "TORCHELASTIC_RUN_ID": "x", "KEPT": "yes"}.items():
        monkeypatch.setenv(name, value)
    seen: dict[str, str] = {}

    class Process:
        def __init__(self, words: list[str], *, env: dict[str, str], **_: Any) -> None:
            seen.update(env)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(compare.subprocess, "Popen", Process)
    assert compare.fit(["--config", "x"], tmp_path / "log") == 0
    assert seen["KEPT"] == "yes" and not set(seen) & {*ranks, "TORCHELASTIC_RUN_ID"}


def test_the_report_has_the_table(tmp_path: Path) -> None:
    run = RunFiles(tmp_path)
    assert beside_baselines([run]) is None
    found = [baselines.Single("words", "f1", 0.4, 0.0, 3), baselines.Single("<tone>", "accuracy", 0.6, 0.5, 7)]
    baselines.write(tmp_path, found)
    html = beside_baselines([run])
    assert html is not None and "<th>&lt;tone&gt;</th><td>accuracy</td><td>0.6</td><td>0.5</td><td>+20.0%</td>" in html
    assert "<th>words</th><td>f1</td><td>0.4</td><td>0</td><td>–</td>" in html
    (tmp_path / "baselines.json").write_text("{")
    assert beside_baselines([run]) is None and run.notes == ["baselines.json cannot be read."]


def test_steps_and_words() -> None:
    assert baselines.steps_alone({"a": 100.0, "b": 3.0, "c": 20.0}, 8) == {"a": 12, "b": 1, "c": 2}
    words = ["--config", "a.yaml", "--baselines", "true", "--trainer.max_epochs=3", "--name=x", "--data.seed", "1"]
    assert baselines.shared_words(words) == ["--config", "a.yaml", "--data.seed", "1"]


def test_refusals(tmp_path: Path, run: Run) -> None:
    outcome = run("fit", "--model.base=b", "--data.path=d", "--baselines=true", *QUIET)
    assert outcome.code == 2 and "--baselines trains each task of MultiTask alone, and" in outcome.err
    module, data = job(tmp_path)
    trainer = SimpleNamespace(callbacks=[])
    data.only = "classes"
    with pytest.raises(Refusal, match=r"trains each task alone, and data\.only classes is one already"):
        baselines.refuse_baselines(module, data, trainer, ["surgery"])
    rows = ClassificationData(str(tmp_path / "classes.jsonl"))
    with pytest.raises(Refusal, match="compares on held-out rows, and the task classes has none"):
        baselines.refuse_baselines(module, MultiTaskData({"classes": rows}), trainer, ["surgery"])
    module, data = job(tmp_path)
    trainer.callbacks = [GradientSurgery()]
    baselines.refuse_baselines(module, data, trainer, ["surgery"])
    with pytest.raises(
        Refusal, match=r"without GradientSurgery, which lies in trainer\.callbacks; give it as the slot surgery"
    ):
        baselines.refuse_baselines(module, data, trainer, [])
    trainer.callbacks = [SampleGenerations(["hello"])]
    with pytest.raises(Refusal, match="SampleGenerations wants texts, which classes does not write"):
        baselines.refuse_baselines(module, data, trainer, [])
