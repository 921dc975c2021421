"""The loader that has a round written when an epoch begins, and then deals its answers.

It knows its length before anything is written: Lightning asks loaders without one for a batch ahead, which would draw the next
round before the last update of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lightning_ft.data.loader import EpochClock, Placement, PlannedLoader
from lightning_ft.data.plan import Plan
from lightning_ft.data.rollouts.collate import Rollout, collate_rollouts
from lightning_ft.data.rollouts.deal import deal_round, micro_batches
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.rollouts.round import Round


class RoundLoader(PlannedLoader):
    """Iterable over the micro-batches of a round, one round each time.

    Args:
        begin: gives the round of an epoch; called when its first batch is asked for.
        prompts: how many a round has.
        samples: answers to each.
        together: kept answers that meet in one micro-batch.
        batch_size: answers a micro-batch.
        passes: how often a round is gone through.
        packed: answers end to end, or padded.
        shared: whether the prompt of several answers is laid out once.
        shuffle: another order in each pass.
        seed: of the run.
        placement: called whenever an epoch begins.
        clock: the epochs of the run.
    """

    def __init__(
        self,
        begin: Callable[[RoundLoader, int], Round],
        *,
        prompts: int,
        samples: int,
        together: int,
        batch_size: int,
        passes: int,
        packed: bool,
        shared: bool,
        shuffle: bool,
        seed: int,
        placement: Callable[[], Placement],
        clock: EpochClock,
    ) -> None:
        # The rows do not exist yet, and nothing that is inherited looks at them.
        super().__init__(
            None,  # type: ignore[arg-type]
            batch_size=batch_size,
            packed=packed,
            shuffle=shuffle,
            seed=seed,
            placement=placement,
            clock=clock,
        )
        self.begin = begin
        self.prompts = prompts
        self.samples = samples
        self.together = together
        self.passes = passes
        self.shared = shared
        self.sampler = self  # Lightning tells the epoch to a loader's sampler only

    def __len__(self) -> int:
        """Micro-batches a round on each rank, without the trainer's limit."""
        placement = self.placement()
        return micro_batches(
            self.prompts * self.samples,
            batch_size=self.batch_size,
            world_size=placement.world_size,
            accumulate=placement.accumulate,
            passes=self.passes,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps a round."""
        return len(self) // self.placement().accumulate

    def plan_of(self, round: Round, placement: Placement, passes: int) -> Plan:
        """How the answers of a round are dealt."""
        return deal_round(
            round.kept.numpy(),
            round.lengths.numpy(),
            samples=self.samples,
            batch_size=self.batch_size,
            together=self.together,
            world_size=placement.world_size,
            accumulate=placement.accumulate,
            passes=passes,
            shuffle=self.shuffle,
            seed=self.seed,
            number=round.number,
        )

    def first_pass(self, round: Round) -> Iterator[tuple[Batch, list[int]]]:
        """This rank's micro-batches as the first pass will have them, before anything is known of tokens, and their answers."""
        placement = self.placement()
        for ranks in self.plan_of(round, placement, 1).micro:
            yield self._batch(round, ranks[placement.rank], [], None), ranks[placement.rank].tolist()

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches of this rank from the position on."""
        placement = self.placement()
        self.clock.begin(placement.position)
        round = self.begin(self, self.epoch)
        plan = self.plan_of(round, placement, self.passes)
        names = sorted(round.tokens)
        stop = len(plan) if placement.limit is None else min(placement.limit, len(plan))
        limited = Plan(plan.micro[:stop], plan.accumulate, {unit: total[:stop] for unit, total in plan.totals.items()})
        for i in range(placement.position, stop):
            yield self._batch(round, limited.micro[i][placement.rank], names, limited.window(i))

    def _batch(self, round: Round, answers: np.ndarray, names: list[str], window: dict[str, float] | None) -> Batch:
        ends = (round.lengths * round.kept).cumsum(0).tolist()
        rollouts = []
        for answer in answers.tolist():
            ids, prompt = round.answers[answer].ids, round.prompts[answer // self.samples]
            own = slice(ends[answer] - len(ids), ends[answer])
            tokens = {name: round.tokens[name][own] for name in names}
            rollouts.append(Rollout(np.array(prompt.ids), np.array(ids), answer // self.samples, prompt.row, tokens))
        return collate_rollouts(rollouts, names, packed=self.packed, shared=self.shared, window=window)
