"""What newcomers type first, and the flag that they are told of."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ft.cli.inspect import InspectCLI
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
CONFIG = ("--config", str(Path(__file__).parents[2] / "configs/sft_lora.yaml"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--lr", "1e-4"], ["Unknown flag --lr", "--model.lr"]),
        (["--epochs", "3"], ["Unknown flag --epochs", "--trainer.max_epochs"]),
        (["--batch_size", "3"], ["--data.batch_size"]),
        (["--continue_from", "a.ckpt"], ["Unknown flag --continue_from", "--data.continue_from of TaskStream"]),
        (
            ["--lwf.weight", "1"],
            ["LwF teaches what the model said at the end of the last task, and SFTData has", "TaskStream"],
        ),
        (["--data", "my.jsonl"], ["--data: no LightningDataModule is called my.jsonl", "--data.path"]),
        (["--model", "my-model"], ["--model: no LightningModule is called my-model", "--model.base"]),
        (["--lora.dora"], ["a flag has no value", "true or false"]),
        (["--lora.name", "-x"], ["a flag has no value", "--FLAG=VALUE"]),
        (["--lora.target", "q_proj,v_proj"], ["lora.target is one name with a comma", """'["q_proj","v_proj"]'."""]),
        (["--lora.exclude", "lm_head"], ["lora.exclude must be a list or null, got lm_head", """'["lm_head"]'."""]),
        (["--samples.prompts", "What is it?"], ["samples.prompts must be a list", """written '["What is it?"]'."""]),
        (["--lora.r", "abc"], ["lora.r must be a whole number, at least 1, got abc."]),
        (["--lora.layers", "{a: 1}"], ["lora.layers must be text, a list of a whole number or null"]),
        (["--trainer.max_epochs", "many"], ["trainer.max_epochs must be a whole number or null, got many."]),
        (["--model.lr", "true"], ["model.lr must be a number", "got true."]),
        (["--model.lr", "-1"], ["model.lr must be a number, greater than 0, or null, got -1."]),
        (["--data.val_fraction", "1"], ["data.val_fraction must be a number, at least 0, less than 1, got 1."]),
    ],
)
def test_the_right_flag_is_named(real: Run, words: list[str], parts: list[str]) -> None:
    outcome = real("fit", *CONFIG, *words)
    assert outcome.code == 2
    assert all(part in outcome.err for part in parts), outcome.err
    assert "FineTuningModule" not in outcome.err and ": :" not in outcome.err


def test_a_flag_of_the_stream_in_a_stream_s_configuration(real: Run) -> None:
    config = str(Path(__file__).parents[2] / "configs/continual_naive.yaml")
    outcome = real("fit", "--config", config, "--continue_from", "a.ckpt")
    assert outcome.code == 2 and "did you mean --data.continue_from?" in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["--lora.layers=-2:"], "-2:"),
        (["--lora.layers", "-2:"], "-2:"),
        (["--lora.layers", "2:"], "2:"),
        (["--lora.layers", "-1"], "-1"),
        (["--lora.layers", "0-3,7"], "0-3,7"),
        (["--lora.layers", "[0, 2]"], [0, 2]),
        (["--lora.layers", "null"], None),
        (["--lora", "{layers: '-2:'}"], "-2:"),
        (["--config", "layers.yaml"], "-2:"),
        (["--config", "layers.yaml", "--lora.layers", "[1]"], [1]),
        (["--lora.layers", "[1]", "--config", "layers.yaml"], "-2:"),
    ],
    ids=str,
)
def test_layers_as_people_write_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], layers: object
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("layers.yaml").write_text("lora:\n  layers: '-2:'\nfreeze:\n  train: [lm_head]\n  layers: '-2:'\n")
    cli = InspectCLI("inspect", [*CONFIG, *words])
    assert cli.config_init["lora"].layers == layers
    again = cli.parser.dump(cli.config)  # as a run's config.yaml is written
    Path("again.yaml").write_text(again)
    assert InspectCLI("inspect", ["--config", "again.yaml"]).config_init["lora"].layers == layers


def test_layers_of_freeze(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cli = InspectCLI("inspect", [*CONFIG, "--freeze.train", '["lm_head"]', "--freeze.layers", "-2:"])
    assert cli.config_init["freeze"].layers == "-2:" and cli.config_init["freeze"].train == ["lm_head"]


def test_a_configuration_is_sought_among_the_recipes(real: Run, tmp_path: Path) -> None:
    (tmp_path / "configs" / "parts").mkdir(parents=True)
    for name in ("sft_lora.yaml", "parts/lora.yaml", "parts/sft_lora.yaml"):
        (tmp_path / "configs" / name).write_text("name: a\n")
    for given in ("sft_lora.yaml", "sft_lora", "sft_lra.yaml"):
        outcome = real("fit", "--config", given)
        assert outcome.code == 2 and outcome.err.startswith(
            f"lightning-ft: The configuration {given} does not exist; did you mean configs/sft_lora.yaml"
        ), outcome.err
        assert outcome.err.endswith("?\n")


def test_a_checkpoint_of_other_parts_is_refused_before_its_base_is_loaded(real: Run, trained: Path) -> None:
    def said(*words: str) -> str:
        outcome = real("fit", "--ckpt_path", str(trained), "--model.base=nowhere", *words)
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
        return outcome.err

    assert "last.ckpt was trained with lora.r 4, and this run has 8; use the same." in said("--lora.r=8")
    assert "trained with lora.target all-linear, and this run has q_proj; use" in said("--lora.target=q_proj")
    assert "last.ckpt was trained with LoRA, and this run has none: add --lora.r 4, as it had." in said("--lora=null")
    assert "was trained without Freeze: leave --freeze out" in said('--freeze.train=["lm_head"]')
    assert "nowhere" in said()  # all parts agree, so the base is what is sought


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict", "inspect"])
def test_a_missing_checkpoint_is_what_is_missing(real: Run, command: str) -> None:
    outcome = real(command, "--ckpt_path", "runs/x/checkpoints/last.ckpt")
    assert outcome.code == 2
    assert "There is no checkpoint runs/x/checkpoints/last.ckpt" in outcome.err
