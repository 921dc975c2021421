"""Online DPO: the policy writes the pairs that it learns from, and rewards say which answer is the better one."""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

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
from lightning_ft.functional.preference import Settings
from lightning_ft.functional.token_rewards import without_end
from lightning_ft.models.quantize import Mode
from lightning_ft.objectives import causal_lm, online_dpo, preference


class OnlineDPO(RolloutModule):
    """Makes a language model prefer the better of its own answers: DPO on pairs that are written anew in each round.

    Each epoch is a round: the policy writes ``samples`` answers to each of ``prompts`` prompts, and learns of each prompt the one
    that was rewarded most against the one that was rewarded least: ``- log sigmoid(beta (r(best) - r(worst)))``, with r(y) = log
    p(y) - log q(y) by how much the policy p has moved from the reference q. Prompts whose answers were rewarded alike teach
    nothing and are left out. Of rewards only the order counts, so they need no scale; pairs stay those that the policy of now
    would write, where DPO's grow old. Data: `PromptData`.

    Args:
        base: the model to start from: ``starter:smollm2-135m``, a local folder, or a Hugging Face id. It should have learned
            to answer: run `SFT` before.
        rewards: name -> what judges an answer; several are added up by weight. See `Reward`. Those of `RewardModel` and
            classifiers are the usual ones.
        samples: answers to each prompt; 2, as in the paper: more find pairs that lie farther apart.
        max_new_tokens: most tokens of an answer; 64 is TRL's default.
        temperature: of the writing, and of all probabilities in the loss; 0.9 is TRL's default.
        top_k: draw only among so many most likely tokens; 0 among all.
        top_p: draw only among the most likely tokens that together reach this probability.
        stop_strings: texts that end an answer where they appear.
        eval_temperature: of the answers in validation, test and prediction; 0 takes the most likely token.
        loss: as of `DPO`: ``sigmoid``, ``sigmoid_norm`` (each answer by its length), ``hinge`` (SLiC) or ``ipo``, the two others
            that the paper tries.
        beta: how strongly the policy is held to the reference: less lets it go farther; 0.1 is TRL's default.
        reference_policy: what is compared with: the model as it is when the fit begins (``start``), adapters and all, or the bare
            ``base``.
        missing_end_penalty: what an answer loses that the limit of tokens cut, before answers are compared; 0: nothing.
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
        Once a round, as ``train/``: ``reward`` and its ``reward_std``, ``rewards/<name>`` of each source before weighting,
        ``reward_gap`` (mean of best less worst), ``length``, ``length_ended``, ``truncated`` (share), ``without_signal`` (share
        of prompts whose answers were rewarded alike), ``judged`` and ``trained_share`` (of answers), and against the reference
        ``kl`` (nats an answer), ``kl_k1`` and ``kl_k3`` (nats a token), of the answers trained on. Each step: ``loss`` and, as of
        `DPO`, ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen``,
        ``logps/rejected``. In validation: ``val/reward``, ``val/rewards/<name>``, ``val/length``, ``val/truncated``. Some answers
        stand in ``rollouts.jsonl``.

    Raises:
        Refusal: for arguments out of bounds here; for rewards that cannot work, or data without prompts, when the run begins.

    Example:
        >>> OnlineDPO("starter:smollm2-135m", rewards={"short": {"length": 40}}).samples
        2

    References:
        Guo et al., 2024 (Direct language model alignment from online AI feedback). The loss is proven against TRL's in
        tests/oracles, the pairs and the gradient against `DPO` on the same pairs in tests/modules.
    """

    together = 2

    def __init__(
        self,
        base: str,
        *,
        rewards: dict[str, Reward],
        samples: Annotated[int, Ge(2)] = 2,
        max_new_tokens: Annotated[int, Ge(1)] = 64,
        temperature: Annotated[float, Gt(0)] = 0.9,
        top_k: Annotated[int, Ge(0)] = 0,
        top_p: Annotated[float, Gt(0), Le(1)] = 1.0,
        stop_strings: list[str] | None = None,
        eval_temperature: Annotated[float, Ge(0)] = 0.0,
        loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"] = "sigmoid",
        beta: Annotated[float, Gt(0)] = 0.1,
        reference_policy: Reference = "start",
        missing_end_penalty: Annotated[float, Ge(0)] = 0.0,
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
        self.beta = beta
        self.reference_policy = reference_policy
        self.missing_end_penalty = missing_end_penalty
        self.check()
        self._settings = Settings(beta)

    @property
    def _compares(self) -> bool:
        return True

    # -- a round --------------------------------------------------------------------------------------------------------

    def keep(self, round: Round) -> Tensor:
        """(S,) bool: of each prompt the best and the worst answer, where they differ."""
        kept = torch.zeros_like(round.rewards, dtype=torch.bool)
        best, worst = online_dpo.best_and_worst(self._judged_as(round))
        prompts = (best >= 0).nonzero()[:, 0]
        kept[prompts, best[prompts]] = kept[prompts, worst[prompts]] = True
        return kept.reshape(-1)

    def _judged_as(self, round: Round) -> Tensor:
        """(P, G) what answers are compared by."""
        judged = without_end(round.scores.total, round.ended, self.missing_end_penalty)
        return judged.reshape(-1, self.samples)

    def appraise(self, round: Round) -> None:
        """Notes at each token whether its answer is the better of the two."""
        best, _ = online_dpo.best_and_worst(self._judged_as(round))
        better = torch.arange(self.samples) == best[:, None]
        round.tokens["better"] = better.reshape(-1)[round.owner].float()

    def facts(self, round: Round) -> dict[str, float]:
        """With the share of prompts that teach nothing, and how far the two answers of the others lie apart."""
        judged = self._judged_as(round)
        best, worst = online_dpo.best_and_worst(judged)
        pairs = best >= 0
        apart = judged[pairs].gather(1, best[pairs, None]) - judged[pairs].gather(1, worst[pairs, None])
        gap = float(apart.mean()) if len(apart) else float("nan")
        return {**super().facts(round), "without_signal": float((~pairs).double().mean()), "reward_gap": gap}

    # -- steps ------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hands the loss to the attachment, which divides it by its window's count."""
        scored = scores(self.view, batch, temperature=self.temperature)
        pairs = online_dpo.pairs_of(batch, scored["logprob"])
        found = online_dpo.term(batch, pairs, self.loss, self._settings)
        attachment = Attachment.of(self)
        attachment.terms([found])
        measured = preference.measured(pairs, {self.loss: 1.0}, self._settings)
        measured.pop("kl")  # that of a round is of all its tokens
        attachment.observe(measured)
        self.log_round()
        return found.sum

    def likelihood(self, batch: Batch, ask: Ask) -> Tensor:
        """What continual learning asks of each answer, (S,): see `lightning_ft.engine.likelihood`."""
        return causal_lm.likelihood(self.view, batch, ask)

    def _finished(self, means: dict[str, Any]) -> dict[str, Any]:
        return {name: mean for name, mean in means.items() if not torch.isnan(mean)}


__all__ = ["OnlineDPO"]
