"""--trainer.strategy: what cannot work is refused by name before a model is looked for; fsdp2 is ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.random_model import write_model
from lightning_ft import FSDP2Strategy
from lightning_ft.cli.strategy import strategy_of
from tests.cli.conftest import call


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "fsdp",
            "cannot work with FSDP1 (FSDPStrategy), because it cuts flat vectors of many weights, whose pieces lack the shapes "
            "that techniques and checkpoints go by; use FSDP2Strategy (--trainer.strategy fsdp2).",
        ),
        (
            "deepspeed",
            "cannot work with DeepSpeed, because it owns gradients, weights and files; use ddp or FSDP2Strategy "
            "(--trainer.strategy fsdp2).",
        ),
        ("deepspeed_stage_3_offload", "cannot work with DeepSpeed"),
        ("ddp_spawn", "cannot work with a strategy that spawns or forks its processes"),
        ("ddp_notebook", "cannot work with a strategy that spawns or forks its processes"),
    ],
)
@pytest.mark.parametrize("technique", [(), ("--lora.r=2",)], ids=["full", "lora"])
def test_what_cannot_work_is_refused_first(
    name: str, words: str, technique: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (f"--trainer.strategy={name}", "--data.path=nowhere.jsonl", "--model.base=nowhere", *technique)
    left = call(capsys, "fit", *flags, f"--trainer.default_root_dir={tmp_path}")
    assert left.code == 2 and left.err.startswith("lightning-ft: lightning_ft cannot work") and words in left.err
    assert left.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_names_that_work_stay_and_a_plain_module_may_have_any() -> None:
    assert strategy_of("ddp", ours=True) == "ddp" and strategy_of("auto", ours=True) == "auto"
    assert strategy_of("fsdp", ours=False) == "fsdp"
    assert isinstance(strategy_of("fsdp2", ours=True), FSDP2Strategy)


def test_units_that_nothing_matches_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    before = dict(os.environ)
    flags = [f"--model.base={tmp_path}/model", f"--data.path={tmp_path}/rows.jsonl", "--trainer.accelerator=cpu"]
    flags += [f"--trainer.default_root_dir={tmp_path}", "--trainer.devices=1", f"--data.cache_dir={tmp_path}/cache"]
    plan = ["--trainer.strategy=lightning_ft.FSDP2Strategy", '--trainer.strategy.units=["model.layer.*"]']
    try:
        left = call(capsys, "fit", *flags, *plan, "--lora.r=2")
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
    assert left.code == 2 and "The pattern 'model.layer.*' matches nothing in this model; the nearest names" in left.err
