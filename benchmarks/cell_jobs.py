"""Cells of a benchmark as processes of their own, several at once, each when what it needs is done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def run_cells(
    module: str,
    needs: Mapping[str, Sequence[str]],
    options: Sequence[str],
    *,
    at_once: int,
    done: Callable[[str], bool],
    wanted: Callable[[str], bool] = lambda key: True,
    cores: int | None = None,
) -> list[str]:
    """Starts ``python -m module --cell KEY`` for each wanted cell that is not done; processors are shared evenly.

    Args:
        module: its command line takes ``--cell``, makes that one cell and keeps it.
        needs: key -> keys of cells that it reads the results of, in an order in which they can be made.
        options: further words of each command.
        at_once: most processes at a time.
        done: whether a cell is kept.
        wanted: which cells are to be made.
        cores: processors there are; None: those of this process.

    Returns:
        Keys of the cells that failed, or that could not start because one before them is missing.
    """
    cores = cores or len(os.sched_getaffinity(0))
    environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(max(1, cores // at_once))}
    waiting = [key for key in needs if wanted(key) and not done(key)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    while waiting or running:
        for key in list(waiting):
            if len(running) < at_once and all(map(done, needs[key])):
                command = [sys.executable, "-m", module, *options, "--cell", key]
                running[key] = subprocess.Popen(command, cwd=ROOT, env=environment)
                waiting.remove(key)
        if not running:
            print(f"Not started, since what they need is missing: {', '.join(waiting)}.", flush=True)
            return failed + waiting
        time.sleep(0.1)
        for key, process in list(running.items()):
            if process.poll() is not None:
                del running[key]
                if process.returncode or not done(key):
                    print(f"{key}: failed (exit code {process.returncode})", flush=True)
                    failed.append(key)
    return failed


def device() -> str:
    """Where Lightning trains here."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
