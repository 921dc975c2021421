"""What modules share that learn from answers which they write themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.evaluation import NamedMeans
from lightning_ft.engine.policy import PolicyModule
from lightning_ft.engine.rewards import Completions, Rewards, Scores
from lightning_ft.engine.rollouts.facts import facts_of
from lightning_ft.engine.rollouts.progress import RoundProgress
from lightning_ft.engine.rollouts.ranks import answer_seed, any_rank, gathered, repeats, shares
from lightning_ft.engine.rollouts.round import Prompt, Round
from lightning_ft.engine.rollouts.silence import Silence
from lightning_ft.engine.rollouts.stops import StopStrings, end_ids
from lightning_ft.engine.sampling import Answer, positions_of, sample
from lightning_ft.engine.scoring import scores
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import evaluating
from lightning_ft.models.causal import CausalLM

_FILLER = [0, 0]
"""What a rank reads that has no prompt left while others still write."""


class RolloutModule(PolicyModule):
    """A language model that writes answers, is told how good they are, and learns from that.

    One epoch is one round: the data module asks `roll_out` for the answers to its prompts, `keep` which of them are trained on,
    and lets `complete` measure them, before the first update. A subclass stores the arguments annotated here, ends its constructor
    with ``self.check()``, and defines `appraise` and the training step.
    """

    writes_its_rows = True
    """Tells the rules of `lightning_ft.engine.compatibility`."""
    rewards: Mapping[str, Any] | None
    rewarded = True
    """Whether there must be rewards; without them answers may still have some, to look at."""
    samples: int
    together = 1
    """Kept answers that have to meet in one micro-batch: 2 where those that are kept of each prompt are compared."""
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop_strings: list[str] | None
    eval_temperature: float
    dropout = False
    draws = True
    """Whether the answers to prompts that are trained on are drawn from a model."""
    drawn_vocabulary: int | None = None
    """Only the first so many tokens are drawn; None: any that the output layer has."""

    def check(self) -> None:
        """Refuses arguments out of bounds, and rewards that cannot be."""
        super().check()
        self._progress = RoundProgress()
        self._silence = Silence()
        if any(not one for one in self.stop_strings or ()):
            raise Refusal(
                f"{type(self).__name__}.stop_strings holds an empty text, which would end every answer at once."
            )
        self._rewards = Rewards(self.rewards or {}, optional=not self.rewarded)
        names = [f"rewards/{name}" for name in self._rewards.sources]
        self.evaluation = NamedMeans(["reward", *names, "length", "truncated", *self.also_evaluated])

    def resolved_arguments(self) -> dict[str, Any]:
        """The arguments with the rewards in plain types, as a checkpoint holds them."""
        return {**arguments_of(self), "rewards": self._rewards.plain()}

    def register(self, attachment: Attachment) -> None:
        """With what `PolicyModule` registers, the refusal of what would make the policy another one while it learns."""
        super().register(attachment)
        for technique in attachment.techniques:
            if technique.traits.slot == "neftune":
                raise Refusal(
                    f"{type(self).__name__} cannot work with {type(technique).__name__}, because noise in training makes the "
                    "policy another one than that which wrote the answers; leave it out."
                )
        if self._trainer is None:
            return
        if not hasattr(self.datamodule, "prompts_of"):
            raise Refusal(
                f"{type(self).__name__} writes the answers that it learns from: give it prompts, by PromptData."
            )
        self._rewards.check(getattr(self.datamodule, "columns", None))

    def on_fit_start(self) -> None:
        """Refuses prompts that are too long to be answered, on all ranks; then says what is trained."""
        asked = {"train": self.draws, "val": self.trainer.enable_validation}
        self._refuse_long_prompts(*(split for split, wanted in asked.items() if wanted))
        super().on_fit_start()

    def on_validation_start(self) -> None:
        """Refuses prompts that are too long to be answered, on all ranks."""
        self._refuse_long_prompts("val")

    def on_test_start(self) -> None:
        """As before a validation."""
        self._refuse_long_prompts("test")

    def on_predict_start(self) -> None:
        """As before a validation."""
        self._refuse_long_prompts("predict")

    def _refuse_long_prompts(self, *splits: str) -> None:
        limit, longest = positions_of(self.view), self.datamodule.longest_prompt(splits)
        if limit is None or longest is None or longest[0] + self.max_new_tokens <= limit:
            return
        tokens, where = longest
        room = limit - self.max_new_tokens
        shorter = f", or PromptData.max_length to {room} with truncation drop or keep_end" if room > 0 else ""
        raise Refusal(
            f"{where} has a prompt of {tokens} tokens, and {type(self).__name__}.max_new_tokens {self.max_new_tokens} more do not "
            f"fit into the model's {limit} positions: lower max_new_tokens{shorter}."
        )

    # -- what a subclass may say ------------------------------------------------------------------------------------------

    also_evaluated: tuple[str, ...] = ()
    """Names of what `evaluated` gives."""

    def evaluated(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, tuple[Tensor, float]]:
        """What else is measured of answers in validation: name -> (sum, how many it was summed over); all ranks ask."""
        return {}

    def write(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], number: int, *, batches: int, batch_size: int
    ) -> list[list[Answer]]:
        """Answers to this rank's prompts of a round, by the model as it is.

        Args:
            prompts: this rank's share; none where there are fewer prompts than ranks.
            seeds: of each answer to each prompt.
            number: of the round.
            batches: how many every rank draws.
            batch_size: prompts each.
        """
        return self._draw_all(self.draw, prompts, seeds, batches, batch_size, self.temperature)

    def keep(self, round: Round) -> Tensor:
        """(S,) bool: which answers are trained on; those that some reward has judged."""
        return ~round.scores.total.isnan()

    def measures(self, steps: int) -> bool:
        """Whether `measure` is wanted of a round of so many optimizer steps.

        In a round of a single one every token is as likely as when it was written; then ``old_logps`` may be left out.
        """
        return steps > 1 or self._compares

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """What is known of each scored token before the first update, (N,) each, without gradients.

        Returns:
            ``old_logps`` and, where the policy is compared with a reference, ``reference_logps``.
        """
        found: dict[str, Tensor] = {}
        if self._compares:
            with self.at_reference():
                found["reference_logps"] = scores(self.view, batch, temperature=self.temperature)["logprob"]
        return {"old_logps": scores(self.view, batch, temperature=self.temperature)["logprob"], **found}

    def appraise(self, round: Round) -> None:
        """Computes from rewards and what was measured whatever else is learned from, ``round.tokens["advantages"]`` above all.

        Called once a round, on every rank with the same whole round; not when a run resumes within it.
        """
        raise NotImplementedError

    def facts(self, round: Round) -> dict[str, float]:
        """What is logged of a round, as ``train/<name>``; not a number where nothing was counted."""
        return facts_of(round)

    # -- a round, in the order in which the data module asks ----------------------------------------------------------------

    def roll_out(self, prompts: Sequence[Prompt], number: int, *, batch_size: int) -> Round:
        """Answers to prompts with their rewards, the same on all ranks; each rank writes its share.

        Args:
            prompts: of the round.
            number: of the round.
            batch_size: prompts that are answered at a time.
        """
        seeds = self._seeds([prompt.row for prompt in prompts], number, self.samples)
        parts = shares(len(prompts), self.trainer.world_size)
        mine = parts[self.trainer.global_rank]
        own, batches = [prompts[i] for i in mine], -(-len(parts[0]) // batch_size)
        own_seeds = [seeds[i] for i in mine]
        with self._progress.section(self.trainer, f"Round {number}: tokens", batches * self.max_new_tokens):
            groups = self.write(own, own_seeds, number, batches=batches, batch_size=batch_size)
        answers, texts, found = self._judged(own, groups)
        names = list(found.each)
        numbers = torch.stack([found.total, *found.each.values()], 1).tolist()
        everyone = gathered([(a.ids, a.ended, text, row) for a, text, row in zip(answers, texts, numbers, strict=True)])
        columns = torch.tensor([one[3] for one in everyone], dtype=torch.float64)  # (S, 1 + K)
        round = Round(
            number,
            self.samples,
            list(prompts),
            [Answer(ids, ended) for ids, ended, _, _ in everyone],
            [text for _, _, text, _ in everyone],
            Scores(columns[:, 0], {name: columns[:, 1 + k] for k, name in enumerate(names)}),
            kept=torch.ones(len(everyone), dtype=torch.bool),
        )
        round.kept = self.keep(round)
        return round

    def complete(self, round: Round, batches: Iterable[tuple[Batch, Sequence[int]]], *, steps: int) -> None:
        """Measures the kept answers, appraises them, and notes the facts; tells of rewards that have judged nothing.

        Args:
            round: after `roll_out`.
            batches: this rank's micro-batches of the first pass, fillers included, each with the answers that it holds, in the
                order of its segments. So the first update finds the very numbers that were measured.
            steps: optimizer steps that the round will have.

        Raises:
            Refusal: no reward has judged any answer of the first round.
        """
        self._silence.tell(round, self.trainer, rewarded=self.rewarded)
        if self.measures(steps):
            self._measure_all(round, list(batches))
        self.appraise(round)
        round.facts = self.facts(round)

    def _measure_all(self, round: Round, batches: Sequence[tuple[Batch, Sequence[int]]]) -> None:
        own: list[tuple[int, dict[str, Tensor]]] = []
        names: list[str] = []
        with self._writing(), self._progress.section(self.trainer, f"Round {round.number}: measured", len(batches)):
            for batch, answers in batches:
                measured = self.measure(batch.to(self.device))
                self._progress.advance()
                counts = [int(n) for n in torch.bincount(batch.segment_of_scored, minlength=len(batch.rows))]
                parts = {name: values.float().cpu().split(counts) for name, values in measured.items()}
                own += [(answer, {n: part[i] for n, part in parts.items()}) for i, answer in enumerate(answers)]
                names = list(measured)
        by_answer = dict(gathered(own))
        ordered = [by_answer[answer] for answer in round.kept.nonzero()[:, 0].tolist()]
        round.tokens = {name: torch.cat([torch.zeros(0), *(one[name] for one in ordered)]) for name in names}

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], temperature: float
    ) -> list[list[Answer]]:
        """Answers to prompts, as many as there are seeds; none to none, though other ranks may want forwards (FSDP2).

        To be called outside of steps: FSDP2 gathers around it what it gathers around a step.
        """
        return self._sample(prompts, seeds, temperature)

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        temperature: float,
        view: CausalLM | None = None,
    ) -> list[list[Answer]]:
        """The same by another model where ``view`` is given; its answers end where this one's do."""
        together, idle = isinstance(self.trainer.strategy, ModelParallelStrategy), not prompts

        def go_on(writing: bool) -> bool:
            self._progress.advance()
            return any_rank(writing, self.device) if together else writing

        stop = StopStrings(self.tokenizer, self.stop_strings or ())
        found = sample(
            view or self.view,
            prompts or [_FILLER],
            seeds=seeds or [[0]],
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            size=self.drawn_vocabulary,
            end_ids=end_ids(self.model, self.tokenizer),
            stops=(lambda ids: True) if idle else stop if stop.strings else None,
            go_on=go_on,
        )
        return [] if idle else found

    def _draw_all(
        self,
        draw: Callable[..., list[list[Answer]]],
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int]],
        batches: int,
        size: int,
        temperature: float,
    ) -> list[list[Answer]]:
        """Answers to this rank's prompts in so many batches; prompts of like length are padded together."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        found: dict[int, list[Answer]] = {}
        with self._writing():
            for begin in range(0, batches * size, size):
                some = order[begin : begin + size]
                drawn = draw([prompts[i].ids for i in some], [seeds[i] for i in some], temperature)
                found.update(zip(some, drawn, strict=True))
                self._progress.to((begin // size + 1) * self.max_new_tokens)
        return [found[i] for i in range(len(prompts))]

    def _judged(
        self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Answer]]
    ) -> tuple[list[Answer], list[str], Scores]:
        """Answers one after the other, their texts and their rewards; all ranks must ask."""
        answers = [answer for group in groups for answer in group]
        asked = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        stop = StopStrings(self.tokenizer, self.stop_strings or ())
        texts = [stop.text(answer.ids) for answer in answers]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        completions = Completions(
            prompts=[prompt.given for prompt in asked],
            texts=texts,
            prompt_ids=[prompt.ids for prompt in asked],
            ids=[answer.ids for answer in answers],
            ended=[answer.ended for answer in answers],
            rows=[prompt.row for prompt in asked],
            columns={name: [prompt.columns.get(name) for prompt in asked] for name in names},
            tokenizer=self.tokenizer,
        )
        return answers, texts, self._rewards.score(completions, self.device)

    def _seeds(self, rows: Sequence[int], number: int, samples: int) -> list[list[int]]:
        seed = Attachment.of(self).seed
        return [
            [answer_seed(seed, number, row, again, one) for one in range(samples)]
            for row, again in zip(rows, repeats(rows), strict=True)
        ]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """As training computes, but in eval mode and without gradients."""
        with evaluating(self.model), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            yield

    # -- steps ------------------------------------------------------------------------------------------------------------

    def log_round(self) -> None:
        """Logs the facts of the present round, once an epoch; called in each step, so that a resumed run has them too."""
        several = self.trainer.world_size > 1
        for name, value in self.datamodule.round.facts.items():
            self.log(
                f"train/{name}",
                value,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                sync_dist=several,
                prog_bar=name == "reward",
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Answers a batch of prompts at ``eval_temperature`` and adds their rewards to what is measured."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Like `validation_step`, logged under ``test/``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """An answer to each prompt: its ``row``, the ``prompt`` as the data have it, and the ``answer``."""
        prompts = self.datamodule.prompts_of("predict", batch)
        answers = self._answers(prompts)
        stop = StopStrings(self.tokenizer, self.stop_strings or ())
        return [
            {"row": p.row, "prompt": p.given, "answer": stop.text(a.ids), "ended": a.ended}
            for p, a in zip(prompts, answers, strict=True)
        ]

    def _answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        seeds = self._seeds([prompt.row for prompt in prompts], 0, 1)
        groups = self._draw_all(self._sample, prompts, seeds, 1, max(len(prompts), 1), self.eval_temperature)
        return [answer for group in groups for answer in group]

    def _evaluate(self, batch: Batch, stage: str) -> None:
        prompts = self.datamodule.prompts_of(stage, batch)
        answers, _, found = self._judged(prompts, [[answer] for answer in self._answers(prompts)])
        measured = {"reward": found.total, **{f"rewards/{name}": each for name, each in found.each.items()}}
        count = float(len(answers))
        values = {name: (each.nansum(), float((~each.isnan()).sum())) for name, each in measured.items()}
        values["length"] = (torch.tensor(float(sum(len(a.ids) for a in answers))), count)
        values["truncated"] = (torch.tensor(float(sum(not a.ended for a in answers))), count)
        self.evaluation.update({**values, **self.evaluated(prompts, answers)})

    def _finished(self, means: dict[str, Any]) -> dict[str, Any]:
        return means
