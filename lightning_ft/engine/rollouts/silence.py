"""Rewards that judge no answer of a round: mostly a column or a task that a reward does not know."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_ft.engine.rewards import described
from lightning_ft.engine.rollouts.round import Round
from lightning_ft.functional.errors import Refusal


class Silence:
    """Tells once of each of them, in the progress bar where there is one."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, round: Round, trainer: pl.Trainer, *, rewarded: bool) -> None:
        """Looks at a round that all ranks have.

        Args:
            round: with its rewards.
            trainer: whose progress bar prints.
            rewarded: whether there is nothing to learn from without rewards.

        Raises:
            Refusal: none has judged any answer of the first round. A later round is left to pass, since others come.
        """
        each, answers = round.scores.each, len(round.answers)
        silent = [name for name, one in each.items() if answers and bool(one.isnan().all())]
        if not silent:
            return
        example = described(round.texts[0], round.prompts[0].given, round.prompts[0].row)
        if rewarded and round.number == 0 and len(silent) == len(each):
            raise Refusal(
                f"The reward{'s' if len(silent) > 1 else ''} {', '.join(silent)} judged none of the {answers} answers of the first "
                f"round, such as {example}, so that there is nothing to learn from; give a number where None is given now."
            )
        new = [name for name in silent if name not in self._told]
        self._told.update(new)
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            for name in new:
                line = f"round {round.number}: the reward {name} judged none of {answers} answers, such as {example}."
                trainer.progress_bar_callback.print(line)
