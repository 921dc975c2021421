"""How a module is asked for its examples' log-likelihoods, of labels that somebody else chooses.

A module answers in ``likelihood(batch, ask)``: it runs its model inside ``ask.examples(...)``, which says where each example
lies in what its layers see, and hands the outputs to ``ask``, which chooses labels and sums by example. In a module of your own::

    def likelihood(self, batch, ask):
        x, y = batch
        with ask.examples(len(x)):
            logits = self(x)
        return ask.of_logits(logits, y)

Without such a method it is done so, where a batch is ``(x, y)`` and the module's forward gives logits, or numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.episodes import MetaBatch
from lightning_ft.functional import token_scores
from lightning_ft.functional.chosen_labels import draw, normal
from lightning_ft.functional.embedding_noise import row_generator
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.fisher import Groups
from lightning_ft.models.causal import LanguageHead
from lightning_ft.nn.head_values import head_values

Labels = Literal["sample", "empirical", "predicted", "all"]


class Ask:
    """What is asked of a module: one number for each example of a batch, whose gradient is of interest.

    Attributes:
        keys: a number for each example of the present batch that tells it from all others.
        passes: how many times a batch has to be asked; known after the first time.
        now: which of these times it is.
    """

    def __init__(self, *seed: int) -> None:
        """Args: seed: numbers that what is drawn depends on, beside the example."""
        self.seed = seed
        self.keys: list[int] = []
        self.passes = 1
        self.now = 0
        self.layouts: list[Groups] = []

    # -- what a module calls ----------------------------------------------------------------------------------------

    @contextmanager
    def examples(self, *layouts: Groups | int) -> Iterator[None]:
        """Inside, the model's layers see examples where ``layouts`` say; a number n means one in each of n rows."""
        before = self.layouts
        self.layouts = [Groups.rows(one) if isinstance(one, int) else one for one in layouts]
        try:
            yield
        finally:
            self.layouts = before

    def of_logits(self, logits: Tensor, labels: Tensor, examples: Tensor | None = None) -> Tensor:
        """Of classes.

        Args:
            logits: (N, C).
            labels: (N,) int64, those in the data.
            examples: (N,) int64, the example of each row; None: each is one.

        Returns:
            (S,), fp32 or above.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        examples = torch.arange(len(wide), device=wide.device) if examples is None else examples
        return self._by_example(self._classes(wide, labels, self._prepared(examples, wide.shape[-1])), examples)

    def of_values(self, values: Tensor, targets: Tensor, variance: float = 1.0) -> Tensor:
        """Of numbers with normal errors, one example a row.

        Args:
            values: (S,) or (S, M).
            targets: of the same shape, those in the data.
            variance: of the errors: 1 where half the squared error is minimised, 1/2 where all of it is.

        Returns:
            (S,), fp32 or above.
        """
        wide = values.to(torch.promote_types(values.dtype, torch.float32)).reshape(len(values), -1)
        return self._numbers(wide, targets.reshape(wide.shape).to(wide), variance)

    def of_bits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of C classes that may each hold or not: (S, C) logits and targets to (S,)."""
        return self._bits(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def of_head(
        self,
        hidden: Tensor,
        labels: Tensor,
        examples: Tensor,
        model: LanguageHead,
    ) -> Tensor:
        """Of tokens, through a head whose logits never exist all at once.

        Args:
            hidden: (N, D) of the scored positions.
            labels: (N,) int64, those in the data.
            examples: (N,) int64, the example of each.
            model: whose head it is.

        Returns:
            (S,), fp32 or above.
        """
        uniform = self._prepared(examples, None)

        @contextmanager
        def around(rows: slice) -> Iterator[None]:
            index = examples[rows]
            with self.examples(Groups((len(index),), index, len(self.keys))):
                yield

        def values(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            return self._tokens(logits, labels[rows], None if uniform is None else uniform[rows])

        return self._by_example(
            head_values(hidden, model.logits, values, recompute=model.must_recompute(), around=around), examples
        )

    # -- what is asked; below for the likelihood ----------------------------------------------------------------------

    def _prepared(self, examples: Tensor, classes: int | None) -> Tensor | None:
        """Uniform numbers, one for each row, where labels are drawn."""
        raise NotImplementedError

    def _classes(self, logits: Tensor, labels: Tensor, uniform: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _numbers(self, values: Tensor, targets: Tensor, variance: float) -> Tensor:
        raise NotImplementedError

    def _bits(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _tokens(self, logits: Tensor, labels: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _by_example(self, values: Tensor, examples: Tensor) -> Tensor:
        return values.new_zeros(len(self.keys)).index_add_(0, examples, values)

    def _uniform(self, examples: Tensor) -> Tensor:
        """(N,) in float64: drawn row by row from (seed, key of the example), so that no other row of the batch matters."""
        counts = torch.bincount(examples.cpu(), minlength=len(self.keys)).tolist()
        drawn = [
            torch.rand(n, generator=row_generator("cpu", *self.seed, key), dtype=torch.float64, device="cpu")
            for n, key in zip(counts, self.keys, strict=True)
        ]
        found = torch.empty(len(examples), dtype=torch.float64, device="cpu")
        found[examples.cpu().argsort(stable=True)] = torch.cat(drawn)
        return found.to(examples.device)


class LogLikelihood(Ask):
    """Log-likelihood of labels, in nats; with ``all``, times the root of their probability, once for each label."""

    def __init__(self, labels: Labels, *seed: int) -> None:
        """Args: labels: which ones; seed: numbers that drawn labels depend on, beside the example."""
        super().__init__(*seed)
        self.labels = labels

    def _prepared(self, examples: Tensor, classes: int | None) -> Tensor | None:
        if self.labels == "all":
            if classes is None or len(examples) != len(self.keys):
                raise Refusal(
                    "labels 'all' goes through every label of an example, and these have a label at each of many places; take "
                    "'sample', which has the same expectation."
                )
            self.passes = classes
        return self._uniform(examples) if self.labels == "sample" else None

    def _classes(self, logits: Tensor, labels: Tensor, uniform: Tensor | None) -> Tensor:
        logp = logits.log_softmax(-1)
        if self.labels == "sample":
            assert uniform is not None
            labels = draw(logits.detach(), uniform)
        elif self.labels == "predicted":
            labels = logits.argmax(-1)
        elif self.labels == "all":
            one = logp[:, self.now]
            return one * one.detach().mul(0.5).exp()
        return logp.gather(-1, labels[:, None])[:, 0]

    def _tokens(self, logits: Tensor, labels: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        p = token_scores.distribution(logits)
        if self.labels == "sample":
            assert uniform is not None
            labels = draw(p.logits, uniform)
        elif self.labels == "predicted":
            labels = p.logits.argmax(-1)
        value, slope = token_scores.log_prob(p, labels)
        assert slope is not None
        return value, slope

    def _numbers(self, values: Tensor, targets: Tensor, variance: float) -> Tensor:
        if self.labels == "predicted":
            raise Refusal(
                "labels 'predicted' has no meaning for numbers: what is predicted has no error; take 'sample'."
            )
        if self.labels == "all":
            self.passes = values.shape[1]
            return values[:, self.now] * variance**-0.5
        if self.labels == "sample":
            rows = torch.arange(len(values), device=values.device).repeat_interleave(values.shape[1])
            errors = normal(self._uniform(rows)).view_as(values).to(values) * variance**0.5
            targets = values.detach() + errors
        return -(values - targets).square().sum(-1) / (2 * variance)

    def _bits(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.labels == "all":
            self.passes = logits.shape[1]
            one = logits[:, self.now]
            p = one.detach().sigmoid()
            return one * (p * (1 - p)).sqrt()
        if self.labels == "sample":
            rows = torch.arange(len(logits), device=logits.device).repeat_interleave(logits.shape[1])
            targets = (self._uniform(rows).view_as(logits) < logits.detach().sigmoid()).to(logits)
        elif self.labels == "predicted":
            targets = (logits > 0).to(logits)
        return -F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none").sum(-1)


class SquaredNorm(Ask):
    """The squared length of an example's outputs, before any softmax; no label has a say."""

    def _prepared(self, examples: Tensor, classes: int | None) -> Tensor | None:
        return None

    def _classes(self, logits: Tensor, labels: Tensor, uniform: Tensor | None) -> Tensor:
        return logits.square().sum(-1)

    def _tokens(self, logits: Tensor, labels: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.square().sum(-1), 2 * wide

    def _numbers(self, values: Tensor, targets: Tensor, variance: float) -> Tensor:
        return values.square().sum(-1)

    def _bits(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.square().sum(-1)


def layouts(batch: Batch, per: int = 1) -> list[Groups]:
    """Where the examples of a batch lie in what a model's layers see.

    Args:
        batch: packed or padded rows.
        per: how many segments that follow one another are one example: 2 for pairs.
    """
    device, segments = batch.ids.device, len(batch.rows)
    each = torch.arange(segments, device=device) // per
    rows = Groups((segments,), each, segments // per)
    if batch.bounds is None:
        return [rows]
    lengths = torch.tensor(batch.bounds, device=device).diff()
    return [Groups((1, batch.bounds[-1]), each.repeat_interleave(lengths), segments // per), rows]


def likelihood(module: pl.LightningModule, batch: Any, ask: Ask) -> Tensor:
    """(S,) what ``ask`` wants to know of a batch's examples, by the module's own ``likelihood`` or the convention.

    Raises:
        Refusal: a module without either.
    """
    own = getattr(module, "likelihood", None)
    if callable(own):
        answer: Tensor = own(batch, ask)
        return answer
    if isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(one, Tensor) for one in batch):
        x, y = batch
        with ask.examples(len(x)):
            outputs = module(x)
        if isinstance(outputs, Tensor) and len(outputs) == len(y):
            if outputs.dim() == 2 and y.dim() == 1 and not y.is_floating_point():
                return ask.of_logits(outputs, y)
            if y.is_floating_point() and outputs.numel() == y.numel():
                return ask.of_values(outputs, y)
    raise Refusal(
        f"{type(module).__name__} does not say how likely its labels are: give it a method likelihood(batch, ask), as "
        "lightning_ft.engine.likelihood shows, or batches (x, y) and a forward that gives logits (B, C) or numbers like y."
    )


def keys_of(batch: Any, first: int, step: int) -> list[int]:
    """A number for each example of a batch that tells it from all others of the data.

    Args:
        batch: one of ours knows its rows; of any other the rows are counted.
        first: number of the first row.
        step: from one row to the next, the number of ranks.
    """
    if isinstance(batch, Batch):
        return batch.rows.tolist()
    if isinstance(batch, MetaBatch):
        return [first + step * i for i in range(int(batch.counts["task"]))]
    rows = next((len(one) for one in _tensors(batch) if one.dim()), 0)
    return [first + step * i for i in range(rows)]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for one in batch.values():
            yield from _tensors(one)
    elif isinstance(batch, (list, tuple)):
        for one in batch:
            yield from _tensors(one)
