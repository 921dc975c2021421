"""A fit from the command line: where it writes, what it keeps, how it resumes; with a linear layer as the model."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lightning_ft.cli import training
from lightning_ft.cli.run_folder import RunFolder, check_disk, checkpoint_bytes
from lightning_ft.functional.errors import Refusal
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
FIT = ("fit", "--model.base=b", "--data.path=d", "--trainer.log_every_n_steps=1", *QUIET)


def steps(folder: Path) -> list[int]:
    with open(folder / "metrics.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return dict(checkpoint["state_dict"])


def test_writes_one_folder(run: Run, tmp_path: Path) -> None:
    outcome = run(*FIT, "--trainer.max_steps=2", "--tiny.r=4")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "runs" / "run"
    written = ["checkpoints", "config.yaml", "hparams.yaml", "metrics.csv", "summary.json", "throughput.json"]
    assert sorted(path.name for path in folder.iterdir()) == written
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert steps(folder) == [0, 1]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["tiny"]["init_args"]["r"] == 4 and config["name"] == "run"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run"]  # no lock left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]  # nothing beside


def test_the_saved_config_gives_the_same_run(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_steps=3", "--tiny.r=4", "--model.lr=0.3").code == 0
    first = weights(tmp_path / "runs/run")
    assert run("fit", "--config", "runs/run/config.yaml", "--name=again").code == 0
    again = weights(tmp_path / "runs/again")
    assert all(torch.equal(first[key], again[key]) for key in first)
    before, after = (yaml.safe_load((tmp_path / f"runs/{name}/config.yaml").read_text()) for name in ("run", "again"))
    assert {**before, "name": "again"} == after


def test_a_finished_run_is_moved_to_a_numbered_sibling(run: Run, tmp_path: Path) -> None:
    for steps_ in (1, 2, 3):
        outcome = run(*FIT, f"--trainer.max_steps={steps_}", "--name=x")
        assert outcome.code == 0
    assert "runs/x already held a run, which is now runs/x.2." in outcome.err
    assert {name: len(steps(tmp_path / "runs" / name)) for name in ("x", "x.1", "x.2")} == {"x": 3, "x.1": 1, "x.2": 2}


def test_name_is_the_config_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("model:\n  base: b\ndata:\n  path: d\ntrainer:\n  max_steps: 1\n")
    (tmp_path / "part.yaml").write_text("tiny:\n  r: 3\n")
    outcome = run("fit", "--config=sft.yaml", "--config=part.yaml", "--tiny.alpha=2", *QUIET)
    assert outcome.code == 0
    config = yaml.safe_load((tmp_path / "runs/sft/config.yaml").read_text())
    assert config["tiny"]["init_args"] == {"r": 3, "alpha": 2.0, "targets": "all-linear", "init_from": None}


def test_resume_goes_on_in_the_folder(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_epochs=2", "--name=whole").code == 0
    assert run(*FIT, "--trainer.max_epochs=1", "--name=x").code == 0
    folder = tmp_path / "runs" / "x"
    last = str(folder / "checkpoints" / "last.ckpt")
    with open(folder / "metrics.csv", "a") as file:  # logged after the checkpoint: will be done again
        file.write(",".join("4" if key in ("step", "train/loss") else "" for key in _header(folder)) + "\n")
    outcome = run("fit", "--ckpt_path", last, "--trainer.max_epochs=2")  # the config comes from the run
    assert outcome.code == 0, outcome.err
    assert steps(folder) == list(range(8)) == steps(tmp_path / "runs/whole")
    assert not (tmp_path / "runs/x.1").exists()
    assert (folder / "config.yaml.1").is_file()
    whole, resumed = (weights(tmp_path / "runs" / name) for name in ("whole", "x"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert run("fit", "--config=runs/x/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=3", "--name=x").code == 0
    assert steps(folder) == list(range(12))


def _header(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()[0].split(",")


def test_flags_win_over_what_a_checkpoint_remembers(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_epochs=1", "--model.lr=0.1").code == 0
    last = "runs/run/checkpoints/last.ckpt"
    assert run(*FIT, "--trainer.max_epochs=2", "--model.lr=0.7", "--ckpt_path", last).code == 0
    assert yaml.safe_load((tmp_path / "runs/run/config.yaml").read_text())["model"]["init_args"]["lr"] == 0.7


def test_validate_a_checkpoint_of_a_run(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_steps=2").code == 0
    before = sorted(tmp_path.rglob("*"))
    outcome = run("validate", "--ckpt_path=runs/run/checkpoints/last.ckpt", *QUIET)
    assert outcome.code == 0, outcome.err
    assert "val/loss" in outcome.out
    assert sorted(tmp_path.rglob("*")) == before  # measuring writes nothing


def test_failing_after_a_step_keeps_the_run_and_before_it_nothing(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_steps=2", "--name=x").code == 0
    kept = (tmp_path / "runs/x/metrics.csv").read_text()
    assert run(*FIT, "--trainer.max_steps=2", "--name=x", "--tiny.targets=nothing").code == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["x"]
    assert (tmp_path / "runs/x/metrics.csv").read_text() == kept
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run(*FIT, "--model.base=bug", "--name=x")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["x", "x.1"]


def test_ctrl_c_says_where_the_checkpoint_lies(run: Run) -> None:
    before = signal.getsignal(signal.SIGINT)
    callback = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1")
    try:
        outcome = run("fit", "--model.base=ctrl-c", "--data.path=d", *QUIET, *callback)
        without = run("fit", "--model.base=ctrl-c", "--data.path=d", *QUIET)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert outcome.code == without.code == 130
    assert (
        f"no checkpoint was saved yet: by default one is written after an epoch, and with {callback[0]} " in without.err
    )
    assert "Stopped by Ctrl-C; go on with --ckpt_path runs/run/checkpoints/epoch=0-step=3.ckpt." in outcome.err


@pytest.mark.parametrize(
    ("writes", "data", "said"),
    [
        (True, {}, "Ask it: lightning-ft generate --ckpt_path last.ckpt --prompt TEXT"),
        (False, {}, "Measure it: lightning-ft validate --ckpt_path last.ckpt"),  # a stream of tasks takes no test_path
        (False, {"test_path": None}, "Measure it: lightning-ft test --ckpt_path last.ckpt --data.test_path FILE"),
        (False, {"test_path": "t.csv"}, "Measure it: lightning-ft test --ckpt_path last.ckpt"),
        (False, {"test_path": None, "test_classes": 3}, "Measure it: lightning-ft test --ckpt_path last.ckpt"),
    ],
)
def test_what_a_fit_says_at_its_end(writes: bool, data: dict[str, object], said: str) -> None:
    cli = SimpleNamespace(model=SimpleNamespace(writes=writes), datamodule=SimpleNamespace(**data))
    assert training.FineTuningCLI.what_next(cli, Path("last.ckpt")) == said  # type: ignore[arg-type]


def test_fast_dev_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.fast_dev_run=1").code == 0
    assert list(tmp_path.iterdir()) == []


def test_input_inside_the_folder_that_would_be_moved(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--trainer.max_steps=1").code == 0
    outcome = run(*FIT, "--tiny.init_from=runs/run/checkpoints/last.ckpt")
    assert outcome.code == 2 and "tiny.init_from reads runs/run/checkpoints/last.ckpt" in outcome.err
    assert (tmp_path / "runs/run/checkpoints/last.ckpt").is_file()


def test_two_runs_at_once(run: Run, tmp_path: Path) -> None:
    holder = RunFolder.claim(tmp_path / "runs" / "x")
    outcome = run(*FIT, "--name=x")
    assert outcome.code == 2
    assert f"Process {os.getpid()} is already writing a run to runs/x" in outcome.err
    holder.abandon()
    assert run(*FIT, "--name=x", "--trainer.max_steps=1").code == 0


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from lightning_ft.cli.run_folder import RunFolder; "
        "folder = RunFolder.claim(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(Refusal, match=f"Process {holder.pid} is already writing"):
        RunFolder.claim(tmp_path / "x")
    holder.kill()
    holder.wait()
    RunFolder.claim(tmp_path / "x").release()


def test_a_folder_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    outcome = run(*FIT)
    assert outcome.code == 2 and "Cannot write the run to runs/run" in outcome.err


def test_disk_too_full(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = checkpoint_bytes(3) - 1  # the layer has 2 weights and a bias
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    outcome = run(*FIT)
    assert outcome.code == 2 and "free" in outcome.err and not list((tmp_path / "runs").iterdir())
    with pytest.raises(Refusal, match=r"2\.0 GiB in .*, but 0\.0 MiB are free"):
        check_disk(tmp_path / "not" / "yet" / "there", 2 * 2**30)
    check_disk(tmp_path, free)


def test_a_sweep_trial_has_a_folder_of_its_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert run(*FIT, "--trainer.max_steps=1").code == 0
    assert (tmp_path / "runs/run-abc/metrics.csv").is_file()


def test_print_config_and_help(run: Run) -> None:
    outcome = run("fit", "--model.base=b", "--data.path=d", "--tiny.r=3", "--print_config")
    assert outcome.code == 0
    config = yaml.safe_load(outcome.out)
    assert config["tiny"]["init_args"]["r"] == 3 and config["model"]["init_args"]["base"] == "b"
    assert "log_every_n_steps" in config["trainer"] and "optimizer" not in config
    outcome = run("fit", "--tiny.help")
    assert outcome.code == 0 and "--tiny.r" in outcome.out and "rank" in outcome.out
    outcome = run("fit", "--model.help")
    assert outcome.code == 0 and "warmup_steps" in outcome.out
    outcome = run("fit", "--help")
    assert outcome.code == 0 and "--tiny" in outcome.out and "Pretends to train a low-rank part." in outcome.out


def test_null_switches_a_slot_off(run: Run, tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("tiny:\n  r: 3\n")
    outcome = run("fit", "--config=part.yaml", "--model.base=b", "--data.path=d", "--tiny=null", "--print_config")
    assert yaml.safe_load(outcome.out)["tiny"] is None


def test_top_help_lists_every_command_without_torch() -> None:
    code = (
        "import sys; from lightning_ft.cli.main import main; main(['--help']); "
        "assert not {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in (
        "fit",
        "validate",
        "test",
        "predict",
        "fetch",
        "inspect",
        "generate",
        "merge",
        "export",
        "report",
        "compare",
    ):
        assert f"\n  {command}" in done.stdout
