"""Losses on pairs of answers to one prompt, a chosen and a rejected one: DPO and its relatives, from log-probabilities alone.

Notation: w the chosen answer, l the rejected one, log p(y) the sum over the tokens of y of the policy's log-probabilities given
the prompt, q the reference's, |y| the number of tokens, r(y) = log p(y) - log q(y), h = r(w) - r(l), s the logistic function.
Everything is a pure function of tensors (P,), in their dtype, which may be float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor

from lightning_ft.functional.errors import Refusal

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


@dataclass(frozen=True)
class Pairs:
    """What is known of P pairs of answers.

    Attributes:
        chosen: (P,) log p(w), in nats.
        rejected: (P,) log p(l).
        chosen_tokens: (P,) |w|.
        rejected_tokens: (P,) |l|.
        reference_chosen: (P,) log q(w); None where there is no reference.
        reference_rejected: (P,) log q(l).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """(P,) r(w)."""
        return self.chosen - _there(self.reference_chosen)

    @property
    def rejected_ratio(self) -> Tensor:
        """(P,) r(l)."""
        return self.rejected - _there(self.reference_rejected)

    @property
    def chosen_mean(self) -> Tensor:
        """(P,) log p(w) / |w|."""
        return self.chosen / self.chosen_tokens.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        """(P,) log p(l) / |l|."""
        return self.rejected / self.rejected_tokens.clamp(min=1)


