"""Memory aware synapses: what the outputs depend on is held where it was, whatever the labels."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
from annotated_types import Ge
from torch import Tensor

from lightning_ft.engine.importance import importance
from lightning_ft.engine.likelihood import SquaredNorm
from lightning_ft.engine.quadratic import CANNOT, QuadraticPenalty
from lightning_ft.engine.traits import Traits


class MAS(QuadraticPenalty):
    """Keeps what a model has learned before: each trained number is held to its old value, by how much outputs depend on it.

    Minimises ``L + lam / 2 sum_i (sum_k A_ki) (theta_i - theta*_i)^2`` over earlier tasks k, with theta* what was trained at the
    end of the last one and ``A_ki`` the mean over the examples of task k of ``|d ||f(x)||^2 / d theta_i|``: f the logits (of a
    language model those of all scored tokens of a row), before any softmax. No label has a say. The gradient
    ``lam A (theta - theta*)`` is added once a step, before clipping. Without a TaskStream a fit is a task.

    Args:
        lam: strength; twice the paper's lambda, which stands without the 1/2. Try 0.1, 1, 10.
        load_from: checkpoint of an earlier fit with MAS, which this fit is held to; None: what this callback has measured itself.
        name: tells two of them apart, and names what is logged.

    Logs:
        ``train/mas``, the penalty; at a task's end ``mas/trace``, the sum of A_k.

    Cost: two float32 copies of what is trained, in memory and in checkpoints; at a task's end one forward and one backward pass
    over its rows.

    Raises:
        Refusal: at setup for a file without its state; when a fit starts that trains other parts than were measured.

    Differs from: Avalanche, which takes the gradient of a batch's mean, in train mode.

    Example:
        >>> MAS(0.5)
        MAS(lam=0.5)

    References:
        Aljundi et al., 2018, equations 2 to 4. Proven against loops over examples in tests/engine and tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(slot="mas", edits=frozenset({"gradients"}), continual=True, cannot=CANNOT)

    def __init__(self, lam: Annotated[float, Ge(0)] = 1.0, *, load_from: str | None = None, name: str = "mas") -> None:
        self.lam = lam
        self.load_from = load_from
        self.name = name
        self._reset()
        self.check()

    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], task: int
    ) -> dict[str, Tensor]:
        """How much the outputs on the task's rows depend on each number."""
        found = importance(trainer, module, batches, SquaredNorm(), power=1)
        self.report(trainer, trace=found.trace, examples=found.examples)
        return found.diagonal
