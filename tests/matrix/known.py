"""What fails today: strict expected failures, each with its reason; a cell that works again fails until its line is gone."""

from __future__ import annotations

from collections.abc import Callable

from tests.matrix.cells import Cell

KNOWN: list[tuple[Callable[[Cell], bool], str]] = []


def reason_of(cell: Cell) -> str | None:
    """Why a cell is expected to fail; None for all others."""
    return next((reason for fails, reason in KNOWN if fails(cell)), None)