def _there(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise Refusal("This preference loss compares with a reference, and none was given; pass its log-probabilities.")
    return reference


@dataclass(frozen=True)
class Settings:
    """The numbers that losses have.

    Attributes:
        beta: how strongly the policy is held to the reference, the papers' beta or tau; above 0.
        label_smoothing: the share e of pairs that are taken to be labelled the wrong way round, in [0, 0.5).
        simpo_gamma: SimPO's target margin, the paper's gamma: what ``beta`` times the difference of the means should exceed.
        divergence: which f-divergence holds the policy to the reference, see `scores`.
        alpha: of the alpha-divergence.
        discopop_tau: DiscoPOP's temperature.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    discopop_tau: float = 0.05


def scores(ratio: Tensor, settings: Settings) -> Tensor:
    """What stands for r under another divergence between policy and reference: f'(u) with u = exp(r).

    reverse_kl: r, which is DPO. forward_kl: 1 - 1 / u. jensen_shannon: log(2 u / (1 + u)). alpha: (u^(a-1) - 1) / (a - 1).
    Constants cancel in the difference of two answers, which is all that the losses that allow it look at; not so where a loss
    divides by the length of each answer before (ipo, sigmoid_norm): there they leave a part that depends on the lengths, as in TRL.

    Args:
        ratio: (P,) r.
        settings: names the divergence.

    References:
        Wang et al., 2023 (Beyond reverse KL: generalizing DPO with diverse divergence constraints), table 1. As in TRL the
        exponent of the alpha-divergence is held below 80, so that it stays finite.
    """
    if settings.divergence == "forward_kl":
        return 1 - torch.exp(-ratio)
    if settings.divergence == "jensen_shannon":
        return math.log(2.0) + F.logsigmoid(ratio)
    if settings.divergence == "alpha" and abs(settings.alpha - 1.0) > 1e-6:
        power = settings.alpha - 1.0
        return torch.expm1((power * ratio).clamp(max=80.0)) / power
    return ratio


def difference(pairs: Pairs, settings: Settings) -> Tensor:
    """(P,) h: by how much more the policy has moved toward the chosen answer than toward the rejected one."""
    return scores(pairs.chosen_ratio, settings) - scores(pairs.rejected_ratio, settings)


def mean_difference(pairs: Pairs, settings: Settings) -> Tensor:
    """(P,) r(w) / |w| - r(l) / |l|: the same in nats a token."""
    chosen = scores(pairs.chosen_ratio, settings) / pairs.chosen_tokens.clamp(min=1)
    return chosen - scores(pairs.rejected_ratio, settings) / pairs.rejected_tokens.clamp(min=1)


def _logistic(z: Tensor, smoothing: float) -> Tensor:
    """- (1 - e) log s(z) - e log s(-z)."""
    loss = -(1 - smoothing) * F.logsigmoid(z)
    return loss - smoothing * F.logsigmoid(-z) if smoothing else loss


def sigmoid(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO: - (1 - e) log s(b h) - e log s(- b h).

    Rafailov et al., 2023, equation 7; with e > 0 cDPO (Mitchell, 2023, A note on DPO with noisy preferences). TRL's
    loss of this name ignores label smoothing; the papers are followed here, and with e = 0 the two agree.
    """
    return _logistic(settings.beta * difference(pairs, settings), settings.label_smoothing)


def sigmoid_norm(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO with r(y) / |y| in the place of r(y), so that long answers do not outweigh short ones.

    Lambert et al., 2024 (Tulu 3), section 5.1.
    """
    return _logistic(settings.beta * mean_difference(pairs, settings), settings.label_smoothing)


def hinge(pairs: Pairs, settings: Settings) -> Tensor:
    """max(0, 1 - b h): pairs that are apart by 1 / b are left alone.

    Liu et al., 2023 (Statistical rejection sampling), after Zhao et al., 2023 (SLiC-HF).
    """
    return torch.relu(1 - settings.beta * difference(pairs, settings))


def ipo(pairs: Pairs, settings: Settings) -> Tensor:
    """(r(w) / |w| - r(l) / |l| - 1 / (2 b))^2: h is drawn to a finite value instead of without bound.

    Azar et al., 2023, equation 17, whose tau is b. The division by the number of tokens is not in the paper's text; its authors
    confirmed it to TRL and to others as what their experiments used.
    """
    return (mean_difference(pairs, settings) - 1 / (2 * settings.beta)).square()


def robust(pairs: Pairs, settings: Settings) -> Tensor:
    """(- (1 - e) log s(b h) + e log s(- b h)) / (1 - 2 e): unbiased where a share e of the labels is flipped.

    Chowdhury et al., 2024 (Provably robust DPO).
    """
    z, e = settings.beta * difference(pairs, settings), settings.label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def exo_pair(pairs: Pairs, settings: Settings) -> Tensor:
    """KL(f || g) of f = (s(b h), s(- b h)) and g = (1 - e, e): the reverse of DPO's divergence; needs e > 0.

    Ji et al., 2024 (Towards efficient exact optimization), equation 16; they take e = 0.001.
    """
    z, e = settings.beta * difference(pairs, settings), settings.label_smoothing
    toward = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-e))
    return toward + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(e))


def nca_pair(pairs: Pairs, settings: Settings) -> Tensor:
    """- log s(b r(w)) - (log s(- b r(w)) + log s(- b r(l))) / 2: each answer against the reference, not against the other.

    Chen et al., 2024 (Noise contrastive alignment of language models), for two answers.
    """
    chosen, rejected = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def apo_zero(pairs: Pairs, settings: Settings) -> Tensor:
    """1 - s(b r(w)) + s(b r(l)): chosen answers become likelier, rejected ones less; for answers better than the model's own.

    D'Oosterlinck et al., 2024 (Anchored preference optimization), equation 7.
    """
    return 1 - torch.sigmoid(settings.beta * pairs.chosen_ratio) + torch.sigmoid(settings.beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, settings: Settings) -> Tensor:
    """s(b r(w)) + 1 - s(b h): both become less likely, rejected ones more so; for answers worse than the model's own.

    D'Oosterlinck et al., 2024 (Anchored preference optimization), equation 8.
    """
    apart = settings.beta * (pairs.chosen_ratio - pairs.rejected_ratio)
    return torch.sigmoid(settings.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(apart)


def sppo_hard(pairs: Pairs, settings: Settings) -> Tensor:
    """(r(w) - 1 / (2 b))^2 + (r(l) + 1 / (2 b))^2: the game-theoretic step for preferences that are certain.

    Wu et al., 2024 (Self-play preference optimization), equation 4.7 with probabilities 1 and 0.
    """
    half = 0.5 / settings.beta
    return (pairs.chosen_ratio - half).square() + (pairs.rejected_ratio + half).square()


def aot(pairs: Pairs, settings: Settings) -> Tensor:
    """The logistic loss of sorted policy margins against sorted reference margins, as if pairs could change partners.

    Needs many pairs at once: quantiles are those of the micro-batch, on each rank, so that this loss (alone of all) does change
    with batch size and accumulation. Melnyk et al., 2024 (Distributional preference alignment via optimal transport), the
    paired form.
    """
    policy = pairs.chosen - pairs.rejected
    reference = _there(pairs.reference_chosen) - _there(pairs.reference_rejected)
    apart = policy.sort().values - reference.sort().values
    return _logistic(settings.beta * apart, settings.label_smoothing)


def aot_unpaired(pairs: Pairs, settings: Settings) -> Tensor:
    """The logistic loss of sorted r(w) against sorted r(l); as `aot`, of the micro-batch.

    Melnyk et al., 2024, the unpaired form.
    """
    apart = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _logistic(settings.beta * apart, settings.label_smoothing)


def discopop(pairs: Pairs, settings: Settings) -> Tensor:
    """(1 - m) (- log s(z)) + m exp(- z) with z = b h and m = s(z / tau): a loss that a language model wrote.

    Lu et al., 2024 (Discovering preference optimization algorithms with and for LLMs), equation 5.
    """
    z = settings.beta * difference(pairs, settings)
    share = torch.sigmoid(z / settings.discopop_tau)
    return -F.logsigmoid(z) * (1 - share) + torch.exp(-z) * share


def orpo(pairs: Pairs, settings: Settings) -> Tensor:
    """- b log s(log odds(w) - log odds(l)) with odds(y) = p / (1 - p), log p = log p(y) / |y|: ORPO's odds-ratio term.

    Hong et al., 2024, equations 4 and 7, whose lambda is b. The whole of ORPO adds the ``sft`` loss, see `parts`. TRL's counts
    the prompt's tokens in that one; the paper's conditions on the prompt, and so does this library's.
    """
    odds = _log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean)
    return -settings.beta * F.logsigmoid(odds)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0; held away from certainty, where it has no gradient."""
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    # Two ways to log(1 - p), each exact where the other cancels.
    other = torch.where(mean < -math.log(2.0), torch.log1p(-torch.exp(mean)), torch.log(-torch.expm1(mean)))
    return mean - other


def simpo(pairs: Pairs, settings: Settings) -> Tensor:
    """- log s(b log p(w) / |w| - b log p(l) / |l| - gamma), without a reference.

    Meng et al., 2024, equation 6; they take b from 2 to 10 and gamma from 0.3 to 1.6.
    """
    apart = settings.beta * (pairs.chosen_mean - pairs.rejected_mean)
    return _logistic(apart - settings.simpo_gamma, settings.label_smoothing)


def cpo(pairs: Pairs, settings: Settings) -> Tensor:
    """- log s(b (log p(w) - log p(l))), without a reference: CPO's preference term.

    Xu et al., 2024 (Contrastive preference optimization), equation 3. The whole of CPO adds the ``sft`` loss, see `parts`.
    """
    return _logistic(settings.beta * (pairs.chosen - pairs.rejected), settings.label_smoothing)


def sft(pairs: Pairs, settings: Settings) -> Tensor:
    """- log p(w), to be divided by the number of chosen tokens: imitation of the chosen answer beside the comparison.

    Pang et al., 2024 (Iterative reasoning preference optimization), equation 1; Dubey et al., 2024 (Llama 3), section 4.1.4.
    """
    return -pairs.chosen


@dataclass(frozen=True)
class Loss:
    """One loss and what it takes.

    Attributes:
        of: (pairs, settings) -> (P,).
        reference: whether it compares with a reference.
        smooths: whether it takes ``label_smoothing``.
        divergences: whether it is right for other divergences than the reverse KL: those that look at h alone are.
        unit: what its sum is divided by.
        means: whether its reward is b log p(y) / |y| (of losses without a reference).
    """

    of: Callable[[Pairs, Settings], Tensor]
    reference: bool = True
    smooths: bool = False
    divergences: bool = False
    unit: Literal["pair", "chosen_token"] = "pair"
    means: bool = False


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, smooths=True, divergences=True),
    "sigmoid_norm": Loss(sigmoid_norm, smooths=True, divergences=True),
    "hinge": Loss(hinge, divergences=True),
    "ipo": Loss(ipo, divergences=True),
    "robust": Loss(robust, smooths=True, divergences=True),
    "exo_pair": Loss(exo_pair, smooths=True, divergences=True),
    "nca_pair": Loss(nca_pair),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "sppo_hard": Loss(sppo_hard),
    "aot": Loss(aot, smooths=True),
    "aot_unpaired": Loss(aot_unpaired, smooths=True),
    "discopop": Loss(discopop, divergences=True),
    "orpo": Loss(orpo, reference=False, means=True),
    "simpo": Loss(simpo, reference=False, smooths=True, means=True),
    "cpo": Loss(cpo, reference=False, smooths=True),
    "sft": Loss(sft, reference=False, divergences=True, unit="chosen_token"),
}


