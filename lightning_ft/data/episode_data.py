"""Episodes for meta-learning: N classes with K examples each, drawn from a table, folders of images, or a function."""

import hashlib
from dataclasses import replace
from typing import Annotated, Any, Literal

from annotated_types import Ge

from lightning_ft.data.episode_loader import EpisodeLoader
from lightning_ft.data.episode_source import EpisodeSource
from lightning_ft.data.labels import Asked
from lightning_ft.data.mixture import Files
from lightning_ft.data.named_files import Split
from lightning_ft.data.preview import Preview
from lightning_ft.data.token_rows import BadRows, Report, Truncation
from lightning_ft.engine.arguments import check_arguments
from lightning_ft.functional.errors import Refusal

_MEASURED: dict[str, tuple[Split, ...]] = {"validate": ("val",), "test": ("test",), "predict": ("test",)}
_STAGES: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), **_MEASURED}


class EpisodeData(EpisodeSource):
    """Small tasks, each of a few classes with a few examples: support rows to adapt on, query rows to be measured on.

    Rows come from a table of ``text`` and ``label``, or from a folder with a folder of images, tensors or texts for each class; or
    whole tasks from a function. Classes of training, validation and test are disjoint, so that what is measured is learning of
    new classes. Support and query share no row and no two that are alike (texts to the model, files in their bytes): what several
    classes have is left out, and of texts counted in the report. Tasks of a function are as it gives them: `sinusoids` with
    ``grid`` has the support among the query points, as in Nichol et al., 2018. Episode i of an epoch depends on the seed alone,
    whatever the batch size, accumulation or number of ranks; those of validation and test are the same in each epoch.

    Args:
        path: labelled texts (JSON lines, a JSON list, CSV, TSV, Parquet, ``starter:vader/train``, a Hugging Face data set), or a
            folder with one folder for each class, of images, of tensors (.npy, .pt) or of texts (.txt, one a file). None: see
            ``tasks``.
        val_path: the same with the classes to validate on; None: see ``val_classes``.
        test_path: the same with the classes to test on.
        val_classes: of ``path``, how many (chosen by the seed) or which classes are kept for validation.
        test_classes: likewise for test.
        tasks: instead of a path, a function by its dotted path, such as ``lightning_ft.data.sinusoids.sinusoids``:
            ``(rng, count, **tasks_args)`` gives support x and y, query x and y of ``count`` tasks, arrays with a first axis of
            tasks, drawn from the `numpy.random.Generator` alone. For texts other than of classes a list of ``count`` dictionaries
            with ``support`` and ``query``, lists of rows, whose columns say what they are: those of `SFTData` or `Seq2SeqData` for
            answers, such as ``lightning_ft.data.reasoning_tasks.reasoning_tasks``; ``text`` and ``label`` for numbers; ``tokens``
            and ``tags`` for tags of words; ``prompt``, ``chosen`` and ``rejected`` for pairs. Query rows that stand in the support
            are left out.
        tasks_args: arguments of that function.
        eval_tasks_args: those that differ in validation and test.
        way: classes of an episode; of tags the most that a task has.
        shot: support rows of each class.
        train_shot: those of a training episode, where they are to be others; None: ``shot``. `Reptile` needs more than one row of a
            class in training whatever a new task will have: Nichol et al. train with 10 or 15 and test with 1 and 5.
        query: query rows of each class.
        permute_labels: deal the labels 0 to way - 1 anew in each episode, so that a head cannot learn classes by heart.
        episodes: of a training epoch, over all ranks.
        val_episodes: of a validation; its intervals shrink with the root of it.
        test_episodes: of a test; 600 as in most papers.
        batch_size: episodes a micro-batch on one device. Steps stay the same where ``batch_size * accumulate_grad_batches *
            devices`` does.
        val_batch_size: episodes a batch in validation and test; None: ``batch_size``.
        small_classes: what happens to classes with fewer rows than an episode takes of each: ``error`` refuses, ``drop`` leaves
            them out.
        text_column: where the text is; None: ``text``.
        label_column: where the class is; None: ``label``.
        max_length: most tokens of a text, special ones included; longer ones are cut as ``truncation`` says. None: any length.
        truncation: what happens to a longer row: ``error``, ``drop``, ``keep_start`` or ``keep_end``.
        bad_rows: what happens to a row whose text or label is missing or unfit: ``error`` or ``drop``.
        image_size: height and width to which images are resized; 28 and 84 are usual.
        channels: of images: 3, or 1 for grey.
        seed: of everything drawn, also of which classes are kept; None: the seed of ``seed_everything`` at the first use, else 0.
            A checkpoint knows the classes of its run, and is not measured on those that it was trained on.
        tokenizer: a model id, folder or starter asset; None: the tokenizer of the module that is trained.
        cache_dir: where tokenised rows are kept; None: as in `ClassificationData`.

    Raises:
        Refusal: an argument out of bounds; from ``check_files`` and ``setup`` whatever is wrong with the data.

    Example:
        >>> EpisodeData("intents.csv", val_classes=20, test_classes=30, way=5, shot=1)
        EpisodeData(path='intents.csv', val_classes=20, test_classes=30, shot=1)

    References:
        Vinyals et al., 2016, section 4.1 (episodes); Finn et al., 2017, section 5.1 (sinusoids).
    """

    # What `PlannedData` asks of others: episodes are padded, and dealt by number.
    packing = False
    max_tokens = None
    val_fraction = 0.0
    predict_path = None
    shuffle = False
    decides = (
        "way",
        "shot",
        "train_shot",
        "query",
        "permute_labels",
        "episodes",
        "val_classes",
        "test_classes",
        "small_classes",
        "tasks_args",
    )

    def __init__(
        self,
        path: Files | None = None,
        *,
        val_path: Files | None = None,
        test_path: Files | None = None,
        val_classes: int | list[str] = 0,
        test_classes: int | list[str] = 0,
        tasks: str | None = None,
        tasks_args: dict[str, Any] | None = None,
        eval_tasks_args: dict[str, Any] | None = None,
        way: Annotated[int, Ge(2)] = 5,
        shot: Annotated[int, Ge(1)] = 5,
        train_shot: Annotated[int, Ge(1)] | None = None,
        query: Annotated[int, Ge(1)] = 15,
        permute_labels: bool = True,
        episodes: Annotated[int, Ge(1)] = 1000,
        val_episodes: Annotated[int, Ge(1)] = 100,
        test_episodes: Annotated[int, Ge(1)] = 600,
        batch_size: Annotated[int, Ge(1)] = 4,
        val_batch_size: Annotated[int, Ge(1)] | None = None,
        small_classes: Literal["error", "drop"] = "error",
        text_column: str | None = None,
        label_column: str | None = None,
        max_length: Annotated[int, Ge(2)] | None = 128,
        truncation: Truncation = "keep_start",
        bad_rows: BadRows = "error",
        image_size: Annotated[int, Ge(1)] = 84,
        channels: Literal[1, 3] = 3,
        seed: Annotated[int, Ge(0)] | None = None,
        tokenizer: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.path = path  # type: ignore[assignment]
        self.val_path = val_path
        self.test_path = test_path
        self.val_classes = val_classes
        self.test_classes = test_classes
        self.tasks = tasks
        self.tasks_args = tasks_args
        self.eval_tasks_args = eval_tasks_args
        self.way = way
        self.shot = shot
        self.train_shot = train_shot
        self.query = query
        self.permute_labels = permute_labels
        self.episodes = episodes
        self.val_episodes = val_episodes
        self.test_episodes = test_episodes
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.small_classes = small_classes
        self.text_column = text_column
        self.label_column = label_column
        self.max_length = max_length
        self.truncation = truncation
        self.bad_rows = bad_rows
        self.image_size = image_size
        self.channels = channels
        self.seed = seed
        self.tokenizer = tokenizer
        self.cache_dir = cache_dir
        self._asked: Asked | None = None
        self.check()

    def check(self) -> None:
        """Refuses arguments out of bounds, and those that contradict each other."""
        check_arguments(self)
        if (self.path is None) == (self.tasks is None):
            raise Refusal("EpisodeData takes rows of a path, or a function in tasks: give one of them.")
        if self.tasks is None and (self.tasks_args or self.eval_tasks_args):
            raise Refusal("EpisodeData.tasks_args are arguments of the function in tasks, which is not given.")
        if self.tasks is not None and self.train_shot is not None:
            raise Refusal(
                "EpisodeData.train_shot is of rows of a path; a function takes what it needs in training from tasks_args, and in "
                "validation and test from eval_tasks_args."
            )
        for split in ("val", "test"):
            classes = getattr(self, f"{split}_classes")
            if isinstance(classes, int) and (classes < 0 or isinstance(classes, bool)):
                raise Refusal(f"EpisodeData.{split}_classes must be at least 0, got {classes}.")
            if classes and (self.tasks is not None or getattr(self, f"{split}_path") is not None):
                raise Refusal(
                    f"EpisodeData.{split}_classes keeps classes of path, and {split} has tasks of its own; leave it out."
                )

    # -- for the module that is trained -------------------------------------------------------------------------------

    def multi_label(self) -> bool:
        """No: a row has one class."""
        return False

    # -- Lightning's hooks ----------------------------------------------------------------------------------------------

    def check_files(self, stage: str | None = None) -> None:
        """Reads what the stage needs, and refuses what is wrong with it; needs neither model nor tokenizer."""
        if self.tasks is not None:
            self._function()
            return
        for split in _MEASURED.get(stage or "", ()):
            if not self._has(split):
                raise self._nothing(split)
        if not self.folders:
            self.check_tables(stage)
        self.check_classes(_STAGES.get(stage or "", ("train", "val", "test")))

    def prepare_data(self) -> None:
        """Tokenises into the cache what there are enough classes for."""
        fn = self.trainer.state.fn if self.trainer is not None else None
        self.check_files(fn.value if fn is not None else None)
        super().prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Finds the classes of each split of this stage."""
        if stage in ("fit", None):
            self._clock = type(self._clock)()
            self._refuse_overlap()
        for split in _STAGES.get(stage or "", ("train", "val", "test")):
            self._prepare_split(split)

    def train_dataloader(self) -> EpisodeLoader:  # type: ignore[override]
        """Meta-batches of new episodes in each epoch."""
        return EpisodeLoader(
            self._get_made("train"),
            episodes=self.episodes,
            batch_size=self.batch_size,
            placement=self._train_placement,
            clock=self._clock,
        )

    def val_dataloader(self) -> EpisodeLoader | list[EpisodeLoader]:  # type: ignore[override]
        """The validation's episodes, the same each time; no loader where there are no classes to validate on."""
        return self._eval("val", self.val_episodes) if self._has("val") else []

    def test_dataloader(self) -> EpisodeLoader:  # type: ignore[override]
        """The test's episodes."""
        if not self._has("test"):
            raise self._nothing("test")
        return self._eval("test", self.test_episodes)

    def _nothing(self, split: Split) -> Refusal:
        return Refusal(f"EpisodeData has no classes for {split}: set EpisodeData.{split}_path or {split}_classes.")

    def predict_dataloader(self) -> EpisodeLoader:  # type: ignore[override]
        """As for test."""
        return self.test_dataloader()

    def in_order(self) -> dict[Split, EpisodeLoader]:  # type: ignore[override]
        """The first epoch's episodes of every split that there is, whatever epochs came since: to measure them."""
        counts: dict[Split, int] = {"train": self.episodes, "val": self.val_episodes, "test": self.test_episodes}
        return {split: self._eval(split, count) for split, count in counts.items() if self._has(split)}

    def _eval(self, split: Split, episodes: int) -> EpisodeLoader:
        made = self._get_made(split)
        return EpisodeLoader(
            lambda epoch, numbers: made(0, numbers),
            episodes=episodes,
            batch_size=self.val_batch_size or self.batch_size,
            placement=self._placement,
        )

    # -- for people, and for checkpoints --------------------------------------------------------------------------------------

    def reports(self) -> dict[str, Report]:
        """What became of the rows of each split of texts."""
        if self.tasks is not None or self.folders:
            return {}
        if not self._rows:
            self.setup()
        found = {}
        for split, rows in self._rows.items():
            pools = self.pools[split]
            facts = {"classes": f"{len(pools)}", "different rows of a class": _span([len(p) for p in pools.values()])}
            if shared := self._shared[split]:
                facts["left out, since several classes have the text"] = f"{shared}"
            found[split] = replace(rows.report, facts=facts, parts=())
        return found  # type: ignore[return-value]

    def preview(self, n: int = 3, split: Split = "train") -> list[Preview]:
        """The first rows of a split of texts with their classes."""
        if self.tasks is not None or self.folders:
            return []
        self._prepare_split(split)
        return super().preview(n, split) if split in self._rows else []

    def _content(self) -> dict[str, Any]:
        if self.tasks is not None:
            return {"content": self.tasks}
        if self.folders:
            files = self._class_files()["train"]
            listed = repr([(name, [file.name for file in found]) for name, found in files.items()])
            return {"content": hashlib.sha256(listed.encode()).hexdigest()}
        return super()._content()


def _span(sizes: list[int]) -> str:
    return f"{min(sizes)} to {max(sizes)}" if sizes else "none"


__all__ = ["EpisodeData"]
