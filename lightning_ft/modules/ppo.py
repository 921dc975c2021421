"""PPO: learning from answers that the model writes itself, each token judged by what was expected before it."""

import math
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
from lightning_ft.engine.scoring import scored_hidden, scores
from lightning_ft.engine.value_model import ValueModel
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.kl_estimators import adapted, kl_estimate
from lightning_ft.functional.policy_gradient import Clip, explained_variance
from lightning_ft.models.quantize import Mode
from lightning_ft.nn.value_head import ValueHead
from lightning_ft.objectives import causal_lm, ppo

FASTER = 10.0
"""Factor from the policy's rate to that of the values, which are learned from nothing."""
_STATE = "ppo"


class PPO(RolloutModule):
    """Makes those tokens likelier after which more was got than expected, and the others less likely.

    Each epoch is a round: the model writes answers and rewards are added up. A token's advantage A sums what came after it, less
    what was expected before it: ``A_t = sum_k (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k})``, where the values V are learned
    beside, and r is ``- beta (log p - log q)`` at each token plus the answer's reward at its last one. With ``rho = p / p_old`` the
    loss is the mean of ``- min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`` over the tokens of each optimizer step on all
    ranks, plus ``value_weight`` times the values' squared error. Data: `PromptData`, whose ``passes`` are PPO's epochs.

    Args:
        base: the model to start from: ``starter:smollm2-135m``, a local folder, or a Hugging Face id.
        rewards: by name: what answers are rewarded with, see `Reward`; in Python also plain functions.
        samples: answers to each prompt; 1 is usual, since each token has a value to compare with.
        max_new_tokens: most tokens of an answer; 256 as for `GRPO`.
        temperature: of the writing, and of all probabilities in the loss.
        top_k: draw only among so many most likely tokens; 0 among all, as PPO's ratios suppose.
        top_p: draw only among the most likely tokens that together reach this probability; 1 likewise.
        stop_strings: texts that end an answer where they appear.
        eval_temperature: of the answers in validation, test and prediction; 0 takes the most likely token.
        gamma: discount of what comes a token later; 1 for answers of limited length.
        lam: of the advantages: 0 trusts the values, 1 what was got. 0.95 is usual.
        beta: weight of the KL to the reference; 0.05 is TRL's. 0: none.
        kl: where it counts: in the ``reward`` of each token (by k1, log p - log q), or in the ``loss`` (by k3).
        correct_kl: multiply a KL in the loss by the token's rho, so that its gradient is that of KL(p || q); that of k3 alone is
            that of KL(q || p).
        kl_target: nats of KL an answer that ``beta`` is moved for, round by round; 6 in Ziegler et al. None: it stays.
        kl_horizon: answers over which it moves; 10,000 in the paper.
        watch_kl: measure the KL to the reference once a round even with ``beta`` 0.
        reference_policy: what is compared with: the model as it is when the fit begins (``start``), adapters and all, or the bare
            ``base``.
        missing_end_penalty: what an answer loses that the limit of tokens has cut.
        whiten_rewards: give the rewards of the round's tokens variance 1, their mean kept. Off as in TRL.
        whiten_advantages: give the advantages of the round's tokens mean 0 and variance 1, over all ranks.
        clip_low: how far below 1 rho counts.
        clip_high: how far above.
        value_clip: how far a value may move in a round before its error counts no less; None: no bound. Of unsure use, customary.
        value_weight: of the values' loss; 0.1 is TRL's.
        entropy_weight: of the policy's entropy, to be raised; 0, since language models need no push to explore.
        value_model: a model of its own for the values, trained in full: a folder, hub id or starter asset with the policy's
            tokens, best an exported reward model. None: a head on the policy's own hidden states, which costs nothing.
        value_lr: peak rate of the value head or model; None: ten times ``lr``, as it learns from nothing; of a model ``lr``.
        lr: peak learning rate; None takes a twentieth of what the technique suggests (LoRA 1e-5), or 1e-6 for full training.
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
        Once a round, as ``train/``: what `GRPO` logs of answers, rewards and KL, and ``explained_variance`` (1: the values knew all
        returns; 0: no better than their mean), ``values``, ``returns`` (means over tokens), ``kl_coefficient``. Each step:
        ``loss``, ``policy``, ``value``, ``entropy`` (nats a token), ``ratio``, ``clipped_low``, ``clipped_high``,
        ``clipped_values``, ``policy_kl``. In validation: ``val/reward``, ``val/rewards/<name>``, ``val/length``, ``val/truncated``.

    Raises:
        Refusal: for arguments out of bounds here; for rewards that cannot work, or data without prompts, when the run begins.

    Example:
        >>> PPO("starter:smollm2-135m", rewards={"short": {"length": 40}}).lam
        0.95

    References:
        Schulman et al., 2017; Schulman et al., 2016 (advantages); Ziegler et al., 2019, section 2.2 (KL); Ouyang et al., 2022,
        equation 2; Huang et al., 2024 (N implementation details).
    """

    def __init__(
        self,
        base: str,
        *,
        rewards: dict[str, Reward],
        samples: Annotated[int, Ge(1)] = 1,
        max_new_tokens: Annotated[int, Ge(1)] = 256,
        temperature: Annotated[float, Gt(0)] = 1.0,
        top_k: Annotated[int, Ge(0)] = 0,
        top_p: Annotated[float, Gt(0), Le(1)] = 1.0,
        stop_strings: list[str] | None = None,
        eval_temperature: Annotated[float, Ge(0)] = 0.0,
        gamma: Annotated[float, Ge(0), Le(1)] = 1.0,
        lam: Annotated[float, Ge(0), Le(1)] = 0.95,
        beta: Annotated[float, Ge(0)] = 0.05,
        kl: Literal["reward", "loss"] = "reward",
        correct_kl: bool = True,
        kl_target: Annotated[float, Gt(0)] | None = None,
        kl_horizon: Annotated[float, Gt(0)] = 10000.0,
        watch_kl: bool = False,
        reference_policy: Reference = "start",
        missing_end_penalty: Annotated[float, Ge(0)] = 0.0,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        clip_low: Annotated[float, Gt(0), Le(1)] = 0.2,
        clip_high: Annotated[float, Gt(0)] = 0.2,
        value_clip: Annotated[float, Gt(0)] | None = 0.2,
        value_weight: Annotated[float, Gt(0)] = 0.1,
        entropy_weight: Annotated[float, Ge(0)] = 0.0,
        value_model: str | None = None,
        value_lr: Annotated[float, Gt(0)] | None = None,
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
        self.gamma = gamma
        self.lam = lam
        self.beta = beta
        self.kl = kl
        self.correct_kl = correct_kl
        self.kl_target = kl_target
        self.kl_horizon = kl_horizon
        self.watch_kl = watch_kl
        self.reference_policy = reference_policy
        self.missing_end_penalty = missing_end_penalty
        self.whiten_rewards = whiten_rewards
        self.whiten_advantages = whiten_advantages
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.value_clip = value_clip
        self.value_weight = value_weight
        self.entropy_weight = entropy_weight
        self.value_model = value_model
        self.value_lr = value_lr
        self.check()
        if kl_target is not None and beta == 0:
            raise Refusal(
                "PPO.kl_target moves beta, and beta is 0, which stays 0; give a beta, or leave kl_target out."
            )
        if kl_target is None:
            refuse_unread(self, ["kl_horizon"], "without kl_target beta stays as it is")
        if kl == "reward":
            refuse_unread(self, ["correct_kl"], "the KL is in the reward, not in the loss (kl)")
        self._appraisal = ppo.Appraisal(gamma, lam, missing_end_penalty, whiten_rewards, whiten_advantages)
        self._settings = ppo.Settings(Clip(clip_low, clip_high), value_clip, value_weight, entropy_weight, correct_kl)
        self.values: ValueHead | ValueModel | None = None
        self._controller: dict[str, float] = {"coefficient": beta, "observed": math.nan, "answers": 0.0}

    @property
    def _compares(self) -> bool:
        return self.beta > 0 or self.watch_kl

    # -- loading ----------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the base, and puts a value head on it, or loads the model of the values."""
        super().configure_model()
        if self.values is not None:
            return
        if self.value_model is None:
            self.values = ValueHead(int(self.view.head.weight.shape[-1]))
            return
        self.values = ValueModel.load(self.value_model, like=self, seed=Attachment.of(self).seed)
        self.sharing_reason = self.sharing_reason or self.values.sharing_reason

    def own_rates(self) -> dict[str, float]:
        """With the rate of the values."""
        factor = FASTER if self.value_model is None else 1.0
        if self.value_lr is not None:
            factor = self.value_lr / self.resolved_lr()
        own = {name: factor for name, _ in self.named_parameters() if name.startswith("values.")}
        return {**super().own_rates(), **own}

    # -- a round ------------------------------------------------------------------------------------------------------------

    def measures(self, steps: int) -> bool:
        """Always: advantages need the values."""
        return True

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """With ``old_values``, of the same forward pass."""
        found: dict[str, Tensor] = {}
        if self._compares:
            with self.at_reference():
                found["reference_logps"] = scores(self.view, batch, temperature=self.temperature)["logprob"]
        scored, values = self._forward(batch, ("logprob",))
        return {"old_logps": scored["logprob"], "old_values": values, **found}

    def _forward(self, batch: Batch, outputs: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor]:
        """Scores and values of the scored tokens."""
        assert self.values is not None
        hidden = scored_hidden(self.view, batch)
        scored = self.view.score(hidden, batch.labels, outputs=outputs, temperature=self.temperature)
        return scored, self.values(batch if isinstance(self.values, ValueModel) else hidden)

    def appraise(self, round: Round) -> None:
        """Advantages and returns of all tokens together, whatever rank wrote them."""
        self._adapt()
        tokens, owner, coefficient = round.tokens, round.owner, self._controller["coefficient"]
        penalised = self.beta > 0 and self.kl == "reward"
        kl = kl_estimate(tokens["old_logps"], tokens["reference_logps"], "k1") if self._compares else None
        advantages, returns = ppo.appraised(
            round.scores.total,
            round.ended,
            owner,
            tokens["old_values"],
            kl if penalised else None,
            coefficient,
            self._appraisal,
        )
        tokens["advantages"], tokens["returns"] = advantages.float(), returns.float()
        answers = int(round.kept.sum())
        if kl is not None and answers:
            self._controller |= {"observed": float(kl.double().sum()) / answers, "answers": float(answers)}

    def _adapt(self) -> None:
        """Moves the KL's coefficient by what the round before has shown; one that does not move is what is given now."""
        now = self._controller
        if self.kl_target is None or now["coefficient"] == 0:  # 0, which stays 0, comes from a run that had no KL
            now["coefficient"] = self.beta
        elif now["answers"]:
            now["coefficient"] = adapted(
                now["coefficient"],
                now["observed"],
                target=self.kl_target,
                horizon=self.kl_horizon,
                steps=int(now["answers"]),
            )

    def facts(self, round: Round) -> dict[str, float]:
        """With what the values knew, and the KL's coefficient."""
        values, returns = (round.tokens[name].double() for name in ("old_values", "returns"))
        some = len(values) > 0
        return {
            **super().facts(round),
            "explained_variance": float(explained_variance(values, returns)) if some else math.nan,
            "values": float(values.mean()) if some else math.nan,
            "returns": float(returns.mean()) if some else math.nan,
            "kl_coefficient": self._controller["coefficient"],
        }

    # -- steps ------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands the losses to the attachment, which divides them by their window's count of tokens."""
        entropy = "entropy" if self.entropy_weight > 0 else "entropy_value"
        scored, values = self._forward(batch, ("logprob", entropy))
        weight = self._controller["coefficient"] if self.kl == "loss" and self.beta > 0 else 0.0
        found = ppo.terms(batch, scored["logprob"], values, scored[entropy], self._settings, weight)
        attachment = Attachment.of(self)
        attachment.terms(found)
        attachment.observe(ppo.measured(batch, scored["logprob"], values, scored[entropy], self._settings))
        self.log_round()
        return found[0].sum

    def likelihood(self, batch: Batch, ask: Ask) -> Tensor:
        """What continual learning asks of each answer, (S,): see `lightning_ft.engine.likelihood`."""
        return causal_lm.likelihood(self.view, batch, ask)

    def _finished(self, means: dict[str, Any]) -> dict[str, Any]:
        return {name: mean for name, mean in means.items() if not torch.isnan(mean)}

    # -- checkpoints --------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With where the KL's coefficient is."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STATE] = dict(self._controller)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the KL's coefficient; one that is given anew and does not move counts from the next round on."""
        super().on_load_checkpoint(checkpoint)
        if _STATE in checkpoint:
            self._controller = dict(checkpoint[_STATE])


__all__ = ["PPO"]
