"""Elastic weight consolidation: what mattered to earlier tasks is held where they left it."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Le
from torch import Tensor

from lightning_ft.engine.anchors import Anchors
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.importance import importance, trained_names
from lightning_ft.engine.likelihood import Labels, LogLikelihood
from lightning_ft.engine.quadratic import CANNOT, QuadraticPenalty
from lightning_ft.engine.traits import Traits


class EWC(QuadraticPenalty):
    """Keeps what a model has learned before: each trained number is held to its old value, the harder the more it mattered there.

    Minimises ``L + lam / 2 sum_k sum_i F_ki (theta_i - theta*_ki)^2`` over earlier tasks k: ``theta*_k`` what was trained at the
    end of task k, ``F_k`` the diagonal Fisher information there, a mean over its examples of the squared gradient of each one's
    log-likelihood (an example is a row; of a language model all its scored tokens together). ``L`` is the mean loss that you train
    with. The penalty's gradient ``lam F (theta - theta*)`` is added once a step, before clipping, so that any objective has it.
    Without a TaskStream a fit is a task.

    Args:
        lam: strength. The right one depends on ``labels`` and on how many numbers are trained: try 10, 100, 1000.
        mode: ``separate``: each task's own term; two copies of what is trained hold them all. ``online``: one term around the last
            task's end, with F = gamma F + F_k, which lets old tasks go.
        gamma: what online EWC keeps of older importances at each task's end; 1 keeps them whole.
        importance: ``fisher``, or ``uniform``: F = 1, which needs no pass over the data; held from the first step on to where the
            fit starts (L2-SP).
        labels: whose likelihood: ``sample``: one label drawn from the model for each example (for each scored token); ``all``: the
            expectation over all classes, exact, a pass for each class; ``empirical``: labels in the data, near zero once a task is
            fitted; ``predicted``: the likeliest.
        load_from: checkpoint of an earlier fit with EWC, which this fit is held to; None: what this callback has measured itself.
        name: tells two of them apart, and names what is logged.

    Logs:
        ``train/ewc``, the penalty; at a task's end ``ewc/trace``, the sum of F_k.

    Cost: two float32 copies of what is trained, in memory and in checkpoints. At a task's end one forward and one backward pass
    over its rows (``all``: one for each class).

    Raises:
        Refusal: at setup for a file without its state; when a fit starts that trains other parts than were measured.

    Differs from: Avalanche, which squares the mean gradient of a batch; many implementations have no 1/2 before lam.

    Example:
        >>> EWC(30.0, labels="all")
        EWC(lam=30.0, labels='all')

    References:
        Kirkpatrick et al., 2017, equation 3; online: Schwarz et al., 2018; L2-SP: Li et al., 2018. Proven against loops over
        examples in tests/engine and tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(slot="ewc", edits=frozenset({"gradients"}), continual=True, cannot=CANNOT)

    def __init__(
        self,
        lam: Annotated[float, Ge(0)] = 100.0,
        *,
        mode: Literal["separate", "online"] = "separate",
        gamma: Annotated[float, Ge(0), Le(1)] = 1.0,
        importance: Literal["fisher", "uniform"] = "fisher",
        labels: Labels = "sample",
        load_from: str | None = None,
        name: str = "ewc",
    ) -> None:
        self.lam = lam
        self.mode = mode
        self.gamma = gamma
        self.importance = importance
        self.labels = labels
        self.load_from = load_from
        self.name = name
        self._reset()
        self.check()

    @property
    def asks(self) -> bool:
        """Uniform importances ask nothing."""
        return self.importance == "fisher"

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, resumed: bool) -> None:
        """Uniform importances hold to the start of the first fit."""
        if self.importance == "uniform" and not self._held.tasks and not resumed:
            self._absorb(trainer, module, (), 0, self._held)

    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], task: int
    ) -> dict[str, Tensor]:
        """The Fisher information of the task's rows."""
        if self.importance == "uniform":
            return {n: torch.ones_like(p, dtype=torch.float32) for n, p in trained_names(module).items()}
        ask = LogLikelihood(self.labels, Attachment.of(module).seed, task)
        found = importance(trainer, module, batches, ask)
        self.report(trainer, trace=found.trace, examples=found.examples)
        return found.diagonal

    def absorb(self, anchors: Anchors, importance: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """A term for each task, or one that moves along."""
        if self.mode == "online":
            anchors.move(importance, values, self.gamma)
        else:
            anchors.merge(importance, values)
