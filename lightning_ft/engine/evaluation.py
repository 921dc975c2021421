"""What is measured on held-out rows, by task: torchmetrics that add up over batches and ranks of any size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.regression import MeanAbsoluteError, PearsonCorrCoef, R2Score, SpearmanCorrCoef

from lightning_ft.functional.entities import entities, is_tagging


class Evaluation(nn.Module):
    """The mean loss of a held-out set and what else its task is measured by."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric()

    def add_loss(self, losses: Tensor) -> None:
        """Adds the losses of rows or tokens, (N,), each with weight 1."""
        if len(losses):
            self.loss.update(losses.mean(), weight=len(losses))

    def compute(self) -> dict[str, Tensor]:
        """Name -> value over all ranks, then nothing is left of it."""
        values = {"loss": self.loss.compute(), **self._others()}
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()
        return values

    def _others(self) -> dict[str, Tensor]:
        return {}


class LanguageEvaluation(Evaluation):
    """``loss``, ``perplexity`` = exp(loss) and ``accuracy``, the share of scored tokens that are the most likely one."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MeanMetric()

    def update(self, scores: dict[str, Tensor]) -> None:
        """Adds scored tokens: ``logprob`` and ``correct``, (N,) each."""
        self.add_loss(-scores["logprob"])
        if count := len(scores["correct"]):
            self.accuracy.update(scores["correct"].float().mean(), weight=count)

    def _others(self) -> dict[str, Tensor]:
        loss = self.loss.compute()
        return {"perplexity": loss.exp(), "accuracy": self.accuracy.compute()}


class ClassEvaluation(Evaluation):
    """``loss``, ``accuracy`` and ``f1``, the mean over classes that occur (macro); for BIO tags ``entity_f1`` too."""

    def __init__(self, names: Sequence[str]) -> None:
        """Args: names: of the classes, in the order of the logits."""
        super().__init__()
        self.accuracy = MulticlassAccuracy(len(names), average="micro")
        self.f1 = MulticlassF1Score(len(names), average="macro")
        self.entity_f1 = EntityF1(names) if is_tagging(names) else None

    def update(self, losses: Tensor, logits: Tensor, targets: Tensor, rows: Tensor | None = None) -> None:
        """Adds rows or tokens.

        Args:
            losses: (N,).
            logits: (N, C).
            targets: (N,) classes.
            rows: (N,) of tokens: which row each belongs to, in order.
        """
        if not len(targets):
            return
        self.add_loss(losses)
        chosen = logits.argmax(-1)
        self.accuracy.update(chosen, targets)
        self.f1.update(chosen, targets)
        if self.entity_f1 is not None and rows is not None:
            self.entity_f1.update(chosen, targets, rows)

    def _others(self) -> dict[str, Tensor]:
        values = {"accuracy": self.accuracy.compute(), "f1": self.f1.compute()}
        return values if self.entity_f1 is None else {**values, "entity_f1": self.entity_f1.compute()}


class MultilabelEvaluation(Evaluation):
    """``loss``, ``f1`` (macro), ``f1_micro`` and ``accuracy``, the share of rows whose whole set of classes is right."""

    def __init__(self, classes: int) -> None:
        """Args: classes: their number."""
        super().__init__()
        self.accuracy = MultilabelExactMatch(classes)
        self.f1 = MultilabelF1Score(classes, average="macro")
        self.f1_micro = MultilabelF1Score(classes, average="micro")

    def update(self, losses: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Adds rows: losses (S,), logits (S, C), targets (S, C); a class is chosen where its probability exceeds 1/2."""
        if not len(targets):
            return
        self.add_loss(losses)
        for metric in (self.accuracy, self.f1, self.f1_micro):
            metric.update((logits > 0).long(), targets.long())

    def _others(self) -> dict[str, Tensor]:
        return {
            "accuracy": self.accuracy.compute(),
            "f1": self.f1.compute(),
            "f1_micro": self.f1_micro.compute(),
        }


