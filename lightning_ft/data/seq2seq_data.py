"""Data for encoder-decoder models: a file of prompts and completions -> batches of what is read and what is written."""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Lt
from datasets import Dataset

from lightning_ft.data.collate import Segment
from lightning_ft.data.frames import Frame
from lightning_ft.data.known_config import known_config
from lightning_ft.data.mixture import Files, WeightedFiles
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.preview import Piece, pieces_between
from lightning_ft.data.rows import text_in
from lightning_ft.data.seq2seq_rows import Seq2SeqSegment, collate_seq2seq, select_seq2seq, tokenise_seq2seq
from lightning_ft.data.sources import Source, open_source
from lightning_ft.data.token_rows import BadRows, TokenRows, Truncation
from lightning_ft.engine.batch import Batch
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.seq2seq import start_id

_PAIRS = (("prompt", "completion"), ("source", "target"))


class Seq2SeqData(PlannedData):
    """Prompts that an encoder reads and completions that a decoder writes, as translation and summaries need them.

    A row has the strings ``prompt`` and ``completion``, or ``source`` and ``target``, or columns that you name. Both sides get
    the special tokens of the tokenizer, and every token of the completion is learned, its end included. Rows are padded,
    those of like length together: encoder-decoder models take no packed rows.

    Args:
        path: rows to train on: a file (JSON lines, a JSON list, CSV, TSV, Parquet), or a Hugging Face data set
            ``owner/name[/config][:split]``; a pattern, a list of these, or a mixture ``{a.jsonl: 2, b.jsonl: 1}`` in
            shares by weight.
        val_path: rows to validate on, a file, pattern or list; None: see ``val_fraction``.
        val_fraction: share of the rows of each file of ``path`` held out for validation, chosen by the seed; 0 holds
            none out.
        test_path: rows for ``test``, and for ``predict`` where ``predict_path`` is None.
        predict_path: rows for ``predict``.
        prompt_column: what is read; None: ``prompt``, else ``source``. Give both columns or neither.
        completion_column: what is written; None: ``completion``, else ``target``.
        prefix: put before each prompt, such as ``"summarize: "``, by which T5 tells its tasks apart.
        max_length: most tokens that are read, special ones included; 512 is the length T5 was trained with. None: any length.
        max_target_length: most tokens that are written, the end included; 128 holds a paragraph. None: any length.
        truncation: what happens to a row that is longer on either side: ``error`` refuses and says how many there are,
            ``drop`` leaves it out, ``keep_start`` and ``keep_end`` cut what is read at the other end. What is written always
            loses its end, and its end token with it, so that the model does not learn to stop there.
        bad_rows: what happens to a row whose prompt or completion is missing or empty: ``error`` refuses with file and
            line, ``drop`` leaves it out and counts it.
        batch_size: rows a micro-batch on one device. Steps stay the same where ``batch_size * accumulate_grad_batches
            * devices`` does.
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
        >>> Seq2SeqData("articles.jsonl", prompt_column="text", completion_column="summary", prefix="summarize: ")
        Seq2SeqData(path='articles.jsonl', prompt_column='text', completion_column='summary', prefix='summarize: ')

    References:
        Raffel et al., 2020, section 2.4: one text in, one text out.
    """

    decides: ClassVar[tuple[str, ...]] = ("prompt_column", "completion_column", "prefix", "max_target_length")
    packing = False
    max_tokens = None

    def __init__(
        self,
        path: WeightedFiles,
        *,
        val_path: Files | None = None,
        val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        test_path: Files | None = None,
        predict_path: Files | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        prefix: str = "",
        max_length: Annotated[int, Ge(2)] | None = 512,
        max_target_length: Annotated[int, Ge(1)] | None = 128,
        truncation: Truncation = "error",
        bad_rows: BadRows = "error",
        batch_size: Annotated[int, Ge(1)] = 8,
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
        self.prompt_column = prompt_column
        self.completion_column = completion_column
        self.prefix = prefix
        self.max_length = max_length
        self.max_target_length = max_target_length
        self.truncation = truncation
        self.bad_rows = bad_rows
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.epoch_rows = epoch_rows
        self.shuffle = shuffle
        self.seed = seed
        self.tokenizer = tokenizer
        self.cache_dir = cache_dir
        self._start: int | None = None
        self.check()

    def check(self) -> None:
        """Refuses arguments out of bounds, and those that contradict each other."""
        super().check()
        if (self.prompt_column is None) != (self.completion_column is None):
            raise Refusal("Seq2SeqData.prompt_column and completion_column belong together: give both, or neither.")

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised rows of this stage, after asking whether the module learns what they teach."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        theirs = getattr(module, "task", None)
        if isinstance(theirs, str) and theirs != "seq2seq_lm":
            raise Refusal(
                f"{type(module).__name__}.task is {theirs}, but Seq2SeqData is for seq2seq_lm: set the module's task to it, or "
                "take SFTData for a decoder alone."
            )
        super().setup(stage)

    def collate(
        self, segments: Sequence[Segment], *, packed: bool, window: dict[str, float] | None, task: str | None
    ) -> Batch:
        """A micro-batch of rows; of none a filler batch."""
        return collate_seq2seq(segments, start=self.decoder_start(), window=window, task=task)

    def use_config(self, config: Any) -> None:
        """Takes the decoder's first token from this configuration, where no trainer leads to a module."""
        self._start = start_id(config)

    def decoder_start(self) -> int:
        """The token that the decoder begins with, by the configuration of the model that is trained.

        Raises:
            Refusal: no model is known, or its configuration names no such token.
        """
        if self._start is None:
            self._start = start_id(self._config())
        return self._start

    def _config(self) -> Any:
        config = known_config(self.trainer, self.tokenizer)
        if config is None:
            raise Refusal(
                "Seq2SeqData knows no model, so it cannot tell what the decoder begins with: set Seq2SeqData.tokenizer to the "
                "model's id or folder."
            )
        return config

    def _columns(self, source: Source) -> tuple[str, str]:
        found = set(source.columns)
        if self.prompt_column is not None and self.completion_column is not None:
            pair = (self.prompt_column, self.completion_column)
        else:
            pair = next((names for names in _PAIRS if found.issuperset(names)), _PAIRS[0])
        if missing := [name for name in pair if name not in found]:
            near = difflib.get_close_matches(missing[0], found, n=1, cutoff=0.6)
            raise Refusal(
                f"{source.name} has no column {missing[0]!r}; it has {', '.join(sorted(found))}: name both sides with "
                f"prompt_column and completion_column{f' (perhaps {near[0]!r})' if near else ''}."
            )
        return pair

    # What `PlannedData` asks

    def _check(self, source: Source) -> None:
        for column in self._columns(source):
            try:
                text_in(source.first, column)
            except Refusal as refusal:
                if self.bad_rows == "error":
                    raise Refusal(f"{source.where(0)}: {refusal}") from None

    def _open(self, path: str) -> Source:
        return open_source(path, any_columns=True)

    def _tokenised(self, path: str) -> Dataset:
        source = self._source(path)
        prompt, completion = self._columns(source)
        return tokenise_seq2seq(
            source,
            self.resolve_tokenizer(),
            prompt,
            completion,
            self.prefix,
            keep_bad_rows=self.bad_rows == "drop",
            cache_dir=self.cache_dir,
        )

    def _select(self, path: str) -> TokenRows:
        return select_seq2seq(
            self._tokenised(path),
            self._source(path),
            Frame.of(self.resolve_tokenizer(), pair=False),
            max_length=self.max_length,
            max_target_length=self.max_target_length,
            truncation=self.truncation,
            bad_rows=self.bad_rows,
        )

    def _pieces(self, segment: Segment) -> list[Piece]:
        assert isinstance(segment, Seq2SeqSegment)
        tokenizer = self.resolve_tokenizer()
        read, written = (pieces_between(ids, ids[:0], tokenizer)[0] for ids in (segment.source, segment.ids))
        return [read, Piece(f" {written.text}", True, written.tokens)]
