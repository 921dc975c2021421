"""Learning without forgetting: what the model said at the end of the last task is taught to it while it learns the next."""

from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.outputs import outputs
from lightning_ft.engine.tasks import Task, require_tasks
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import Cannot, Traits
from lightning_ft.functional.soft_targets import softened_kl_sum
from lightning_ft.models.admission import evaluating


class LwF(Technique):
    """Keeps what a model said before: on the rows of a new task it is taught its own answers from the end of the last one.

    Adds ``weight T^2 mean KL(softmax(z / T) || softmax(h / T))``, with ``h`` the logits now and ``z`` those of the teacher, the
    model with what is trained as it was when the last task ended, in eval mode and without gradients. Of classes only those are
    compared that earlier tasks had; of a language model all tokens, at each scored position (of pairs, of both answers). The mean
    is over rows, or over tokens where tokens are classified or written. No row of an earlier task is needed. Without a TaskStream
    a fit is a task.

    Args:
        weight: of the term; 1 is the paper's. Raise it where earlier tasks are forgotten, up to 10.
        temperature: T; the paper's 2 looks also at classes that were not chosen. ``T^2`` keeps the size of the gradient, so that
            T can be changed alone.
        name: tells two of them apart, and names what is logged.

    Logs:
        ``train/lwf``, the term without its weight.

    Cost: a copy of what is trained (with LoRA its factors: the base is not copied), in memory and in checkpoints; each step a
    forward pass of the teacher, and another forward and backward pass of the model, over the step's rows.

    Raises:
        Refusal: at setup under FSDP2, or where a stream does not tell its tasks; in the second task for a user's module without a
            method ``logits(batch)``.

    Differs from: Avalanche and Mammoth, whose teacher stays in train mode or whose ``T^2`` is missing; the paper, which trains a
        new task's head alone first.

    Example:
        >>> LwF(temperature=4)
        LwF(temperature=4)

    References:
        Li and Hoiem, 2016, equations 2 to 4; Hinton et al., 2015, section 2.1 (T^2). Proven against the formula in float64 in
        tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(
        slot="lwf",
        edits=frozenset({"loss"}),
        needs=frozenset({"logits", "stream"}),
        continual=True,
        cannot=(
            Cannot("fsdp2", "the model would run several times within one of FSDP2's forward passes", "use ddp"),
            Cannot("fp16", "its term was not tried with gradient scaling", "use bf16-mixed or 32-true"),
            Cannot(
                "episodes",
                "it compares what is said of rows, and of an episode nothing is said before the model has adapted to it",
                "use ewc or si",
            ),
            Cannot(
                "unfreezing",
                "the teacher is a copy of parts that were trained from the start",
                "choose what is trained once, by freeze",
            ),
        ),
    )

    def __init__(
        self,
        weight: Annotated[float, Ge(0)] = 1.0,
        *,
        temperature: Annotated[float, Gt(0)] = 2.0,
        name: str = "lwf",
    ) -> None:
        self.weight = weight
        self.temperature = temperature
        self.name = name
        self._attachment: Attachment | None = None
        self._old: list[int] | None = None
        self.check()

    @property
    def snapshot(self) -> str:
        """The name of the reference that is its teacher."""
        return f"task end of {self.name}"

    def register(self, attachment: Attachment) -> None:
        """Adds the term to the loss."""
        self._attachment = attachment
        attachment.references.copied.add(self.snapshot)  # what is nothing now will not be nothing later
        if attachment._trainer is not None and hasattr(getattr(attachment.trainer, "datamodule", None), "tells_tasks"):
            require_tasks(attachment.trainer, "LwF")
        if self.weight:
            attachment.loss_term(self.name, self._term)

    def on_task_end(self, trainer: pl.Trainer, module: pl.LightningModule, task: Task) -> None:
        """The teacher of the next task."""
        if self._attachment is not None:
            self._attachment.references.take(self.snapshot)
            self._old = list(task.seen) if task.seen is not None else None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without a stream the fit was the task."""
        if self._attachment is not None and not hasattr(getattr(trainer, "datamodule", None), "tells_tasks"):
            self._attachment.references.take(self.snapshot)
            self._old = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The teacher stays for a next fit."""
        super().teardown(trainer, pl_module, stage)
        self._attachment = None

    def _term(self, module: pl.LightningModule, batch: Any, output: Any) -> list[Term]:
        attachment = self._attachment
        assert attachment is not None
        if self.snapshot not in attachment.references.snapshots:
            return []
        with attachment.reference(self.snapshot), evaluating(module):
            teacher = outputs(module, batch)
        student = outputs(module, batch)
        if student.logits is not None:
            assert teacher.logits is not None
            columns = None if self._old is None else torch.tensor(self._old, device=student.logits.device)
            h, z = student.logits, teacher.logits
            real = getattr(batch, "rows", None)
            if real is not None and student.unit == "row":  # a rank without rows has a filler, which counts for nothing
                h, z = h[real >= 0], z[real >= 0]
            value = softened_kl_sum(h, z, self.temperature, columns)
            return [Term(self.name, value, float(len(h)), student.unit, self.weight)]
        assert student.hidden is not None and teacher.hidden is not None
        hidden, view = teacher.hidden, student.head

        def said(rows: slice) -> Tensor:
            with attachment.reference(self.snapshot):  # a head that is trained was another then
                logits: Tensor = view.logits(hidden[rows])
                return logits

        scored = view.score(
            student.hidden, batch.labels, outputs=("forward_kl",), other=said, temperature=self.temperature
        )
        value = self.temperature**2 * scored["forward_kl"].sum()
        return [Term(self.name, value, float(len(batch.labels)), "token", self.weight)]

    def state_dict(self) -> dict[str, Any]:
        """The classes of earlier tasks; the teacher is among the checkpoint's references."""
        return {} if self._old is None else {"old": list(self._old)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._old = list(state_dict["old"]) if "old" in state_dict else None


__all__ = ["LwF"]
