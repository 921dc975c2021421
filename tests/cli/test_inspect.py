"""inspect: rows as the model sees them, scored tokens marked, without a weight being read."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lightning_ft.cli.inspect import show
from lightning_ft.data.sft_data import SFTData
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


def test_rows_with_scored_tokens_in_brackets(
    real: Run, tiny_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("inspect loads no weights")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", no_weights)
    outcome = real("inspect", f"--model.base={tiny_model}", f"--data.path={rows}", "--rows=2")
    assert outcome.code == 0, outcome.err
    assert "rows.jsonl, line 1" in outcome.out and "rows.jsonl, line 2" in outcome.out
    assert "line 3" not in outcome.out
    assert outcome.out.count("<|im_start|>assistant\n[[no ") == 2  # the answer and its end of turn, not its header
    assert "[[no 1<|im_end|>]]" in outcome.out
    facts = dict(line.strip("│").split("│") for line in outcome.out.splitlines() if line.count("│") == 3)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    assert facts["rows used"] == facts["rows in the file"] == "12"
    assert facts["positions that hold a token"] == "100.0%"


def test_what_is_dropped_is_said(real: Run, tiny_model: Path, rows: Path) -> None:
    flags = ("--data.max_length=24", "--data.truncation=drop", "--rows=0")
    outcome = real("inspect", f"--model.base={tiny_model}", f"--data.path={rows}", *flags)
    assert outcome.code == 0, outcome.err
    assert "rows are left out: longer than 24 tokens." in outcome.out


def test_a_terminal_gets_colour(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    data = SFTData(str(rows), tokenizer=str(tiny_model), cache_dir=str(tmp_path))
    out = io.StringIO()
    show(data, 1, "train", Console(file=out, force_terminal=True, width=100, color_system="standard"))
    assert "[[" not in out.getvalue() and "\x1b[1;32mno 1<|im_end|>\x1b[0m" in out.getvalue()


def test_a_saved_config_can_be_inspected(real: Run, trained: Path) -> None:
    outcome = real("inspect", "--config", str(trained.parents[1] / "config.yaml"), "--rows=1")
    assert outcome.code == 0, outcome.err
    assert "[[no 1<|im_end|>]]" in outcome.out


def test_bad_input(real: Run, tiny_model: Path, rows: Path) -> None:
    outcome = real("inspect", f"--model.base={tiny_model}", f"--data.path={rows}", "--rows=-1")
    assert outcome.code == 2 and "rows must be a whole number, at least 0, got -1." in outcome.err
    outcome = real("inspect", f"--model.base={tiny_model}", f"--data.path={rows}x")
    assert outcome.code == 2 and "rows.jsonl" in outcome.err


def preferences(folder: Path) -> Path:
    """Four pairs as whole conversations, and one that teaches nothing."""
    asked = [{"role": "user", "content": "hello"}]
    answers = [("yes " * n, "no") for n in range(1, 5)] + [("no", "no")]
    pairs = [[[*asked, {"role": "assistant", "content": text}] for text in pair] for pair in answers]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps({"chosen": one, "rejected": other}) + "\n" for one, other in pairs))
    return file


def test_pairs(real: Run, tiny_model: Path, tmp_path: Path) -> None:
    words = [f"--model.base={tiny_model}", "--data=PreferenceData", f"--data.path={preferences(tmp_path)}", "--rows=1"]
    outcome = real("inspect", *words)
    assert outcome.code == 2 and "pairs.jsonl, line 5: chosen and rejected are the same tokens" in outcome.err
    outcome = real("inspect", *words, "--data.bad_rows=drop", "--data.packing=true", "--data.share_prompts=true")
    assert outcome.code == 0, outcome.err
    assert "── chosen: [[yes <|im_end|>]]" in outcome.out and "── rejected: [[no<|im_end|>]]" in outcome.out
    assert outcome.out.count("<|im_start|>user\nhello") == 1
    assert "1 rows are left out: chosen and rejected are the same." in outcome.out
    assert "train: prompts laid out once: saves " in outcome.out


def test_single_answers(real: Run, tiny_model: Path, tmp_path: Path) -> None:
    words = [
        "--data=UnpairedPreferenceData",
        f"--data.path={preferences(tmp_path)}",
        "--data.bad_rows=drop",
        "--rows=2",
    ]
    outcome = real("inspect", f"--model.base={tiny_model}", *words)
    assert outcome.code == 0, outcome.err
    assert "line 1 (chosen)" in outcome.out and "── desirable: [[yes <|im_end|>]]" in outcome.out
    assert "line 1 (rejected)" in outcome.out and "── undesirable: [[no<|im_end|>]]" in outcome.out
    assert "2 rows are left out: chosen and rejected are the same." in outcome.out
    outcome = real("inspect", f"--model.base={tiny_model}", *words, "--data.label=1")
    assert outcome.code == 2 and "label" in outcome.err
