"""What ``predict`` leaves behind: one line of JSON for each row, in the order of the data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback

from lightning_ft.cli.errors import say
from lightning_ft.engine.task_list import OF_PAIRS
from lightning_ft.functional.errors import Refusal

PREDICTIONS = "predictions.jsonl"
FILLER = -1
"""Row number of what was only added to give every rank as many batches."""
_LOADER = "lightning_ft_loader"
"""Key of a part's lines from a loader behind the first: the rows of each are numbered from 0."""


class PredictionFile(Callback):
    """Writes what a module's ``predict_step`` says of each row.

    Each rank writes its own rows as they come, beside ``path``; when all is through they are put together in the order of the
    data. Rows are numbered from 0 as they stand in the file.

    Args:
        path: the file to write; not there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._out: IO[str] | None = None

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{rank}.part")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens this rank's part."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._out = self._part(trainer.global_rank).open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the rows of a batch, flushed, so that a run that was killed leaves what it had."""
        assert self._out is not None
        for line in lines_of(outputs, **_kind(pl_module, outputs, batch)):
            place = {_LOADER: dataloader_idx} if dataloader_idx else {}
            self._out.write(json.dumps({**place, **line}, ensure_ascii=False) + "\n")
        self._out.flush()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the parts of all ranks together."""
        self._close()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        texts = [text for part in parts if part.exists() for text in part.read_text(encoding="utf-8").splitlines()]
        lines = sorted(map(json.loads, texts), key=_order)  # stable: rows without a number stay as they came
        for line in lines:
            line.pop(_LOADER, None)
        written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.path.write_text(written, encoding="utf-8")
        for part in parts:
            part.unlink(missing_ok=True)
        say(f"{len(lines):,} predictions in {self.path}.")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the part as it is."""
        self._close()

    def _close(self) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None


def free_file(folder: Path) -> Path:
    """``predictions.jsonl`` in a run's folder, or the first of ``predictions-2.jsonl`` ... that is not there."""
    path, number = folder / PREDICTIONS, 2
    while path.exists():
        path = folder / f"{Path(PREDICTIONS).stem}-{number}.jsonl"
        number += 1
    return path


def checked_file(given: str) -> Path:
    """The file that a user named.

    Raises:
        Refusal: something is there already, or its folder is a file.
    """
    path = Path(given).expanduser()
    if path.exists():
        raise Refusal(f"--output {given} is there already, and nothing is overwritten; give another name.")
    above = next((folder for folder in path.parents if folder.exists()), Path("."))
    if not above.is_dir():
        raise Refusal(f"--output {given} cannot be written: {above} is no folder.")
    return path


def lines_of(
    outputs: Any, labels: Sequence[str] | None = None, *, several: bool = False, pairs: bool = False
) -> Iterator[dict[str, Any]]:
    """What one batch's outputs say of each of its rows.

    Args:
        outputs: a dictionary of tensors with ``rows``, as our modules give; a list of dictionaries, one a row; or whatever a
            module of one's own returns: a tensor or a dictionary of tensors whose first axis counts rows.
        labels: names of the classes that ``probabilities`` belong to.
        several: whether a row may have several classes, each by a probability above 1/2.
        pairs: whether rows come twice, the chosen answer first.
    """
    if isinstance(outputs, (list, tuple)) and all(isinstance(one, dict) for one in outputs):
        yield from ({key: _plain(value) for key, value in one.items()} for one in outputs)
        return
    if not isinstance(outputs, dict):
        outputs = {"prediction": outputs}
    values = {key: _plain(value) for key, value in outputs.items() if value is not None}
    rows = values.pop("rows", None)
    if "segment" in values:  # classes of words: those of one row together
        words: list[list[Any]] = [[] for _ in rows or ()]
        for segment, chances in zip(values.pop("segment"), values.pop("probabilities"), strict=True):
            words[segment].append(_class_of(chances, labels))
        values["words"] = words
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    shared = {key: value for key, value in values.items() if key not in lists}
    count = len(rows) if rows is not None else max(map(len, lists.values()), default=1)
    for number in range(count):
        if rows is not None and rows[number] == FILLER:
            continue
        line: dict[str, Any] = {} if rows is None else {"row": rows[number]}
        if pairs:
            line["answer"] = "rejected" if number % 2 else "chosen"
        line |= shared
        for key, value in lists.items():
            if len(value) != count:
                line[key] = value
            elif key == "probabilities":
                line |= _classes_of(value[number], labels) if several else _class_of(value[number], labels)
                line["probabilities"] = dict(
                    zip(_names(labels, value[number]), map(_short, value[number]), strict=True)
                )
            else:
                line[key] = value[number]
        yield line


def _names(labels: Sequence[str] | None, chances: Sequence[float]) -> list[str]:
    return list(labels) if labels is not None and len(labels) == len(chances) else [str(n) for n in range(len(chances))]


def _class_of(chances: list[float], labels: Sequence[str] | None) -> dict[str, Any]:
    best = max(range(len(chances)), key=chances.__getitem__)
    return {"label": _names(labels, chances)[best], "probability": _short(chances[best])}


def _classes_of(chances: list[float], labels: Sequence[str] | None) -> dict[str, Any]:
    return {"labels": [name for name, chance in zip(_names(labels, chances), chances, strict=True) if chance > 0.5]}


def _short(number: float) -> float:
    return round(number, 6)


def _plain(value: Any) -> Any:
    """As JSON can have it."""
    if isinstance(value, torch.Tensor):
        return value.detach().float().tolist() if value.is_floating_point() else value.detach().tolist()
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _order(line: dict[str, Any]) -> tuple[int, int]:
    row = line.get("row")
    return line.get(_LOADER, 0), row if isinstance(row, int) else FILLER


def _labels(module: Any) -> list[str] | None:
    labels = getattr(getattr(module, "view", None), "labels", None) or getattr(module, "labels", None)
    return list(labels) if isinstance(labels, (list, tuple)) else None


def _kind(module: Any, outputs: Any, batch: Any) -> dict[str, Any]:
    """What `lines_of` is to know of the rows: of several tasks, what their own has."""
    name = outputs.get("task") if isinstance(outputs, dict) and getattr(module, "trains_several_tasks", False) else None
    if name is not None:
        task = module.asked()[name]
        return {"labels": task.labels, "several": task.several, "pairs": task.objective in OF_PAIRS}
    pairs = "pair" in (getattr(batch, "counts", None) or {})
    return {"labels": _labels(module), "several": bool(getattr(module, "takes_several", False)), "pairs": pairs}


__all__ = ["PREDICTIONS", "PredictionFile", "checked_file", "free_file", "lines_of"]
