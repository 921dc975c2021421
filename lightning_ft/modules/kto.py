"""KTO: learning from single answers that somebody found good or bad."""

from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt
from torch import Tensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.evaluation import NamedMeans
from lightning_ft.engine.likelihood import Ask
from lightning_ft.engine.module import DtypePolicy, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.engine.policy import PolicyModule, Reference
from lightning_ft.engine.scoring import segment_logps
from lightning_ft.engine.terms import Term
from lightning_ft.functional.kto import KTOLoss, kl_estimate
from lightning_ft.models.quantize import Mode
from lightning_ft.objectives import kto


class KTO(PolicyModule):
    """Makes good answers likelier and bad ones less likely, from answers that were judged one by one.

    With r = log p(y) - log q(y), policy against reference, and z the mean of r over answers to other prompts on all ranks, at
    least 0, it minimises the mean over rows of ``w_good (1 - sigmoid(beta (r - z)))`` for good answers and ``w_bad (1 -
    sigmoid(beta (z - r)))`` for bad ones. Data: `UnpairedPreferenceData`. z is that of each micro-batch, as in TRL, so that the
    same rows in smaller micro-batches give a slightly different step: take at least 8 rows.

    Args:
        base: the model to start from: ``starter:smollm2-135m``, a local folder, or a Hugging Face id. It should have learned
            to answer: run `SFT` before.
        loss: ``kto``, or ``apo_zero_unpaired``, which is the same with z = 0 and runs no mismatched answers.
        beta: how strongly the policy is held to the reference: less lets it go farther. 0.1 is the paper's and TRL's.
        desirable_weight: weight of good answers. The paper wants the sums of both kinds, weight times number, within a factor
            of 4/3 of each other.
        undesirable_weight: weight of bad answers.
        reference_policy: what is compared with: the model as it is when the fit begins (``start``), adapters and all, or the
            bare ``base``. The mismatched answers are others in each epoch, so nothing can be computed beforehand.
        dropout: whether the model drops activations while it trains. Off, as in TRL: the reference does not, so rewards would
            be partly noise.
        lr: peak learning rate; None takes a twentieth of what the technique suggests (LoRA 1e-5), or 1e-6 for full training,
            TRL's default.
        weight_decay: AdamW's decay of trained matrices.
        warmup_steps: optimizer steps over which the rate rises from zero; None takes 3 % of all steps.
        schedule: how the rate falls after the warm-up: along a cosine to zero, linearly to zero, or not at all.
        optimizer: a factory of another torch optimizer; None is AdamW, fused, betas .9 and .999.
        base_dtype: of frozen weights: ``auto`` takes bfloat16 where the device multiplies it fast, else float32. What is trained
            is float32 in any case, unless ``pure_bfloat16`` asks for all of it in bfloat16.
        attention: ``auto`` takes this library's packed attention where the model allows it, else transformers' ``sdpa``.
        gradient_checkpointing: recompute activations in backward: one more forward pass for much less memory.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.
        quantize: pack the weights of the base's linear layers, which stay frozen then: ``nf4``, ``nf4-dq``, ``fp4`` or ``int8``,
            see `SFT`. None: not at all.

    Logs:
        ``train/loss`` and, under TRL's names and also after ``val/``: ``rewards/chosen`` and ``logps/chosen`` (means over good
        answers), ``rewards/rejected`` and ``logps/rejected`` (over bad ones), ``rewards/margins`` (their difference), ``kl`` (z).
        What a window has no answer for is not a number.

    Raises:
        Refusal: for arguments out of bounds here; for data without labels, or an encoder-decoder, when the run begins.

    Example:
        >>> KTO("starter:smollm2-135m", desirable_weight=1.5).loss
        'kto'

    References:
        Ethayarajh et al., 2024 (KTO: model alignment as prospect theoretic optimization), equations 7 and 8. Proven against TRL's
        KTOTrainer in tests/oracles.
    """

    learns_from = "labelled"

    def __init__(
        self,
        base: str,
        *,
        loss: KTOLoss = "kto",
        beta: Annotated[float, Gt(0)] = 0.1,
        desirable_weight: Annotated[float, Gt(0)] = 1.0,
        undesirable_weight: Annotated[float, Gt(0)] = 1.0,
        reference_policy: Reference = "start",
        dropout: bool = False,
        lr: Annotated[float, Gt(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        warmup_steps: Annotated[int, Ge(0)] | None = None,
        schedule: Schedule = "cosine",
        optimizer: OptimizerFactory | None = None,
        base_dtype: DtypePolicy = "auto",
        attention: Literal["auto", "lightning_ft", "sdpa", "eager"] = "auto",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        quantize: Mode | None = None,
    ) -> None:
        super().__init__(
            base,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            base_dtype=base_dtype,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
        )
        self.loss = loss
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.reference_policy = reference_policy
        self.dropout = dropout
        self.check()
        self._settings = kto.Settings(loss, beta, desirable_weight, undesirable_weight)
        names = ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"]
        self.evaluation = NamedMeans(["loss", *names, *(["kl"] if loss == "kto" else [])])

    @property
    def wants_mismatched(self) -> bool:
        """Whether the loss looks at answers to other prompts."""
        return self.loss == "kto"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands the term to the attachment, which divides it by its window's count."""
        term, measured = self._measure(batch)
        attachment = Attachment.of(self)
        attachment.terms([term])
        attachment.observe(measured, kto.with_margins)
        return term.sum

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to what is measured: the loss and what training logs."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Like `validation_step`, logged under ``test/``."""
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Log-probability of each answer, its row and whether it is a good one: ``rows``, ``logprob``, ``desirable``, (S,) each."""
        own = len(batch.targets) if batch.targets is not None else len(batch.rows)
        desirable = batch.targets > 0.5 if batch.targets is not None else None
        return {
            "rows": batch.rows[:own],
            "logprob": segment_logps(self.view, batch)[0][:own],
            "desirable": desirable,
        }

    def good_answers(self, batch: Batch) -> list[int]:
        """Numbers of the segments that are good answers: what `GenerationMetrics` compares with."""
        return [number for number, target in enumerate(kto.targets_of(batch).tolist()) if target > 0.5]

    def likelihood(self, batch: Batch, ask: Ask) -> Tensor:
        """What continual learning asks of each desirable answer, (S,), see `lightning_ft.engine.likelihood`."""
        return kto.likelihood(self.view, batch, ask)

    def _measure(self, batch: Batch) -> tuple[Term, kto.Measured]:
        with self.at_reference():
            reference = segment_logps(self.view, batch)[0]
        answers = kto.answers_of(batch, segment_logps(self.view, batch)[0], reference)
        kl = torch.zeros_like(reference[0])
        if self.wants_mismatched:
            total = kto.mismatched_sum(answers)
            if self.trainer.world_size > 1:
                dist.all_reduce(total)
            kl = kl_estimate(total[0], total[1])
        return kto.term(batch, answers, kl, self._settings), kto.measured(answers, kl, self._settings)

    def _evaluate(self, batch: Batch) -> None:
        term, measured = self._measure(batch)
        self.evaluation.update({"loss": (term.sum, term.count), **measured})

    def _finished(self, means: dict[str, Any]) -> dict[str, Any]:
        return kto.with_margins(means)