class ValueEvaluation(Evaluation):
    """``loss`` (mean squared error), ``mae``, ``r2``, ``pearson`` and ``spearman``; the last three need two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mae = MeanAbsoluteError()
        self.r2 = R2Score()
        self.pearson = PearsonCorrCoef()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `SpearmanCorrcoef` will save all", UserWarning)
            self.spearman = SpearmanCorrCoef()  # ranks need all values at once: 8 bytes a row
        self.rows = SumMetric()

    def update(self, losses: Tensor, predicted: Tensor, targets: Tensor) -> None:
        """Adds rows: (S,) each."""
        if not len(targets):
            return
        self.add_loss(losses)
        self.mae.update(predicted, targets)
        self.rows.update(len(targets))
        for metric in (self.r2, self.pearson, self.spearman):
            metric.update(predicted, targets)

    def _others(self) -> dict[str, Tensor]:
        values = {"mae": self.mae.compute()}
        if self.rows.compute() >= 2:
            values |= {"r2": self.r2.compute(), "pearson": self.pearson.compute(), "spearman": self.spearman.compute()}
        return values


class PairEvaluation(Evaluation):
    """``loss``, ``accuracy`` (share of pairs whose better answer has the larger reward) and ``margin``, by how much, on average."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MeanMetric()
        self.margin = MeanMetric()

    def update(self, losses: Tensor, rewards: Tensor) -> None:
        """Adds pairs: losses (P,), and (P, 2) rewards of the better answer and of the worse one."""
        if not (count := len(losses)):
            return
        self.add_loss(losses)
        ahead = (rewards[:, 0] - rewards[:, 1]).float()
        self.accuracy.update((ahead > 0).float().mean(), weight=count)
        self.margin.update(ahead.mean(), weight=count)

    def _others(self) -> dict[str, Tensor]:
        return {"accuracy": self.accuracy.compute(), "margin": self.margin.compute()}


class EntityF1(Metric):
    """F1 of whole entities: type, start and end must all be right (micro over types), as in CoNLL-2003."""

    full_state_update = False
    found: Tensor
    there: Tensor
    both: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        """Args: names: of the classes, ``O``, ``B-...`` and ``I-...``."""
        super().__init__()
        self.names = list(names)
        for state in ("found", "there", "both"):
            self.add_state(state, torch.tensor(0.0, device="cpu"), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, targets: Tensor, rows: Tensor) -> None:
        """Adds tokens in the order of their rows: predicted class, class, row; (N,) each."""
        edges = [0, *((rows[1:] != rows[:-1]).nonzero()[:, 0] + 1).tolist(), len(rows)]
        for begin, end in zip(edges, edges[1:], strict=False):
            ours = entities([self.names[i] for i in chosen[begin:end].tolist()])
            truth = entities([self.names[i] for i in targets[begin:end].tolist()])
            self.found += len(ours)
            self.there += len(truth)
            self.both += len(ours & truth)

    def compute(self) -> Tensor:
        """2 both / (found + there); 0 where there are none of either."""
        return 2 * self.both / (self.found + self.there).clamp(min=1)


class NamedMeans(Metric):
    """Means of several numbers at once, each over what it was counted for; not a number where that is nothing."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        """Args: names: of the numbers."""
        super().__init__()
        self.names = list(names)
        for state in ("sums", "counts"):
            self.add_state(state, torch.zeros(len(self.names), device="cpu"), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, tuple[Tensor, Tensor | float]]) -> None:
        """Adds name -> (sum, how many it was summed over) of a batch, for every name."""
        both = [torch.as_tensor(n, device=self.sums.device).detach().float() for x in self.names for n in values[x]]
        added = torch.stack(both).reshape(-1, 2)
        self.sums += added[:, 0]
        self.counts += added[:, 1]

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean, over batches and ranks."""
        return dict(zip(self.names, self.sums / self.counts, strict=True))
