"""What a technique declares about itself: compatibility rules, command line, contract tests and docs read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Edits = Literal["model", "loss", "gradients", "data", "weights", "nothing"]


@dataclass(frozen=True)
class Cannot:
    """One thing that a technique cannot meet.

    Attributes:
        meets: what it is: a word of `lightning_ft.engine.compatibility.Situation` such as ``"deepspeed"``, ``"fsdp1"``,
            ``"fsdp2"``, ``"quantised"``, ``"manual_optimization"`` (see its ``WORDS``), or another slot.
        why: the reason, as a clause that follows "because".
        fix: what the user can do instead, as an imperative.
    """

    meets: str
    why: str
    fix: str


ROWS_ALONE = (
    Cannot(
        "several_tasks",
        "a batch says of its rows together whose they are, so that none can be kept alone",
        "use a technique that keeps no rows (ewc, lwf)",
    ),
    Cannot(
        "mismatched_answers",
        "a row is compared with others of its batch, and cannot be kept alone",
        "use loss apo_zero_unpaired, or a technique that keeps no rows (ewc, lwf)",
    ),
    Cannot(
        "rollouts",
        "what it keeps was judged as the answers of the model that wrote them, which is another one by then",
        "use ewc, mas or si",
    ),
    Cannot("episodes", "it keeps single rows, and those of an episode mean nothing alone", "use ewc or si"),
)
"""What no technique can meet that keeps single rows and trains on them again."""

TERMS_APART = (
    Cannot("fsdp2", "it needs each term's whole gradient, and FSDP2 reduces their sum", "use ddp"),
    Cannot("fp16", "its gradients never pass the scaler", "use bf16-mixed or 32-true"),
)
"""What nothing can meet that takes the gradient of each loss term by itself."""


@dataclass(frozen=True)
class Traits:
    """Facts about one technique, declared beside it.

    Attributes:
        slot: the command line's named slot, e.g. ``lora`` for ``--lora.r 8``.
        edits: what it changes: the model's parts, loss terms, gradients, what the model reads, the weights that are left.
        needs: what it must find: ``"reference"``, ``"generator"`` (a module with ``generate``), ``"embedding"``, ``"attention"``
            (of a Hugging Face model), ``"adapter"`` (one to export), ``"terms"`` or ``"tasks"`` (several of them),
            ``"imitation"`` (a module that learns the answers it is given, or a user's own), ``"logits"`` (a module of ours, or one
            with ``logits(batch)``), ``"stream"`` (on the command line, data that are a TaskStream).
        keeps: one sentence on what stays in the model after training.
        suggested_lr: the rate that ``lr: null`` takes when this technique is the one that trains; None has no say.
        starts_as_identity: whether the first forward equals the model without it.
        conditional_gradients: whether its parameters may lack a gradient in a window (a head of an absent task).
        alone: whether a run can hold only one of its kind.
        continual: whether it keeps what earlier tasks taught; those sit out where a task stream asks for a baseline.
        cannot: what it cannot meet, why, and the way out.
    """

    slot: str
    edits: frozenset[Edits]
    needs: frozenset[str] = frozenset()
    keeps: str = "nothing"
    suggested_lr: float | None = None
    starts_as_identity: bool = True
    conditional_gradients: bool = False
    alone: bool = False
    continual: bool = False
    cannot: tuple[Cannot, ...] = field(default=())
