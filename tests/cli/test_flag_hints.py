"""What newcomers type first, and the flag that they are told of."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
CONFIG = ("--config", str(Path(__file__).parents[2] / "configs/sft_lora.yaml"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--lr", "1e-4"], ["Unknown flag --lr", "--model.lr"]),
        (["--epochs", "3"], ["Unknown flag --epochs", "--trainer.max_epochs"]),
        (["--batch_size", "3"], ["--data.batch_size"]),
        (["--data", "my.jsonl"], ["no LightningDataModule is called my.jsonl", "--data.path"]),
        (["--model", "my-model"], ["no LightningModule is called my-model", "--model.base"]),
        (["--lora.dora"], ["a flag has no value", "true or false"]),
        (["--lora.layers", "-2:"], ["a flag has no value", "--FLAG=VALUE"]),
    ],
)
def test_the_right_flag_is_named(real: Run, words: list[str], parts: list[str]) -> None:
    outcome = real("fit", *CONFIG, *words)
    assert outcome.code == 2
    assert all(part in outcome.err for part in parts), outcome.err
    assert "FineTuningModule" not in outcome.err and ": :" not in outcome.err


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict", "inspect"])
def test_a_missing_checkpoint_is_what_is_missing(real: Run, command: str) -> None:
    outcome = real(command, "--ckpt_path", "runs/x/checkpoints/last.ckpt")
    assert outcome.code == 2
    assert "There is no checkpoint runs/x/checkpoints/last.ckpt" in outcome.err
