"""Data for KTO: a file of prompts with one answer each, good or bad -> batches of labelled answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Lt
from datasets import Dataset

from lightning_ft.data.answered import AnsweredData
from lightning_ft.data.answered_rows import UnpairedRows
from lightning_ft.data.collate import Segment
from lightning_ft.data.collate_pairs import UnpairedSegment, collate_unpaired
from lightning_ft.data.mixture import Files, MixedRows, WeightedFiles, places_of
from lightning_ft.data.named_files import Split
from lightning_ft.data.plan import split_rows
from lightning_ft.data.preference_rows import is_paired, labelled_of, pair_of, wrong_columns
from lightning_ft.data.preference_select import select_unpaired
from lightning_ft.data.preference_tokens import Read, tokenise_exchanges
from lightning_ft.data.preview import Piece, answer_pieces, pieces_between
from lightning_ft.data.sources import Located, Source
from lightning_ft.data.token_rows import BadRows, TokenRows, Truncation
from lightning_ft.engine.batch import Batch
from lightning_ft.functional.errors import Refusal


@dataclass(frozen=True)
class _Halves:
    """Where the answers of a file of pairs stand: two to a row."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return 2 * len(self.source)

    def where(self, row: int) -> str:
        return f"{self.source.where(row // 2)} ({('chosen', 'rejected')[row % 2]})"


