"""Supervised fine-tuning: language models on answers, any base on classes, tags or numbers."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.evaluation import (
    ClassEvaluation,
    Evaluation,
    LanguageEvaluation,
    MultilabelEvaluation,
    ValueEvaluation,
)
from lightning_ft.engine.likelihood import Ask
from lightning_ft.engine.module import DtypePolicy, FineTuningModule, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.engine.scoring import row_logits
from lightning_ft.engine.terms import Term
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.classifier import CLASSIFIES
from lightning_ft.models.load_task import Task
from lightning_ft.models.quantize import Mode
from lightning_ft.nn.head_sums import Summed
from lightning_ft.objectives import causal_lm, classification, seq2seq_lm


class SFT(FineTuningModule):
    """Teaches a model to give the answers in your data: texts, classes of texts or words, or numbers.

    Minimises ``- sum_i log p(y_i | x_i) / n`` over the n scored tokens (or rows, see ``task``) of each accumulation window on
    all ranks, in nats: exact for any batch size, accumulation, packing and number of ranks. What is trained is decided by
    callbacks (all parameters when there is none); the base is loaded when a run begins, not by the constructor.

    Args:
        base: the model to start from: ``starter:smollm2-135m``, a local folder, or a Hugging Face id.
        task: what is predicted. ``causal_lm``: the next token, by a decoder; with `SFTData`. ``seq2seq_lm``: an answer, by an
            encoder-decoder; with `Seq2SeqData`. With `ClassificationData`, by an encoder or decoder whose head is new unless
            the base brings one for these labels, and is always trained: ``sequence_classification`` (one class a row, or
            several), ``token_classification`` (one a word), ``regression`` (a number a row, by its squared error).
        lr: peak learning rate; None takes what the technique suggests (LoRA 2e-4), or 2e-5 for full training, TRL's default.
        head_lr: peak rate of the head of a classification or regression; None: ``lr``. A new head learns from nothing, so that
            many recipes give it ten times the rate of the model below it.
        labels: names of the classes in order; None takes those of the data.
        multi_label: whether a row may have several classes or none; data whose labels are lists say so themselves.
        class_weights: weight of each class's loss in the order of the labels (of several: of its positives), or ``balanced``:
            n / (C n_c) from the training rows, so that rare classes count as much as common ones. The sum is divided by the
            number of rows, not of weights. None: all 1.
        weight_decay: AdamW's decay of trained matrices; 0, since a short fine-tuning gains nothing from shrinking weights.
        warmup_steps: optimizer steps over which the rate rises from zero; None takes 3 % of all steps, as most recipes do.
        schedule: how the rate falls after the warm-up: along a cosine to zero, linearly to zero, or not at all.
        optimizer: a factory of another torch optimizer, e.g. ``torch.optim.SGD``; None is AdamW, fused, betas .9 and .999.
        base_dtype: of frozen weights: ``auto`` takes bfloat16 where the device multiplies it fast, else float32. What is trained
            is float32 in any case, unless ``pure_bfloat16`` asks for all of it in bfloat16 (less memory, coarser steps).
        attention: ``auto`` takes this library's packed attention where the model allows it, else transformers' ``sdpa``.
        gradient_checkpointing: recompute activations in backward: one more forward pass for much less memory.
        compile_blocks: compile each repeated block by this backend of ``torch.compile`` (``inductor``), on one device, DDP and
            FSDP2; None: not. Pays on GPUs in runs of more than a few minutes; no name in a checkpoint changes.
        trust_remote_code: run Python code that the model's repository brings; only for authors you trust.
        revision: branch, tag or commit of a Hugging Face id; None is its main branch.
        quantize: pack the weights of the base's linear layers, which stay frozen then, by bitsandbytes, on CUDA and on CPUs:
            ``nf4`` (4 bits with a scale for 64 weights, the choice of QLoRA), ``nf4-dq`` (the scales in 8 bits too), ``fp4``,
            ``int8`` (a scale a row). Heads, embeddings, norms, biases and adapters are not packed. None: not at all.

    Logs:
        ``train/loss`` (mean over the window) and ``val/loss``; of language models ``val/perplexity`` and ``val/accuracy`` (share
        of scored tokens that are the most likely one); of classes ``val/accuracy`` and ``val/f1`` (macro; of several classes a
        row also ``val/f1_micro``, of BIO tags ``val/entity_f1``); of numbers ``val/mae``, ``val/r2``, ``val/pearson``,
        ``val/spearman``.

    Raises:
        Refusal: for arguments out of bounds here, for a missing base when the run begins.

    Example:
        >>> SFT("starter:smollm2-135m", lr=2e-4).lr
        0.0002

    References:
        Ouyang et al., 2022, section 3.1; Devlin et al., 2019, section 4.1; Raffel et al., 2020, section 2.4. Proven against TRL's
        SFTTrainer and transformers' own heads in tests/oracles and tests/models.
    """

    imitates = True
    """Every answer it is given is learned, so that it takes no data with worse ones."""

    def __init__(
        self,
        base: str,
        *,
        task: Task = "causal_lm",
        lr: Annotated[float, Gt(0)] | None = None,
        head_lr: Annotated[float, Gt(0)] | None = None,
        labels: list[str] | None = None,
        multi_label: bool = False,
        class_weights: list[float] | Literal["balanced"] | None = None,
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
        compile_blocks: str | None = None,
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
            compile_blocks=compile_blocks,
        )
        self.task = task
        self.head_lr = head_lr
        self.labels = labels
        self.multi_label = multi_label
        self.class_weights = class_weights
        self.check()
        if task not in CLASSIFIES:
            self._refuse_classes()
        if isinstance(class_weights, list) and min(class_weights, default=0.0) < 0:
            raise Refusal(f"SFT.class_weights must be at least 0, got {class_weights}.")
        self.evaluation: Evaluation | None = None
        self._weights: list[float] | None = None

    def _refuse_classes(self) -> None:
        for name in ("head_lr", "labels", "multi_label", "class_weights"):
            if getattr(self, name):
                raise Refusal(f"SFT.{name} belongs to classification, and the task is {self.task}; leave it out.")

    def resolved_arguments(self) -> dict[str, Any]:
        """With the classes that were taken from the data, which need not be there when a checkpoint is loaded."""
        arguments = arguments_of(self)
        if self.model is not None and self.task in ("sequence_classification", "token_classification"):
            arguments |= {"labels": self.view.labels, "multi_label": self.takes_several, "class_weights": self._weights}
        return arguments

    # -- loading ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the base, and prepares what its task is measured by."""
        super().configure_model()
        if self.evaluation is not None:
            return
        self._weights = self._resolved_weights()
        if self.task == "regression":
            self.evaluation = ValueEvaluation()
        elif self.task not in CLASSIFIES:
            self.evaluation = LanguageEvaluation()
        elif self.takes_several:
            self.evaluation = MultilabelEvaluation(len(self.view.labels))
        else:
            self.evaluation = ClassEvaluation(self.view.labels)

    @property
    def takes_several(self) -> bool:
        """Whether a row may have several classes, or none."""
        return bool(self.model.config.problem_type == "multi_label_classification")

    def _resolved_weights(self) -> list[float] | None:
        """The weight of each class as numbers.

        Raises:
            Refusal: not one for each class; balanced without data that count their classes, or with a class that is absent.
        """
        if self.class_weights is None:
            return None
        if self.task == "regression":
            raise Refusal("SFT.class_weights has no meaning for a regression, which has no classes; leave it out.")
        names = self.view.labels
        if self.class_weights != "balanced":
            if len(self.class_weights) != len(names):
                raise Refusal(
                    f"SFT.class_weights has {len(self.class_weights)} numbers for {len(names)} labels {names}."
                )
            return list(self.class_weights)
        counted = getattr(self.datamodule, "class_counts", None)
        if not callable(counted) or self.takes_several:
            raise Refusal(
                "SFT.class_weights balanced needs ClassificationData with one class a row, which counts them; give a list of "
                "numbers."
            )
        counts = counted()
        if not all(counts):
            absent = [name for name, count in zip(names, counts, strict=True) if not count]
            raise Refusal(
                f"SFT.class_weights balanced: no training row has the class {', '.join(absent)}; give numbers."
            )
        return [sum(counts) / (len(counts) * count) for count in counts]

    # -- steps ----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands the term to the attachment, which divides it by its window's count."""
        attachment = Attachment.of(self)
        trains_head = self.task not in CLASSIFIES and any(p.requires_grad for p in self.view.head_parameters())
        term = self._term(batch, attachment.step.together(trains_head=trains_head))
        attachment.terms([term])
        return term.sum

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the loss and the metrics of the task."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation, under ``test/``."""
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """What the model says of each row, ``rows`` (S,) naming them.

        Returns:
            ``logprob`` (S,), of each row's scored tokens, summed, from a language model; ``probabilities`` (S, C); ``value``
            (S,) from a regression; from words ``probabilities`` (N, C) and ``segment`` (N,), the row of the batch that each
            belongs to.
        """
        if self.task == "token_classification":
            probabilities = classification.token_logits(self.view, batch).softmax(-1)
            return {"rows": batch.rows, "segment": batch.segment_of_scored, "probabilities": probabilities}
        if self.task in CLASSIFIES:
            logits = row_logits(self.view, batch)
            if self.task == "regression":
                return {"rows": batch.rows, "value": logits[:, 0]}
            return {"rows": batch.rows, "probabilities": logits.sigmoid() if self.takes_several else logits.softmax(-1)}
        logprob = self._scores(batch, ("logprob",))["logprob"]
        total = logprob.new_zeros(len(batch.rows)).index_add_(0, batch.segment_of_scored, logprob)
        return {"rows": batch.rows, "logprob": total}

    def _term(self, batch: Batch, together: Sequence[Summed] = ()) -> Term:
        if self.task == "causal_lm":
            return causal_lm.causal_lm(self.view, batch, together)
        if self.task == "seq2seq_lm":
            return seq2seq_lm.seq2seq_lm(self.view, batch, together)
        of = classification.token_term if self.task == "token_classification" else classification.row_term
        return of(self.view, batch, self._weight_tensor())

    def likelihood(self, batch: Batch, ask: Ask) -> Tensor:
        """What continual learning asks of each row, (S,): see `lightning_ft.engine.likelihood`."""
        if self.task == "causal_lm":
            return causal_lm.likelihood(self.view, batch, ask)
        if self.task == "seq2seq_lm":
            return seq2seq_lm.likelihood(self.view, batch, ask)
        if self.task == "token_classification":
            return classification.token_likelihood(self.view, batch, ask)
        return classification.row_likelihood(self.view, batch, ask, self.task != "regression" and self.takes_several)

    def _weight_tensor(self) -> Tensor | None:
        return None if self._weights is None else torch.tensor(self._weights, device=self.device)

    def _scores(self, batch: Batch, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        of = seq2seq_lm.scores if self.task == "seq2seq_lm" else causal_lm.scores
        return of(self.view, batch, outputs)

    def _evaluate(self, batch: Batch) -> None:
        evaluation, weights = self.evaluation, self._weight_tensor()
        if isinstance(evaluation, LanguageEvaluation):
            if batch.counts["token"]:
                evaluation.update(self._scores(batch, ("logprob", "correct")))
        elif self.task == "token_classification":
            assert isinstance(evaluation, ClassEvaluation)
            logits = classification.token_logits(self.view, batch)
            losses = classification.row_losses(logits, batch.labels, weights)
            evaluation.update(losses, logits, batch.labels, batch.segment_of_scored)
        else:
            real = batch.rows >= 0
            logits = row_logits(self.view, batch)[real]
            targets = classification.targets_of(batch)[real]
            losses = classification.row_losses(logits, targets, weights)
            assert isinstance(evaluation, (ClassEvaluation, MultilabelEvaluation, ValueEvaluation))
            evaluation.update(losses, logits[:, 0] if self.task == "regression" else logits, targets)

    def on_validation_epoch_end(self) -> None:
        """Computes and forgets the metrics of a validation."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Computes and forgets the metrics of a test."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        assert self.evaluation is not None
        for name, value in self.evaluation.compute().items():
            # compute() has summed over ranks already
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "accuracy"), rank_zero_only=False)
