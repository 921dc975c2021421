"""Data for supervised fine-tuning: a file of conversations, prompts with completions, or texts -> batches."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from datasets import Dataset

from lightning_ft.data.chat import LossOn, require_template, resolve_loss_on
from lightning_ft.data.mixture import Files, WeightedFiles
from lightning_ft.data.rows import Kind
from lightning_ft.data.spans import Rendered, render_rows
from lightning_ft.data.streamed import StreamedData
from lightning_ft.data.token_rows import BadRows, Truncation
from lightning_ft.data.tokenise import tokenise
from lightning_ft.functional.errors import Refusal


class SFTData(StreamedData):
    """Rows to imitate, rendered through the tokenizer's own chat template, with only what is to be learned scored.

    A row has ``messages`` (and optional ``tools``), ``prompt`` and ``completion`` (strings, or lists of messages), or
    ``text``; ShareGPT and Alpaca columns are converted. Each row is tokenised once into a cache on disk. What is
    learned is known from the rendering itself, never guessed from ids, and proven for each row; a row with nothing to
    learn, no end of turn, two BOS tokens, or a prompt that is not a prefix of its row is refused by file and line.

    Args:
        path: rows to train on: a file (JSON lines, a JSON list, CSV, TSV, Parquet), ``starter:vader/train``, or a
            Hugging Face data set ``owner/name[/config][:split]``; a pattern (``shards/*.jsonl``); a list of these, whose
            rows are trained on together; or a mixture ``{a.jsonl: 2, b.jsonl: 1}``, where an epoch has as many rows as
            all files together, in shares by weight. Each file may hold another kind of rows. A file's rows come in a
            new order, all of them before any comes again, and the next epoch goes on where this one ended.
        val_path: rows to validate on, a file, pattern or list; None: see ``val_fraction``.
        val_fraction: share of the rows of each file of ``path`` held out for validation, chosen by the seed, at least
            one row; 0 holds none out, so that a short run trains on all it has.
        test_path: rows for ``test``, and for ``predict`` where ``predict_path`` is None.
        predict_path: rows for ``predict``.
        loss_on: what is learned: ``assistant`` turns with their end of turn, only the ``last_assistant`` turn (for
            templates that render earlier turns differently, as reasoning models' do), the ``completion``, or ``all``
            tokens. ``auto`` takes assistant turns of ``messages``, the completion of ``prompt`` + ``completion``, and
            all of ``text``.
        max_length: most tokens a row may have; 1024 is TRL's default, so that runs compare. None: any length.
        truncation: what happens to a longer row: ``error`` refuses and says how many there are (the default, since
            each other choice changes what is learned), ``drop`` leaves it out, ``keep_start`` and ``keep_end`` cut it.
        bad_rows: what happens to a row that cannot be learned from: ``error`` refuses with file and line, ``drop``
            leaves it out and counts it.
        packing: lay rows end to end, each seeing only itself; False pads, with rows of like length together. The loss
            and the gradients are the same; packing computes no padding.
        batch_size: rows a micro-batch on one device. Steps stay the same where ``batch_size * accumulate_grad_batches
            * devices`` does.
        max_tokens: fill each micro-batch to at most so many tokens instead (best fit over all rows; needs
            ``packing``), so that memory and time of all steps are alike. None: by ``batch_size``.
        val_batch_size: rows a batch in validation, test and prediction; None: ``batch_size``.
        shuffle: a new order of the training rows in each epoch; False: file after file.
        epoch_rows: rows an epoch takes, fewer or more than there are, the next epoch going on from there; None: as many
            as there are.
        streaming: read, render and tokenise the training rows as they come, for files too large for the cache: JSON
            lines (plain or .gz) and Parquet. The files are read again when they end, so the run needs
            ``trainer.max_steps``; it resumes at the same row; validation rows come from ``val_path``. A bad row stops the
            run where it comes, so think of ``bad_rows: drop``.
        shuffle_buffer: rows held while streaming, from which the next is drawn; 10,000 chats of a few kB are some tens of
            MB. Raise it where neighbouring rows are alike.
        seed: of the order and the hold-out; None: the seed of ``seed_everything``, else 0.
        tokenizer: a model id, folder or starter asset; None: the tokenizer of the module that is trained.
        cache_dir: where tokenised rows are kept; None: ``tokenised`` below ``LIGHTNING_FT_CACHE`` or
            ``~/.cache/lightning_ft``.

    Raises:
        Refusal: an argument out of bounds; from ``check_files`` and ``setup`` whatever is wrong with the data.

    Example:
        >>> data = SFTData("train.jsonl", val_fraction=0.1, batch_size=4)
        >>> data
        SFTData(path='train.jsonl', val_fraction=0.1, batch_size=4)
    """

    decides: ClassVar[tuple[str, ...]] = ("loss_on",)

    def __init__(
        self,
        path: WeightedFiles,
        *,
        val_path: Files | None = None,
        val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        test_path: Files | None = None,
        predict_path: Files | None = None,
        loss_on: LossOn = "auto",
        max_length: Annotated[int, Ge(2)] | None = 1024,
        truncation: Truncation = "error",
        bad_rows: BadRows = "error",
        packing: bool = True,
        batch_size: Annotated[int, Ge(1)] = 8,
        max_tokens: Annotated[int, Gt(1)] | None = None,
        val_batch_size: Annotated[int, Ge(1)] | None = None,
        shuffle: bool = True,
        epoch_rows: Annotated[int, Ge(1)] | None = None,
        streaming: bool = False,
        shuffle_buffer: Annotated[int, Ge(1)] = 10_000,
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
        self.loss_on = loss_on
        self.max_length = max_length
        self.truncation = truncation
        self.bad_rows = bad_rows
        self.packing = packing
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.val_batch_size = val_batch_size
        self.shuffle = shuffle
        self.epoch_rows = epoch_rows
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.tokenizer = tokenizer
        self.cache_dir = cache_dir
        self.check()

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised rows of this stage, after asking whether the module learns what they teach."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        theirs = getattr(module, "task", None)
        if isinstance(theirs, str) and theirs != "causal_lm" and not hasattr(module, "learns_from_episodes"):
            fitting = "Seq2SeqData" if theirs == "seq2seq_lm" else "ClassificationData"
            raise Refusal(
                f"{type(module).__name__}.task is {theirs}, but SFTData is for causal_lm: take {fitting}, or set the module's task "
                "to causal_lm where its base is a decoder."
            )
        super().setup(stage)

    def _check_kind(self, kind: Kind, first: dict[str, Any]) -> None:
        strings = kind == "prompt_completion" and isinstance(first.get("prompt"), str)
        resolve_loss_on(self.loss_on, kind, strings=strings)

    def _render(self, rows: Sequence[dict[str, Any]], kind: Kind) -> Sequence[Rendered | Refusal]:
        tokenizer = self.resolve_tokenizer()
        if kind == "messages":
            require_template(tokenizer)
        return render_rows(tokenizer, rows, kind, self.loss_on)

    def _tokenised(self, path: str) -> Dataset:
        return tokenise(
            self._source(path),
            self.resolve_tokenizer(),
            loss_on=self.loss_on,
            keep_bad_rows=self.bad_rows == "drop",
            cache_dir=self.cache_dir,
        )
