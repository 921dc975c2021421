"""The scores of all tasks after each of them, as a stream collects, saves and writes them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_ft.functional.continual_metrics import continual_metrics
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.heat_map import heat_map

MATRIX = "task_matrix.csv"
PICTURE = "task_matrix.svg"
START = "(start)"
"""The row before any training."""
_USUAL = ("val/accuracy", "val_accuracy", "val_acc", "val/acc", "val/rewards/accuracies", "val/loss", "val_loss")
_LESS_IS_BETTER = ("loss", "perplexity", "error", "mae", "mse", "nll")

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value."""


class TaskScores:
    """What was measured.

    Attributes:
        tasks: names of all that belong to the run, also those of which nothing can be measured.
        start: before any training; empty where it was not measured.
        rows: name of a task that was trained -> the scores after it, in order.
    """

    def __init__(self, metric: str | None = None, mode: Literal["max", "min"] | None = None) -> None:
        """Args: metric: that fills the matrix; None: the first usual one that is there; mode: which way is better."""
        self.metric, self.mode = metric, mode
        self.tasks: list[str] = []
        self.start: Scores = {}
        self.rows: dict[str, Scores] = {}

    def check(self, measured: Scores) -> None:
        """Refuses a metric that a validation has not logged.

        Raises:
            Refusal: naming what was logged.
        """
        there = sorted({name for found in measured.values() for name in found})
        if self.metric is not None and self.metric not in there:
            raise Refusal(
                f"TaskStream.metric is {self.metric}, which validation does not log: it logs {', '.join(there) or 'nothing'}. Give "
                "one of these, or leave metric out."
            )

    def chosen(self) -> str | None:
        """The metric that fills the matrix; None where nothing was measured that could."""
        there = {name for row in (self.start, *self.rows.values()) for score in row.values() for name in score}
        if self.metric is not None:
            return self.metric
        return next((name for name in _USUAL if name in there), None)

    def higher_is_better(self) -> bool:
        """The direction: as said, else told from the metric's name."""
        if self.mode is not None:
            return self.mode == "max"
        return not any(word in (self.chosen() or "") for word in _LESS_IS_BETTER)

    def columns(self) -> list[str]:
        """The tasks: those trained, in order, then the others; one without rows to validate on has an empty column."""
        seen = (task for row in (*self.rows.values(), self.start) for task in row)
        every = dict.fromkeys([*self.tasks, *seen])
        return [*(task for task in self.rows if task in every), *(task for task in every if task not in self.rows)]

    def matrix(self) -> tuple[list[list[float | None]], list[float | None] | None]:
        """(rows after each task, row before any) over `columns`; None where a score is missing."""
        return self._over(self.columns())

    def _over(self, columns: Sequence[str]) -> tuple[list[list[float | None]], list[float | None] | None]:
        metric = self.chosen()

        def values(row: Scores) -> list[float | None]:
            return [row.get(task, {}).get(metric) if metric is not None else None for task in columns]

        return [values(row) for row in self.rows.values()], values(self.start) if self.start else None

    def metrics(self, joint: bool = False) -> dict[str, float]:
        """The numbers of `lightning_ft.functional.continual_metrics`; of joint training the average over all tasks alone."""
        if joint:
            rows, _ = self.matrix()
            last = [value for value in rows[-1] if value is not None] if rows else []
            return {"average": sum(last) / len(last)} if last else {}
        # A column for each row: that of an earlier run's joint training is no task, and has nothing in it.
        rows, start = self._over(list(self.rows))
        return continual_metrics(rows, start, higher_is_better=self.higher_is_better())

    def write(self, folder: Path) -> None:
        """The matrix as a table and as a picture."""
        rows, start = self.matrix()
        names = [*self.rows]
        if start is not None:
            rows, names = [start, *rows], [START, *names]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / MATRIX, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(
                [f"{self.chosen()} ({'more' if self.higher_is_better() else 'less'} is better)", *self.columns()]
            )
            for name, row in zip(names, rows, strict=True):
                table.writerow([name, *("" if value is None else repr(value) for value in row)])
        better = self.higher_is_better()
        picture = heat_map(rows, names, self.columns(), higher_is_better=better, corner="after \\ on")
        (folder / PICTURE).write_text(picture, encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """Plain types."""
        rows = {name: _copied(row) for name, row in self.rows.items()}
        return {"tasks": list(self.tasks), "start": _copied(self.start), "rows": rows}

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave, whose tasks come before those of this run."""
        self.tasks = list(dict.fromkeys([*state.get("tasks", ()), *self.tasks]))
        self.start = _copied(state["start"])
        self.rows = {name: _copied(row) for name, row in state["rows"].items()}


def said_unmeasured(tasks: Sequence[str], measured: Sequence[str]) -> str | None:
    """What a user is told where some tasks have no rows to validate on; None where all have.

    Args:
        tasks: of the stream.
        measured: those that have.
    """
    left_out = [task for task in tasks if task not in measured]
    if not left_out:
        return None
    if not measured:
        return "TaskStream: no task has rows to validate on, so there is no matrix, and no average, transfer or forgetting."
    return (
        f"TaskStream: nothing is measured of {', '.join(left_out)}, for want of rows to validate on: empty in the matrix, and not "
        "counted in average, transfer and forgetting."
    )


def read_matrix(file: Path) -> tuple[str, list[str], list[str], list[list[float | None]]]:
    """(what it holds, names of rows, of columns, values) of a table that `TaskScores.write` wrote."""
    with open(file, newline="") as opened:
        head, *rows = list(csv.reader(opened))
    return head[0], [row[0] for row in rows], head[1:], [[float(v) if v else None for v in row[1:]] for row in rows]


def _copied(row: Mapping[str, Mapping[str, float]]) -> Scores:
    return {task: dict(scores) for task, scores in row.items()}


__all__ = ["MATRIX", "PICTURE", "START", "Scores", "TaskScores", "read_matrix", "said_unmeasured"]
