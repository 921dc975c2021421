"""What a report shows, in order. A panel is a function of the runs that gives HTML, or None where a run has nothing for it.

A new one is a function in a file of its own and a line in `PANELS`. Whatever it takes from a run goes through `html.escape`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_ft.cli.report_parts.adapting import adapting
from lightning_ft.cli.report_parts.beside_baselines import beside_baselines
from lightning_ft.cli.report_parts.curves import curves, speed
from lightning_ft.cli.report_parts.facts import facts
from lightning_ft.cli.report_parts.reward_and_kl import reward_and_kl
from lightning_ft.cli.report_parts.run_files import RunFiles
from lightning_ft.cli.report_parts.task_matrix import task_matrix
from lightning_ft.cli.report_parts.texts import answers, configuration, differences, masked_row

Panel = Callable[[Sequence[RunFiles]], str | None]

PANELS: tuple[tuple[str, Panel], ...] = (
    ("What was trained", facts),
    ("Curves", curves),
    ("Reward and KL", reward_and_kl),
    ("Each task beside its baseline", beside_baselines),
    ("One task after another", task_matrix),
    ("Adapting, step by step", adapting),
    ("Speed", speed),
    ("A row, as the model sees it", masked_row),
    ("Answers before and after", answers),
    ("What the runs were told differently", differences),
    ("Configuration", configuration),
)
