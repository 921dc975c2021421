"""What data modules of tokenised rows share: splits, planned loaders, and exact resume.

A subclass says what a row is (columns, rendering, targets); here is decided which rows are used, in which order they
come on which rank, and what a checkpoint has to hold so that the remaining batches of an epoch are the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.collate import Segment, collate
from lightning_ft.data.loader import EpochClock, Placement, PlannedLoader
from lightning_ft.data.mixture import MixedRows, Shares, draw, mixed
from lightning_ft.data.named_files import NamedFiles, Split
from lightning_ft.data.plan import split_rows
from lightning_ft.data.preview import Piece, Preview, pieces_of, preview_rows
from lightning_ft.data.sources import Source
from lightning_ft.data.token_rows import BadRows, Report, TokenRows, Truncation, select
from lightning_ft.engine.answers import check_rows
from lightning_ft.engine.arguments import check_arguments, describe
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.randomness import global_seed
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.load import load_tokenizer


class PlannedData(NamedFiles):
    """Rows of files, tokenised once, dealt by a plan.

    A subclass stores its arguments, among them those annotated below, and ends its constructor with ``self.check()``;
    it defines `_check` and `_tokenised`; and where its rows hold more than tokens, `_select`, `collate` and `_pieces`.

    Attributes:
        decides: names of further arguments that decide what the batches of an epoch hold.
        rows_are: their kind, which a module may ask for, see `lightning_ft.engine.answers.ROWS`.
    """

    max_length: int | None
    truncation: Truncation
    bad_rows: BadRows
    packing: bool | None
    batch_size: int
    max_tokens: int | None
    val_batch_size: int | None
    shuffle: bool
    seed: int | None
    tokenizer: str | None

    decides: ClassVar[tuple[str, ...]] = ()
    rows_are: ClassVar[str] = "plain"

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[Split, TokenRows | MixedRows] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._clock = EpochClock()

    def check(self) -> None:
        """Refuses arguments out of bounds, and those that contradict each other."""
        check_arguments(self)
        name = type(self).__name__
        if self.val_path is not None and self.val_fraction > 0:
            raise Refusal(f"{name}.val_path and {name}.val_fraction both name validation rows: give one of them.")
        if self.max_tokens is not None and not self.packing:
            raise Refusal(f"{name}.max_tokens fills packed rows: set packing true, or use batch_size.")
        if self.max_tokens is not None and self._is_drawn:
            raise Refusal(
                f"{name}.max_tokens fills its bins once, with rows that each epoch has: with weights or epoch_rows epochs "
                "differ, and so would their number of steps, so use batch_size, or give path as a list without epoch_rows."
            )
        too_long = self.max_tokens is not None and self.max_length is not None and self.max_length > self.max_tokens
        if too_long and self.truncation != "error":
            raise Refusal(
                f"{name}.max_length {self.max_length} lets rows through that cannot fit into max_tokens "
                f"{self.max_tokens}: lower max_length to it, or raise max_tokens."
            )

    # What a subclass says

    def _check(self, source: Source) -> None:
        """Refuses a source whose rows are of a kind that this data module cannot use; reads its first rows at most."""

    def _tokenised(self, path: str) -> Dataset:
        """The rows of a file as a table with the columns of `lightning_ft.data.tokenise.tokenise`."""
        raise Refusal(f"{type(self).__name__} does not say how its rows are tokenised; define _tokenised(path).")

    def _hold_out(self, rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
        """Places of the rows of a file that are trained on, and of those held out."""
        return split_rows(len(rows), self.val_fraction, seed=self._seed)

    def _pieces(self, segment: Segment) -> list[Piece]:
        """A row for people, see `Preview`."""
        return pieces_of(segment, self.resolve_tokenizer())

    def collate(
        self, segments: Sequence[Segment], *, packed: bool, window: dict[str, float] | None, task: str | None
    ) -> Batch:
        """A micro-batch of rows; of none a filler batch."""
        return collate(segments, packed=packed, window=window, task=task)

    def __repr__(self) -> str:
        return describe(self)

    __str__ = __repr__  # Lightning's lists the loaders, which would read the files

    # Before any model is loaded

    def check_files(self, stage: str | None = None) -> None:
        """Reads every file that the stage needs, and refuses what is wrong with it; needs neither model nor tokenizer.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: all files given.
        """
        if stage in ("fit", None):
            self._clock = EpochClock()  # of a run; a checkpoint that it resumes is read after this
            self._refuse_overlap()
        for path in self._paths(stage):
            self._check(self._source(path))

    # Lightning's hooks, in the order in which it calls them

    def prepare_data(self) -> None:
        """Tokenises into the cache, on one process of each node."""
        check_rows(self.trainer, self.rows_are)
        fn = self.trainer.state.fn if self.trainer is not None else None
        self.tokenise(fn.value if fn is not None else None)  # fit, validate, test, predict

    def tokenise(self, stage: str | None) -> None:
        """Tokenises what a stage reads (None: all files) into the cache."""
        for path in self._paths(stage):
            self._tokenised(path)

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised rows of this stage and decides which are used."""
        check_rows(self.trainer, self.rows_are)
        if stage in ("fit", None):
            self._clock = EpochClock()  # of a run; a checkpoint that it resumes is read after this
            self._refuse_overlap()
        if "train" not in self._rows and stage in ("fit", None) and not self.streaming:
            self._rows["train"], held = self._train_and_held_out()
            if held is not None:
                self._rows["val"] = held
        if "val" not in self._rows and stage in ("fit", "validate", None):
            if self.val_path is not None:
                self._rows["val"] = self._rows_of("val")
            elif self.val_fraction > 0:
                held = self._train_and_held_out()[1]
                assert held is not None
                self._rows["val"] = held
        for split in ("test", "predict"):
            if split not in self._rows and stage in (split, None) and self._names(split):
                self._rows[split] = self._rows_of(split)

    def train_dataloader(self) -> PlannedLoader:
        """Shuffled, planned micro-batches with the totals of their accumulation window."""
        overfit = self.trainer is not None and bool(getattr(self.trainer, "overfit_batches", 0))
        return PlannedLoader(
            self._get("train"),
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            packed=self._packs,
            shuffle=self.shuffle and not overfit,
            seed=self._seed,
            placement=self._train_placement,
            collate=self.collate,
            shares=self._shares(),
            clock=self._clock,
        )

    def val_dataloader(self) -> PlannedLoader | list[PlannedLoader]:
        """Rows in file order, or no loader where there are none to validate on."""
        return self._eval_loader("val") if "val" in self._rows else []

    def test_dataloader(self) -> PlannedLoader:
        """Rows of ``test_path`` in file order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> PlannedLoader:
        """Rows of ``predict_path``, else of ``test_path``, in file order."""
        return self._eval_loader("predict")

    def in_order(self) -> dict[Split, PlannedLoader]:
        """The rows of every split that is set up, each once and in file order: to measure them before a run."""
        return {split: self._eval_loader(split) for split in self._rows}

    # For people

    def reports(self) -> dict[str, Report]:
        """What became of the rows of each split that is set up (of all where none is), packing efficiency included."""
        if not self._rows:
            self.setup()
        found: dict[str, Report] = {}
        for split in self._rows:
            loader = self.train_dataloader() if split == "train" else self._eval_loader(split)
            found[split] = replace(self._get(split).report, packing_efficiency=loader.efficiency())
            if split == "train" and (shares := self._shares()) is not None:
                found[split] = replace(found[split], epoch_rows=len(shares))
        return found

    def preview(self, n: int = 3, split: Split = "train") -> list[Preview]:
        """The first ``n`` rows of a split as the model will see them, with what is scored marked."""
        return preview_rows(self._get(split), self._places(split), self._pieces, n)

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes this tokenizer where none was given by name and no trainer leads to a module."""
        self._tokenizer = tokenizer

    def resolve_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the one given by name, else that of the trained module.

        Raises:
            Refusal: if there is none, or it cannot be loaded.
        """
        if self._tokenizer is None:
            if self.tokenizer is not None:
                self._tokenizer = load_tokenizer(self.tokenizer)
            else:
                module = self.trainer.lightning_module if self.trainer is not None else None
                found = getattr(module, "tokenizer", None)
                if found is None:
                    name = type(self).__name__
                    raise Refusal(
                        f"{name} has no tokenizer: the module being trained offers none as `tokenizer`; set "
                        f"{name}.tokenizer to a model id, folder or starter asset."
                    )
                self._tokenizer = found
        assert self._tokenizer is not None
        return self._tokenizer

    # What a checkpoint holds. The position itself is Lightning's own batch counter, which the loader asks.

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch was, and everything that decides what its remaining batches are."""
        epochs = {"epoch": self._clock.epoch if self._ready() else None}
        return {"format": 1, "position": self._position(), **epochs, **self._deal()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses to go on in the middle of an epoch that would now be dealt otherwise.

        Raises:
            Refusal: naming what differs.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not fitting:
            return
        # Also where that epoch was complete: Lightning then passes through it once more, without a batch.
        self._clock.resumed = state_dict.get("epoch")
        self.refuse_other_deal(state_dict, state_dict.get("position", 0))

    def refuse_other_deal(self, deal: dict[str, Any], position: int) -> None:
        """Refuses to go on with an epoch of which this many micro-batches are done, if the rest would now be others.

        Raises:
            Refusal: naming what differs.
        """
        if not position:
            return
        now = self._deal()
        # A window of rows (not of bins) is the same however many ranks share a micro-batch of it.
        rows = [one.get("batch_size", 0) * one.get("devices", 0) for one in (deal, now)]
        either = ("batch_size", "devices") if self.max_tokens is None and rows[0] == rows[1] else ()
        differs = [
            f"{name} {deal.get(name)!r} (now {now[name]!r})"
            for name in now
            if deal.get(name) != now[name] and name not in either
        ]
        if differs:
            raise Refusal(
                f"The checkpoint was written in the middle of an epoch with {', '.join(differs)}, so the remaining "
                "batches would be others: resume with the same values (other devices with batch_size times devices as it was, "
                "where rows are counted), from a checkpoint of an epoch's end, or start a new fit from the weights."
            )

    def _deal(self) -> dict[str, Any]:
        placement = self._train_placement()
        return {
            **self._content(),
            "val_fraction": self.val_fraction,
            **{name: getattr(self, name) for name in self.decides},
            "max_length": self.max_length,
            "truncation": self.truncation,
            "bad_rows": self.bad_rows,
            "packing": self._packs,
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "shuffle": self.shuffle,
            "seed": self._seed,
            "accumulate_grad_batches": placement.accumulate,
            "devices": placement.world_size,
        }

    # Where we are

    def _position(self) -> int:
        """Micro-batches of the current epoch that are done; 0 at its end, and outside a fit."""
        ready = self._ready()
        return 0 if self.trainer is None or ready >= self.trainer.num_training_batches else ready

    def _ready(self) -> int:
        """Micro-batches of the present epoch that were begun, as Lightning counts them; 0 outside a fit."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return 0
        return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _train_placement(self) -> Placement:
        trainer = self.trainer
        if trainer is None:
            return Placement()
        limit = trainer.num_training_batches
        return replace(
            self._placement(),
            accumulate=trainer.accumulate_grad_batches,
            limit=int(limit) if limit not in (0, float("inf")) else None,
            # Lightning restores this counter before it asks for a batch, and puts it to 0 where an epoch begins.
            position=self._ready(),
        )

    def _placement(self) -> Placement:
        trainer = self.trainer
        if trainer is None:
            return Placement()
        # The data-parallel part of the world: under tensor parallelism several ranks see the same rows.
        ranks = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        return Placement(
            world_size=ranks.get("num_replicas", trainer.world_size), rank=ranks.get("rank", trainer.global_rank)
        )

    @property
    def _packs(self) -> bool:
        """Whether rows are packed: as asked for, else where the model that is trained was proven to take packed rows."""
        if self.packing is not None:
            return self.packing
        module = self.trainer.lightning_module if self.trainer is not None else None
        return bool(getattr(getattr(module, "admission", None), "packing", False))

    def _eval_loader(self, split: Split) -> PlannedLoader:
        return PlannedLoader(
            self._get(split),
            batch_size=self.val_batch_size or self.batch_size,
            packed=self._packs,
            seed=self._seed,
            placement=self._placement,
            collate=self.collate,
        )

    # Files and rows

    @property
    def _seed(self) -> int:
        return self.seed if self.seed is not None else global_seed()

    def _train_and_held_out(self) -> tuple[TokenRows | MixedRows, TokenRows | MixedRows | None]:
        kept, held = [], []
        for file in self._files("train"):
            rows = self._select(file)
            if self.val_fraction > 0:
                if len(rows) < 2:
                    raise Refusal(f"{file} has one row, so val_fraction cannot hold one out: give val_path.")
                stay, leave = self._hold_out(rows)
                held.append(rows.subset(leave))
                rows = rows.subset(stay)
            kept.append(rows)
        return mixed(kept), mixed(held) if held else None

    def _rows_of(self, split: Split) -> TokenRows | MixedRows:
        return mixed([self._select(file) for file in self._files(split)])

    @property
    def _is_drawn(self) -> bool:
        return isinstance(self.path, dict) or self.epoch_rows is not None

    def _shares(self) -> Shares | None:
        return draw(self._entries_of("train"), self._get("train"), self.epoch_rows) if self._is_drawn else None

    def _select(self, path: str) -> TokenRows:
        return select(
            self._tokenised(path),
            self._source(path),
            max_length=self.max_length,
            truncation=self.truncation,
            bad_rows=self.bad_rows,
            bos=self.resolve_tokenizer().bos_token_id,
        )

    def _get(self, split: Split) -> TokenRows | MixedRows:
        if split not in self._rows:
            self.setup({"train": "fit", "val": "validate"}.get(split, split))
        if split not in self._rows:
            self._entries_of(split)
            name = type(self).__name__
            raise Refusal(f"{name} has no rows for {split}: set {name}.val_path or {name}.val_fraction.")
        return self._rows[split]
