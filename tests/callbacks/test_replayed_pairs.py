"""Pairs of answers in memory: what the reference says of them is asked once, and again where it is another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ft import DPO, LoRA, PreferenceData, Refusal, Replay, TaskStream
from lightning_ft.data.batch_rows import Row, batch_of
from lightning_ft.engine.scoring import segment_logps
from tests.contract.subjects import trainer


def pairs(folder: Path, name: str = "pairs", answer: str = " yes") -> PreferenceData:
    rows = [{"prompt": f"{n}?", "chosen": answer * (1 + n % 3), "rejected": " no"} for n in range(12)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreferenceData(str(file), batch_size=4, shuffle=False, cache_dir=str(folder / "cache"))


def policy(chat: Path, **options: Any) -> DPO:
    settings = {"lr": 0.05, "base_dtype": "float32", "warmup_steps": 0, "optimizer": torch.optim.SGD}
    return DPO(str(chat / "model"), **{**settings, **options})


def said(module: DPO, kept: list[Row]) -> torch.Tensor:
    """What the module says of kept pairs as it is."""
    with torch.no_grad():
        return segment_logps(module.view, batch_of(kept, packed=True))[0]


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """An entry for each time that a model is made its reference."""
    found: list[int] = []
    own = DPO.at_reference

    def counted(self):
        found.append(1)
        return own(self)

    monkeypatch.setattr(DPO, "at_reference", counted)
    return found


def test_pairs_are_replayed_with_the_log_probabilities_of_their_reference(chat, tmp_path, asked):
    """They are asked once, and the memory has what the reference says: that of the fit's start."""
    module, technique = policy(chat), Replay(6)
    run = trainer(tmp_path, technique, LoRA(2), max_steps=3, limit_val_batches=0)
    run.fit(module, pairs(tmp_path))
    assert len(asked) == 3 and float(run.callback_metrics["train/replay"]) > 0
    kept = technique._memory.buffer.groups[""]
    assert len(kept) == 6 and all(len(row["segments"]) == 2 for row in kept)
    with module.at_reference():
        wanted = said(module, kept)
    torch.testing.assert_close(batch_of(kept).columns["reference_logps"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reference", ["start", "precomputed", "base"])
def test_a_second_fit_compares_kept_pairs_with_its_own_start(chat, tmp_path, asked, reference):
    module, technique, lora = policy(chat, reference_policy=reference, lr=0.5), Replay(6), LoRA(2)
    module.reference_cache = str(tmp_path / "references")
    trainer(tmp_path, technique, lora, max_steps=3, limit_val_batches=0).fit(module, pairs(tmp_path))
    kept = list(technique._memory.buffer.groups[""])
    first, start = batch_of(kept).columns["reference_logps"], said(module, kept)
    assert float((first - start).abs().max()) > 1e-2, "the policy has moved, so that the two starts differ"
    asked.clear()
    run = trainer(tmp_path, technique, lora, max_steps=1, limit_val_batches=0)
    run.fit(module, pairs(tmp_path, "others", " sure"))
    now = batch_of(kept).columns["reference_logps"]
    torch.testing.assert_close(now, first if reference == "base" else start, rtol=1e-5, atol=1e-5)
    assert len(asked) == {"start": 2, "precomputed": 0, "base": 1}[reference], "the kept pairs, and those of one step"


def test_pairs_that_come_with_a_checkpoint_are_compared_with_the_new_start(chat, tmp_path):
    first = trainer(tmp_path, one := Replay(6), LoRA(2), max_steps=-1, max_epochs=-1, limit_val_batches=0)
    module = policy(chat, lr=0.5)
    first.fit(module, TaskStream({"a": pairs(tmp_path)}))
    first.save_checkpoint(tmp_path / "a.ckpt")
    kept = one._memory.buffer.groups[""]
    wanted, before = said(module, kept).reshape(-1, 2), batch_of(kept).columns["reference_logps"].reshape(-1, 2)
    again = TaskStream({"b": pairs(tmp_path, "b", " sure")}, continue_from=str(tmp_path / "a.ckpt"))
    run = trainer(tmp_path, other := Replay(6), LoRA(2), max_steps=1, max_epochs=-1, limit_val_batches=0)
    run.fit(policy(chat, lr=0.5), again)
    place, same = {_ids(row): n for n, row in enumerate(kept)}, []
    for row in other._memory.buffer.groups[""]:
        if (n := place.get(_ids(row))) is not None:
            same.append(n)
            now = batch_of([row]).columns["reference_logps"]
            torch.testing.assert_close(now, wanted[n], rtol=1e-4, atol=1e-4)
    assert len(same) > 2 and float((wanted - before)[same].abs().max()) > 1e-2


def _ids(row: Row) -> tuple[int, ...]:
    return tuple(row["segments"][0]["ids"].tolist())


def test_a_resumed_run_keeps_what_its_start_has_said(chat, tmp_path, asked):
    one, other, data = Replay(6), Replay(6), pairs(tmp_path)
    run = trainer(tmp_path, one, LoRA(2), max_steps=2, limit_val_batches=0)
    run.fit(policy(chat), data)
    run.save_checkpoint(tmp_path / "two.ckpt")
    kept = batch_of(one._memory.buffer.groups[""]).columns["reference_logps"]
    asked.clear()
    again = trainer(tmp_path, other, LoRA(2), max_steps=3, limit_val_batches=0)
    again.fit(policy(chat), pairs(tmp_path), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    same = [row for row in other._memory.buffer.groups[""] if row["segments"][0]["row"] < 8]
    found = batch_of(same).columns["reference_logps"]
    assert len(asked) == 1 and all(bool((kept == value).any()) for value in found)


def test_a_precomputed_reference_cannot_begin_where_a_stream_goes_on(chat, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    data = TaskStream({"b": pairs(tmp_path)}, continue_from=str(tmp_path / "a.ckpt"))
    run = trainer(tmp_path, Replay(6), LoRA(2), max_steps=1, max_epochs=-1, limit_val_batches=0)
    with pytest.raises(Refusal, match="precomputed names the start by its weights before TaskStream.continue_from"):
        run.fit(policy(chat, reference_policy="precomputed"), data)
