"""One fit on VADER by one of the starter models, and its scores: a cell of `supervised` and of `methods`, kept when it is done.

The encoder learns the sentiment (or the rating) of single sentences through a new head; the decoder answers the question of
``starter:vader`` in one word. Rows, their split and order are the same for all cells; the seed draws heads and factors.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.row_files import written
from benchmarks.silent import silent_trainer

DOMAINS = ("tweets", "amazonReviewSnippets", "movieReviewSnippets")
TRAIN, VAL, TEST, STEPS, BATCH, SEEDS = 2000, 400, 1000, 63, 32, (0, 1, 2)
TASKS = {"classification": "val/accuracy", "regression": "val/pearson"}
"""Task of the encoder -> what is reported of it; higher is better."""
HEAD_LR = 1e-3
"""Rate of the new head, wherever the body trains at a lower one."""
ASKED_TRAIN, ASKED_VAL, ASKED_TEST, ASKED_BATCH = 240, 120, 300, 16
"""Rows of the decoder, in one epoch; the best rate is the one of the least loss on the validation rows."""


def write_rows(folder: Path) -> dict[str, str]:
    """Split -> file of clearly rated sentences of three domains, each once, shuffled with one seed.

    ``more`` are the training rows and all those that are in no split.
    """
    from lightning_ft.data.vader import ratings

    rows: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        for rating, text in ratings(domain):
            if abs(rating) > 0.5:
                key = " ".join(text.lower().split())
                rows.setdefault(
                    key, {"text": text, "label": "positive" if rating > 0 else "negative", "rating": rating}
                )
    chosen = list(rows.values())
    random.Random(0).shuffle(chosen)
    files, begin = {}, 0
    for split, count in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        files[split], begin = written(folder / f"{split}.jsonl", chosen[begin : begin + count]), begin + count
    files["more"] = written(folder / "more.jsonl", chosen[:TRAIN] + chosen[begin:])
    return files


def write_questions(folder: Path) -> dict[str, str]:
    """Split -> file of questions about sentences, each with a one-word answer."""
    from lightning_ft.data.vader import vader_rows

    train = vader_rows("train")
    splits = {
        "train": train[:ASKED_TRAIN],
        "val": train[ASKED_TRAIN : ASKED_TRAIN + ASKED_VAL],
        "test": vader_rows("test")[:ASKED_TEST],
    }
    return {
        name: written(folder / f"asked_{name}.jsonl", [{k: row[k] for k in ("prompt", "completion")} for row in chosen])
        for name, chosen in splits.items()
    }


def encoder_job(
    task: str, rate: float, files: Mapping[str, str], base: str = "starter:minilm-l6", **model: Any
) -> tuple[Any, Any]:
    """(module, data) of the encoder."""
    from lightning_ft import SFT, ClassificationData

    name = "regression" if task == "regression" else "sequence_classification"
    module = SFT(base, task=name, lr=rate, head_lr=max(rate, HEAD_LR), **model)
    data = ClassificationData(
        files["train"],
        val_path=files["val"],
        test_path=files["test"],
        label_column="rating" if task == "regression" else "label",
        task=name,
        batch_size=BATCH,
        val_batch_size=64,
        packing=True,  # half of the padded positions would hold nothing
        seed=0,
    )
    return module, data


def decoder_job(
    rate: float, files: Mapping[str, str], base: str = "starter:smollm2-135m", **model: Any
) -> tuple[Any, Any]:
    """(module, data) of the decoder: the quickstart's, which learns the answer alone."""
    from lightning_ft import SFT, SFTData

    module = SFT(base, lr=rate, **model)
    data = SFTData(
        files["train"],
        val_path=files["val"],
        test_path=files["test"],
        loss_on="completion",
        batch_size=ASKED_BATCH,
        seed=0,
    )
    return module, data


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    """A trainer that writes nothing, clips, and does not validate while it trains; on the GPU where there is one."""
    accelerator = "gpu" if measure.device() == "cuda" else "cpu"
    fixed = {"accelerator": accelerator, "devices": 1, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    return silent_trainer(folder, callbacks, **{**fixed, **options})


def encoder_cell(
    task: str,
    callbacks: list[Any],
    rate: float,
    seed: int,
    files: Mapping[str, str],
    folder: Path,
    **model: Any,
) -> dict[str, Any]:
    """One fit of the encoder, then its scores on validation and test rows."""
    import lightning.pytorch as pl

    pl.seed_everything(seed, verbose=False)
    module, data = encoder_job(task, rate, files, **model)
    found = _fitted(module, data, trainer(folder, callbacks, max_steps=STEPS, max_epochs=-1))
    return {**found, "scores": judged(module, data, folder)}


def decoder_cell(
    callbacks: list[Any], rate: float, seed: int, files: Mapping[str, str], folder: Path, **model: Any
) -> dict[str, Any]:
    """One epoch of the decoder, then the loss of validation rows and how many test rows it answers right."""
    import lightning.pytorch as pl

    from lightning_ft.cli.quickstart import label_accuracy

    pl.seed_everything(seed, verbose=False)
    module, data = decoder_job(rate, files, **model)
    found = _fitted(module, data, trainer(folder, callbacks, max_epochs=1))
    (val,) = trainer(folder, [], limit_val_batches=None).validate(module, data, verbose=False)
    right, rows = label_accuracy(module.to(measure.device()), data)
    scores = {**{k: float(v) for k, v in val.items()}, "test/right": right, "test/rows": rows}
    return {**found, "scores": {**scores, "test/accuracy": right / rows}}


def judged(module: Any, data: Any, folder: Path, **options: Any) -> dict[str, float]:
    """What is measured of all validation and test rows."""
    judge = trainer(folder, [], **{**options, "limit_val_batches": None})
    (val,) = judge.validate(module, data, verbose=False)
    (test,) = judge.test(module, data, verbose=False)
    return {name: float(value) for name, value in {**val, **test}.items()}


def _fitted(module: Any, data: Any, fitter: Any) -> dict[str, Any]:
    begun = time.perf_counter()
    fitter.fit(module, data)
    seconds = time.perf_counter() - begun
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {"seconds": seconds, "trainable": trainable, "device": measure.device_name()}


class Kept:
    """Cells in a JSON file, by key; written after each, so that a stopped run goes on where it was.

    Several processes may share the file: a cell that another one is at is left out, and a write keeps what others have written.

    Args:
        file: where they lie.
        setting: what all of them have in common.
        only: leave out what contains none of these, which commas separate.
    """

    def __init__(self, file: Path, setting: dict[str, Any], only: str = "") -> None:
        self.file, self.only = file, only
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"cells": {}}
        self.setting = setting

    @property
    def cells(self) -> dict[str, Any]:
        """Key -> result."""
        return self.content["cells"]

    def ensure(self, key: str, make: Callable[[], dict[str, Any]], score: str) -> None:
        """Makes a cell that is missing, or has failed before; one that fails is kept with its reason, and the next may run."""
        if "scores" in self.cells.get(key, {}) or not chosen(key, self.only):
            return
        with self._alone(f"cell {key}", wait=False) as mine:
            self._take_others()
            if not mine or "scores" in self.cells.get(key, {}):
                return
            try:
                self.cells[key] = found = make()
                told = f"{found['scores'][score]:.4f} {score}, {found['seconds']:.0f} s"
            except Exception as error:  # one method that fails must not end a run of hours
                self.cells[key] = {"failed": f"{type(error).__name__}: {error}"[:1000]}
                told = self.cells[key]["failed"]
            self.save()
        print(f"{key}: {told}", flush=True)

    def save(self) -> None:
        """Write the file, whole or not at all, with the cells that others have made meanwhile."""
        with self._alone("file", wait=True):
            self._take_others()
            self.content |= {"machine": measure.machine(), "setting": self.setting}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.file)

    def _take_others(self) -> None:
        theirs = json.loads(self.file.read_text())["cells"] if self.file.exists() else {}
        for key, cell in theirs.items():
            if key not in self.cells or ("scores" in cell and "scores" not in self.cells[key]):
                self.cells[key] = cell

    @contextmanager
    def _alone(self, what: str, *, wait: bool) -> Iterator[bool]:
        """Inside, no other process is here; False where one is and nobody waits. The lock goes with the process that has it."""
        name = hashlib.sha256(f"{self.file.resolve()} {what}".encode()).hexdigest()[:32]
        with (Path(tempfile.gettempdir()) / f"lightning_ft-{name}.lock").open("a") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def chosen(key: str, only: str) -> bool:
    """Whether the key contains one of the parts that commas separate."""
    return any(part in key for part in only.split(","))


def best_rate(cells: Mapping[str, Any], keys: Mapping[float, str], score: str) -> float | None:
    """The rate whose cell has the best score, the least where it is a loss; None while one of them is missing.

    Args:
        cells: key -> result.
        keys: rate -> key of its cell.
        score: which of a cell's scores.
    """
    if not all("scores" in cells.get(key, {}) for key in keys.values()):
        return None
    sign = -1 if score.endswith("loss") else 1
    return max(keys, key=lambda rate: sign * cells[keys[rate]]["scores"][score])


def quiet() -> None:
    """No warnings or logs of others between the lines of a long run."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
