"""The W&B sweep, without its service: wandb's own agent builds the command lines, and each is parsed and run a step."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ft.cli.config_files import config_arguments
from tests.cli.conftest import Outcome

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ROOT / "configs" / "sweeps" / "lora_rank.yaml"


def trials() -> list[dict[str, Any]]:
    """Every point of the grid, as the service would hand it to an agent."""
    parameters = yaml.safe_load(SWEEP.read_text())["parameters"]
    choices = [entry["values"] if "values" in entry else [entry["value"]] for entry in parameters.values()]
    return [dict(zip(parameters, point, strict=True)) for point in product(*choices)]


def command_line(trial: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that wandb's agent would start for one trial."""
    from wandb import wandb_agent

    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **kwargs: object) -> None:
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "before")  # the agent overwrites it
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "before")
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    agent._sweep_command = yaml.safe_load(SWEEP.read_text())["command"]
    agent._in_jupyter, agent._function, agent._forward_signals, agent._run_processes = False, None, False, {}
    args = {key: {"value": value} for key, value in trial.items()}
    agent._command_run({"type": "run", "run_id": "trial7", "program": "unused", "args": args})
    return started[0]


def test_every_trial_parses(
    real: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft_lora.yaml").write_text(f"model:\n  base: {tiny_model}\ndata:\n  path: {rows}\n")
    found = set()
    for trial in trials():
        words = command_line(trial, monkeypatch)
        assert words[:5] == ["/usr/bin/env", "python", "-m", "lightning_ft", "fit"]
        outcome = real(*words[4:], "--print_config")
        assert outcome.code == 0, outcome.err
        config = yaml.safe_load(outcome.out)
        assert config["lora"]["init_args"]["r"] == trial["lora.r"]
        assert config["model"]["init_args"]["lr"] == trial["model.lr"]
        assert config["data"]["init_args"]["val_fraction"] == 0.1
        assert config["trainer"]["logger"]["class_path"].endswith("WandbLogger")
        found.add((trial["lora.r"], trial["model.lr"]))
    assert len(found) == len(trials()) == 12


def test_a_trial_runs_a_step(
    real: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft_lora.yaml").write_text(f"model:\n  base: {tiny_model}\ndata:\n  path: {rows}\n")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = command_line(trials()[0], monkeypatch)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    outcome = real(
        *words[4:], "--trainer.max_epochs=1", "--data.batch_size=16", "--trainer.log_every_n_steps=1", *quiet
    )
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "runs" / "sft_lora-trial7"
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    logged = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert yaml.safe_load(SWEEP.read_text())["metric"]["name"] in logged


def test_the_sweep_names_a_config_that_exists() -> None:
    command = yaml.safe_load(SWEEP.read_text())["command"]
    assert command[-1] == "${args}"
    assert (ROOT / config_arguments(command)[0]).is_file()
