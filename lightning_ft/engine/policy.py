"""What modules share that train a language model against what it was: the reference, no dropout, one prompt for two answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lightning_ft.engine.answers import no_dropout, prove_sharing, refuse_dropout
from lightning_ft.engine.arguments import signature_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.evaluation import NamedMeans
from lightning_ft.engine.module import FineTuningModule
from lightning_ft.models.admission import evaluating

Reference = Literal["start", "base"]
SLOWER = 1 / 20
"""Factor from the rate that a technique suggests (for supervised training) to that of a preference loss: TRL's defaults for all
parameters are 2e-5 and 1e-6, and the same factor is found in published LoRA recipes, 2e-4 and about 1e-5."""


class PolicyModule(FineTuningModule):
    """A language model that is trained against a reference.

    Subclasses store ``dropout`` and ``reference_policy`` beside their other arguments.
    """

    reference_policy: str
    dropout: bool
    sharing_reason: str | None = None
    """Why two answers cannot share one copy of their prompt; empty when it is proven that they can."""
    evaluation: NamedMeans

    def configure_model(self) -> None:
        """Loads the base, and proves once whether its attention lets answers share a prompt."""
        super().configure_model()
        self.sharing_reason = prove_sharing(self)

    def register(self, attachment: Attachment) -> None:
        """The base's own edits, the reference that is compared with, and dropout switched off."""
        super().register(attachment)
        if self._compares and self.reference_policy != "precomputed":
            attachment.want_reference(self.reference_policy)
        if not self.dropout:
            ours = f", or set {type(self).__name__}.dropout to true"
            refuse_dropout(attachment.techniques, ours if "dropout" in signature_of(type(self)) else "")
            attachment.edit("hooks", "no dropout", no_dropout)

    @property
    def _compares(self) -> bool:
        """Whether the losses look at the reference at all."""
        return True

    @contextmanager
    def at_reference(self) -> Iterator[None]:
        """The model as the reference is, without gradients, dropout or embedding noise."""
        with Attachment.of(self).reference(self.reference_policy), evaluating(self.model):
            yield

    def resolved_lr(self) -> float:
        """``lr``, else a twentieth of what supervised training would take: 1e-6 for all parameters, 1e-5 with LoRA."""
        return self.lr if self.lr is not None else super().resolved_lr() * SLOWER

    def on_validation_epoch_end(self) -> None:
        """Computes and forgets what a validation measured."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Computes and forgets what a test measured."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        means = self._finished(self.evaluation.compute())
        self.evaluation.reset()
        for name, value in means.items():
            # compute() has summed over ranks already
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "rewards/accuracies"), rank_zero_only=False)

    def _finished(self, means: dict[str, Any]) -> dict[str, Any]:
        """The means that are logged of a validation, from those of terms and of what was measured."""
        raise NotImplementedError
