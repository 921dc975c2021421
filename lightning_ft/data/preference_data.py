"""Data for reward models and preference optimisation: a file of prompts with a better and a worse answer -> batches of pairs."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from datasets import Dataset

from lightning_ft.data.answered import AnsweredData
from lightning_ft.data.collate import Segment
from lightning_ft.data.collate_pairs import PairSegment, collate_pairs
from lightning_ft.data.mixture import Files, WeightedFiles
from lightning_ft.data.preference_rows import is_paired, pair_of, wrong_columns
from lightning_ft.data.preference_select import select_pairs
from lightning_ft.data.preference_tokens import Read, tokenise_exchanges
from lightning_ft.data.preview import Piece, answer_pieces, pieces_between
from lightning_ft.data.sources import Source
from lightning_ft.data.token_rows import BadRows, TokenRows, Truncation
from lightning_ft.engine.batch import Batch
from lightning_ft.functional.errors import Refusal


class PreferenceData(AnsweredData):
    """Prompts with a better and a worse answer, as reward models and DPO learn from them.

    A row has ``chosen``, ``rejected`` and mostly ``prompt``: strings, or lists of messages. Without ``prompt`` it is what both
    conversations (or both strings, in tokens) begin with. An optional ``margin`` says by how much the chosen answer is better.
    What is learned of an answer are its assistant turns with their ends, as in `SFTData`, with the same proofs for each row. Both
    answers stand behind exactly the same tokens, so that the prompt is laid out and computed once for both.

    Args:
        path: rows to train on: a file (JSON lines, a JSON list, CSV, TSV, Parquet), or a Hugging Face data set
            ``owner/name[/config][:split]``; a pattern, a list of these, or a mixture ``{a.jsonl: 2, b.jsonl: 1}`` in
            shares by weight.
        val_path: rows to validate on, a file, pattern or list; None: see ``val_fraction``.
        val_fraction: share of the rows of each file of ``path`` held out for validation, chosen by the seed; 0 holds
            none out.
        test_path: rows for ``test``, and for ``predict`` where ``predict_path`` is None.
        predict_path: rows for ``predict``.
        max_length: most tokens that the prompt may have together with either answer; 1024 is TRL's default, so that runs
            compare. None: any length.
        truncation: what happens to a longer pair: ``error`` refuses and says how many there are, ``drop`` leaves it out,
            ``keep_start`` cuts the ends of the answers, ``keep_end`` the beginning of the prompt, the same for both answers.
        bad_rows: what happens to a pair that cannot be learned from: a missing or empty part, no end of turn, chosen and
            rejected alike, or alike after truncation. ``error`` refuses with file and line, ``drop`` leaves it out and
            counts it by reason.
        packing: lay rows end to end, each seeing only itself. None: where the model was proven to take such rows; False pads,
            with pairs of like length together.
        share_prompts: lay each prompt out once for both answers (needs packed rows). None: where the model was proven to see
            it; the loss is the same, only slower without.
        batch_size: pairs a micro-batch on one device. Steps stay the same where ``batch_size * accumulate_grad_batches
            * devices`` does.
        max_tokens: fill each micro-batch to at most so many tokens instead (needs ``packing``), a shared prompt counted once.
            None: by ``batch_size``.
        val_batch_size: pairs a batch in validation, test and prediction; None: ``batch_size``.
        epoch_rows: pairs an epoch takes, drawn anew each time; None: each pair once.
        shuffle: a new order of the training rows in each epoch.
        seed: of the order and the hold-out; None: the seed of ``seed_everything``, else 0.
        tokenizer: a model id, folder or starter asset; None: the tokenizer of the module that is trained.
        cache_dir: where tokenised rows are kept; None: ``tokenised`` below ``LIGHTNING_FT_CACHE`` or
            ``~/.cache/lightning_ft``.

    Raises:
        Refusal: an argument out of bounds; from ``check_files`` and ``setup`` whatever is wrong with the data.

    Example:
        >>> PreferenceData("pairs.jsonl", val_fraction=0.1, batch_size=4)
        PreferenceData(path='pairs.jsonl', val_fraction=0.1, batch_size=4)
    """

    rows_are = "pairs"

    def __init__(
        self,
        path: WeightedFiles,
        *,
        val_path: Files | None = None,
        val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        test_path: Files | None = None,
        predict_path: Files | None = None,
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
        self._with_margins: dict[str, bool] = {}
        self.path = path
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.test_path = test_path
        self.predict_path = predict_path
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

    def check_files(self, stage: str | None = None) -> None:
        """Reads every file that the stage needs, and refuses what is wrong with it; needs neither model nor tokenizer."""
        super().check_files(stage)
        self._refuse_some_margins(stage)

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised rows of this stage, whose margins must be given for all rows of a split or for none."""
        self._refuse_some_margins(stage)
        super().setup(stage)

    def collate(
        self, segments: Sequence[Segment], *, packed: bool, window: dict[str, float] | None, task: str | None
    ) -> Batch:
        """A micro-batch of pairs; of none a filler batch."""
        return collate_pairs(segments, packed=packed, shared=self.shares_prompts, window=window, task=task)

    # What `PlannedData` asks

    def _reader(self, source: Source) -> Read:
        if not is_paired(source.columns):
            expected = "chosen + rejected, with a prompt or both beginning with it (margin is optional)"
            where = source.where(0)
            raise wrong_columns(where, source.columns, ("prompt", "chosen", "rejected"), expected)
        return partial(pair_of, margins=self._has_margins(source))

    def _has_margins(self, source: Source) -> bool:
        """Whether a row has one; then every row must. A column of nothing is none."""
        if source.name not in self._with_margins:
            column = source.column("margin") if "margin" in source.columns else []
            self._with_margins[source.name] = any(value not in (None, "") for value in column)
        return self._with_margins[source.name]

    def _refuse_some_margins(self, stage: str | None) -> None:
        """Files whose rows meet in a batch have margins all, or none."""
        for split in self._splits(stage):
            files = self._files(split)
            has = {file: self._has_margins(self._source(file)) for file in files}
            if len(set(has.values())) > 1:
                one, other = (next(file for file in files if has[file] is wanted) for wanted in (True, False))
                raise Refusal(f"{one} has margins and {other} has none: give all rows one, or take the column out.")

    def _tokenised(self, path: str) -> Dataset:
        source = self._source(path)
        return tokenise_exchanges(
            source,
            self.resolve_tokenizer(),
            self._reader(source),
            {"kind": "pairs", "margins": self._has_margins(source)},
            keep_bad_rows=self.bad_rows == "drop",
            cache_dir=self.cache_dir,
        )

    def _select(self, path: str) -> TokenRows:
        return select_pairs(
            self._tokenised(path),
            self._source(path),
            max_length=self.max_length,
            truncation=self.truncation,
            bad_rows=self.bad_rows,
            bos=self.resolve_tokenizer().bos_token_id,
            margins=self._has_margins(self._source(path)),
        )

    def _pieces(self, segment: Segment) -> list[Piece]:
        assert isinstance(segment, PairSegment)
        tokenizer, prompt = self.resolve_tokenizer(), segment.ids[: segment.prompt]
        pieces = pieces_between(prompt, prompt[:0], tokenizer)
        for name, answer in (("chosen", segment.chosen), ("rejected", segment.rejected)):
            pieces += [Piece(f"\n── {name}: ", False, 0), *answer_pieces(answer, tokenizer)]
        return pieces if segment.margin is None else [*pieces, Piece(f"\n── margin: {segment.margin:g}", False, 0)]
