"""Gradient surgery: one step for tasks, or terms, whose gradients disagree."""

from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.task_list import refuse_one_task_a_step
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import TERMS_APART, Traits
from lightning_ft.functional.gradient_surgery import METHODS, Method, cagrad, conflict_rate, pcgrad

_ORDER = 11  # keeps the random order apart from other streams of the same seed


class GradientSurgery(Technique):
    """Combines the gradients of several tasks so that they spoil less of one another where they disagree.

    Each term of the loss (a task of `MultiTask`, or the own loss and a distillation's) has its own gradient, added up over the
    accumulation window and averaged over ranks; where two point against each other, the step is no longer their sum:

        pcgrad  each gradient loses its component along those that it opposes; the sum of what is left
        cagrad  K times the direction within c |g_0| of the mean g_0 that helps the worst-off task most, divided by 1 + c
        mgda    K times the shortest convex combination
        nash    the bargaining solution, of norm sqrt(K) however long the gradients are
        upgrad  K times the mean of each gradient's nearest direction that opposes none: no task is harmed

    K is the number of tasks that have something in the window. Without conflict pcgrad and upgrad are the plain sum, so a learning
    rate can be kept; AdamW does not notice the size of a gradient, but clipping does. Parameters that one task alone reaches (its
    head, its adapter) keep their gradient.

    Args:
        method: how they are combined; pcgrad changes least. ``sum`` leaves them as they are and only logs the conflict rate, which
            tells whether surgery has anything to do.
        c: of cagrad: radius of the ball around the mean gradient, in its norm; the authors' 0.4 to 0.5 for their benchmarks. 0 is
            the plain mean.
        name: tells it apart in files.

    Logs:
        ``train/conflict_rate``: share of the pairs of tasks in a step whose gradients form an obtuse angle; steps with one task
        log nothing.

    Cost: one backward pass a task, and memory for K gradients of what is trained; cheap over LoRA, dear in full training.

    Differs from: the methods' own code, which steps with sums here and means there; here all are on the scale of the sum, but nash.

    Raises:
        Refusal: at setup under FSDP2, fp16 scaling or manual optimization, which have no gradient for each term, and where each
            step holds one task (homogeneous batches without accumulation).

    Example:
        >>> GradientSurgery("cagrad", c=0.4)
        GradientSurgery(method='cagrad', c=0.4)

    References:
        Yu et al., 2020, algorithm 1; Liu et al., 2021, algorithm 1; Desideri, 2012; Navon et al., 2022; Quinton and Rey, 2024.
        Proven against the papers' vectors, TorchJD, scipy and duality in tests/functional.
    """

    traits: ClassVar[Traits] = Traits(
        slot="surgery",
        edits=frozenset({"gradients"}),
        needs=frozenset({"terms"}),
        alone=True,
        cannot=TERMS_APART,
    )

    def __init__(
        self,
        method: Method = "pcgrad",
        *,
        c: Annotated[float, Ge(0)] = 0.5,
        name: str = "surgery",
    ) -> None:
        self.method = method
        self.c = c
        self.name = name
        self._attachment: Attachment | None = None
        self.check()

    def register(self, attachment: Attachment) -> None:
        """Takes the place of the sum of the terms' gradients."""
        self._attachment = attachment
        if attachment.module._trainer is not None:
            refuse_one_task_a_step(attachment.trainer, "GradientSurgery")
        attachment.on_leave(self._forget)
        attachment.surgery(self._weights)

    def _forget(self) -> None:
        self._attachment = None

    def _weights(self, gram: Tensor) -> Tensor:
        """(K, K) -> (K,): the method on the terms that have a gradient; 1 for the others, which have none to weigh."""
        weights = torch.ones(len(gram), dtype=torch.float64)
        present = (gram.diagonal() > 0).nonzero()[:, 0]
        if len(present) < 2:
            return weights
        assert self._attachment is not None
        among = gram[present][:, present].cpu()
        self._attachment.module.log("train/conflict_rate", conflict_rate(among))
        weights[present.cpu()] = self._combined(among, self._attachment)
        return weights

    def _combined(self, gram: Tensor, attachment: Attachment) -> Tensor:
        if self.method == "sum":
            return torch.ones(len(gram), dtype=torch.float64)
        if self.method == "pcgrad":
            key = [attachment.seed, attachment.trainer.global_step, _ORDER]
            generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
            return pcgrad(gram, generator)
        if self.method == "cagrad":
            return len(gram) * cagrad(gram, self.c)
        found = METHODS[self.method](gram)
        return found if self.method == "nash" else len(gram) * found
