"""``lightning-ft inspect``: the rows as the model sees them, before a minute of training is spent on them.

Needs the tokenizer alone: no weights are loaded. On a terminal scored tokens are coloured; in a pipe they stand in
``[[double brackets]]``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ft.cli.configured import ConfiguredCLI
from lightning_ft.functional.errors import Refusal

SCORED = "bold green"


class InspectCLI(ConfiguredCLI):
    """The configuration of a fit, of which the data alone are set up."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What to show."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rows", type=Annotated[int, Ge(0)], default=3, help="How many rows to show.")
        parser.add_argument(
            "--split",
            type=Literal["train", "val", "test", "predict"],
            default="train",
            help="Which rows to show.",
        )

    def _set_seed(self) -> None:
        """As fit does, but without a word about it."""
        from lightning.pytorch import seed_everything

        seed = self.config["seed_everything"]
        seed_everything(0 if isinstance(seed, bool) else seed, workers=True, verbose=False)


def inspect_command(argv: list[str]) -> None:
    """Shows rows, lengths, what was dropped, and how full the batches are.

    Raises:
        Refusal: whatever is wrong with the configuration or the data; or data of another kind than ours.
    """
    cli = InspectCLI("inspect", argv)
    data = cli.datamodule
    if not (hasattr(data, "preview") and hasattr(data, "reports")):
        raise Refusal(f"{type(data).__name__} cannot be inspected: it has no preview(n) and reports(), as SFTData has.")
    if getattr(data, "tokenizer", None) is None:
        data.use_tokenizer(cli.model.tokenizer)  # in a fit the trainer leads from data to module
    show(data, cli.config["rows"], cli.config["split"], Console(soft_wrap=True, highlight=False))


def show(data: Any, rows: int, split: str, console: Console) -> None:
    """Prints the rows of one split, then a table of all.

    Args:
        data: with ``preview(n, split)`` and ``reports()``, as `SFTData` has them.
        rows: how many rows to print.
        split: of which.
        console: where to; whether it is a terminal decides between colours and brackets.
    """
    for row in data.preview(rows, split):
        scored = f", {row.scored} scored" if row.scored else ""  # none where rows are learned as a whole
        console.print(Text(f"── {row.where}: {row.tokens} tokens{scored}", style="dim"))
        text = Text()
        for piece in row.pieces:
            if not piece.scored:
                text.append(piece.text)
            elif console.is_terminal:
                text.append(piece.text, style=SCORED)
            else:
                text.append(f"[[{piece.text}]]")
        console.print(text, end="\n\n")
    console.print(_table(data))
    for name, report in data.reports().items():
        if name == "train" and getattr(data, "streaming", False):
            console.print(f"{name}: these are the numbers of {report.name}; the rows of a stream are not counted.")
        for part in report.parts:
            console.print(f"{name}: {part}")
        if report.epoch_rows is not None:
            console.print(f"{name}: an epoch takes {report.epoch_rows:,} rows.")
        if report.truncated:
            console.print(f"{name}: {report.truncated:,} rows are cut (truncation {data.truncation}).")
        for reason, count in report.dropped.items():
            console.print(f"{name}: {count:,} rows are left out: {reason}.")
        for fact, value in report.facts.items():
            console.print(f"{name}: {fact}: {value}.")


def _table(data: Any) -> Table:
    """One column a split: rows, tokens, lengths, and how much of the batches is no padding."""
    reports = data.reports()
    lines: dict[str, list[str]] = {}
    for name, report in reports.items():
        lengths = data._get(name).lengths
        shortest, median, most, longest = np.percentile(lengths, [0, 50, 95, 100], method="lower")
        facts = {
            "rows used": f"{report.kept:,}",
            "rows in the file": f"{report.rows:,}",
            "tokens": f"{report.tokens:,}",
            "tokens scored": f"{report.scored:,} ({report.scored / report.tokens:.0%})" if report.scored else "-",
            "shortest row": f"{shortest:,}",
            "median row": f"{median:,}",
            "95 % of rows up to": f"{most:,}",
            "longest row": f"{longest:,}",
            "positions that hold a token": f"{report.packing_efficiency:.1%}" if report.packing_efficiency else "-",
        }
        for fact, value in facts.items():
            lines.setdefault(fact, []).append(value)
    table = Table("", *reports)
    for column in table.columns[1:]:
        column.justify = "right"
    for fact, values in lines.items():
        table.add_row(fact, *values)
    return table
