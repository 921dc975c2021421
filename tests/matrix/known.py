"""What fails today: strict expected failures, each with its reason; a cell that works again fails until its line is gone."""

from __future__ import annotations

from collections.abc import Callable

from tests.matrix.cells import Cell

KNOWN: list[tuple[Callable[[Cell], bool], str]] = [
    (
        lambda cell: (
            cell.extra == "mas" and cell.part in ("adapter-pfeiffer", "prefix") and cell.placement.startswith("fsdp2")
        ),
        "importances of bottleneck adapters and prefixes need a backward pass for each example, which FSDP2 has not; refused only "
        "where a task ends, no rule says so at setup",
    ),
]


def reason_of(cell: Cell) -> str | None:
    """Why a cell is expected to fail; None for all others."""
    return next((reason for fails, reason in KNOWN if fails(cell)), None)
