"""Which answers of a round meet in which micro-batch: a pure function of (seed, round, which are kept, where it runs).

Answers to one prompt stay together, so that their prompt is computed once. How many steps a round takes depends on how many
answers are drawn, not on how many of them are kept: those are spread evenly, so that a Trainer knows the length of its run.
"""

from __future__ import annotations

import numpy as np

from lightning_ft.data.plan import Plan, permutation

_ROUND = 12  # a random stream of its own, beside those of plan.py and its neighbours


def micro_batches(rows: int, *, batch_size: int, world_size: int, accumulate: int, passes: int) -> int:
    """Micro-batches a rank in one round: whole windows, so that none joins two passes."""
    return passes * accumulate * -(-rows // (batch_size * world_size * accumulate))


def deal_round(
    kept: np.ndarray,
    lengths: np.ndarray,
    *,
    samples: int,
    batch_size: int,
    together: int = 1,
    world_size: int = 1,
    accumulate: int = 1,
    passes: int = 1,
    shuffle: bool = True,
    seed: int = 0,
    number: int = 0,
) -> Plan:
    """Deals the kept answers, each once a pass.

    Args:
        kept: (S,) bool.
        lengths: (S,) tokens of each answer.
        samples: answers to each prompt, which follow one another.
        batch_size: most answers a micro-batch.
        together: kept answers that meet in one micro-batch, in their order: 2 where a loss compares the two that are kept of each
            prompt. Their number must be a multiple of it.
        world_size: ranks.
        accumulate: micro-batches a window.
        passes: how often the round is gone through.
        shuffle: another order of the prompts in each pass.
        seed: of the run.
        number: of the round.
    """
    micro: list[list[np.ndarray]] = []
    count = micro_batches(len(kept), batch_size=batch_size, world_size=world_size, accumulate=accumulate, passes=1)
    prompts = len(kept) // samples
    for one in range(passes):
        order = permutation(prompts, (seed, _ROUND, number, one)) if shuffle else np.arange(prompts)
        rows = (order[:, None] * samples + np.arange(samples)).reshape(-1)
        units = rows[kept[rows]].reshape(-1, together)
        for window in np.array_split(units, count // accumulate):
            pieces = [piece.reshape(-1) for piece in np.array_split(window, accumulate * world_size)]
            micro += [pieces[i : i + world_size] for i in range(0, len(pieces), world_size)]
    totals = {
        "row": np.array([float(sum(map(len, ranks))) for ranks in micro]),
        "token": np.array([float(sum(lengths[part].sum() for part in ranks)) for ranks in micro]),
    }
    return Plan(micro, accumulate, totals)
