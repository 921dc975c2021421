"""Cells of a benchmark, each in a process of its own, several beside one another; kept as soon as they are done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

from benchmarks.runs import launch
from benchmarks.vader_cells import Kept, chosen


def run_cells(
    kept: Kept, module: str, cells: Mapping[str, list[str]], *, score: str, jobs: int, limit: float = 3600.0
) -> None:
    """Runs every cell that is missing; one that fails is kept with its reason, and the others go on.

    Args:
        kept: the results.
        module: run as ``python -m MODULE WORDS``; it prints its result as one line of JSON with ``scores`` and ``seconds``.
        cells: key -> the words, in the order in which they begin.
        score: which of the scores is told.
        jobs: processes at once, with one thread each.
        limit: seconds that a cell may take.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    missing = [key for key in cells if "scores" not in kept.cells.get(key, {}) and chosen(key, kept.only)]
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        running = {pool.submit(launch, module, cells[key], limit): key for key in missing}
        for done in as_completed(running):
            kept.ensure(running[done], done.result, score)


__all__ = ["run_cells"]
