"""What is minimised over an episode's rows, by name: of a net or a base, and of a policy against its reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.episode_checks import check_losses
from lightning_ft.engine.episode_module import EpisodeModule
from lightning_ft.engine.episodes import Episode, Rows
from lightning_ft.functional.episode_losses import mean_loss, mean_preference, preferred, refers

BETA = 0.1
"""How strongly a policy is held to its reference unless it is said; that of `DPO`."""


class ObjectiveModule(EpisodeModule):
    """Subclasses store ``inner_loss``, ``outer_loss`` and ``beta``."""

    inner_loss: str
    outer_loss: str
    beta: float | None

    def check(self) -> None:
        """Refuses also losses that the task cannot have, and arguments that belong to another one."""
        super().check()
        losses = {"inner_loss": self.inner_loss, "outer_loss": self.outer_loss}
        check_losses(type(self).__name__, None if self.base is None else self.task, losses, self.beta)
        if self._preferring:
            self.no_likelihood = (
                self.no_likelihood or "of the task dpo compares answers, which have no likelihood there"
            )

    def register(self, attachment: Attachment) -> None:
        """Also keeps the reference that a policy's losses compare with: the model as it is when the fit begins."""
        super().register(attachment)
        if self._refers:
            attachment.want_reference()

    @property
    def _preferring(self) -> bool:
        return str(self.task) == "dpo"

    @property
    def _refers(self) -> bool:
        """Whether a loss compares with a reference."""
        return self._preferring and any(map(refers, (self.inner_loss, self.outer_loss)))

    def loss(self, name: str, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of rows, tokens or pairs.

        Args:
            name: ``inner_loss`` or ``outer_loss``.
            outputs: what the model says of them.
            targets: see `lightning_ft.engine.episodes.Rows`.
        """
        if self._preferring:
            return mean_preference(name, outputs, targets, BETA if self.beta is None else self.beta)
        return mean_loss(name, outputs, targets)

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(N,) 1 where the most likely class or token is the right one, or the better of two answers has the greater reward."""
        if self._preferring:
            return preferred(self.outer_loss, outputs, targets)
        if self.asks_for == "pairs":  # two equal rewards are no answer
            return (outputs[:, 0] > outputs[:, 1]).float()
        return (outputs.argmax(-1) == targets).float()

    def referred(self, episode: Episode) -> Episode:
        """The episode with what the reference says of its pairs, where a loss compares with it."""
        return Episode(self._known(episode.support), self._known(episode.query)) if self._refers else episode

    def _known(self, rows: Rows) -> Rows:
        if not self._refers or rows.targets.shape[1] > 2:
            return rows
        with self.reference("start"):  # without gradients
            said = self(rows.inputs)
        return replace(rows, targets=torch.cat([rows.targets.to(said.dtype), said], 1))


__all__ = ["ObjectiveModule"]
