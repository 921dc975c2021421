"""What is logged of a round of answers, by what they and their rewards are."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_ft.engine.rollouts.round import Round
from lightning_ft.functional.kl_estimators import kl_estimate


def facts_of(round: Round) -> dict[str, float]:
    """Name -> number; not a number where nothing was counted.

    The KL is that of the kept answers, whose tokens alone are measured; all else is that of all answers.
    """
    scores, lengths, ended = round.scores, round.lengths.double(), round.ended
    there = ~scores.total.isnan()
    found = {
        "reward": _mean(scores.total[there]),
        "reward_std": float(scores.total[there].std()) if int(there.sum()) > 1 else math.nan,
        **{f"rewards/{name}": _mean(each[~each.isnan()]) for name, each in scores.each.items()},
        "length": _mean(lengths),
        "length_ended": _mean(lengths[ended]),
        "truncated": _mean((~ended).double()),
        "trained_share": _mean(round.kept.double()),
    }
    if scores.each:
        found["judged"] = _mean(there.double())
    if len(scores.each) > 1:
        found |= {f"judged/{name}": _mean((~each.isnan()).double()) for name, each in scores.each.items()}
    if "reference_logps" in round.tokens:
        before, own = round.tokens["reference_logps"].double(), round.tokens["old_logps"].double()
        answers = int(round.kept.sum())
        found |= {
            "kl": float((own - before).sum()) / answers if answers else math.nan,
            "kl_k1": _mean(kl_estimate(own, before, "k1")),
            "kl_k3": _mean(kl_estimate(own, before, "k3")),
        }
    return found


def _mean(x: Tensor) -> float:
    return float(x.mean()) if len(x) else math.nan
