"""``lightning-ft report RUN``: what a run has logged, as one HTML page that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_ft.cli.checkpoint_parser import SmallParser, small_parser
from lightning_ft.cli.report_parts.page import page
from lightning_ft.cli.report_parts.panels import PANELS
from lightning_ft.cli.report_parts.run_files import RunFiles
from lightning_ft.functional.errors import Refusal

FILE = "report.html"


def parser() -> SmallParser:
    """The flags of ``report``."""
    flags = small_parser("report", "Draws what a run has logged as one HTML page; several runs lie over one another.")
    flags.add_argument("runs", type=str, nargs="*", metavar="RUN", help="A folder that fit has written, runs/NAME.")
    flags.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"The file to write; null is {FILE} in the run's folder, or beside the first one's where several are given.",
    )
    return flags


def report_command(argv: list[str]) -> None:
    """Writes the page, and says where.

    Raises:
        Refusal: a folder that is no run, or a file that cannot be written.
    """
    config = parser().parse_args(argv)
    if not config.runs:
        raise Refusal("Say which run: lightning-ft report runs/NAME.")
    runs = [RunFiles.read(folder) for folder in dict.fromkeys(config.runs)]
    default = runs[0].path / FILE if len(runs) == 1 else runs[0].path.parent / FILE
    target = Path(config.output) if config.output is not None else default
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(report(runs), encoding="utf-8")
    except OSError as error:
        raise Refusal(
            f"Cannot write the report to {target}: {error.strerror}; name another file as --output."
        ) from error
    print(f"{target}: open it in any browser; it needs nothing else ({os.path.getsize(target) / 1e3:.0f} kB).")


def report(runs: Sequence[RunFiles]) -> str:
    """The page of one or several runs."""
    sections = [(title, html) for title, panel in PANELS if (html := panel(runs))]
    notes = [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes]
    return page(", ".join(run.name for run in runs), sections, notes)
