"""Reward models: a number for an answer, learned from pairs of which people preferred one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Ge, Gt
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_ft.data.collate_pairs import lay_out_all
from lightning_ft.data.preference_rows import Exchange
from lightning_ft.data.preference_tokens import render_exchanges
from lightning_ft.engine.answers import no_dropout, other_rows, prove_sharing
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask
from lightning_ft.engine.module import DtypePolicy, FineTuningModule, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.engine.reward_evaluation import RewardEvaluation, RewardMoments
from lightning_ft.formats.reward import MEAN, folded
from lightning_ft.functional.advantages import Moments
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import evaluating
from lightning_ft.models.quantize import Mode
from lightning_ft.nn.seeding import seeded_generator
from lightning_ft.objectives import reward


class RewardModel(FineTuningModule):
    """Learns to give better answers a larger number, from pairs of answers of which people preferred one.

    Minimises ``- mean log sigmoid(r_w - r_l - margin)`` over the pairs of each accumulation window on all ranks, in nats, where
    r_w and r_l are the rewards of the chosen and of the rejected answer: what a head of one output makes of the answer's last
    token (of an encoder: of what its own head reads). That token is known from the row's length, never from a padding id. The
    head is new unless the base brings one with one output, and always trained; what else is, callbacks decide. Data:
    `PreferenceData`, margins included where the rows have them.

    Args:
        base: the model to start from: ``starter:smollm2-135m``, a local folder, or a Hugging Face id; a decoder or an encoder.
        lr: peak learning rate; None takes what the technique suggests (LoRA 2e-4), or 2e-5 for full training.
        head_lr: peak rate of the head; None: ``lr``. A new head learns from nothing, so that ten times the rate of the model
            below it is common.
        center_rewards_coefficient: weight of the term ``mean (r_w + r_l)^2``, which holds rewards around zero, as the loss alone
            leaves their mean free; 0.01 is usual. None: no such term.
        normalise: give rewards the mean 0 and the standard deviation 1 over reference rows (chosen and rejected answers):
            ``after`` measures them at each validation and each epoch's end, and shifts and scales what predict, score and
            exports give; the loss goes on with the rewards as they are. ``both`` also scales the head before the first step (one
            that the base brings, too), so that training starts from that spread. None: rewards as learned.
        normalise_path: file of the reference rows, like that of the data; None: the validation rows, or the training rows where
            there are none.
        calibration_bins: of the expected calibration error in ``val/calibration``, of equal width between 1/2 and 1. 10 leave some
            pairs in each even of a few hundred; more bins make small sets look worse than they are.
        dropout: whether the base drops activations in training. Off, as in TRL: rewards of a pair are compared, and noise in
            each blurs that. A technique's own dropout stays as it is given.
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
        quantize: pack the weights of the base's linear layers, which stay frozen then: ``nf4`` (4 bits with a scale for 64
            weights), ``nf4-dq`` (the scales in 8 bits too), ``fp4``, ``int8`` (a scale a row). None: not at all.
        compile_blocks: compile each repeated block by this backend of ``torch.compile`` (``inductor``); None: not.

    Logs:
        ``train/`` and ``val/``: ``loss``, ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` (means, as trained: before
        ``normalise``), ``accuracy`` (share of pairs whose chosen answer has the larger reward); with centring ``bradley_terry``
        and ``centring``, the parts of the loss. ``val/calibration``: expected calibration error of sigmoid(r_w - r_l).

    Raises:
        Refusal: for arguments out of bounds here; when the run begins for a missing base, or nothing to normalise on.

    Example:
        >>> RewardModel("starter:smollm2-135m", center_rewards_coefficient=0.01).center_rewards_coefficient
        0.01

    References:
        Bradley and Terry, 1952; Stiennon et al., 2020, section 3.4 (the head's first values, normalisation); Touvron et al., 2023,
        section 3.2.2 (margins); Eisenstein et al., 2023, section 2 (centring). Proven against TRL's RewardTrainer in
        tests/oracles.
    """

    learns_from = "pairs"

    def __init__(
        self,
        base: str,
        *,
        lr: Annotated[float, Gt(0)] | None = None,
        head_lr: Annotated[float, Gt(0)] | None = None,
        center_rewards_coefficient: Annotated[float, Ge(0)] | None = None,
        normalise: Literal["after", "both"] | None = None,
        normalise_path: str | None = None,
        calibration_bins: Annotated[int, Ge(1)] = 10,
        dropout: bool = False,
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
        self.task = "regression"
        self.head_lr = head_lr
        self.center_rewards_coefficient = center_rewards_coefficient
        self.normalise = normalise
        self.normalise_path = normalise_path
        self.calibration_bins = calibration_bins
        self.dropout = dropout
        self.check()
        if normalise_path is not None and normalise is None:
            raise Refusal("RewardModel.normalise_path is given, but normalise is null; set normalise to after or both.")
        self.sharing_reason: str | None = None
        names = [*reward.MEASURED, "bradley_terry", *(["centring"] if center_rewards_coefficient is not None else [])]
        self.evaluation = RewardEvaluation(names, calibration_bins)
        self.normalisation: Tensor
        self.register_buffer(
            "normalisation", torch.tensor([0.0, 1.0], device="cpu")
        )  # mean and standard deviation, in checkpoints
        self._normalised_at = -1

    # -- loading ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Looks for the reference rows before any weight is loaded."""
        if stage != "fit" or self.normalise is None:
            return
        if self.normalise_path is not None and hasattr(self.datamodule, "rows_of"):
            self.datamodule.rows_of(self.normalise_path)
        elif self.normalise_path is not None or not hasattr(self.datamodule, "in_order"):
            raise Refusal(
                "RewardModel.normalise needs rows to measure rewards on, which it asks of the data module; use PreferenceData, or "
                "leave normalise out."
            )

    def configure_model(self) -> None:
        """Loads the base, gives a new head its first values, and proves once whether answers may share a prompt."""
        fresh = self.model is None
        super().configure_model()
        self.sharing_reason = prove_sharing(self)
        self.normalisation = self.normalisation.float()  # a Trainer in bf16-true has rounded it
        if not fresh:
            return
        name, head = self.view.output_layer()
        if f"{name}.weight" in self.new_names:
            with torch.no_grad():
                generator = seeded_generator(Attachment.of(self).seed, f"{name}.weight")
                drawn = torch.randn(head.weight.shape, generator=generator, device="cpu")
                head.weight.copy_(drawn / (head.in_features + 1) ** 0.5)
                if head.bias is not None:
                    head.bias.zero_()
        elif (
            mean := getattr(self.model.config, MEAN, None)
        ) is not None:  # a folder that an export of ours has written
            self.normalisation.copy_(torch.tensor([mean, 1.0], device="cpu"))
            delattr(self.model.config, MEAN)

    def register(self, attachment: Attachment) -> None:
        """The base's own edits, and its dropout switched off before techniques inject what may have its own."""
        super().register(attachment)
        if not self.dropout:
            attachment.edit("freeze", "no dropout", no_dropout)

    # -- steps ----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands the terms to the attachment, which divides them by their window's count of pairs."""
        chosen, rejected = self._pairs(batch)
        terms = reward.terms(batch, chosen, rejected, self.center_rewards_coefficient)
        attachment = Attachment.of(self)
        attachment.terms(terms)
        attachment.observe(reward.measured(chosen, rejected))
        return terms[0].sum

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to what is measured."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation, under ``test/``."""
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """``reward`` (S,) of each segment, normalised, and ``rows`` (S,): of pairs twice each, the chosen answer first."""
        return {"rows": batch.rows, "reward": self._normal(reward.rewards(self.view, batch))}

    def _normal(self, rewards: Tensor) -> Tensor:
        mean, std = self.normalisation
        return (rewards - mean) / std

    def likelihood(self, batch: Batch, ask: Ask) -> Tensor:
        """What continual learning asks of each pair, (P,), see `lightning_ft.engine.likelihood`."""
        return reward.likelihood(self.view, batch, ask)

    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if "pair" not in batch.counts:
            raise other_rows(self)
        return reward.pairs(batch, reward.rewards(self.view, batch))

    def _evaluate(self, batch: Batch) -> None:
        chosen, rejected = self._pairs(batch)
        terms = reward.terms(batch, chosen, rejected, self.center_rewards_coefficient)
        values = {**{term.name: (term.sum, term.count) for term in terms}, **reward.measured(chosen, rejected)}
        self.evaluation.update(values, chosen.detach(), rejected.detach())

    def on_validation_epoch_end(self) -> None:
        """Computes and forgets what was measured; within a fit the rewards' moments become the normalisation."""
        moments = self._log_evaluation("val")
        if (
            self.normalise is not None
            and self.trainer.state.fn == TrainerFn.FITTING
            and not self.trainer.sanity_checking
        ):
            self._set_normalisation(moments if self.normalise_path is None else self._measured())

    def on_test_epoch_end(self) -> None:
        """Computes and forgets what was measured."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> Moments:
        means, moments = self.evaluation.compute()
        loss = means["bradley_terry"]
        if self.center_rewards_coefficient is None:
            del means["bradley_terry"]
        else:
            loss = loss + self.center_rewards_coefficient * means["centring"]
        for name, value in {"loss": loss, **means}.items():
            # compute() has summed over ranks already
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "accuracy"), rank_zero_only=False)
        return moments

    # -- normalisation ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Says what is trained; where ``normalise`` is both, scales the head to rewards of standard deviation 1."""
        super().on_fit_start()
        self._normalised_at = -1
        if self.normalise != "both" or self.trainer.ckpt_path is not None:
            return
        moments = self._measured()
        std = moments.variance**0.5 or 1.0
        head = self.view.output_layer()[1]
        with torch.no_grad():
            head.weight.div_(std)
            if head.bias is not None:
                head.bias.sub_(moments.mean).div_(std)
        kept = 0.0 if head.bias is not None else moments.mean / std
        self.normalisation.copy_(torch.tensor([kept, 1.0], device="cpu"))

    def on_train_epoch_end(self) -> None:
        """Measures the reference rows, unless a validation has just done so; checkpoints of the epoch are written later."""
        if self.normalise is not None and self._normalised_at != self.trainer.global_step:
            self._set_normalisation(self._measured())

    def _set_normalisation(self, moments: Moments) -> None:
        if moments.count:
            std = moments.variance**0.5 or 1.0  # rewards that are all the same cannot be scaled
            self.normalisation.copy_(torch.tensor([moments.mean, std], device="cpu"))
            self._normalised_at = self.trainer.global_step

    def _measured(self) -> Moments:
        """Moments of the rewards of the reference rows, as they are trained, over all ranks."""
        data = self.datamodule
        if self.normalise_path is not None:
            loader = data.rows_of(self.normalise_path)
        else:
            splits = data.in_order()
            loader = splits.get("val") or splits["train"]
        before = self.normalisation.clone()
        self.normalisation.copy_(torch.tensor([0.0, 1.0], device="cpu"))
        moments = RewardMoments().to(self.device)
        with torch.no_grad(), evaluating(self.model), Attachment.of(self).evaluated():
            for batch in loader:
                # Through the strategy, since a sharded model is gathered by its registered steps alone.
                found = cast("dict[str, Tensor]", self.trainer.strategy.predict_step(batch.to(self.device), 0))
                moments.update(found["reward"][found["rows"] >= 0])
        self.normalisation.copy_(before)
        return moments.moments()

    # -- use --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, max_tokens: int = 16384
    ) -> Tensor:
        """Rewards of answers given as token ids, in eval mode, as a reinforcement learner needs them.

        Answers that follow one another behind the same prompt hold it once, where the model was proven to see it.

        Args:
            prompts: token ids of each answer's prompt, at least one; a prompt comes again for each of its answers.
            answers: token ids of each answer, its end included as in training, at least one.
            max_tokens: most tokens of one forward pass, padding included (or one answer, if that is longer).

        Returns:
            (S,) fp32 on the model's device, normalised as ``predict`` gives them, in the order given.

        Raises:
            Refusal: not as many prompts as answers, an empty one, or a module whose base is not loaded yet.
        """
        if len(prompts) != len(answers):
            raise Refusal(f"RewardModel.score got {len(prompts)} prompts for {len(answers)} answers; give one each.")
        if self.model is None or self.admission is None:
            raise Refusal("RewardModel.score needs the model: load a checkpoint (lightning_ft.load), or run a fit.")
        packed = self.admission.packing
        found: list[Tensor] = []
        with evaluating(self.model):
            for batch in lay_out_all(prompts, answers, max_tokens, packed=packed, shared=self.sharing_reason == ""):
                found.append(self._normal(reward.rewards(self.view, batch.to(self.device))))
        return torch.cat(found) if found else torch.zeros(0, device=self.device)

    def score_texts(
        self, prompts: Sequence[str | list[dict[str, Any]]], answers: Sequence[str], *, max_tokens: int = 16384
    ) -> list[float | None]:
        """Rewards of answers given as texts, rendered and tokenised as rows of `PreferenceData` are, with their ends.

        Args:
            prompts: of each answer: a string that the answer goes on with, or a list of messages that it answers.
            answers: texts; an empty one is no answer, and gets None.
            max_tokens: see `score`.

        Returns:
            A number for each answer, normalised as ``predict`` gives them.

        Raises:
            Refusal: messages that this model's tokenizer cannot render; as `score` does.
        """
        if len(prompts) != len(answers):
            raise Refusal(
                f"RewardModel.score_texts got {len(prompts)} prompts for {len(answers)} answers; give one each."
            )
        drafts = [
            Exchange(
                prompt,
                (text if isinstance(prompt, str) else [{"role": "assistant", "content": text}],),
                ("answer",),
                None,
            )
            for prompt, text in zip(prompts, answers, strict=True)
            if text.strip()
        ]
        ids: list[list[int]] = []
        written: list[list[int]] = []
        for found in render_exchanges(self.tokenizer, drafts):
            if isinstance(found, Refusal):
                raise found
            ids.append(list(found.prompt))
            written.append(list(found.answers[0].ids))
        rewards = iter(self.score(ids, written, max_tokens=max_tokens).tolist())
        return [next(rewards) if text.strip() else None for text in answers]

    def generate(self, *_: Any, **__: Any) -> list[str]:
        """Refused: a reward model writes no text."""
        raise Refusal(
            "A reward model gives numbers and writes no text; in Python, Trainer.predict rates rows and score token ids."
        )

    @contextmanager
    def exported(self) -> Iterator[str]:
        """Inside, the head's weight and bias give the normalised rewards by themselves."""
        mean, std = self.normalisation.tolist()
        with folded(self.model, self.view.output_layer()[1], mean, std) as said:
            yield said
