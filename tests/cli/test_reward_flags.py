"""A reward that is given wrongly is named, wherever it was given; the parser's own message does not say which one it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
CONFIG = ("--config", str(Path(__file__).parents[2] / "configs/grpo_lora.yaml"))
BOUND = "model.rewards.x.length{} must be a whole number, greater than 0, or null, got abc."


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.rewards.x.length", "abc"], BOUND.format("")),
        (["--model.rewards.x.length=abc"], BOUND.format("")),
        (["--model.rewards.x.length", "0"], "The reward x: Reward.length must be greater than 0, got 0."),
        (["--model.rewards.y.length", "3", "--model.rewards.x.length", "abc"], BOUND.format("")),
        (["--model.rewards", "{y: {length: 3}, x: {length: abc}}"], BOUND.format("")),
        (["--model.rewards.x.lenth", "3"], "Unknown key model.rewards.x.lenth; did you mean model.rewards.x.length?"),
        (["--model.rewards.x.weight", "2"], "The reward x: a reward comes from one of function, "),
        (["--model.rewards.x", "{regex: a, length: 3}"], "The reward x: a reward comes from one of function, "),
        (["--model.rewards.x.regex", "("], "The reward x: Reward.regex '(' is no regular expression"),
        (["--model.rewards.concise.label", "good"], "The reward concise: Reward.label belongs to a classifier"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_by_a_flag(real: Run, words: list[str], said: str) -> None:
    outcome = real("fit", *CONFIG, *words)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(f"lightning-ft: {said}"), outcome.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  rewards:\n    y: {length: 3}\n    x:\n      length: abc\n", BOUND.format(" (bad.yaml, line 5)")),
        (
            "model:\n  init_args:\n    rewards: {y: {length: 3}, x: {length: abc}}\n",
            BOUND.format(" (bad.yaml, line 3)"),
        ),
        (
            "model:\n  rewards:\n    x: {lenth: 3}\n",
            "Unknown key model.rewards.x.lenth (bad.yaml, line 3); did you mean model.rewards.x.length?",
        ),
        ("model:\n  rewards:\n    x: {weight: 2}\n", "The reward x: a reward comes from one of function, "),
    ],
)
def test_in_a_file(real: Run, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    outcome = real("fit", *CONFIG, "--config", "bad.yaml")
    assert outcome.code == 2 and outcome.err.startswith(f"lightning-ft: {said}"), outcome.err


def test_where_no_key_is_known_the_name_is_left_out() -> None:
    from lightning_ft.cli.config_files import ConfigFiles

    files = ConfigFiles.of(
        ["--model.rewards.a.length", "7", "--model.rewards.b.length=8", "--model.init_args.rewards.c.regex", "("]
    )
    assert files.named("model.rewards.*.length", "7") == "model.rewards.a.length"
    assert files.named("model.rewards.*.length", "9") == "model.rewards.b.length", "the last one"
    assert files.named("model.rewards.*.regex") == "model.rewards.c.regex"
    assert files.named("model.rewards.*.tags") == "model.rewards.tags"
    assert files.named("model.lr") == "model.lr"
