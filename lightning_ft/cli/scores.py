"""What a metric's name says: which direction is better, and how sure one measurement of it is."""

from __future__ import annotations

from typing import Literal

from lightning_ft.functional.intervals import wilson

Mode = Literal["min", "max"]

LOWER = ("loss", "perplexity", "error", "mse", "rmse", "mae", "nll", "wer", "cer")
HIGHER = (
    *("accuracy", "exact_match", "f1", "precision", "recall", "auroc", "mcc"),
    *("bleu", "rouge", "chrf", "pearson", "spearman", "r2", "reward", "win_rate"),
)
SHARES = ("accuracy", "exact_match")  # so many rows right of so many rows


def direction(metric: str) -> Mode | None:
    """Whether less or more of it is better, by the words of its name (``val/f1_macro``); None when they do not say."""
    words = metric.rpartition("/")[2].lower()
    for mode, known in (("min", LOWER), ("max", HIGHER)):
        if any(
            words == name or words.startswith((f"{name}_", f"{name}-")) or words.endswith(f"_{name}") for name in known
        ):
            return mode  # type: ignore[return-value]
    return "max" if words.startswith(("rouge", "bleu")) else None  # rouge1, rougeL


def row_interval(metric: str, value: float | None, rows: int | None) -> tuple[float, float] | None:
    """The 95 % interval (Wilson) of one measured share of rows; None for other metrics, or when nobody counted the rows.

    A share of tokens gets the interval of its rows, since tokens of a row are right or wrong together: rather too wide.
    """
    if value is None or not rows or metric.rpartition("/")[2] not in SHARES or not 0 <= value <= 1:
        return None
    return wilson(value * rows, rows)
