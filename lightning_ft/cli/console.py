"""Progress of work that Lightning's progress bar does not cover."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Shows a spinner with ``what`` while the block runs; a plain line where there is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
        yield
        return
    with console.status(what):
        yield


def quiet() -> None:
    """Drops three messages of other libraries that a user of ours can do nothing about; for this process."""
    # Lightning recommends two cloud services each time a trainer is built.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    # A fit without validation rows is what the user asked for.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    # Lightning 2.6 on torch 2.13.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
