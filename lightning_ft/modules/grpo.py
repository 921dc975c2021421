"""GRPO and its relatives: learning from answers that the model writes itself, each compared with others to the same prompt."""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lightning_ft.engine.arguments import refuse_unread
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.likelihood import Ask
from lightning_ft.engine.module import DtypePolicy, OptimizerFactory
from lightning_ft.engine.optimizer import Schedule
from lightning_ft.engine.policy import Reference
from lightning_ft.engine.rewards import Reward
from lightning_ft.engine.rollouts.module import RolloutModule
from lightning_ft.engine.rollouts.round import Round
from lightning_ft.engine.scoring import scores
from lightning_ft.functional.advantages import Scale, group_advantages, leave_one_out, without_signal
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.kl_estimators import kl_estimate
from lightning_ft.functional.policy_gradient import Clip, Importance, PolicyLoss
from lightning_ft.models.quantize import Mode
from lightning_ft.objectives import causal_lm, grpo, ppo


class GRPO(RolloutModule):
    """Makes those answers likelier that were rewarded more than others to the same prompt, and the others less likely.

    Each epoch is a round: the model writes ``samples`` answers to each prompt, rewards are added up, and an answer's advantage is
    ``A = (r - mean of its group) / (standard deviation of its group)``. With ``rho = p(token) / p_old(token)``, by how much a token
    has become likelier since the answer was written, the loss is the mean of
    ``- min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`` over the tokens of each optimizer step on all ranks. No model of
    values is needed. Data: `PromptData`.

    Args:
        base: the model to start from: ``starter:smollm2-135m``, a local folder, or a Hugging Face id. It should succeed now and
            then: where all answers fail, there is nothing to compare.
        rewards: by name: what answers are rewarded with, see `Reward`; in Python also plain functions.
        samples: answers to each prompt; 8 is TRL's default. A single one only with ``reinforce++``.
        max_new_tokens: most tokens of an answer; 256 is TRL's default.
        temperature: of the writing, and of all probabilities in the loss.
        top_k: draw only among so many most likely tokens; 0 among all.
        top_p: draw only among the most likely tokens that together reach this probability.
        stop_strings: texts that end an answer where they appear.
        eval_temperature: of the answers in validation, test and prediction; 0 takes the most likely token.
        loss: how tokens are added up. ``dapo`` (and ``bnpo``, which is the same here): the mean over all tokens of the step;
            ``grpo``: over each answer's tokens, then over answers; ``dr_grpo``: the sum over all tokens, divided by
            ``max_new_tokens`` and the number of answers; ``cispo``: as ``dapo``, with weights ``min(rho, cispo_most)`` held
            constant instead of a clipped loss, so that no token loses its gradient. ``dapo`` is TRL's default.
        importance: ``token``, or ``sequence``: rho is the geometric mean over an answer's tokens (GSPO), which wants much
            narrower bounds, such as 3e-4 and 4e-4.
        advantage: ``group`` as above; ``rloo``: the reward less the mean of the *other* answers to the prompt; or ``reinforce++``:
            of each token what follows it, the reward less ``beta`` times the rest of the KL, whitened over all tokens of the
            round, so that answers to one prompt are not compared and one answer each may do (Hu et al., 2025).
        scale: what differences to the group's mean are divided by: the standard deviation of the ``group``, of the whole
            ``batch`` (round), or ``none``.
        clip_low: how far below 1 rho counts.
        clip_high: how far above; 0.28 in DAPO, so that rare tokens can grow.
        clip_both: most that rho counts at all, also for bad answers; None: no bound.
        cispo_most: see ``loss``.
        beta: weight of the KL to the reference, estimated by k3 and added to the loss (with ``reinforce++``: by k1, taken off the
            reward of each token); 0 computes none.
        correct_kl: multiply the KL of each token by its rho, so that its gradient becomes that of the reverse KL without bias
            (DeepSeek-V3.2), as TRL does; False leaves k3 alone, as in the GRPO paper.
        watch_kl: measure the KL to the reference once a round even with ``beta`` 0: one more forward pass.
        reference_policy: what is compared with: the model as it is when the fit begins (``start``), adapters and all, or the bare
            ``base``.
        mask_truncated: whether answers that the limit of tokens cut are left out of the loss; they still count in their group.
        drop_without_signal: whether groups that were all rewarded alike, whose advantages are 0, are left out of steps and
            divisors; False counts their tokens among those that a loss is divided by, as TRL does. With ``reinforce++`` none are.
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
        Once a round, as ``train/``: ``reward`` and its ``reward_std``, ``rewards/<name>`` of each source before weighting,
        ``length``, ``length_ended``, ``truncated`` (share), ``without_signal`` (share of groups), ``judged`` and
        ``trained_share`` (of answers; with several rewards also ``judged/<name>``), and against the reference ``kl`` (nats an
        answer), ``kl_k1`` and ``kl_k3`` (nats a token), which are of the answers trained on, while the others are of all. Each
        step: ``loss``, ``entropy`` (nats a token), ``ratio``, ``clipped_low``, ``clipped_high``, ``policy_kl``. In validation:
        ``val/reward``, ``val/rewards/<name>``, ``val/length``, ``val/truncated``. Some answers stand in ``rollouts.jsonl``.

    Raises:
        Refusal: for arguments out of bounds here; for rewards that cannot work, or data without prompts, when the run begins.

    Example:
        >>> GRPO("starter:smollm2-135m", rewards={"short": {"length": 40}}, samples=4).loss
        'dapo'

    References:
        Shao et al., 2024 (DeepSeekMath), equation 3; Yu et al., 2025 (DAPO); Liu et al., 2025 (Dr. GRPO); Zheng et al., 2025
        (GSPO); MiniMax, 2025 (CISPO); Ahmadian et al., 2024 (RLOO); Hu et al., 2025 (REINFORCE++).
        Proven against TRL's trainers in tests/oracles.
    """

    def __init__(
        self,
        base: str,
        *,
        rewards: dict[str, Reward],
        samples: Annotated[int, Ge(1)] = 8,
        max_new_tokens: Annotated[int, Ge(1)] = 256,
        temperature: Annotated[float, Gt(0)] = 1.0,
        top_k: Annotated[int, Ge(0)] = 0,
        top_p: Annotated[float, Gt(0), Le(1)] = 1.0,
        stop_strings: list[str] | None = None,
        eval_temperature: Annotated[float, Ge(0)] = 0.0,
        loss: PolicyLoss = "dapo",
        importance: Importance = "token",
        advantage: Literal["group", "rloo", "reinforce++"] = "group",
        scale: Scale = "group",
        clip_low: Annotated[float, Gt(0), Le(1)] = 0.2,
        clip_high: Annotated[float, Gt(0)] = 0.2,
        clip_both: Annotated[float, Gt(1)] | None = None,
        cispo_most: Annotated[float, Ge(1)] = 5.0,
        beta: Annotated[float, Ge(0)] = 0.0,
        correct_kl: bool = True,
        watch_kl: bool = False,
        reference_policy: Reference = "start",
        mask_truncated: bool = False,
        drop_without_signal: bool = True,
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
        self.rewards = rewards
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.stop_strings = stop_strings
        self.eval_temperature = eval_temperature
        self.loss = loss
        self.importance = importance
        self.advantage = advantage
        self.scale = scale
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.clip_both = clip_both
        self.cispo_most = cispo_most
        self.beta = beta
        self.correct_kl = correct_kl
        self.watch_kl = watch_kl
        self.reference_policy = reference_policy
        self.mask_truncated = mask_truncated
        self.drop_without_signal = drop_without_signal
        self.check()
        self._plain = advantage == "reinforce++"
        if samples < 2 and not self._plain:
            raise Refusal(
                f"GRPO.samples must be at least 2, got {samples}: the advantage {advantage} compares answers to one prompt; raise "
                "it, or take reinforce++."
            )
        if advantage == "rloo":
            refuse_unread(self, ["scale"], "the advantage rloo divides by nothing")
        if self._plain:
            refuse_unread(self, ["scale"], "the advantage reinforce++ is whitened over all tokens of the round")
            refuse_unread(self, ["correct_kl"], "the KL of reinforce++ is in the reward, not in the loss")
        bounds = ["clip_low", "clip_high", "clip_both"]
        ignored, used = (bounds, ["cispo_most"]) if loss == "cispo" else (["cispo_most"], bounds)
        refuse_unread(self, ignored, f"{loss} is bounded by {', '.join(used)}")
        if clip_both is not None and clip_both <= 1 + clip_high:
            raise Refusal(f"GRPO.clip_both must be greater than 1 + clip_high, {1 + clip_high:g}, got {clip_both}.")
        clip, in_loss = Clip(clip_low, clip_high, clip_both), 0.0 if self._plain else beta
        self._settings = grpo.Settings(loss, importance, clip, cispo_most, in_loss, correct_kl, max_new_tokens)

    @property
    def _compares(self) -> bool:
        return self.beta > 0 or self.watch_kl

    # -- a round --------------------------------------------------------------------------------------------------------

    def keep(self, round: Round) -> Tensor:
        """(S,) bool: judged answers; without those that were cut, and without groups that say nothing, where so asked."""
        kept = super().keep(round)
        if self.mask_truncated:
            kept = kept & round.ended
        if self.drop_without_signal and not self._plain:
            kept = kept & ~without_signal(round.rewards).repeat_interleave(self.samples)
        return kept

    def appraise(self, round: Round) -> None:
        """The same advantage for every token of an answer; of ``reinforce++`` what follows each token."""
        if self._plain:
            round.tokens["advantages"] = self._following(round).float()
            return
        rewards = round.rewards
        found = leave_one_out(rewards) if self.advantage == "rloo" else group_advantages(rewards, self.scale)
        round.tokens["advantages"] = found.reshape(-1)[round.owner].float()

    def _following(self, round: Round) -> Tensor:
        """(N,) what PPO would find without a critic: nothing is expected, so an advantage is all that came after a token."""
        tokens, owner = round.tokens, round.owner
        kl = kl_estimate(tokens["old_logps"], tokens["reference_logps"], "k1") if self.beta > 0 else None
        nothing = torch.zeros(len(owner), dtype=torch.float64)
        how = ppo.Appraisal(gamma=1.0, lam=1.0)
        return ppo.appraised(round.scores.total, round.ended, owner, nothing, kl, self.beta, how)[0]

    def facts(self, round: Round) -> dict[str, float]:
        """With the share of groups that were all rewarded alike, where that matters."""
        if self._plain:
            return super().facts(round)
        return {**super().facts(round), "without_signal": float(without_signal(round.rewards).double().mean())}

    # -- steps ------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands the losses to the attachment, which divides them by their window's count."""
        scored = scores(self.view, batch, ("logprob", "entropy_value"), temperature=self.temperature)
        found = grpo.terms(batch, scored["logprob"], self._settings)
        attachment = Attachment.of(self)
        attachment.terms(found)
        attachment.observe(grpo.measured(batch, scored["logprob"], scored["entropy_value"], self._settings))
        self.log_round()
        return found[0].sum

    def likelihood(self, batch: Batch, ask: Ask) -> Tensor:
        """What continual learning asks of each answer, (S,): see `lightning_ft.engine.likelihood`."""
        return causal_lm.likelihood(self.view, batch, ask)

    def _finished(self, means: dict[str, Any]) -> dict[str, Any]:
        return {name: mean for name, mean in means.items() if not torch.isnan(mean)}


__all__ = ["GRPO"]
