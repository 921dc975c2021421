"""Experience replay: rows of earlier steps are trained on again, with their labels, with what the model said of them, or both."""

from contextlib import nullcontext
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from annotated_types import Ge
from torch import Tensor

from lightning_ft.data.batch_rows import Row, batch_of
from lightning_ft.data.rehearsal import AT_ONCE, Rehearsal
from lightning_ft.data.replay_memory import Balance, on_device, totals_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.outputs import outputs
from lightning_ft.engine.tasks import Task
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import ROWS_ALONE, Cannot, Traits
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.soft_targets import logit_distance_sum, top_kl
from lightning_ft.models.admission import evaluating
from lightning_ft.nn.head_values import head_values


class Replay(Rehearsal):
    """Keeps some rows of what was trained and trains on them again in every step, so that earlier tasks are not forgotten.

    With B the rows of a step and M, M' rows drawn from memory, L the module's own loss as a mean:

        er      L(B) + weight L(M)
        der     L(B) + alpha mean_{x in M} ||z - h(x)||^2
        der++   L(B) + alpha mean_{x in M} ||z - h(x)||^2 + beta L(M')

    ``h(x)`` are the logits now, ``z`` those of the model when the row was kept. Of a language model the top_k most likely tokens
    and the rest as one are kept for each scored token, and KL(z || h(x)) over these takes the place of the squared distance, as a
    mean over tokens. Any module works in er: its own step runs a second time, and nothing of it is logged but ``train/replay``.

    Args:
        size: rows in memory, over all ranks. More is better until it holds all; 500 rows of 200 tokens are 2 MB.
        mode: what is asked of replayed rows, see above.
        weight: factor of the replayed loss in er; 1 is the paper's.
        alpha: factor of the distance in der and der++. The paper's tuned values are 0.1 to 1 for a mean over classes, so divide
            them by the number of classes.
        beta: factor of the replayed loss in der++; the paper's tuned values are 0.5 to 1.
        rows: replayed a step, over all its micro-batches and ranks; None: as many as the step trains.
        balance: ``none``: every row seen has the same chance to be in memory. ``class`` or ``task``: each class or task has an
            equal share of the memory, and within it every row the same chance.
        offer: when a row comes into memory. ``step``: after the step that trains it first, as in the papers; no borders between
            tasks are needed, and rows of the present task are replayed, too. ``task``: when its task ends, so that all that is
            replayed is of earlier tasks. On five permutations of a synthetic set with 500 rows the accuracy was .616 by step and
            .655 by task.
        top_k: of a language model, tokens whose probability is kept in der and der++.
        name: tells two of them apart, and names what is logged.

    Rows are offered to the memory once, in the first pass over them, however many epochs a task has (with ``TaskStream.steps`` in
    the windows that the first pass takes). Without a TaskStream a fit is a task.
    A memory that was filled in er may go on in der: its rows are asked what the model says when the new fit begins.
    State: rows and counters, in plain tensors, in the checkpoint: all choices are derived from the seed and the counters, so a
    resumed run goes on exactly, and all ranks hold one memory.

    Cost: one more forward and backward pass over ``rows`` rows a step (two in der++), and their storage (up to twice the size where
    rows wait for the end of their task).

    Raises:
        Refusal: at setup under FSDP2, for what cannot have loss terms, and where rows wait for ends of tasks that the stream does
            not tell; in the first step for rows that cannot be kept alone, and in der for a user's module without
            ``logits(batch)``.

    Differs from: Mammoth, which takes the mean over classes in der (so its alpha is ours times the number of classes), the logits
        of the training step itself (we: after it, or at the task's end, in eval mode), rows as augmented (we: as they came), and
        offers a row again in each epoch.

    Example:
        >>> Replay(200, balance="task")
        Replay(size=200, balance='task')

    References:
        Chaudhry et al., 2019 (er, reservoir); Buzzega et al., 2020, equations 5 and 6 (der, der++). Proven against both written
        out, and the reservoir by a chi-squared test, in tests/callbacks and tests/data.
    """

    traits: ClassVar[Traits] = Traits(
        slot="replay",
        edits=frozenset({"loss"}),
        continual=True,
        cannot=(
            Cannot("fsdp2", "its own step would run twice within one of FSDP2's forward passes", "use ddp"),
            Cannot("fp16", "replayed losses were not tried with gradient scaling", "use bf16-mixed or 32-true"),
            *ROWS_ALONE,
        ),
    )

    def __init__(
        self,
        size: Annotated[int, Ge(1)] = 500,
        *,
        mode: Literal["er", "der", "der++"] = "er",
        weight: Annotated[float, Ge(0)] = 1.0,
        alpha: Annotated[float, Ge(0)] = 0.1,
        beta: Annotated[float, Ge(0)] = 0.5,
        rows: Annotated[int, Ge(1)] | None = None,
        balance: Balance = "none",
        offer: Literal["step", "task"] = "step",
        top_k: Annotated[int, Ge(1)] = 16,
        name: str = "replay",
    ) -> None:
        self.size = size
        self.mode = mode
        self.weight = weight
        self.alpha = alpha
        self.beta = beta
        self.rows = rows
        self.balance = balance
        self.offer = offer
        self.top_k = top_k
        self.name = name
        super().__init__()
        self.check()

    @property
    def _labels(self) -> float:
        """Factor of the replayed loss."""
        return {"er": self.weight, "der": 0.0, "der++": self.beta}[self.mode]

    @property
    def _distance(self) -> float:
        """Factor of the distance to what was said."""
        return 0.0 if self.mode == "er" else self.alpha

    def register(self, attachment: Attachment) -> None:
        """Adds the replayed terms to the loss."""
        self._attachment = attachment
        told = attachment._trainer is None or getattr(_data(attachment.trainer), "tells_tasks", True)
        if self.offer == "task" and not told:
            raise Refusal(
                "Replay.offer task waits for the end of a task, and a stream with scenario free does not tell where one ends; "
                "set offer step (--replay.offer step), or another scenario."
            )
        if self._labels or self._distance:
            attachment.loss_term(self.name, self._terms)

    # -- the run ----------------------------------------------------------------------------------------------------------

    @property
    def _waits(self) -> bool:
        return self.offer == "task"

    def on_task_end(self, trainer: pl.Trainer, module: pl.LightningModule, task: Task) -> None:
        """Rows of the task come into memory, where they waited for that."""
        self._end_task(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without a stream the fit was the task."""
        if not hasattr(_data(trainer), "tells_tasks"):
            self._end_task(trainer, pl_module)

    # -- terms --------------------------------------------------------------------------------------------------------------

    def _terms(self, module: pl.LightningModule, batch: Any, output: Any) -> list[Term]:
        memory, attachment = self._memory, self._attachment
        assert memory is not None and attachment is not None
        trainer = attachment.trainer
        found: list[Term] = []
        if not len(memory.buffer):
            return found
        if self._labels:
            drawn = memory.draw(trainer, batch, self.rows)
            mine, share = memory.share(trainer, drawn)
            terms = attachment.rerun(self._again(trainer, batch, mine, drawn), self._index(trainer))
            for term in terms:
                name = self.name if len(terms) == 1 else f"{self.name}/{term.name}"
                found.append(self._counted(batch, term, name, self._labels, drawn, share))
        if self._distance:
            drawn = memory.draw(trainer, batch, self.rows, 1)
            mine, share = memory.share(trainer, drawn)
            term = self._distance_term(module, self._again(trainer, batch, mine, drawn), mine)
            name = self.name if self.mode == "der" else f"{self.name}/logits"
            found.append(self._counted(batch, term, name, self._distance, drawn, share))
        return found

    def _index(self, trainer: pl.Trainer) -> int:
        return int(trainer.fit_loop.epoch_loop.batch_idx)

    def _counted(self, batch: Any, term: Term, name: str, factor: float, drawn: list[Row], share: float) -> Term:
        """A term of replayed rows, which are counted apart from those that are trained."""
        if term.unit == "mean":
            return Term(name, term.sum * share, 1.0, "mean", factor * term.weight)
        total = term.sum if share else term.sum * 0.0
        count = term.count if share else 0.0
        unit = f"{self.name} {term.unit}"
        if isinstance(batch, Batch) and batch.window is not None:
            batch.window = {**batch.window, unit: totals_of(drawn)[term.unit]}
        else:
            raise Refusal(
                "Replay counts replayed rows apart from those that are trained, and this loader does not count its windows; use "
                "one of this library's data modules, or a training_step that returns a mean."
            )
        return Term(name, total, count, unit, factor * term.weight)

    def _distance_term(self, module: pl.LightningModule, made: Any, mine: list[Row]) -> Term:
        found = outputs(module, made)
        if found.logits is not None:
            z = torch.cat([row["logits"] for row in mine]).to(found.logits.device)
            value = logit_distance_sum(found.logits, z)
            if not isinstance(made, Batch):
                return Term("logits", value / len(mine), 1.0, "mean")
            return Term("logits", value, float(len(z)), found.unit)
        assert found.hidden is not None
        device, head = found.hidden.device, found.head
        log_p, index, rest = (
            torch.cat([row[key] for row in mine]).to(device) for key in ("top_logprob", "top_index", "rest_logprob")
        )

        def values(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            return top_kl(log_p[rows], rest[rows], logits, index[rows])

        value = head_values(
            found.hidden, head.logits, values, recompute=head.must_recompute(), around=lambda _: nullcontext()
        )
        return Term("logits", value.sum(), float(len(log_p)), "token")

    @torch.no_grad()
    def _complete(self, trainer: pl.Trainer, module: pl.LightningModule, rows: list[Row]) -> None:
        """What the model says now, where it will be compared with; of rows that have been asked it stays."""
        if not self._distance:
            return
        self._refuse_other_top_k(rows)
        rows = [row for row in rows if "logits" not in row and "top_logprob" not in row]
        with evaluating(module), trainer.precision_plugin.forward_context():
            for begin in range(0, len(rows), AT_ONCE):
                piece = rows[begin : begin + AT_ONCE]
                made = on_device(trainer, batch_of(piece))
                found = outputs(module, made)
                if found.logits is not None:
                    of = found.owner if found.owner is not None else torch.arange(len(piece))
                    for number, row in enumerate(piece):
                        row["logits"] = found.logits[of.to(found.logits.device) == number].float().cpu()
                    continue
                assert found.hidden is not None and found.owner is not None
                scored = found.head.score(found.hidden, made.labels, outputs=("topk",), top_k=self.top_k)
                size = 2 if "pair" in made.counts else 1
                for number, row in enumerate(piece):
                    at = found.owner // size == number
                    row["top_logprob"] = scored["topk_logprob"][at].float().cpu()
                    row["top_index"] = scored["topk_index"][at].cpu()
                    row["rest_logprob"] = scored["rest_logprob"][at].float().cpu()

    def _refuse_other_top_k(self, rows: list[Row]) -> None:
        """Refuses rows of which other numbers of tokens are kept: they cannot stand beside one another."""
        for row in rows:
            kept = row["top_index"].shape[1] if "top_index" in row else self.top_k
            if kept != self.top_k:
                raise Refusal(
                    f"Replay.top_k is {self.top_k}, and of the rows in its memory, which an earlier run has kept, the {kept} most "
                    f"likely tokens are known; set top_k {kept} (--replay.top_k {kept})."
                )


def _data(trainer: pl.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


__all__ = ["Replay"]
