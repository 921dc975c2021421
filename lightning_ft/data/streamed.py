"""The part of a data module that streams its training rows; validation rows are few and planned as always."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_ft.data.loader import PlannedLoader
from lightning_ft.data.mixture import MixedRows
from lightning_ft.data.named_files import Split
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.rows import Kind
from lightning_ft.data.sources import Located, Source
from lightning_ft.data.spans import Rendered
from lightning_ft.data.stream import RawRow, Stream, open_stream
from lightning_ft.data.stream_loader import Fitting, Mark, StreamLoader, rendered
from lightning_ft.data.token_rows import Report, TokenRows, select
from lightning_ft.functional.errors import Refusal

_SAMPLE = 100  # rows looked at before a run: enough to find a wrong max_length, and quick with any tokenizer


@dataclass(frozen=True)
class _Sample:
    """The first rows of a stream, for people."""

    name: str
    raws: list[RawRow]

    def __len__(self) -> int:
        return len(self.raws)

    def where(self, row: int) -> str:
        return self.raws[row].where()


class StreamedData(PlannedData):
    """Data whose training rows may be streamed; a subclass defines `_render` beside what `PlannedData` asks for."""

    shuffle_buffer: int

    def __init__(self) -> None:
        super().__init__()
        self._opened: Stream | None = None
        self._sampled: tuple[_Sample, TokenRows] | None = None
        self._loader: StreamLoader | None = None
        self._resumed: Mark | None = None

    def _render(self, rows: Sequence[dict[str, Any]], kind: Kind) -> Sequence[Rendered | Refusal]:
        """Rows of one kind as token ids and spans, or what is wrong with each."""
        raise Refusal(f"{type(self).__name__} does not say how its rows are rendered; define _render(rows, kind).")

    def _check_kind(self, kind: Kind, first: dict[str, Any]) -> None:
        """Refuses a kind of rows that this data module cannot use.

        Args:
            kind: of all rows of a file.
            first: the first of them.
        """

    def _check(self, source: Source) -> None:
        self._check_first(source.name, source.kind, next(source.rows()))

    def _check_first(self, name: str, kind: Kind, first: dict[str, Any]) -> None:
        try:
            self._check_kind(kind, first)
        except Refusal as refusal:
            raise Refusal(f"{name}: {refusal}") from refusal

    def check(self) -> None:
        """Refuses also what a stream cannot do."""
        super().check()
        name = type(self).__name__
        if self.streaming and self.val_fraction > 0:
            raise Refusal(
                f"{name}.val_fraction holds rows of the training files out, which a stream, read as it comes, cannot: set it "
                f"to 0, and give {name}.val_path to validate on."
            )
        if self.streaming and self.epoch_rows is not None:
            raise Refusal(f"{name}.epoch_rows has no meaning for a stream, which has no epochs: set trainer.max_steps.")

    def check_files(self, stage: str | None = None) -> None:
        """Of a stream reads the first rows alone."""
        super().check_files(stage)
        if self.streaming and stage in ("fit", None):
            for file in self._stream.files:
                self._check_first(file.name, file.kind, next(file.rows()).columns())

    def prepare_data(self) -> None:
        """Refuses a run of a stream that has no end, before the first file is tokenised."""
        if self.streaming and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            _require_end(self.trainer, type(self).__name__)
        super().prepare_data()

    def train_dataloader(self) -> PlannedLoader | StreamLoader:  # type: ignore[override]
        """Planned micro-batches, or those of a stream; both with the totals of their accumulation window."""
        if not self.streaming:
            return super().train_dataloader()
        trainer = self.trainer
        if trainer is not None:
            _require_end(trainer, type(self).__name__)
        fit = Fitting(
            self._render,
            max_length=self.max_length,
            truncation=self.truncation,
            bad_rows=self.bad_rows,
            max_tokens=self.max_tokens,
            bos=self.resolve_tokenizer().bos_token_id,
        )
        self._loader = StreamLoader(
            self._stream,
            fit,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            packed=self._packs,
            placement=self._train_placement,
            steps=lambda: trainer.max_steps if trainer is not None else None,
            begin=self._take_resumed,
            collate=self.collate,
        )
        return self._loader

    def reports(self) -> dict[str, Report]:
        """Of a stream the account of its first 100 rows."""
        return {"train": self._get("train").report, **super().reports()} if self.streaming else super().reports()

    # What a checkpoint holds: of a stream also the place in it

    def state_dict(self) -> dict[str, Any]:
        """Of a stream also its place, so that a resumed run reads up to it without rendering a row."""
        state = super().state_dict()
        trainer = self.trainer
        if self._loader is not None and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            state["stream"] = self._loader.mark(ready).state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses to go on in a stream that has become another; after its last step a run may go on with new data."""
        super().load_state_dict(state_dict)
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and self.streaming and "stream" in state_dict:
            now = self._deal()
            same = ("content", "weights", "shuffle", "seed", "streaming", "shuffle_buffer")
            if all(state_dict.get(name) == now[name] for name in same):
                self._resumed = Mark.of(state_dict["stream"])

    def _take_resumed(self) -> Mark | None:
        mark, self._resumed = self._resumed, None
        return mark

    def _content(self) -> dict[str, Any]:
        if not self.streaming:
            return super()._content()
        return {
            "content": self._stream.key,
            "weights": self._stream.weights,
            "epoch_rows": None,
            "streaming": True,
            "shuffle_buffer": self.shuffle_buffer,
        }

    # Rows for people

    @property
    def _stream(self) -> Stream:
        if self._opened is None:
            overfit = self.trainer is not None and bool(getattr(self.trainer, "overfit_batches", 0))
            if overfit:
                raise Refusal(
                    f"Trainer.overfit_batches sees the same batches again and again, and a stream goes on: set "
                    f"{type(self).__name__}.streaming false."
                )
            self._opened = open_stream(
                self._entries_of("train"), seed=self._seed, shuffle=self.shuffle, buffer=self.shuffle_buffer
            )
        return self._opened

    def _get(self, split: Split) -> TokenRows | MixedRows:
        return self._sample()[1] if self.streaming and split == "train" else super()._get(split)

    def _places(self, split: Split) -> Located:
        return self._sample()[0] if self.streaming and split == "train" else super()._places(split)

    def _sample(self) -> tuple[_Sample, TokenRows]:
        if self._sampled is None:
            raws = self._stream.first(_SAMPLE)
            results = rendered(raws, self._render)
            names = ", ".join(entry.name for entry in self._entries_of("train"))
            sample = _Sample(f"{names} (its first {len(raws)} rows)", raws)
            rows = select(
                _table(raws, results),
                sample,
                max_length=self.max_length,
                truncation=self.truncation,
                bad_rows=self.bad_rows,
                bos=self.resolve_tokenizer().bos_token_id,
            )
            self._sampled = sample, replace(rows, report=replace(rows.report, name=sample.name))
        return self._sampled


def _table(raws: Sequence[RawRow], results: Sequence[Rendered | Refusal]) -> Dataset:
    """In memory what `lightning_ft.data.tokenise.tokenise` keeps on disk."""
    good = [None if isinstance(result, Refusal) else result for result in results]
    columns = {
        "ids": pa.array([r.ids if r else [] for r in good], pa.list_(pa.int32())),
        "spans": pa.array(
            [[edge for span in r.spans for edge in span] if r else [] for r in good], pa.list_(pa.int32())
        ),
        "length": pa.array([len(r.ids) if r else 0 for r in good], pa.int32()),
        "scored": pa.array([r.scored if r else 0 for r in good], pa.int32()),
        "problem": pa.array(
            [
                str(result).removeprefix(raw.where()).lstrip(" :") if isinstance(result, Refusal) else ""
                for raw, result in zip(raws, results, strict=True)
            ]
        ),
    }
    return Dataset(pa.table(columns))


def _require_end(trainer: Trainer, name: str) -> None:
    if trainer.max_steps == -1:
        raise Refusal(
            f"{name}.streaming reads rows without knowing how many there are, so the run needs an end: set trainer.max_steps."
        )
