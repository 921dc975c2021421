"""What is seen while a round is written and measured: a line below that of Lightning's bar, which stands still meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tqdm.auto import tqdm  # type: ignore[import-untyped]


class RoundProgress:
    """Shows how far a section of a round is, in the bar that the Trainer has; nothing where it has none or another kind.

    Outside a section `to` and `advance` do nothing, so that the same code may write answers unseen.
    """

    def __init__(self) -> None:
        self._line: _RichLine | _TqdmLine | None = None
        self._done = 0

    @contextmanager
    def section(self, trainer: pl.Trainer, what: str, total: int) -> Iterator[None]:
        """Shows a line while the block runs.

        Args:
            trainer: whose bar it is.
            what: the words before it.
            total: how far `to` and `advance` will come.
        """
        self._line, self._done = _line(trainer, what, total), 0
        try:
            yield
        finally:
            line, self._line = self._line, None
            if line is not None:
                line.end()

    def to(self, done: int) -> None:
        """So much of the total is done."""
        self._done = done
        if self._line is not None:
            self._line.to(done)

    def advance(self) -> None:
        """One more."""
        self.to(self._done + 1)


def _line(trainer: pl.Trainer, what: str, total: int) -> _RichLine | _TqdmLine | None:
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        return _RichLine(bar.progress, what, total)
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:  # ranks that show nothing have a disabled one
        return _TqdmLine(bar, what, total)
    return None


_RICH: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Progress display -> our line in it: one for all rounds, hidden between them, since Lightning finds its own by their place."""


class _RichLine:
    def __init__(self, progress: Any, what: str, total: int) -> None:
        self._progress = progress
        if progress not in _RICH:
            _RICH[progress] = progress.add_task(what, total=total)
        self._id = _RICH[progress]
        progress.reset(self._id, description=what, total=total, visible=True)

    def to(self, done: int) -> None:
        self._progress.update(self._id, completed=done)
        self._progress.soft_refresh()

    def end(self) -> None:
        self._progress.refresh()
        self._progress.update(self._id, visible=False)
        self._progress.refresh()


class _TqdmLine:
    def __init__(self, bar: TQDMProgressBar, what: str, total: int) -> None:
        below = 2 * bar.process_position + 1
        self._bar = tqdm(desc=what, total=total, position=below, leave=False, dynamic_ncols=True, file=sys.stdout)

    def to(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def end(self) -> None:
        self._bar.close()


__all__ = ["RoundProgress"]
