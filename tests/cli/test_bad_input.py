"""Everything that a user can get wrong on the command line: one sentence on stderr, exit code 2, no model built."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_ft.cli.checkpoint_argument import weights_alone
from tests.cli.conftest import Outcome
from tests.cli.standins import TinyModule

Run = Callable[..., Outcome]
CALLBACK = "--trainer.callbacks+=ModelCheckpoint"
GOOD = ("fit", "--model.base", "b", "--data.path", "d")


def refused(outcome: Outcome, *parts: str) -> None:
    """Exit code 2, one line that contains the parts, nothing built, no traceback."""
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("lightning-ft: ") and lines[0].endswith((".", "?"))
    for part in parts:
        assert part in lines[0], lines[0]
    assert TinyModule.built == 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        # unknown keys, with the nearest
        (["--tiny.rr=1"], ["Unknown key tiny.rr", "tiny.r"]),
        (["--model.lrr=1"], ["Unknown key model.lrr", "did you mean model.lr?"]),
        (["--data.batchsize=1"], ["Unknown key data.batchsize", "did you mean data.batch_size?"]),
        (["--trainer.max_stepss=1"], ["--trainer.max_stepss", "trainer.max_steps"]),
        (["--tinny.r=1"], ["--tinny.r", "did you mean --tiny?"]),
        (["--ewc.lam=3"], ["--ewc.lam", "known here are"]),
        (["--lr", "3"], ["--lr", "did you mean --model.lr?"]),
        (["junk"], ["'junk'", "flag"]),
        # types and bounds, inside optional slots and unions too
        (["--tiny.r=0"], ["tiny.r must be a whole number, at least 1, got 0."]),
        (["--tiny.r=4.5"], ["tiny.r must be a whole number, at least 1, got 4.5."]),
        (["--tiny.alpha=-1"], ["tiny.alpha must be a number, greater than 0, or null, got -1."]),
        (["--tiny=true"], ["tiny takes tiny.r, tiny.alpha, tiny.targets, tiny.init_from, or null", "got true"]),
        (["--model.lr=abc"], ["model.lr must be a number, greater than 0, or null, got abc."]),
        (["--model.dtype=fp8"], ["model.dtype must be one of auto, fp32, got fp8."]),
        (["--data.batch_size=0"], ["data.batch_size must be a whole number, at least 1, got 0."]),
        (["--trainer.max_steps=0.5"], ["trainer.max_steps must be a whole number, got 0.5."]),
        (["--trainer.precision=17"], ["trainer.precision must be one of", "bf16-true", "got 17"]),
        ([CALLBACK, "--trainer.callbacks.save_topk=x"], ["callbacks.save_topk", "save_top_k"]),
        ([CALLBACK, "--trainer.callbacks.save_top_k=x"], ["save_top_k must be a whole number"]),
        (["--model=Foo"], ["no LightningModule is called Foo"]),
        (["--model=no.such.Module"], ["no.such.Module"]),
        (["--trainer.callbacks+=Foo"], ["no Callback is called Foo"]),
        # refusals of constructors, of the trainer, of setup
        (["--tiny.targets=refused"], ["TinyAdapter.targets must not be refused."]),
        (["--trainer.accelerator=gpuu"], ["trainer", "gpuu"]),
        (["--trainer.strategy=nonsense"], ["trainer", "nonsense"]),
        (["--tiny.targets=nothing"], ["No module matches 'nothing'; the nearest is layer."]),
        (["--tiny.targets=misconfigured"], ["Lightning says no."]),
        (["--model.base=missing"], ["There is no model 'missing'"]),
        (["--data.path=missing"], ["There is no data file missing"]),
        # checkpoints
        (["--ckpt_path=nowhere.ckpt"], ["There is no checkpoint nowhere.ckpt"]),
        (["--ckpt_path=last"], ["--ckpt_path last", "holds no checkpoint"]),
        (["--ckpt_path=best"], ["--ckpt_path best"]),
        (["--ckpt_path=."], ["is a folder, not a checkpoint"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_bad_flags(run: Run, flags: list[str], parts: list[str], tmp_path: Path) -> None:
    refused(run(*GOOD, *flags), *parts)
    assert not any((tmp_path / "runs").glob("*"))  # a refused run leaves nothing


def test_missing_arguments(run: Run) -> None:
    refused(run("fit", "--data.path=d"), "model.base is missing: give it as --model.base or in a --config file.")
    refused(run("fit", "--model.base=b"), "data.path is missing")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  base: x\n lrr: 3\n", ["bad.yaml, line 3", "not valid YAML"]),
        ("model:\n\tbase: x\n", ["bad.yaml, line 2", "not valid YAML"]),
        ("- a\n- b\n", ["bad.yaml, line 1", "mapping"]),
        ("", ["bad.yaml is empty"]),
        ("# a comment\n", ["bad.yaml is empty"]),
        ("model:\n  base: x\n\tlr: 3\n", ["bad.yaml, line 3", "a tab indents it"]),
        ("tiny:\n  targets: -2:\n", ["bad.yaml, line 2", "a value that holds a colon and needs quotes"]),
        ("model: {base: x\n", ["bad.yaml, line 2", "not valid YAML"]),
        ("a: &a [*a]\nb: *c\n", ["bad.yaml, line 2", "undefined alias"]),
        ("model:\n  base: !!python/object/apply:os.system [ls]\n", ["bad.yaml, line 2", "is not plain YAML"]),
        ("--- \nmodel: {}\n---\nmodel: {}\n", ["bad.yaml, line 3", "not valid YAML"]),
        ("tiny: &a\n  r: *a\n", ["bad.yaml, line 1", "holds itself"]),
        ("? [a, b]\n: 3\n", ["bad.yaml, line 1", "the key that is no single word is not text"]),
        (
            "trainer:\n  max_epochs: many\n",
            ["trainer.max_epochs (bad.yaml, line 2) must be a whole number", "got many"],
        ),
        ("trainer: 3\n", ["trainer (bad.yaml, line 1) takes keys, as in trainer.max_epochs, got 3."]),
        ("3: 4\n", ["bad.yaml, line 1", "the key 3 is not text"]),
        ("model:\n  base: x\n  base: y\n", ["bad.yaml, line 3", "base was already given in line 2"]),
        ("model:\n  base: x\n  lrr: 3\n", ["model.lrr (bad.yaml, line 3)", "did you mean model.lr?"]),
        ("tiny:\n  r: 8\n  rr: 3\n", ["tiny.rr (bad.yaml, line 3)", "tiny.r"]),
        ("tiny:\n  r: -3\n", ["tiny.r (bad.yaml, line 2) must be a whole number, at least 1, got -3."]),
        ("tiny: [1]\n", ["tiny (bad.yaml, line 1) takes tiny.r"]),
        ("trainer:\n  max_stepss: 3\n", ["trainer.max_stepss (bad.yaml, line 2)", "trainer.max_steps"]),
        ("modell:\n  base: x\n", ["modell (bad.yaml, line 1)", "did you mean model?"]),
        ("model:\n  class_path: TinyModule\n  init_args:\n    bse: x\n", ["model.bse (bad.yaml, line 4)", "model.ba"]),
        (
            "trainer:\n  callbacks:\n  - class_path: ModelCheckpoint\n    init_args:\n      save_topk: 3\n",
            ["trainer.callbacks.save_topk (bad.yaml, line 5)", "save_top_k"],
        ),
        ("model: x\n", ["no LightningModule is called x"]),
        ("data: 3\n", ["data (bad.yaml, line 1)", "3"]),
    ],
)
def test_bad_files(run: Run, tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    refused(run(*GOOD, "--config", "bad.yaml"), *parts)


def test_a_flag_is_named_where_it_has_the_last_word(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("tiny:\n  r: 4\ndata:\n  class_path: TinyData\n")
    refused(run(*GOOD, "--config", "good.yaml", "--tiny.r=0"), "tiny.r must be a whole number")
    refused(run(*GOOD, "--config", "good.yaml", "--data", "x"), "--data: no LightningDataModule is called x")
    assert "good.yaml" not in run(*GOOD, "--config", "good.yaml", "--tiny.r=0").err
    (tmp_path / "bad.yaml").write_text("tiny:\n  r: 0\n")
    refused(run(*GOOD, "--tiny.r=4", "--config", "bad.yaml"), "tiny.r (bad.yaml, line 2) must be")


def test_of_two_files_the_last_has_the_last_word(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("tiny:\n  r: 0\n  alpha: 3\n")
    (tmp_path / "two.yaml").write_text("tiny:\n  r: 4\n  targets: misconfigured\n")
    refused(
        run(*GOOD, "--config=one.yaml", "--config=two.yaml"), "tiny.r (one.yaml, line 2)"
    )  # each file must be valid
    (tmp_path / "one.yaml").write_text("tiny:\n  r: 2\n  targets: nothing\n")
    refused(run(*GOOD, "--config=one.yaml", "--config=two.yaml"), "Lightning says no.")
    refused(run(*GOOD, "--config=two.yaml", "--config=one.yaml"), "No module matches 'nothing'")


def test_missing_and_binary_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sft_lora.yaml").write_bytes(b"model: \xff\xfe")
    refused(run("fit", "--config", "sft_lra.yaml"), "sft_lra.yaml does not exist; did you mean sft_lora.yaml?")
    refused(run("fit", "--config", "no/sft.yaml"), "there is no folder no")
    refused(run("fit", "--config=sft_lora.yaml"), "sft_lora.yaml is not a configuration: byte 7 is not UTF-8 text.")
    for content in (b"model: \0\1", "model: {}".encode("utf-16"), b"\x89PNG\r\n\x1a\n", b"\x1f\x8b\x08\0"):
        (tmp_path / "binary.yaml").write_bytes(content)
        refused(run("fit", "--config=binary.yaml"), "binary.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    refused(run("fit", "--config=loop.yaml"), "loop.yaml")
    refused(run("fit", f"--config={'a' * 5000}.yaml"), "cannot be read: File name too long")
    refused(run("fit", "--config="), "--config names no file.")
    (tmp_path / "deep.yaml").write_text("tiny: " + "[" * 5000)
    refused(run("fit", "--config=deep.yaml"), "deep.yaml is not a configuration: it is nested too deeply.")
    (tmp_path / "latin.yaml").write_bytes("name: ö".encode("latin-1"))
    refused(run("fit", "--config=latin.yaml"), "latin.yaml is not a configuration: byte 6 is not UTF-8 text.")


def test_foreign_checkpoints(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("hello")
    refused(run(*GOOD, "--ckpt_path=text.ckpt"), "text.ckpt is not a checkpoint, or was cut short")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.ckpt")
    refused(run(*GOOD, "--ckpt_path=plain.ckpt"), "not a checkpoint of a Lightning run", "weight")
    record = {"state_dict": {}, "pytorch-lightning_version": "2.6", "global_step": 1}
    torch.save(record, tmp_path / "weights.ckpt")
    refused(run(*GOOD, "--ckpt_path=weights.ckpt"), "weights alone", "a checkpoint that was saved whole")
    refused(run(*GOOD, "--ckpt_path=plian.ckpt"), "did you mean plain.ckpt?")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch pwned",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    refused(run(*GOOD, "--ckpt_path=evil.ckpt"), "evil.ckpt is not a checkpoint of ours")
    assert not (tmp_path / "pwned").exists()


def test_weights_alone_start_a_new_run_by_what_was_trained() -> None:
    path = "lightning_ft.callbacks.prefix_tuning.PrefixTuning"
    for techniques, words in (
        ([{"class_path": path, "init_args": {}}], "start anew from its weights with --prefix.init_from."),
        ([], "write them with lightning-ft merge, and name the folder by --model.base)."),
    ):
        said = weights_alone(Path("a.ckpt"), {"lightning_ft": {"techniques": techniques}})
        assert said.startswith("a.ckpt holds weights alone, so fit cannot resume from it; load it, export it, or ")
        assert said.endswith(words)


def test_commands(run: Run) -> None:
    refused(run("fti"), "There is no command 'fti'", "fit")
    refused(run("dance"), "there are fit, validate, test, predict, inspect")
    refused(run("--config", "a.yaml", "fit"), "The command comes first: lightning-ft fit --config")


def test_a_bug_keeps_its_traceback(run: Run) -> None:
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run("fit", "--model.base=bug", "--data.path=d", "--trainer.max_steps=4")


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_FT_DEBUG", "1")
    outcome = run(*GOOD, "--model.base=missing")
    assert outcome.code == 2 and "Traceback" in outcome.err and "There is no model 'missing'" in outcome.err


def test_other_ranks_are_silent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    outcome = run(*GOOD, "--tiny.r=0")
    assert (outcome.code, outcome.err) == (2, "")


def test_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_ft", "fit", "--config", "nowhere.yaml"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "lightning-ft: The configuration nowhere.yaml does not exist.\n"
