"""Gradient surgery: one step for tasks, or terms, whose gradients disagree."""

from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lightning_ft.engine.arguments import refuse_idle
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.task_list import refuse_one_task_a_step
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import TERMS_APART, Traits
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.gradient_surgery import METHODS, Method, cagrad, conflict_rate, gradvac, pcgrad

_USED_BY = {"c": ("cagrad",), "beta": ("gradvac",)}
_ORDER = 11  # keeps the random order apart from other streams of the same seed


class GradientSurgery(Technique):
    """Combines the gradients of several tasks so that they spoil less of one another where they disagree.

    Each term of the loss (a task of `MultiTask`, or the own loss and a distillation's) has its own gradient, added up over the
    accumulation window and averaged over ranks; where two point against each other, the step is no longer their sum:

        pcgrad  each gradient loses its component along those that it opposes; the sum of what is left
        gradvac each gradient turns towards the others until their cosines are at least what they are on average; the sum
        cagrad  K times the direction within c |g_0| of the mean g_0 that helps the worst-off task most, divided by 1 + c
        mgda    K times the shortest convex combination
        nash    the bargaining solution, of norm sqrt(K) however long the gradients are
        upgrad  K times the mean of each gradient's nearest direction that opposes none: no task is harmed
        aligned the sum of the nearest gradients that are orthogonal and equally long

    K is the number of tasks that have something in the window. Without conflict pcgrad and upgrad are the plain sum, so a learning
    rate can be kept; AdamW does not notice the size of a gradient, but clipping does. Parameters that one task alone reaches (its
    head, its adapter) keep their gradient.

    Args:
        method: how they are combined; pcgrad changes least. ``sum`` leaves them as they are and only logs the conflict rate, which
            tells whether surgery has anything to do.
        c: of cagrad: radius of the ball around the mean gradient, in its norm; the authors' 0.4 to 0.5 for their benchmarks. 0 is
            the plain mean.
        beta: of gradvac: share of the newest cosine in the average; little, since that of a single step is noisy.
        name: tells it apart in files.

    Logs:
        ``train/conflict_rate``: share of the pairs of tasks in a step whose gradients form an obtuse angle; steps with one task
        log nothing.

    Cost: one backward pass a task, and memory for K gradients of what is trained; cheap over LoRA, dear in full training. In
    `MultiTask` each task's rows then go through the trunk by themselves, so that all passes together are as long as one.

    Differs from: the methods' own code, which steps with sums here and means there; here all are on the scale of the sum, but nash.

    Raises:
        Refusal: for arguments that the method does not read; at setup under FSDP2, fp16 scaling or manual optimization, which have
            no gradient for each term, and where each step holds one task (homogeneous batches without accumulation).

    Example:
        >>> GradientSurgery("cagrad", c=0.4)
        GradientSurgery(method='cagrad', c=0.4)

    References:
        Yu et al., 2020, algorithm 1; Liu et al., 2021, algorithm 1; Desideri, 2012; Navon et al., 2022; Quinton and Rey, 2024; Wang
        et al., 2021, algorithm 1 (over the whole model); Senushkin et al., 2023.
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
        beta: Annotated[float, Gt(0), Le(1)] = 0.01,
        name: str = "surgery",
    ) -> None:
        self.method = method
        self.c = c
        self.beta = beta
        self.name = name
        self._attachment: Attachment | None = None
        self._cosines: Tensor | None = None  # (K, K), on average, of gradvac
        self.check()
        refuse_idle(self, _USED_BY, method)

    def register(self, attachment: Attachment) -> None:
        """Takes the place of the sum of the terms' gradients."""
        self._attachment = attachment
        if attachment.module._trainer is not None:
            refuse_one_task_a_step(attachment.trainer, "GradientSurgery")
        attachment.on_leave(self._forget)
        attachment.surgery(self._weights)

    def _forget(self) -> None:
        self._attachment = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new run knows no cosines."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._cosines = None

    def _weights(self, gram: Tensor) -> Tensor:
        """(K, K) -> (K,): the method on the terms that have a gradient; 1 for the others, which have none to weigh."""
        weights = torch.ones(len(gram), dtype=torch.float64)
        present = (gram.diagonal() > 0).nonzero()[:, 0]
        if len(present) < 2:
            return weights
        assert self._attachment is not None
        among, present = gram[present][:, present].cpu(), present.cpu()
        self._attachment.module.log("train/conflict_rate", conflict_rate(among))
        if self.method == "gradvac":
            weights[present] = self._vaccinated(among, present, len(gram))
        else:
            weights[present] = self._combined(among)
        return weights

    def _vaccinated(self, gram: Tensor, present: Tensor, terms: int) -> Tensor:
        """Of gradvac, which knows what the cosines of the present terms were before."""
        if self._cosines is None:
            self._cosines = torch.zeros(terms, terms, dtype=torch.float64)
        if len(self._cosines) != terms:
            raise Refusal(
                f"GradientSurgery gradvac goes on with the average cosines of {len(self._cosines)} terms, and the loss has {terms} "
                "now; resume with the same tasks, or start a new fit."
            )
        pairs = (present[:, None], present[None])
        weights, self._cosines[pairs] = gradvac(gram, self._cosines[pairs], self.beta, self._generator())
        return weights

    def _generator(self) -> torch.Generator:
        """Of the order of a step, the same on all ranks and in a run that was resumed."""
        assert self._attachment is not None
        key = [self._attachment.seed, self._attachment.trainer.global_step, _ORDER]
        return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _combined(self, gram: Tensor) -> Tensor:
        if self.method == "sum":
            return torch.ones(len(gram), dtype=torch.float64)
        if self.method == "pcgrad":
            return pcgrad(gram, self._generator())
        if self.method == "cagrad":
            return len(gram) * cagrad(gram, self.c)
        found = METHODS[self.method](gram)
        return found if self.method == "nash" else len(gram) * found

    def state_dict(self) -> dict[str, Any]:
        """Of gradvac, the cosines on average; None before the first step, and of the other methods."""
        return {"cosines": self._cosines.clone() if self._cosines is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with them."""
        self._cosines = state_dict["cosines"].clone() if state_dict["cosines"] is not None else None
