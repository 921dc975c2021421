"""On-policy distillation: a teacher corrects, token by token, what the student itself has written."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_ft.data.given_answers import given_answers
from lightning_ft.data.rollouts.collate import Rollout, collate_rollouts
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.known_teacher import KnownTeacher
from lightning_ft.engine.module import DtypePolicy, FineTuningModule, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.engine.rewards import Reward
from lightning_ft.engine.rollouts.module import RolloutModule
from lightning_ft.engine.rollouts.round import Prompt, Round
from lightning_ft.engine.sampling import Answer
from lightning_ft.engine.teacher import SELF, Origin, Teacher, fingerprint_of, load_teacher, origin_of, vocabulary_of
from lightning_ft.engine.teacher import run as read
from lightning_ft.engine.terms import Term
from lightning_ft.functional.distillation import Divergence
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission_sharing import why_no_sharing
from lightning_ft.models.observed import Observer
from lightning_ft.models.quantize import Mode, check_mode
from lightning_ft.models.vocabulary import shared_vocabulary, sliced
from lightning_ft.objectives import distillation as objective

Writer = Literal["student", "teacher", "data"]
_STREAM = 13  # a random stream of its own, beside those of rollouts/ranks.py and the plans
_STATE = "on_policy_distillation"


class OnPolicyDistillation(RolloutModule):
    """Makes a language model predict what a teacher predicts, above all where the student's own answers lead it (GKD).

    Each epoch is a round: the student answers ``prompts`` (or, in the other rounds, the answers of the data or of the teacher are
    taken), and at each token of an answer the teacher's distribution q is what the student's p is drawn to: the loss is the mean of
    D(q, p) over the tokens of each optimizer step on all ranks, exactly. Answers are constants: no gradient passes through the
    drawing. Neither model's logits exist for more than ``chunk_size`` tokens. Data: `PromptData`.

    Args:
        base: the student: ``starter:smollm2-135m``, a local folder (see ``lightning-ft distill-init``), or a Hugging Face id.
        teacher: a folder, ``starter:NAME`` or hub id; a checkpoint of this library; or a LoRA adapter's folder. It must have the
            student's tokenizer, which is compared token by token.
        share: lambda, the probability that a round is written by the student. 0.5 is TRL's default; 1 learns from its own answers
            alone, which wants a student that writes sense already; 0 from the others alone.
        sequence_kd: whether the teacher writes the answers of the other rounds (sequence-level distillation); False takes those
            of the data.
        answer_column: where the data have their answers; needed where ``share`` is below 1 and ``sequence_kd`` is false.
        divergence: ``forward_kl`` covers all that the teacher holds possible, ``reverse_kl`` keeps to what it holds likely (as
            MiniLLM, without its gradient through the drawing), ``jensen_shannon`` lies between; others as of
            `Distillation`.
        beta: of ``jensen_shannon``: towards 0 it becomes the forward KL, towards 1 the reverse; of others see `Distillation`.
            Jensen-Shannon is divided by beta (1 - beta), so that it meets them; TRL's is not, and is a quarter of this at 0.5.
        loss_temperature: what both models' logits are divided by in the loss, which is multiplied by its square (the total
            variation by itself) in any case, so that it does not change the rate that suits.
        rewards: by name: what answers are rewarded with, see `Reward`. Nothing is learned from them; they are logged.
        samples: answers to each prompt; an answer of the data is taken once.
        max_new_tokens: most tokens of an answer that is written; 128 is TRL's default. Answers of the data keep their length.
        temperature: of the writing, the student's and the teacher's; 0.9 is TRL's default.
        top_k: draw only among so many most likely tokens; 0 among all.
        top_p: draw only among the most likely tokens that together reach this probability.
        stop_strings: texts that end an answer where they appear.
        eval_temperature: of the answers in validation, test and prediction; 0 takes the most likely token.
        teacher_dtype: of the teacher's weights, as ``base_dtype``.
        teacher_quantize: pack the teacher's linear layers, as ``quantize``. None: not.
        chunk_size: tokens whose logits exist at one time.
        lr: peak learning rate; None takes what the technique suggests (LoRA 2e-4), or 2e-5 for full training.
        weight_decay: AdamW's decay of trained matrices.
        warmup_steps: optimizer steps over which the rate rises from zero; None takes 3 % of all steps.
        schedule: how the rate falls after the warm-up: along a cosine to zero, linearly to zero, or not at all.
        optimizer: a factory of another torch optimizer; None is AdamW, fused, betas .9 and .999.
        base_dtype: of frozen weights: ``auto`` takes bfloat16 where the device multiplies it fast, else float32. What is trained
            is float32 in any case, unless ``pure_bfloat16`` asks for all of it in bfloat16.
        attention: ``auto`` takes this library's packed attention where the model allows it, else transformers' ``sdpa``.
        gradient_checkpointing: recompute activations in backward: one more forward pass for much less memory.
        trust_remote_code: run Python code that the repositories of student and teacher bring; only for authors you trust.
        revision: branch, tag or commit of the student's Hugging Face id; None is its main branch.
        teacher_revision: the same of the teacher's.
        quantize: pack the weights of the base's linear layers, which stay frozen then: ``nf4``, ``nf4-dq``, ``fp4`` or ``int8``,
            see `SFT`. None: not at all.

    Logs:
        Each step ``train/loss``, which is the divergence, and ``train/t2``, the factor of ``loss_temperature`` in it. Once a round,
        as ``train/``: ``on_policy`` (1 where the student has written it), ``length``, ``length_ended``, ``truncated``,
        ``trained_share``, and of rewards ``reward``, ``reward_std`` and ``rewards/<name>``. In validation ``val/loss``, the
        divergence on the student's answers to held-out prompts, ``val/length``, ``val/truncated`` and the rewards. Some answers
        stand in ``rollouts.jsonl``.

    Raises:
        Refusal: for arguments out of bounds here; for a teacher of another vocabulary or with the student's weights, or data
            without prompts or answers, when the run begins.

    Example:
        >>> OnPolicyDistillation("starter:smollm2-135m", teacher="my/teacher", share=1.0).divergence
        'jensen_shannon'

    References:
        Agarwal et al., 2024 (GKD), algorithm 1; Kim and Rush, 2016 (sequence-level); Gu et al., 2024 (MiniLLM). Proven against
        the formulas in float64 and TRL's generalised JSD in tests/modules and tests/oracles.
    """

    rewarded = False
    also_evaluated = ("loss",)

    def __init__(
        self,
        base: str,
        *,
        teacher: str,
        share: Annotated[float, Ge(0), Le(1)] = 0.5,
        sequence_kd: bool = False,
        answer_column: str = "completion",
        divergence: Divergence = "jensen_shannon",
        beta: Annotated[float, Ge(0), Le(1)] = 0.5,
        loss_temperature: Annotated[float, Gt(0)] = 1.0,
        rewards: dict[str, Reward] | None = None,
        samples: Annotated[int, Ge(1)] = 1,
        max_new_tokens: Annotated[int, Ge(1)] = 128,
        temperature: Annotated[float, Gt(0)] = 0.9,
        top_k: Annotated[int, Ge(0)] = 0,
        top_p: Annotated[float, Gt(0), Le(1)] = 1.0,
        stop_strings: list[str] | None = None,
        eval_temperature: Annotated[float, Ge(0)] = 0.0,
        teacher_dtype: DtypePolicy = "auto",
        teacher_quantize: Mode | None = None,
        chunk_size: Annotated[int, Ge(1)] = 256,
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
        teacher_revision: str | None = None,
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
        self.teacher = teacher
        self.share = share
        self.sequence_kd = sequence_kd
        self.answer_column = answer_column
        self.divergence = divergence
        self.beta = beta
        self.loss_temperature = loss_temperature
        self.rewards = rewards
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.stop_strings = stop_strings
        self.eval_temperature = eval_temperature
        self.teacher_dtype = teacher_dtype
        self.teacher_quantize = teacher_quantize
        self.chunk_size = chunk_size
        self.teacher_revision = teacher_revision
        self.check()
        if teacher == SELF:
            raise Refusal(
                "OnPolicyDistillation.teacher is self, and a model has nothing to learn from itself on its own answers; name "
                "another model."
            )
        self._settings = objective.Settings(divergence, beta, loss_temperature, chunk_size=chunk_size)
        self._known = KnownTeacher()
        self._teacher: Teacher | None = None
        self._given: dict[int, list[int]] = {}

    @property
    def _compares(self) -> bool:
        return False

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether some rounds are not the data's."""
        return self.share > 0 or self.sequence_kd

    def resolved_lr(self) -> float:
        """``lr``, else that of supervised training, which this is."""
        return self.lr if self.lr is not None else FineTuningModule.resolved_lr(self)

    # -- the teacher ------------------------------------------------------------------------------------------------------

    def register(self, attachment: Attachment) -> None:
        """With what `RolloutModule` registers, the teacher."""
        super().register(attachment)
        if self._trainer is None or self._trainer.state.fn == TrainerFn.PREDICTING:
            return
        if self.teacher_quantize is not None:
            check_mode(self.teacher_quantize)
        columns = getattr(self.datamodule, "columns", None)
        fits = self._trainer.state.fn == TrainerFn.FITTING
        if (
            fits
            and self.share < 1
            and not self.sequence_kd
            and columns is not None
            and self.answer_column not in columns
        ):
            raise Refusal(
                f"OnPolicyDistillation.share is {self.share:g}, so that other rounds take the answers of the data, and these have "
                f"no column {self.answer_column} (but {', '.join(columns) or 'none'}); name it by answer_column, set share to 1, "
                "or let the teacher write (sequence_kd true)."
            )
        origin = origin_of(
            self.teacher,
            trust_remote_code=self.trust_remote_code,
            revision=self.teacher_revision,
            argument="OnPolicyDistillation.teacher",
        )
        used = shared_vocabulary(self.tokenizer, origin.tokenizer())
        attachment.edit("hooks", "teacher", lambda module: self._load(attachment, origin, used), order=50, again=True)
        attachment.on_leave(self._leave)

    def _leave(self) -> None:
        self._teacher = None
        self._known.forget()

    def _load(self, attachment: Attachment, origin: Origin, used: int) -> None:
        assert self.admission is not None
        if not attachment.installed:
            return
        device = self._root_device()
        view, frozen = load_teacher(
            origin,
            self.task,
            packing=bool(self.admission.packing) and self.datamodule.packing is not False,
            quantize=self.teacher_quantize,
            dtype=self.teacher_dtype,
            device=device,
        )
        if self.samples > 1 and not self.sharing_reason:
            self.sharing_reason = why_no_sharing(view, self.tokenizer)
        observer = Observer(view)
        observer.attach()
        self._teacher = Teacher(observer, partial(frozen.on, device))
        size = sliced(vocabulary_of(self.view), self._teacher.vocabulary, used)
        self._settings = replace(self._settings, size=size)
        self.drawn_vocabulary = size  # neither may write what the other cannot read
        self._known.meet(frozen.model)
        if attachment.fits and fingerprint_of(self.model) == self._known.known:
            raise Refusal(
                f"OnPolicyDistillation.teacher {self.teacher} has the weights of the student {self.base}, so that there is nothing "
                "to learn but how numbers are rounded; name another teacher, or begin from another student."
            )
        frozen.spread(attachment.trainer.strategy)

    # -- a round ----------------------------------------------------------------------------------------------------------

    def writer(self, number: int) -> Writer:
        """Who writes a round: drawn from the seed and the round's number, the same on every rank and in a run that resumes."""
        drawn = np.random.default_rng([_STREAM, Attachment.of(self).seed, number]).random()
        if drawn < self.share:
            return "student"
        return "teacher" if self.sequence_kd else "data"

    def roll_out(self, prompts: Sequence[Prompt], number: int, *, batch_size: int) -> Round:
        """A round by whoever writes it."""
        self._given = {}
        if self.writer(number) == "data":
            # Of the whole round, so that a row which is refused is refused on all ranks.
            ids = given_answers(self.tokenizer, prompts, self.answer_column)
            self._given = {prompt.row: one for prompt, one in zip(prompts, ids, strict=True)}
        return super().roll_out(prompts, number, batch_size=batch_size)

    def write(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], number: int, *, batches: int, batch_size: int
    ) -> list[list[Answer]]:
        """Answers of the student, the teacher or the data."""
        writer = self.writer(number)
        if writer == "data":
            return [[Answer(self._given[prompt.row], True)] * self.samples for prompt in prompts]
        if writer == "student":
            return super().write(prompts, seeds, number, batches=batches, batch_size=batch_size)
        return self._draw_all(self._taught, prompts, seeds, batches, batch_size, self.temperature)

    def _taught(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], temperature: float
    ) -> list[list[Answer]]:
        """As `draw`, by the teacher, in its own dtype."""
        assert self._teacher is not None
        with self._teacher.computing():
            return self._sample(prompts, seeds, temperature, self._teacher.observer.view)

    def keep(self, round: Round) -> Tensor:
        """(S,) bool: all answers; of the data's the first to each prompt, since the others are the same."""
        first = torch.arange(len(round.answers)) % self.samples == 0
        return first if self.writer(round.number) == "data" else torch.ones_like(first)

    def measures(self, steps: int) -> bool:
        """Never: the loss looks at the present alone."""
        return False

    def appraise(self, round: Round) -> None:
        """Nothing: the teacher is asked in each step."""

    def facts(self, round: Round) -> dict[str, float]:
        """With who has written."""
        found = super().facts(round)
        if not self.rewards:
            found = {name: value for name, value in found.items() if not name.startswith("reward")}
        return {**found, "on_policy": float(self.writer(round.number) == "student")}

    # -- steps ------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands the divergence to the attachment, which divides it by its window's count of tokens."""
        term = self._term(batch)
        attachment = Attachment.of(self)
        attachment.terms([term])
        attachment.step.observe({"t2": (torch.tensor(self._settings.factor, device=self.device), 1.0)})
        self.log_round()
        return term.sum

    def _term(self, batch: Batch) -> Term:
        assert self._teacher is not None
        hidden = read(self.view, batch)
        other = self._teacher.at_scored(self._teacher.see(batch), batch, self._settings.size)
        term = objective.of_tokens(
            self.view, hidden, batch, objective.soft_tokens(other, self._settings), self._settings
        )
        return replace(term, name="divergence")

    def evaluated(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, tuple[Tensor, float]]:
        """The divergence on these answers; nothing where no teacher was loaded."""
        assert self.admission is not None
        rollouts = [
            Rollout(np.array(prompt.ids), np.array(answer.ids), number, prompt.row, {})
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        packed = bool(self.admission.packing) and self.datamodule.packing is not False
        batch = collate_rollouts(rollouts, [], packed=packed, shared=False).to(self.device)
        term = self._term(batch)
        return {"loss": (term.sum, term.count)}

    def _finished(self, means: dict[str, Any]) -> dict[str, Any]:
        return {name: mean for name, mean in means.items() if not torch.isnan(mean)}

    # -- checkpoints --------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the fingerprint of the teacher."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STATE] = {"teacher": self._known.known}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with another teacher."""
        super().on_load_checkpoint(checkpoint)
        if _STATE in checkpoint and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._known.expect(checkpoint[_STATE]["teacher"])


__all__ = ["OnPolicyDistillation"]