class UnpairedPreferenceData(AnsweredData):
    """Prompts with one answer each and whether it is a good one, as KTO learns from them.

    A row has ``prompt``, ``completion`` (strings, or lists of messages) and ``label``: true or false, or 1 or 0. Rows of pairs
    (``chosen`` and ``rejected``, see `PreferenceData`) become two rows each, a good and a bad one. What is learned of an answer
    are its assistant turns with their ends, as in `SFTData`, with the same proofs for each row.

    Args:
        path: rows to train on: a file (JSON lines, a JSON list, CSV, TSV, Parquet), or a Hugging Face data set
            ``owner/name[/config][:split]``; a pattern, a list of these, or a mixture ``{a.jsonl: 2, b.jsonl: 1}`` in
            shares by weight.
        val_path: rows to validate on, a file, pattern or list; None: see ``val_fraction``.
        val_fraction: share of the rows of each file of ``path`` held out for validation, chosen by the seed, good and bad ones
            alike; both answers to a prompt of pairs stay together. 0 holds none out.
        test_path: rows for ``test``, and for ``predict`` where ``predict_path`` is None.
        predict_path: rows for ``predict``.
        mismatched: put behind each prompt also the answer of another row of its micro-batch, from which KTO estimates how far
            the policy has moved. None: unless the module says that it has no use for them.
        max_length: most tokens that a prompt may have with its answer; 1024 is TRL's default, so that runs compare. None: any
            length.
        truncation: what happens to a longer row: ``error`` refuses and says how many there are, ``drop`` leaves it out,
            ``keep_start`` cuts the end of the answer, ``keep_end`` the beginning of the prompt.
        bad_rows: what happens to a row that cannot be learned from: a missing or empty part, no label, no end of turn.
            ``error`` refuses with file and line, ``drop`` leaves it out and counts it by reason.
        packing: lay rows end to end, each seeing only itself. None: where the model was proven to take such rows; False pads,
            with rows of like length together.
        share_prompts: lay each prompt out once for its own and the mismatched answer (needs packed rows). None: where the model
            was proven to see it; the loss is the same, only slower without.
        batch_size: rows a micro-batch on one device, at least 2 where answers are mismatched, better more.
        max_tokens: fill each micro-batch to at most so many tokens instead (needs ``packing``), mismatched answers included.
            None: by ``batch_size``.
        val_batch_size: rows a batch in validation, test and prediction; None: ``batch_size``.
        epoch_rows: rows an epoch takes, drawn anew each time; None: each row once.
        shuffle: a new order of the training rows in each epoch.
        seed: of the order and the hold-out; None: the seed of ``seed_everything``, else 0.
        tokenizer: a model id, folder or starter asset; None: the tokenizer of the module that is trained.
        cache_dir: where tokenised rows are kept; None: ``tokenised`` below ``LIGHTNING_FT_CACHE`` or
            ``~/.cache/lightning_ft``.

    Raises:
        Refusal: an argument out of bounds; from ``check_files`` and ``setup`` whatever is wrong with the data.

    Example:
        >>> UnpairedPreferenceData("rated.jsonl", batch_size=4)
        UnpairedPreferenceData(path='rated.jsonl', batch_size=4)

    References:
        Ethayarajh et al., 2024, section 4.1: the mismatched answers.
    """

    rows_are = "labelled"

    def __init__(
        self,
        path: WeightedFiles,
        *,
        val_path: Files | None = None,
        val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        test_path: Files | None = None,
        predict_path: Files | None = None,
        mismatched: bool | None = None,
        max_length: Annotated[int, Ge(2)] | None = 1024,
        truncation: Truncation = "error",
        bad_rows: BadRows = "error",
        packing: bool | None = None,
        share_prompts: bool | None = None,
        batch_size: Annotated[int, Ge(1)] = 8,
        max_tokens: Annotated[int, Gt(1)] | None = None,
        val_batch_size: Annotated[int, Ge(1)] | None = None,
        epoch_rows: Annotated[int, Ge(1)] | None = None,
        shuffle: bool = True,
        seed: Annotated[int, Ge(0)] | None = None,
        tokenizer: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.test_path = test_path
        self.predict_path = predict_path
        self.mismatched = mismatched
        self.max_length = max_length
        self.truncation = truncation
        self.bad_rows = bad_rows
        self.packing = packing
        self.share_prompts = share_prompts
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.val_batch_size = val_batch_size
        self.epoch_rows = epoch_rows
        self.shuffle = shuffle
        self.seed = seed
        self.tokenizer = tokenizer
        self.cache_dir = cache_dir
        self.check()

    def check(self) -> None:
        """Refuses arguments out of bounds, and those that contradict each other."""
        super().check()
        if self.mismatched and min(self.batch_size, self.val_batch_size or self.batch_size) < 2 and not self.max_tokens:
            raise Refusal(
                "UnpairedPreferenceData.mismatched takes the answer of another row of the micro-batch: set batch_size and "
                "val_batch_size to 2 or more."
            )

    @property
    def mismatches(self) -> bool:
        """Whether prompts also come with the answers of other rows: as asked for, else unless the module has no use for them."""
        if self.mismatched is not None:
            return self.mismatched
        module = self.trainer.lightning_module if self.trainer is not None else None
        return bool(getattr(module, "wants_mismatched", True))

    def label_counts(self) -> dict[str, int]:
        """Training rows of each label after the hold-out: ``desirable`` and ``undesirable``."""
        rows = self._get("train")
        parts = rows.parts if isinstance(rows, MixedRows) else (rows,)
        good = sum(int(part.desirable(part.index).sum()) for part in parts if isinstance(part, UnpairedRows))
        return {"desirable": good, "undesirable": len(rows) - good}

    def collate(
        self, segments: Sequence[Segment], *, packed: bool, window: dict[str, float] | None, task: str | None
    ) -> Batch:
        """A micro-batch of answers; of none a filler batch."""
        shared, mismatched = self.shares_prompts, self.mismatches
        return collate_unpaired(segments, packed=packed, shared=shared, mismatched=mismatched, window=window, task=task)

    # What `PlannedData` asks

    def _reader(self, source: Source) -> Read:
        if is_paired(source.columns):
            return partial(pair_of, margins=source.first.get("margin") is not None)
        needed = ("prompt", "completion", "label")
        if not set(needed) <= set(source.columns):
            expected = "prompt + completion + label, or prompt + chosen + rejected"
            raise wrong_columns(source.where(0), source.columns, needed, expected)
        return labelled_of

    def _tokenised(self, path: str) -> Dataset:
        source = self._source(path)
        paired = is_paired(source.columns)
        margins = paired and source.first.get("margin") is not None
        return tokenise_exchanges(
            source,
            self.resolve_tokenizer(),
            self._reader(source),
            {"kind": "pairs", "margins": margins} if paired else {"kind": "unpaired"},
            keep_bad_rows=self.bad_rows == "drop",
            cache_dir=self.cache_dir,
        )

    def _select(self, path: str) -> TokenRows:
        rows = select_unpaired(
            self._tokenised(path),
            self._source(path),
            max_length=self.max_length,
            truncation=self.truncation,
            bad_rows=self.bad_rows,
            bos=self.resolve_tokenizer().bos_token_id,
            paired=is_paired(self._source(path).columns),
            mismatched=self.mismatches,
        )
        if self.mismatches and len(np.unique(rows.source_rows())) < 2:
            raise Refusal(f"{path} has one prompt, so no other row's answer can be put behind it: give more rows.")
        return rows

    def _hold_out(self, rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
        assert isinstance(rows, UnpairedRows)
        if not rows.paired:
            labels = rows.desirable(rows.index).astype(np.int64)
            return split_rows(len(rows), self.val_fraction, seed=self._seed, strata=labels)
        if len(rows) < 4:
            raise Refusal(f"{rows.report.name} has one pair, so val_fraction cannot hold one out: give val_path.")
        stay, leave = split_rows(len(rows) // 2, self.val_fraction, seed=self._seed)
        both = np.arange(2)
        return (2 * stay[:, None] + both).reshape(-1), (2 * leave[:, None] + both).reshape(-1)

    def _places(self, split: Split) -> Located:
        sources = [self._source(file) for file in self._files(split)]
        return places_of([_Halves(source) if is_paired(source.columns) else source for source in sources])

    def _pieces(self, segment: Segment) -> list[Piece]:
        assert isinstance(segment, UnpairedSegment)
        tokenizer, prompt = self.resolve_tokenizer(), segment.ids[: segment.prompt]
        name = "desirable" if segment.desirable else "undesirable"
        pieces = [*pieces_between(prompt, prompt[:0], tokenizer), Piece(f"\n── {name}: ", False, 0)]
        return pieces + answer_pieces(segment.answer, tokenizer)
