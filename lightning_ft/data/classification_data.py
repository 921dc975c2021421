"""Data for classification and regression: a file of labelled texts, pairs of texts or words -> batches."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt
from datasets import Dataset

from lightning_ft.data.collate import Segment
from lightning_ft.data.collate_labelled import LabelledSegment, collate_labelled
from lightning_ft.data.frames import Frame
from lightning_ft.data.labelled_rows import LabelledRows, select_labelled, target_of, tokenise_labelled
from lightning_ft.data.labels import Answers, Asked, Columns, LabelTask, answers_of, asked_of, columns_of
from lightning_ft.data.mixture import Files, MixedRows, WeightedFiles
from lightning_ft.data.plan import split_rows
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.preview import Piece, pieces_between
from lightning_ft.data.sources import Source, open_source
from lightning_ft.data.token_rows import BadRows, TokenRows, Truncation
from lightning_ft.engine.batch import Batch
from lightning_ft.functional.errors import Refusal


class ClassificationData(PlannedData):
    """Texts with a class, several classes or a number each, or words with a class each.

    A row has ``text`` and ``label``: a class by name or number, a list of classes that hold (which may be empty), or a
    number to predict; or it has ``tokens`` (words) and as many ``tags``, of which null is not learned. Texts get what
    the tokenizer puts around them and no chat template. Of a word its first token carries the class, as is usual for
    encoders. What is wrong with a label is said with file and line before a model is loaded.

    Args:
        path: rows to train on: a file (JSON lines, a JSON list, CSV, TSV, Parquet), ``starter:vader/train``, or a
            Hugging Face data set ``owner/name[/config][:split]``; a pattern, a list of these, or a mixture
            ``{a.jsonl: 2, b.jsonl: 1}`` in shares by weight.
        val_path: rows to validate on, a file, pattern or list; None: see ``val_fraction``.
        val_fraction: share of the rows of each file of ``path`` held out for validation, chosen by the seed; where each
            row has one class, classes keep their shares. 0 holds none out.
        test_path: rows for ``test``, and for ``predict`` where ``predict_path`` is None.
        predict_path: rows for ``predict``; they need no labels.
        task: what is learned; ``auto`` tells it from the training files: lists of words and tags are token
            classification, numbers with a fraction are regression, all else is classification of rows.
        text_column: where the text is; None: ``text``, or ``tokens`` of words.
        pair_column: where a second text is, e.g. the hypothesis to a premise; None: there is none.
        label_column: where the label is; None: ``label``, or ``tags``, ``ner_tags`` or ``labels`` of words.
        labels: names of all classes in order; None: those of the training files, sorted, whole numbers by their size.
            Whole numbers in a file are places in this list, unless its names are numbers themselves.
        max_length: most tokens a row may have, special ones included; 512 is what encoders of BERT's kind can read. None: any
            length.
        truncation: what happens to a longer row: ``error`` refuses and says how many there are, ``drop`` leaves it out,
            ``keep_start`` and ``keep_end`` cut it between its special tokens; of a pair the longer text gives way.
        bad_rows: what happens to a row whose text or label is missing or unfit: ``error`` refuses with file and line,
            ``drop`` leaves it out and counts it. A class that is not in the list is always refused.
        packing: lay rows end to end, each seeing only itself, so that nothing is computed for padding. None: where the model
            was proven to take such rows; False pads, with rows of like length together.
        batch_size: rows a micro-batch on one device. Steps stay the same where ``batch_size * accumulate_grad_batches
            * devices`` does.
        max_tokens: fill each micro-batch to at most so many tokens instead (needs ``packing``). None: by ``batch_size``.
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
        >>> ClassificationData("reviews.csv", val_fraction=0.1, batch_size=32)
        ClassificationData(path='reviews.csv', val_fraction=0.1, batch_size=32)

    References:
        Devlin et al., 2019, sections 4.1 and 5.3: a row's first token, and the first token of each word.
    """

    decides: ClassVar[tuple[str, ...]] = ("task", "text_column", "pair_column", "label_column", "labels")

    def __init__(
        self,
        path: WeightedFiles,
        *,
        val_path: Files | None = None,
        val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        test_path: Files | None = None,
        predict_path: Files | None = None,
        task: Literal["auto", "sequence_classification", "token_classification", "regression"] = "auto",
        text_column: str | None = None,
        pair_column: str | None = None,
        label_column: str | None = None,
        labels: list[str] | None = None,
        max_length: Annotated[int, Ge(2)] | None = 512,
        truncation: Truncation = "error",
        bad_rows: BadRows = "error",
        packing: bool | None = None,
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
        self.task = task
        self.text_column = text_column
        self.pair_column = pair_column
        self.label_column = label_column
        self.labels = labels
        self.max_length = max_length
        self.truncation = truncation
        self.bad_rows = bad_rows
        self.packing = packing
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.val_batch_size = val_batch_size
        self.epoch_rows = epoch_rows
        self.shuffle = shuffle
        self.seed = seed
        self.tokenizer = tokenizer
        self.cache_dir = cache_dir
        self._asked: Asked | None = None
        self._answers: dict[str, Answers] = {}
        self.check()

    def check(self) -> None:
        """Refuses arguments out of bounds, and those that contradict each other."""
        super().check()
        if self.task == "regression" and self.labels is not None:
            raise Refusal(
                "ClassificationData.labels names classes, and a regression has none: take labels or task away."
            )
        if self.task == "token_classification" and self.pair_column is not None:
            raise Refusal("ClassificationData.pair_column has no meaning for words: take it away, or set another task.")
        if self.labels is not None and (
            not all(isinstance(name, str) and name.strip() for name in self.labels)
            or len(set(self.labels)) < len(self.labels)
            or not self.labels
        ):
            raise Refusal(f"ClassificationData.labels must be names, each once and none empty, got {self.labels!r}.")

    # For the module that is trained

    def resolved_task(self) -> LabelTask:
        """The task: as given, or as told from the training files."""
        return self._asks().task

    def label_names(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None for regression. Needs no tokenizer."""
        asked = self._asks()
        return list(asked.names) if asked.task != "regression" else None

    def multi_label(self) -> bool:
        """Whether a row may have several classes."""
        return self._asks().multi_label

    def class_counts(self) -> list[int]:
        """Training rows of each class after the hold-out; of token classification, tokens that are scored.

        Raises:
            Refusal: for a regression, which has no classes.
        """
        if self.resolved_task() == "regression":
            raise Refusal("A regression has no classes to count.")
        rows = self._get("train")
        parts = rows.parts if isinstance(rows, MixedRows) else (rows,)
        counts = [part.class_counts() for part in parts if isinstance(part, LabelledRows)]
        return [int(count) for count in np.sum(counts, axis=0)]

    # What `PlannedData` asks

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised rows of this stage, after asking whether the module learns what they teach."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        theirs, own = getattr(module, "task", None), self.resolved_task()
        if isinstance(theirs, str) and theirs != own:
            raise Refusal(
                f"{type(module).__name__}.task is {theirs}, but the rows of {', '.join(self._files('train'))} are for {own}: "
                f"set the module's task to {own}, or ClassificationData.task and label_column to what is meant."
            )
        super().setup(stage)

    def collate(
        self, segments: Sequence[Segment], *, packed: bool, window: dict[str, float] | None, task: str | None
    ) -> Batch:
        """A micro-batch of rows; of none a filler batch."""
        void = target_of(self._asks(), np.empty(0, dtype=np.int64))
        return collate_labelled(segments, packed=packed, window=window, task=task, void=void)

    def _check(self, source: Source) -> None:
        answers = self._answers_of(source.name)
        if answers.problems and self.bad_rows == "error":
            row = min(answers.problems)
            raise Refusal(f"{source.where(row)}: {answers.problems[row]}")

    def _open(self, path: str) -> Source:
        return open_source(path, any_columns=True)

    def _tokenised(self, path: str) -> Dataset:
        return tokenise_labelled(
            self._source(path),
            self.resolve_tokenizer(),
            self._columns(path),
            keep_bad_rows=self.bad_rows == "drop",
            cache_dir=self.cache_dir,
        )

    def _select(self, path: str) -> TokenRows:
        return select_labelled(
            self._tokenised(path),
            self._source(path),
            Frame.of(self.resolve_tokenizer(), pair=self.pair_column is not None),
            self._asks(),
            self._answers_of(path),
            max_length=self.max_length,
            truncation=self.truncation,
            bad_rows=self.bad_rows,
            labelled=self._is_labelled(path),
        )

    def _hold_out(self, rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
        asked = self._asks()
        one_class = asked.task == "sequence_classification" and not asked.multi_label
        strata = rows.classes() if one_class and isinstance(rows, LabelledRows) else None
        return split_rows(len(rows), self.val_fraction, seed=self._seed, strata=strata)

    def _pieces(self, segment: Segment) -> list[Piece]:
        assert isinstance(segment, LabelledSegment)
        asked = self._asks()
        pieces = pieces_between(segment.ids, segment.at, self.resolve_tokenizer())
        if asked.task == "token_classification":
            names = iter(asked.names[number] for number in segment.classes)
            return [Piece(f"{p.text}/{next(names)}", True, 1) if p.scored else p for p in pieces]
        answer = segment.target
        assert answer is not None
        if asked.task == "regression":
            shown = f"{answer:g}"
        elif asked.multi_label:
            shown = ", ".join(asked.names[number] for number in np.flatnonzero(answer)) or "none"
        else:
            shown = asked.names[int(answer)]
        return [*pieces, Piece(f" {shown}", True, 0)]

    # Labels

    def _is_labelled(self, path: str) -> bool:
        """Whether a file's rows must have labels: not those that are only predicted."""
        if self.predict_path is None or path not in self._files("predict"):
            return True
        return any(path in self._files(split) for split in ("train", "val", "test") if self._names(split))

    def _names(self, split: str) -> bool:
        return split == "train" or getattr(self, f"{split}_path") is not None

    def _columns(self, path: str) -> Columns:
        return columns_of(
            self._source(path),
            self._given_task(),
            self.text_column,
            self.pair_column,
            self.label_column,
            labelled=self._is_labelled(path),
        )

    def _given_task(self) -> LabelTask | None:
        return None if self.task == "auto" else self.task

    def _asks(self) -> Asked:
        if self._asked is None:
            files = self._files("train")
            sources, columns = [self._source(file) for file in files], [self._columns(file) for file in files]
            self._asked = asked_of(sources, columns, self._given_task(), self.labels)
        return self._asked

    def _answers_of(self, path: str) -> Answers:
        if path not in self._answers:
            source, columns = self._source(path), self._columns(path)
            self._answers[path] = answers_of(source, columns.label, self._asks(), labelled=self._is_labelled(path))
        return self._answers[path]