def parts(losses: Mapping[str, float] | Sequence[str] | str, *, cpo_alpha: float = 1.0) -> dict[str, float]:
    """What is added up: name of each loss -> weight, where ORPO and CPO bring the ``sft`` loss that belongs to them.

    Args:
        losses: one, several of weight 1, or several with weights.
        cpo_alpha: weight of the ``sft`` loss within CPO.

    Raises:
        Refusal: for an unknown or repeated name, a weight that is not above 0, or no loss at all.
    """
    named = [losses] if isinstance(losses, str) else list(losses)
    for name in named:
        if name not in LOSSES:
            near = get_close_matches(str(name), LOSSES, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(LOSSES)}."
            raise Refusal(f"There is no preference loss named {name!r}; {hint}")
    if not named or len(set(named)) < len(named):
        raise Refusal(f"Preference losses must be one or more, each named once, got {losses!r}.")
    weights = {name: float(losses[name]) if isinstance(losses, Mapping) else 1.0 for name in named}
    for name, weight in weights.items():
        if not weight > 0 or math.isinf(weight):
            raise Refusal(f"The weight of the preference loss {name!r} must be above 0, got {weight}.")
    within = weights.get("orpo", 0.0) + cpo_alpha * weights.get("cpo", 0.0)
    if within:
        weights["sft"] = weights.get("sft", 0.0) + within
    return weights


def check(weights: Mapping[str, float], settings: Settings) -> None:
    """Refuses settings that a loss cannot take, or that none of them would take.

    Raises:
        Refusal: naming the loss and the number.
    """
    smoothing = settings.label_smoothing
    if "exo_pair" in weights and smoothing == 0:
        raise Refusal(
            "The loss exo_pair needs label_smoothing above 0, whose logarithm it takes; its paper uses 0.001."
        )
    if smoothing > 0 and not any(LOSSES[name].smooths for name in weights):
        takes = ", ".join(name for name, loss in LOSSES.items() if loss.smooths)
        raise Refusal(
            f"label_smoothing {smoothing} would do nothing in {' and '.join(weights)}; leave it out, or use one of {takes}."
        )
    if settings.divergence != "reverse_kl":
        wrong = [name for name in weights if not LOSSES[name].divergences]
        if wrong:
            raise Refusal(
                f"The divergence {settings.divergence} leaves a constant that only cancels between two answers to one prompt, and "
                f"{wrong[0]} looks at each by itself; use reverse_kl, or a loss of the difference, such as sigmoid."
            )


def needs_reference(weights: Mapping[str, float]) -> bool:
    """Whether any of the losses compares with a reference."""
    return any(LOSSES[name].reference for name in weights)
