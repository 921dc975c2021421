"""What a student is asked to share with its teacher, as named terms: soft targets, hidden states, attention maps, value relations.

Of language models and of words the scored tokens count (unit ``token``), of everything else whole rows (unit ``row``): a row's
hidden states, maps and relations are meant over its own tokens first. Padding and fillers count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.terms import Term
from lightning_ft.functional import distillation as maths
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.token_scores import TopK
from lightning_ft.models.causal import LanguageHead
from lightning_ft.models.observed import Seen
from lightning_ft.nn.head_sums import Summed

RECIPES: dict[str, dict[str, float]] = {
    "soft_targets": {"task": 1.0, "soft_targets": 1.0, "temperature": 1.0},
    # Sanh et al., 2019, and their code: 5 soft targets + 2 task + 1 cosine of the last hidden state, temperature 2.
    "distilbert": {"task": 2.0, "soft_targets": 5.0, "cosine": 1.0, "temperature": 2.0},
    # Wang et al., 2020, equation 8: the last layer's maps and value relations, and nothing else.
    "minilm": {"task": 0.0, "soft_targets": 0.0, "attention": 1.0, "values": 1.0, "temperature": 1.0},
}
"""Recipe -> its weights and its temperature; what it does not name is 0."""

BY_TOKEN = ("causal_lm", "seq2seq_lm", "token_classification")
"""Tasks whose units are scored tokens."""


@dataclass(frozen=True)
class Settings:
    """The numbers of the objective.

    Attributes:
        divergence: of soft targets.
        beta: weight of the teacher in ``jensen_shannon``, of the first distribution in the mixture of skewed ones.
        temperature: what logits are divided by.
        scale_t2: whether soft targets are multiplied by the temperature's square, the total variation by the temperature.
        chunk_size: tokens whose logits exist at one time.
        size: how many tokens of two padded vocabularies are compared; None: all.
        layers: number of a student's layer -> of a teacher's.
        relation_heads: into how many heads values are split; None: as many as both have.
        names: what stands before each term's name.
    """

    divergence: maths.Divergence = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    scale_t2: bool = True
    chunk_size: int = 256
    size: int | None = None
    layers: Mapping[int, int] = field(default_factory=dict)
    relation_heads: int | None = None
    names: str = "distillation"

    def __post_init__(self) -> None:
        if self.divergence.startswith("skewed") and self.beta == 1.0:
            raise Refusal(
                f"The divergence {self.divergence} with beta 1 compares a distribution with itself; give less, 0.1 in its paper."
            )

    @property
    def blocks(self) -> dict[int, int]:
        """``layers`` without the embeddings, which have no maps and no values."""
        return {own: other for own, other in self.layers.items() if own > 0 and other > 0}

    @property
    def factor(self) -> float:
        """What soft targets are multiplied by."""
        return maths.temperature_factor(self.divergence, self.temperature) if self.scale_t2 else 1.0


def soft_tokens(
    other: Callable[[slice], Tensor | TopK], settings: Settings, *, weight: float = 1.0, kept: bool = False
) -> Summed:
    """Soft targets of a language model, at its scored tokens; a chunk of logits of each model exists at a time.

    Args:
        other: gives the teacher's logits of a slice of the scored tokens, or what was kept of them.
        settings: the numbers.
        weight: of the term, where the student's own loss is made in the same pass.
        kept: whether ``other`` gives what was kept; the divergence is the forward KL then.
    """
    output, factor = ("topk_kl", 1.0) if kept else maths.in_chunks(settings.divergence, settings.beta)
    return Summed(
        output,
        factor * settings.factor,
        weight,
        temperature=settings.temperature,
        beta=settings.beta,
        other=other,
        size=settings.size,
        chunk_size=settings.chunk_size,
    )


def of_tokens(view: LanguageHead, hidden: Tensor, batch: Batch, soft: Summed, settings: Settings) -> Term:
    """The term of soft targets; in a pass over the student's head of its own, unless the student's own step has made it.

    Args:
        view: the student.
        hidden: (1|B, T, D) its hidden states.
        batch: of which they are.
        soft: what `soft_tokens` gave.
        settings: the numbers.
    """
    if soft.sum is None:
        chosen = hidden.reshape(-1, hidden.shape[-1])[batch.scored]  # (N, D)
        view.sum_scores(chosen, batch.labels, [soft])
    assert soft.sum is not None
    return Term(f"{settings.names}/soft_targets", soft.sum, batch.counts["token"], unit="token")


def of_classes(student: Tensor, teacher: Tensor, batch: Batch, task: str, several: bool, settings: Settings) -> Term:
    """Soft targets of classes, or squared differences of numbers.

    Args:
        student: (S, C) logits of rows, (N, C) of labelled words.
        teacher: the same of the teacher.
        batch: of which they are.
        task: as of `SFT`.
        several: whether a row may have several classes.
        settings: the numbers.
    """
    losses = class_losses(
        student, teacher, "numbers" if task == "regression" else "several" if several else "one", settings
    )
    name = f"{settings.names}/soft_targets"
    if task == "token_classification":
        return Term(name, losses.sum(), batch.counts["token"], unit="token")
    return Term(name, _real(losses, batch).sum(), batch.counts["row"], unit="row")


def class_losses(student: Tensor, teacher: Tensor, kind: str, settings: Settings) -> Tensor:
    """(N,) of logits (N, C): of ``one`` class a row, of ``several``, or of ``numbers``."""
    if kind == "numbers":
        return maths.soft_values(student, teacher)
    of = maths.soft_decisions if kind == "several" else maths.soft_targets
    return of(
        student,
        teacher,
        settings.divergence,
        temperature=settings.temperature,
        beta=settings.beta,
        scale_t2=settings.scale_t2,
    )


def of_layers(
    weights: Mapping[str, float],
    student: Seen,
    teacher: Seen,
    batch: Batch,
    task: str,
    project: Mapping[str, nn.Module],
    settings: Settings,
) -> list[Term]:
    """Every term of layers that has a weight; names of terms are ``hidden``, ``cosine``, ``attention`` and ``values``."""
    made: dict[str, Callable[[], Term]] = {
        "hidden": lambda: of_states("hidden", student, teacher, batch, task, project, settings),
        "cosine": lambda: of_states("cosine", student, teacher, batch, task, project, settings),
        "attention": lambda: of_maps(student, teacher, batch, settings),
        "values": lambda: of_values(student, teacher, batch, settings),
    }
    return [replace(make(), weight=weights[kind]) for kind, make in made.items() if weights[kind] > 0]


def of_states(
    kind: str,
    student: Seen,
    teacher: Seen,
    batch: Batch,
    task: str,
    project: Mapping[str, nn.Module],
    settings: Settings,
) -> Term:
    """Hidden states, ``hidden`` by their squared differences or ``cosine``, the mean over the mapped layers.

    Args:
        kind: which of the two.
        student: what was seen of it.
        teacher: what was seen of it.
        batch: of which they are.
        task: as of `SFT`.
        project: a layer of the student, ``layer_3`` -> what turns its states into the teacher's width; empty without any.
        settings: the numbers.
    """
    distance = maths.hidden_cosine if kind == "cosine" else maths.hidden_mse
    name, share = f"{settings.names}/{kind}", 1.0 / len(settings.layers)
    total: Tensor | None = None
    count, unit = (batch.counts["token"], "token") if task in BY_TOKEN else (batch.counts["row"], "row")
    for own, other in settings.layers.items():
        s, t = student.states[own], teacher.states[other]
        s, t = s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1])
        if unit == "token":
            s, t = s[batch.scored], t[batch.scored]
        if project:
            s = project[f"layer_{own}"](s.float())
        losses = distance(s, t)  # (N,) or (B T,)
        summed = losses.sum() if unit == "token" else _real(row_means(losses, batch), batch).sum()
        total = summed if total is None else total + summed
    assert total is not None  # at least one layer is mapped
    return Term(name, total * share, count, unit=unit)


def of_maps(student: Seen, teacher: Seen, batch: Batch, settings: Settings) -> Term:
    """Attention maps of padded rows, the mean over the mapped layers, counted in rows."""

    def losses(own: int, other: int, mask: Tensor) -> Tensor:
        s, t = student.maps[own - 1], teacher.maps[other - 1]
        assert s is not None and t is not None  # checked when they were first seen
        return maths.map_kl(s, t, mask)

    return _of_rows("attention", losses, batch, settings)


def of_values(student: Seen, teacher: Seen, batch: Batch, settings: Settings) -> Term:
    """Value relations of padded rows, the mean over the mapped layers, counted in rows."""
    assert settings.relation_heads is not None  # resolved at setup

    def losses(own: int, other: int, mask: Tensor) -> Tensor:
        heads = settings.relation_heads or 1
        s, t = (maths.relation_log_probs(v, heads, mask) for v in (student.values[own], teacher.values[other]))
        return maths.relation_kl(s, t, mask)

    return _of_rows("values", losses, batch, settings)


def _of_rows(kind: str, losses: Callable[[int, int, Tensor], Tensor], batch: Batch, settings: Settings) -> Term:
    assert batch.bounds is None, "packed rows have no maps"
    mask = batch.mask if batch.mask is not None else torch.ones_like(batch.ids, dtype=torch.bool)
    found = torch.stack([losses(own, other, mask) for own, other in settings.blocks.items()]).mean(0)  # (B,)
    return Term(f"{settings.names}/{kind}", _real(found, batch).sum(), batch.counts["row"], unit="row")


def row_means(losses: Tensor, batch: Batch) -> Tensor:
    """(B T,) of every token -> (S,) the mean over the tokens of each row, padding left out."""
    if batch.bounds is not None:
        bounds = torch.tensor(batch.bounds, device=losses.device)
        lengths = bounds[1:] - bounds[:-1]
        owner = torch.repeat_interleave(lengths)
        return losses.new_zeros(len(lengths)).index_add(0, owner, losses) / lengths
    each = losses.view(batch.ids.shape)
    if batch.mask is None:
        return each.mean(1)
    return torch.where(batch.mask, each, 0.0).sum(1) / batch.mask.sum(1)


def _real(losses: Tensor, batch: Batch) -> Tensor:
    """(S,) with zero, and a gradient of zero, for fillers."""
    return torch.where(batch.rows >= 0, losses, losses.new_zeros(()))


__all__ = [
    "Settings",
    "class_losses",
    "of_classes",
    "of_layers",
    "of_maps",
    "of_states",
    "of_tokens",
    "soft_tokens",
    "of_values",
    "row_means",
]
