"""The command line in-process: `run(*words)` gives exit code, stdout and stderr, in an empty working directory."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lightning_ft.cli import main as main_module
from lightning_ft.cli import training
from tests.cli import standins


class Outcome(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], *words: str) -> Outcome:
    """One command line through `main`."""
    capsys.readouterr()
    code = 0
    try:
        main_module.main(list(words))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs ``lightning-ft`` with the stand-ins as default classes."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "LIGHTNING_FT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    build = training.FineTuningCLI.__init__

    def with_standins(self: training.FineTuningCLI, command: str, argv: list[str], **more: object) -> None:
        build(self, command, argv, **{"model": standins.TinyModule, "data": standins.TinyData, **more})

    monkeypatch.setattr(training.FineTuningCLI, "__init__", with_standins)
    monkeypatch.setattr(training, "techniques", lambda: {"tiny": standins.TinyAdapter})
    standins.TinyModule.built = 0

    return lambda *words: call(capsys, *words)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random Llama of two layers with a byte-level chat tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.data.tiny_tokenizers import CHATML, tiny_tokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer(CHATML, eos="<|im_end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations."""
    import json

    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    chats = [
        [{"role": "user", "content": "yes " * n}, {"role": "assistant", "content": f"no {n}"}] for n in range(1, 13)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs ``lightning-ft`` as it is, with the classes and techniques of the library."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "LIGHTNING_FT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return lambda *words: call(capsys, *words)


@pytest.fixture(scope="session")
def trained(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of three LoRA steps at a rate that shows."""
    from lightning_ft.cli.training import run as train

    folder = tmp_path_factory.mktemp("trained")
    words = [
        f"--model.base={tiny_model}",
        f"--data.path={rows}",
        "--data.val_fraction=0.1",  # without any Lightning warns
        "--lora.r=4",
        "--model.base_dtype=float32",  # to compare logits exactly
        "--model.lr=0.1",
        "--model.warmup_steps=0",
    ]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cache = [f"--data.cache_dir={folder / 'cache'}", f"--trainer.default_root_dir={folder}"]
    train("fit", [*words, *quiet, *cache, "--trainer.max_steps=3", "--trainer.log_every_n_steps=1"])
    return folder / "runs" / "run" / "checkpoints" / "last.ckpt"
