"""Supervised fine-tuning of a language model on conversations, completions or plain text."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.module import DtypePolicy, FineTuningModule, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.objectives.causal_lm import causal_lm, scores


class SFT(FineTuningModule):
    """Teaches a chat model to give the answers in your data, token by token.

    Minimises ``- sum_i log p(y_i | x_<i) / n`` over the n scored tokens of each accumulation window on all ranks, in nats:
    exact for any batch size, accumulation, packing and number of ranks. What is trained is decided by callbacks (all
    parameters when there is none); the base is loaded when a run begins, not by the constructor.

    Args:
        base: the model to start from: ``starter:smollm2-135m``, a local folder, or a Hugging Face id.
        task: what is predicted: ``causal_lm``, the next token.
        lr: peak learning rate; None takes what the technique suggests (LoRA 2e-4), or 2e-5 for full training, TRL's default.
        weight_decay: AdamW's decay of trained matrices; 0, since a short fine-tuning gains nothing from shrinking weights.
        warmup_steps: optimizer steps over which the rate rises from zero; None takes 3 % of all steps, as most recipes do.
        schedule: how the rate falls after the warm-up: along a cosine to zero, linearly to zero, or not at all.
        optimizer: a factory of another torch optimizer, e.g. ``torch.optim.SGD``; None is AdamW, fused, betas .9 and .999.
        base_dtype: of frozen weights: ``auto`` takes bfloat16 where the device multiplies it fast, else float32. What is trained
            is float32 in any case, unless ``pure_bfloat16`` asks for all of it in bfloat16 (less memory, coarser steps).
        attention: ``auto`` takes this library's packed attention where the model allows it, else transformers' ``sdpa``.
        gradient_checkpointing: recompute activations in backward: one more forward pass for much less memory.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.

    Logs:
        ``train/loss`` (mean over the window), ``val/loss``, ``val/perplexity``, ``val/accuracy`` (share of scored tokens that
        are the most likely one).

    Raises:
        Refusal: for arguments out of bounds here, for a missing base when the run begins.

    Example:
        >>> SFT("starter:smollm2-135m", lr=2e-4).lr
        0.0002

    References:
        Ouyang et al., 2022, section 3.1. Proven against TRL's SFTTrainer in tests/oracles.
    """

    def __init__(
        self,
        base: str,
        *,
        task: Literal["causal_lm"] = "causal_lm",
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
        )
        self.task = task
        self.check()
        self.evaluation_loss = MeanMetric()
        self.evaluation_accuracy = MeanMetric()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands the term to the attachment, which divides it by its window's count."""
        term = causal_lm(self.view, batch)
        Attachment.of(self).terms([term])
        return term.sum

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Token-weighted loss and accuracy."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation, under ``test/``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Log-probability of each row's scored tokens, summed: {"rows": (S,), "logprob": (S,)}."""
        logprob = scores(self.view, batch)["logprob"]
        total = logprob.new_zeros(len(batch.rows)).index_add_(0, batch.segment_of_scored, logprob)
        return {"rows": batch.rows, "logprob": total}

    def _evaluate(self, batch: Batch, stage: str) -> None:
        if not batch.counts["token"]:
            return
        scored = scores(self.view, batch, ("logprob", "correct"))
        count = len(batch.labels)
        self.evaluation_loss.update(-scored["logprob"].mean(), weight=count)
        self.evaluation_accuracy.update(scored["correct"].float().mean(), weight=count)

    def on_validation_epoch_end(self) -> None:
        """Computes and forgets the metrics of a validation."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Computes and forgets the metrics of a test."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        loss = self.evaluation_loss.compute()
        # compute() has summed over ranks already
        self.log(f"{stage}/loss", loss, prog_bar=True, rank_zero_only=False)
        self.log(f"{stage}/perplexity", loss.exp())
        self.log(f"{stage}/accuracy", self.evaluation_accuracy.compute(), prog_bar=True)
        self.evaluation_loss.reset()
        self.evaluation_accuracy.reset()
