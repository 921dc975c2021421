"""Tokens/s and peak memory of each method: a fresh process for each, a few timed steps, all methods in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import vader_cells
from benchmarks.method_list import DECODER, ENCODER, methods, setting
from benchmarks.vader_cells import Kept

STEPS, WARMUP = {ENCODER: 12, DECODER: 8}, 2
PATIENCE = 900
"""Seconds after which a process is ended."""


def measure_all(kept: Kept, turns: int, only: str = "", skip: str = "") -> None:
    """Every missing measurement; one process at a time."""
    found = kept.content.setdefault("speed", {})
    for turn in range(turns):
        for model in (ENCODER, DECODER):
            for method in methods():
                key = f"{model}|{method}|turn {turn}"
                wanted = vader_cells.chosen(key, only) and not (skip and vader_cells.chosen(key, skip))
                if not wanted or "tokens_per_second" in found.get(key, {}):
                    continue
                found[key] = launch(model, method)
                kept.save()
                told = found[key].get("failed") or (
                    f"{found[key]['tokens_per_second']:.0f} tokens/s, {found[key]['peak_memory_bytes'] / 1e9:.2f} GB"
                )
                print(f"{key}: {told}", flush=True)


def launch(model: str, method: str) -> dict[str, Any]:
    """One process's last line, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.methods_speed", json.dumps({"model": model, "method": method})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result after {PATIENCE} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": done.stderr.strip()[-1000:]}


def side(model: str, method: str) -> dict[str, Any]:
    """Trains a few steps at a rate of zero effect on speed, and says how fast and in how much memory."""
    import lightning.pytorch as pl
    import torch

    from benchmarks.measure import peak_memory_bytes
    from benchmarks.step_watch import StepWatch

    vader_cells.quiet()
    chosen, steps = methods()[method], STEPS[model]
    watch = StepWatch(WARMUP)
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as name:
        folder, rate = Path(name), chosen.rates[model][0]
        if model == ENCODER:
            job = vader_cells.encoder_job("classification", rate, vader_cells.write_rows(folder), **chosen.model)
        else:
            files = vader_cells.write_questions(folder)
            job = vader_cells.decoder_job(rate, files, **chosen.model)
        callbacks = [*chosen.callbacks(setting(model, steps)), watch]
        vader_cells.trainer(folder, callbacks, max_steps=steps, max_epochs=-1).fit(*job)
    told = watch.clock.summary()
    return {**told, "peak_memory_bytes": peak_memory_bytes(), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(json.dumps(side(**json.loads(sys.argv[1]))), flush=True)
