"""Data for supervised fine-tuning: a file of conversations, prompts with completions, or texts -> batches."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.chat import LossOn, resolve_loss_on
from lightning_ft.data.loader import Placement, PlannedLoader
from lightning_ft.data.plan import split_rows
from lightning_ft.data.preview import Preview, preview_rows
from lightning_ft.data.sources import Source, open_source
from lightning_ft.data.token_rows import BadRows, Report, TokenRows, Truncation, select
from lightning_ft.data.tokenise import tokenise
from lightning_ft.engine.arguments import check_arguments, describe
from lightning_ft.engine.randomness import global_seed
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.load import load_tokenizer

Split = Literal["train", "val", "test", "predict"]


class SFTData(LightningDataModule):
    """Rows to imitate, rendered through the tokenizer's own chat template, with only what is to be learned scored.

    A row has ``messages`` (and optional ``tools``), ``prompt`` and ``completion`` (strings, or lists of messages), or
    ``text``; ShareGPT and Alpaca columns are converted. Each row is tokenised once into a cache on disk. What is
    learned is known from the rendering itself, never guessed from ids, and proven for each row; a row with nothing to
    learn, no end of turn, two BOS tokens, or a prompt that is not a prefix of its row is refused by file and line.

    Args:
        path: rows to train on: a file (JSON lines, a JSON list, CSV, TSV, Parquet), ``starter:vader/train``, or a
            Hugging Face data set ``owner/name[/config][:split]``.
        val_path: rows to validate on, the same kinds; None: see ``val_fraction``.
        val_fraction: share of the rows of ``path`` held out for validation, chosen by the seed, at least one row; 0
            holds none out, so that a short run trains on all it has.
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
        shuffle: a new order of the training rows in each epoch.
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

    def __init__(
        self,
        path: str,
        *,
        val_path: str | None = None,
        val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        test_path: str | None = None,
        predict_path: str | None = None,
        loss_on: LossOn = "auto",
        max_length: Annotated[int, Ge(2)] | None = 1024,
        truncation: Truncation = "error",
        bad_rows: BadRows = "error",
        packing: bool = True,
        batch_size: Annotated[int, Ge(1)] = 8,
        max_tokens: Annotated[int, Gt(1)] | None = None,
        val_batch_size: Annotated[int, Ge(1)] | None = None,
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
        self.loss_on = loss_on
        self.max_length = max_length
        self.truncation = truncation
        self.bad_rows = bad_rows
        self.packing = packing
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.val_batch_size = val_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.tokenizer = tokenizer
        self.cache_dir = cache_dir
        check_arguments(self)
        if val_path is not None and val_fraction > 0:
            raise Refusal("SFTData.val_path and SFTData.val_fraction both name validation rows: give one of them.")
        if max_tokens is not None and not packing:
            raise Refusal("SFTData.max_tokens fills packed rows: set packing true, or use batch_size.")
        if max_tokens is not None and max_length is not None and max_length > max_tokens and truncation != "error":
            raise Refusal(
                f"SFTData.max_length {max_length} lets rows through that cannot fit into max_tokens {max_tokens}: "
                "lower max_length to it, or raise max_tokens."
            )
        self._sources: dict[str, Source] = {}
        self._rows: dict[Split, TokenRows] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def __repr__(self) -> str:
        return describe(self)

    __str__ = __repr__  # Lightning's lists the loaders, which would read the files

    # Before any model is loaded

    def check_files(self, stage: str | None = None) -> None:
        """Reads every file that the stage needs, and refuses what is wrong with it; needs neither model nor tokenizer.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: all files given.
        """
        for path in self._paths(stage):
            source = self._source(path)
            first = next(source.rows())
            strings = source.kind == "prompt_completion" and isinstance(first.get("prompt"), str)
            resolve_loss_on(self.loss_on, source.kind, strings=strings)

    # Lightning's hooks, in the order in which it calls them

    def prepare_data(self) -> None:
        """Tokenises into the cache, on one process of each node."""
        fn = self.trainer.state.fn if self.trainer is not None else None
        for path in self._paths(fn.value if fn is not None else None):  # fit, validate, test, predict
            self._tokenised(path)

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised rows of this stage and decides which are used."""
        if "train" not in self._rows and stage in ("fit", None):
            rows = self._select(self.path)
            if self.val_fraction > 0:
                if len(rows) < 2:
                    raise Refusal(f"{self.path} has one row, so val_fraction cannot hold one out: give val_path.")
                kept, held = split_rows(len(rows), self.val_fraction, seed=self._seed)
                self._rows["val"] = rows.subset(held)
                rows = rows.subset(kept)
            self._rows["train"] = rows
        if "val" not in self._rows and stage in ("fit", "validate", None):
            if self.val_path is not None:
                self._rows["val"] = self._select(self.val_path)
            elif self.val_fraction > 0:
                rows = self._select(self.path)
                self._rows["val"] = rows.subset(split_rows(len(rows), self.val_fraction, seed=self._seed)[1])
        if "test" not in self._rows and stage in ("test", None) and self.test_path is not None:
            self._rows["test"] = self._select(self.test_path)
        predict_path = self.predict_path or self.test_path
        if "predict" not in self._rows and stage in ("predict", None) and predict_path is not None:
            self._rows["predict"] = self._select(predict_path)

    def train_dataloader(self) -> PlannedLoader:
        """Shuffled, planned micro-batches with the totals of their accumulation window."""
        overfit = self.trainer is not None and bool(getattr(self.trainer, "overfit_batches", 0))
        return PlannedLoader(
            self._get("train"),
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            packed=self.packing,
            shuffle=self.shuffle and not overfit,
            seed=self._seed,
            placement=self._train_placement,
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

    # For people

    def reports(self) -> dict[str, Report]:
        """What became of the rows of each split that is set up (of all where none is), packing efficiency included."""
        if not self._rows:
            self.setup()
        found: dict[str, Report] = {}
        for split, rows in self._rows.items():
            loader = self.train_dataloader() if split == "train" else self._eval_loader(split)
            found[split] = replace(rows.report, packing_efficiency=loader.efficiency())
        return found

    def preview(self, n: int = 3, split: Split = "train") -> list[Preview]:
        """The first ``n`` rows as the model will see them, with what is scored marked.

        Args:
            n: rows.
            split: which.
        """
        rows = self._get(split)
        tokenizer = self.resolve_tokenizer()
        source = self._source(self._path_of(split))
        return preview_rows(rows, source, tokenizer, n)

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
                    raise Refusal(
                        "SFTData has no tokenizer: the module being trained offers none as `tokenizer`; set "
                        "SFTData.tokenizer to a model id, folder or starter asset."
                    )
                self._tokenizer = found
        assert self._tokenizer is not None
        return self._tokenizer

    # What a checkpoint holds. The position itself is Lightning's own batch counter, which the loader asks.

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch was, and everything that decides what its remaining batches are."""
        return {"format": 1, "position": self._position(), **self._deal()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses to go on in the middle of an epoch that would now be dealt otherwise.

        Raises:
            Refusal: naming what differs.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not fitting or not state_dict.get("position"):
            return
        now = self._deal()
        differs = [
            f"{name} {state_dict.get(name)!r} (now {now[name]!r})" for name in now if state_dict.get(name) != now[name]
        ]
        if differs:
            raise Refusal(
                f"The checkpoint was written in the middle of an epoch with {', '.join(differs)}, so the remaining "
                "batches would be others: resume with the same values, or start a new fit from the weights."
            )

    def _deal(self) -> dict[str, Any]:
        placement = self._train_placement()
        return {
            "content": self._source(self.path).key,
            "val_fraction": self.val_fraction,
            "loss_on": self.loss_on,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "bad_rows": self.bad_rows,
            "packing": self.packing,
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
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return 0
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return 0 if ready >= trainer.num_training_batches else ready

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
            position=trainer.fit_loop.epoch_loop.batch_progress.current.ready,
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

    def _eval_loader(self, split: Split) -> PlannedLoader:
        return PlannedLoader(
            self._get(split),
            batch_size=self.val_batch_size or self.batch_size,
            packed=self.packing,
            seed=self._seed,
            placement=self._placement,
        )

    # Files and rows

    @property
    def _seed(self) -> int:
        return self.seed if self.seed is not None else global_seed()

    def _paths(self, stage: str | None) -> list[str]:
        held_out = self.path if self.val_fraction > 0 else self.val_path
        needed: list[str | None] = []
        if stage in ("fit", None):
            needed += [self.path]
        if stage in ("fit", "validate", None):
            needed += [held_out]
        if stage in ("test", None):
            needed += [self.test_path]
        if stage in ("predict", None):
            needed += [self.predict_path or self.test_path]
        return list(dict.fromkeys(path for path in needed if path is not None))

    def _path_of(self, split: Split) -> str:
        paths = {
            "train": self.path,
            "val": self.val_path or self.path,
            "test": self.test_path,
            "predict": self.predict_path or self.test_path,
        }
        path = paths[split]
        if path is None:
            raise Refusal(f"SFTData has no rows for {split}: set SFTData.{split}_path.")
        return path

    def _source(self, path: str) -> Source:
        if path not in self._sources:
            self._sources[path] = open_source(path)
        return self._sources[path]

    def _tokenised(self, path: str) -> Any:
        return tokenise(
            self._source(path),
            self.resolve_tokenizer(),
            loss_on=self.loss_on,
            keep_bad_rows=self.bad_rows == "drop",
            cache_dir=self.cache_dir,
        )

    def _select(self, path: str) -> TokenRows:
        return select(
            self._tokenised(path),
            self._source(path),
            max_length=self.max_length,
            truncation=self.truncation,
            bad_rows=self.bad_rows,
            bos=self.resolve_tokenizer().bos_token_id,
        )

    def _get(self, split: Split) -> TokenRows:
        if split not in self._rows:
            self.setup({"train": "fit", "val": "validate"}.get(split, split))
        if split not in self._rows:
            self._path_of(split)
            raise Refusal(f"SFTData has no rows for {split}: set SFTData.val_path or SFTData.val_fraction.")
        return self._rows[split]
