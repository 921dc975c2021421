"""Prompts for a policy that writes the answers itself: one epoch is one round."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Lt
from datasets import Dataset

from lightning_ft.data.collate import Segment
from lightning_ft.data.mixture import Files, WeightedFiles
from lightning_ft.data.named_files import Split
from lightning_ft.data.prompt_rows import (
    Asking,
    Cut,
    check_columns,
    other_columns,
    select_prompts,
    tokenise_prompts,
)
from lightning_ft.data.rollouts.answer_log import AnswerLog
from lightning_ft.data.rollouts.loader import RoundLoader
from lightning_ft.data.shared_prompts import SharedPrompts
from lightning_ft.data.sources import Source, open_source
from lightning_ft.data.token_rows import BadRows, Report, TokenRows
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.rollouts.module import RolloutModule
from lightning_ft.engine.rollouts.round import Prompt, Round
from lightning_ft.functional.errors import Refusal


class PromptData(SharedPrompts):
    """Prompts that the trained model answers itself, as GRPO, PPO, OnlineDPO and OnPolicyDistillation learn from it.

    A row has ``prompt`` (or ``question``, as reasoning-gym says): a string, which is gone on with, or a list of messages, which
    is answered. All other columns are there for rewards. When an epoch begins, the model as it then is writes the answers to the
    next prompts: a round. The epoch's micro-batches are these answers, in one pass or several. The round is in every checkpoint, so
    that a run resumes within it.

    Args:
        path: rows to train on: a file (JSON lines, a JSON list, CSV, TSV, Parquet), or a Hugging Face data set
            ``owner/name[/config][:split]``; a pattern, a list of these, or a mixture ``{a.jsonl: 2, b.jsonl: 1}`` in
            shares by weight.
        prompts: prompts a round; each is answered as often as the module's ``samples`` says. Rounds take the prompts in turn, each
            once before any comes again.
        passes: how often an epoch goes through its answers: several learn more from each, until they are clipped.
        batch_size: answers a micro-batch on one device. An optimizer step sees ``batch_size * accumulate_grad_batches * devices``
            answers, or some fewer, so that all steps of a round see equally many.
        draw_batch: prompts that are answered at a time on one device: as many as memory allows, since writing many answers takes
            hardly longer than writing one.
        val_path: prompts to validate on, a file, pattern or list; None: see ``val_fraction``.
        val_fraction: share of the rows of each file of ``path`` held out for validation, chosen by the seed; 0 holds
            none out.
        test_path: prompts for ``test``, and for ``predict`` where ``predict_path`` is None.
        predict_path: prompts for ``predict``.
        chat: send a string as a user's message, by the tokenizer's chat template. Rewards then get messages too.
        system: what the system says before the first message of a conversation that has no system message.
        max_length: most tokens of a prompt; None: any length.
        truncation: what happens to a longer prompt: ``error`` refuses and says how many there are, ``drop`` leaves it out,
            ``keep_end`` cuts its beginning.
        bad_rows: what happens to a row without a fit prompt: ``error`` refuses with file and line, ``drop`` leaves it out and
            counts it.
        packing: lay answers end to end, each seeing only itself and its prompt. None: where the model was proven to take such
            rows.
        share_prompts: lay a prompt out once for all its answers in a micro-batch (needs packed rows). None: where the model was
            proven to see it; the numbers are the same, only slower without.
        shuffle: another order of the prompts each time they come, and of the answers in each pass.
        seed: of the order and the hold-out; None: the seed of ``seed_everything``, else 0.
        log_answers: how many answers of each round are written, with their rewards, into ``rollouts.jsonl`` beside the logs.
        tokenizer: a model id, folder or starter asset; None: the tokenizer of the module that is trained.
        cache_dir: where tokenised prompts are kept; None: ``tokenised`` below ``LIGHTNING_FT_CACHE`` or
            ``~/.cache/lightning_ft``.

    Raises:
        Refusal: an argument out of bounds; from ``check_files`` and ``setup`` whatever is wrong with the data.

    Example:
        >>> PromptData("prompts.jsonl", prompts=16, batch_size=8)
        PromptData(path='prompts.jsonl', prompts=16)
    """

    decides: ClassVar[tuple[str, ...]] = ("prompts", "passes", "chat", "system")
    max_tokens = None

    def __init__(
        self,
        path: WeightedFiles,
        *,
        prompts: Annotated[int, Ge(1)] = 8,
        passes: Annotated[int, Ge(1)] = 1,
        batch_size: Annotated[int, Ge(1)] = 8,
        draw_batch: Annotated[int, Ge(1)] = 8,
        val_path: Files | None = None,
        val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        test_path: Files | None = None,
        predict_path: Files | None = None,
        chat: bool = False,
        system: str | None = None,
        max_length: Annotated[int, Ge(1)] | None = 1024,
        truncation: Cut = "error",
        bad_rows: BadRows = "error",
        packing: bool | None = None,
        share_prompts: bool | None = None,
        shuffle: bool = True,
        seed: Annotated[int, Ge(0)] | None = None,
        log_answers: Annotated[int, Ge(0)] = 4,
        tokenizer: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.prompts = prompts
        self.passes = passes
        self.batch_size = batch_size
        self.draw_batch = draw_batch
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.test_path = test_path
        self.predict_path = predict_path
        self.chat = chat
        self.system = system
        self.max_length = max_length
        self.truncation = truncation
        self.bad_rows = bad_rows
        self.packing = packing
        self.share_prompts = share_prompts
        self.shuffle = shuffle
        self.seed = seed
        self.log_answers = log_answers
        self.tokenizer = tokenizer
        self.cache_dir = cache_dir
        self.check()
        self._asking = Asking(chat, system)
        self._round: Round | None = None
        self._answer_log = AnswerLog()
        self._by_row: dict[Split, dict[int, int]] = {}

    @property
    def epoch_rows(self) -> int:  # type: ignore[override]
        """An epoch takes the prompts of one round."""
        return self.prompts

    @property
    def val_batch_size(self) -> int:  # type: ignore[override]
        """Prompts a batch in validation, test and prediction."""
        return self.draw_batch

    @property
    def columns(self) -> list[str]:
        """The columns that rewards may ask for: those that every file has."""
        files = [file for split in ("train", "val") for file in self._paths("fit" if split == "train" else "validate")]
        named = [set(other_columns(self._source(file).columns)) for file in dict.fromkeys(files)]
        return sorted(set.intersection(*named)) if named else []

    @property
    def round(self) -> Round:
        """The round that is trained on.

        Raises:
            Refusal: none has begun.
        """
        if self._round is None:
            raise Refusal("No round has begun: PromptData has answers only while it is trained on.")
        return self._round

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised prompts of this stage; a fit begins without a round."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        if module is not None and not isinstance(module, RolloutModule):
            raise Refusal(
                f"PromptData has no answers, and {type(module).__name__} writes none that it learns from: take GRPO, PPO, "
                "OnlineDPO or OnPolicyDistillation, or data that have answers, such as SFTData."
            )
        if stage in ("fit", None):
            self._round, self._answer_log = None, AnswerLog()
        super().setup(stage)

    def reports(self) -> dict[str, Report]:
        """What became of the prompts of each split that is set up; of all where none is."""
        if not self._rows:
            self.setup()
        found: dict[str, Report] = {split: self._get(split).report for split in self._rows}
        if "train" in found:
            found["train"] = replace(found["train"], epoch_rows=self.prompts)
        return found

    # Rounds

    def train_dataloader(self) -> RoundLoader:
        """The micro-batches of the present round, which is written when its first batch is asked for."""
        return RoundLoader(
            self._begin,
            prompts=self.prompts,
            samples=self._module.samples,
            together=self._module.together,
            batch_size=self.batch_size,
            passes=self.passes,
            packed=self._packs,
            shared=self.shares_prompts,
            shuffle=self.shuffle,
            seed=self._seed,
            placement=self._train_placement,
            clock=self._clock,
        )

    def in_order(self) -> dict[Split, Any]:
        """As for all data, but rows to train on are the last round's answers, each behind a prompt of its own.

        From these continual learning measures what matters to a task (EWC, MAS); those without signal count, too.
        """
        found: dict[Split, Any] = dict(super().in_order())
        if self._round is not None:
            loader = self.train_dataloader()
            loader.shared, loader.together = False, 1
            whole = replace(self._round, kept=torch.ones_like(self._round.kept))
            found["train"] = [batch for batch, _ in loader.first_pass(whole)]
        return found

    @property
    def _module(self) -> RolloutModule:
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, RolloutModule):
            raise Refusal(
                "PromptData asks the module how many answers it writes: use it with a Trainer and GRPO, PPO, "
                "OnlineDPO or OnPolicyDistillation."
            )
        return module

    def _begin(self, loader: RoundLoader, epoch: int) -> Round:
        """The round of an epoch: the one that there is, or that of a checkpoint, or a new one."""
        if self._round is None or self._round.number != epoch:
            shares, rows = self._shares(), self._get("train")
            assert shares is not None
            prompts = self._prompts(
                "train", rows.segments(shares.rows(seed=self._seed, epoch=epoch, shuffle=self.shuffle))
            )
            round = self._module.roll_out(prompts, epoch, batch_size=self.draw_batch)
            self._module.complete(round, loader.first_pass(round), steps=loader.steps)
            self._round = round
            self._write_answers(round)
        return self._round

    def prompts_of(self, split: Split, batch: Batch) -> list[Prompt]:
        """The prompts of an evaluation's batch; none of a filler."""
        rows = self._get(split)
        wanted = [row for row in batch.rows.tolist() if row >= 0]
        return self._prompts(split, rows.segments([self._places_by_row(split)[row] for row in wanted]))

    def longest_prompt(self, splits: Sequence[Split]) -> tuple[int, str] | None:
        """Tokens of the longest prompt of these splits, and where it stands; None where none of them is set up."""
        found: tuple[int, str] | None = None
        for split in splits:
            rows = self._rows.get(split)
            if rows is None or (found is not None and int(rows.lengths.max()) <= found[0]):
                continue
            (prompt,) = rows.segments([int(rows.lengths.argmax())])
            found = len(prompt.ids), self._places(split).where(prompt.row)
        return found

    def _places_by_row(self, split: Split) -> dict[int, int]:
        if split not in self._by_row:
            rows = self._get(split)
            self._by_row[split] = {one.row: place for place, one in enumerate(rows.segments(range(len(rows))))}
        return self._by_row[split]

    def _prompts(self, split: Split, segments: Sequence[Segment]) -> list[Prompt]:
        return [self._prompt(split, segment) for segment in segments]

    def _prompt(self, split: Split, segment: Segment) -> Prompt:
        number = segment.row
        for file in self._files(split):
            source = self._source(file)
            if number < len(source):
                (row,) = source.batch(source.table[number : number + 1])
                columns = {name: row.get(name) for name in other_columns(row)}
                return Prompt(segment.row, self._asking.prompt(row), segment.ids.tolist(), columns)
            number -= len(source)
        raise IndexError(segment.row)

    def _write_answers(self, round: Round) -> None:
        trainer = self.trainer
        assert trainer is not None
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank: it is broadcast
        if trainer.is_global_zero and self.log_answers:
            self._answer_log.write(folder / "rollouts.jsonl", round, self.log_answers)

    # What `PlannedData` asks

    def _open(self, path: str) -> Source:
        return open_source(path, any_columns=True)

    def _check(self, source: Source) -> None:
        check_columns(source)
        try:
            self._asking.prompt(source.first)
        except Refusal as refusal:
            if self.bad_rows == "error":
                raise Refusal(f"{source.where(0)}: {refusal}") from None

    def _tokenised(self, path: str) -> Dataset:
        source = self._source(path)
        check_columns(source)
        return tokenise_prompts(
            source,
            self.resolve_tokenizer(),
            self._asking,
            keep_bad_rows=self.bad_rows == "drop",
            cache_dir=self.cache_dir,
        )

    def _select(self, path: str) -> TokenRows:
        return select_prompts(
            self._tokenised(path),
            self._source(path),
            max_length=self.max_length,
            truncation=cast("Cut", self.truncation),
            bad_rows=self.bad_rows,
            bos=self.resolve_tokenizer().bos_token_id,
        )

    def _deal(self) -> dict[str, Any]:
        return {**super()._deal(), "samples": self._module.samples}

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch was, and its round."""
        return {**super().state_dict(), "round": self._round.state() if self._round is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the round of a checkpoint.

        Raises:
            Refusal: its remaining batches would now be dealt otherwise.
        """
        super().load_state_dict(state_dict)
        if state_dict.get("round") is not None:
            self._round = Round.of_state(state_dict["round"])
