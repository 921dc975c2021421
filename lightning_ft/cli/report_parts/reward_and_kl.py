"""What reinforcement learning has bought, and at what distance from where it began: reward against KL."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ft.cli.report_parts.chart import Line, Point, chart
from lightning_ft.cli.report_parts.run_files import RunFiles

REWARD, KL = "train/reward", "train/kl"


def reward_and_kl(runs: Sequence[RunFiles]) -> str | None:
    """One point a round and run, joined in their order; several runs can be read against one another, whatever their rates."""
    lines = []
    for number, run in enumerate(runs):
        points = path_of(run)
        if points:
            label = "reward" if len(runs) == 1 else run.name
            lines.append(Line(label, points, colour=number, smoothed=False))
    if not lines:
        return None
    drawn = chart(
        "reward against KL",
        lines,
        x_label="KL from the reference, nats an answer",
        x_name="KL",
        whole=False,
        caption="Mean reward of each round's answers, joined in the order of the rounds. Higher and further left is better.",
    )
    return f'<div class="charts">{drawn}</div>'


def path_of(run: RunFiles) -> list[Point]:
    """(KL, reward) of each round that has both."""
    kl = dict(run.metrics.get(KL, []))
    return [(kl[step], reward) for step, reward in run.metrics.get(REWARD, []) if step in kl]
