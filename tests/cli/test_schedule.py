"""schedule: what gradual unfreezing thaws when, written, edited and trained by."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@pytest.fixture
def config(tiny_model: Path, rows: Path, tmp_path: Path) -> Path:
    """The configuration of a fit, as a user has it."""
    path = tmp_path / "fit.yaml"
    model = {"base": str(tiny_model), "lr": 0.01, "warmup_steps": 0}
    data = {"path": str(rows), "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.1}
    path.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": {"max_steps": 2}}))
    return path


def test_written_edited_and_trained_by(real: Run, config: Path, tmp_path: Path) -> None:
    outcome = real("schedule", "--config", str(config), "--output", "schedule.yaml")
    assert outcome.code == 0, outcome.err
    assert "schedule.yaml: 4 phases, the last at epoch 3; train by it with --unfreezing.schedule" in outcome.out
    text = Path("schedule.yaml").read_text()
    assert text.startswith("# What starts to train when")
    assert yaml.safe_load(text) == [
        {"at": 0, "unit": "epoch", "train": ["lm_head"]},
        {"at": 1, "unit": "epoch", "train": ["model.layers.1", "model.norm"]},
        {"at": 2, "unit": "epoch", "train": ["model.layers.0"]},
        {"at": 3, "unit": "epoch", "train": ["model.embed_tokens"]},
    ]
    edited = text.replace("epoch", "step").replace("- lm_head", "- norms")
    edited = edited[: edited.index("- at: 2")]
    Path("schedule.yaml").write_text(edited)
    outcome = real("fit", "--config", str(config), "--unfreezing.schedule", "schedule.yaml", *QUIET)
    assert outcome.code == 0, outcome.err
    kept = torch.load(tmp_path / "runs/fit/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    parts = {key.removeprefix("model.") for key in kept if "layers.0" in key or "layers.1" not in key}
    assert parts == {
        "model.norm.weight",
        *(f"model.layers.0.{w}_layernorm.weight" for w in ("input", "post_attention")),
    }


def test_values_of_the_slot_count(real: Run, config: Path) -> None:
    flags = ("--unfreezing.every=5", "--unfreezing.unit=step", "--unfreezing.groups=2", "--unfreezing.embeddings=false")
    outcome = real("schedule", "--config", str(config), *flags, "--output", "s.yaml")
    assert outcome.code == 0, outcome.err
    found = yaml.safe_load(Path("s.yaml").read_text())
    assert [(entry["at"], entry["unit"]) for entry in found] == [(0, "step"), (5, "step")]


def test_a_config_that_names_the_file_to_come(real: Run, config: Path) -> None:
    outcome = real("schedule", "--config", str(config), "--unfreezing.schedule=s.yaml", "--output", "s.yaml")
    assert outcome.code == 0, outcome.err
    assert len(yaml.safe_load(Path("s.yaml").read_text())) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "output is missing"),
        (("--output", "fit.yaml"), "fit.yaml is there already, and nothing is overwritten"),
        (("--output", "s.yaml", "--unfreezing.every=0"), "every must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_input(real: Run, config: Path, words: tuple[str, ...], said: str) -> None:
    outcome = real("schedule", "--config", str(config), *words)
    assert outcome.code == 2 and said in outcome.err, outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {at: 0, train: [lm_haed]}", "'lm_haed' matches nothing in this model; the nearest names are"),
        ("- {at: 1, train: [head]}\n- {at: 1, train: [norms]}", "entry 2, is at 1, not after the entry before it"),
        ("- {at: 1, trains: [head]}", "entry 1, has an unknown key 'trains'"),
        (None, "There is no schedule bad.yaml; write one with: lightning-ft schedule"),
    ],
)
def test_a_bad_schedule_is_one_sentence(real: Run, config: Path, text: str | None, said: str) -> None:
    if text is not None:
        Path("bad.yaml").write_text(text)
    outcome = real("fit", "--config", str(config), "--unfreezing.schedule=bad.yaml", *QUIET)
    assert outcome.code == 2 and said in outcome.err, outcome.err
    assert "Traceback" not in outcome.err
