"""Going on from the checkpoint of an earlier run with new tasks: what was learned, kept and measured, not how far it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.checkpoints import (
    KEY,
    difference,
    injected_names,
    kept_keys,
    record_of,
    refuse_earlier,
    restore_adapters,
)
from lightning_ft.engine.gradients import like
from lightning_ft.engine.sharded_files import is_folder, read_meta, read_whole
from lightning_ft.engine.tasks import baseline_of
from lightning_ft.functional.errors import Refusal

STREAM = "TaskStream"


def read(given: str, *, mapped: bool = False) -> dict[str, Any]:
    """The checkpoint.

    Args:
        given: a file, or the folder of a sharded one.
        mapped: without reading its tensors.

    Raises:
        Refusal: it does not exist, or cannot be read.
    """
    file = Path(given).expanduser()
    if is_folder(file):
        return read_meta(file) if mapped else read_whole(file, optimizers=False)
    if not file.is_file():
        raise Refusal(
            f"TaskStream.continue_from names {given!r}, which is no file; give the checkpoint of an earlier run."
        )
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise Refusal(f"TaskStream.continue_from: {given} cannot be read as a checkpoint: {error}") from error
    return found


def stream_state(checkpoint: dict[str, Any], given: str) -> dict[str, Any]:
    """What the stream of that run had kept; of a run without one, nothing learned.

    Raises:
        Refusal: a run that was in the middle of a task.
    """
    state: dict[str, Any] = checkpoint.get(STREAM) or {}
    if not state:
        return {"learned": [], "scores": {"start": {}, "rows": {}}, "classes": {}, "labels": None}
    if state["ended"] < len(state["names"]):
        at = state["names"][state["ended"]]
        raise Refusal(
            f"TaskStream.continue_from: the run of {given} has not finished its task {at}; resume it first (ckpt_path), or give "
            "the checkpoint of its end."
        )
    return {
        "learned": [*state["learned"], *state["names"]],
        "scores": state["scores"],
        "classes": classes_in(state),
        "labels": state.get("labels"),
    }


def classes_in(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Name of a task -> numbers of its classes, as the stream's state has them."""
    return {name: None if found is None else tuple(found) for name, found in state.get("classes", {}).items()}


def check_labels(before: list[str] | None, now: list[str] | None, given: str) -> None:
    """Refuses data whose classes have other numbers than those of the run that is gone on from.

    Raises:
        Refusal: with both lists.
    """
    if before is not None and now is not None and before != now:
        raise Refusal(
            f"TaskStream.continue_from: the run of {given} had the classes {', '.join(before)}, and the data here have "
            f"{', '.join(now)}. Give labels (ClassificationData.labels) to all data modules: those of that run, in that order. "
            "Classes that come with a later task have to be among the labels of the very first run."
        )


def go_on_from(given: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Restores weights, snapshots and what continual techniques have kept.

    Raises:
        Refusal: a file of another model, or of tasks of which a continual technique has kept nothing.
    """
    checkpoint = read(given)
    weights = checkpoint["state_dict"]
    attachment = Attachment.of(module)
    now: Mapping[str, Any] = attachment.references.snapshots
    if KEY in checkpoint and attachment.installed:
        record = record_of(checkpoint)
        listed = set(record["keys"])
        # An adapter whose task is still to come begins as it was made.
        fresh = {n for n in attachment.late if n not in listed} & injected_names(module)
        refuse_earlier(listed, kept_keys(module))
        if problem := difference(listed, kept_keys(module) - fresh):
            raise Refusal(
                f"TaskStream.continue_from: {given} does not fit this model: {problem}; use the same base, techniques and targets."
            )
        if record["fingerprint"] != attachment.fingerprint:
            raise Refusal(
                f"TaskStream.continue_from: {given} was trained on another base; give the one it was trained on."
            )
        kept = {name: state for name, state in record["references"].items() if name not in ("start", "base")}
        attachment.references.load(kept)
        now = attachment.references.snapshots = {**now, **attachment.references.snapshots}
        restore_adapters(module, record)
    elif missing := set(module.state_dict()) - set(weights):
        raise Refusal(
            f"TaskStream.continue_from: {given} lacks {sorted(missing)[0]} of this model; give a file of the same."
        )
    own = module.state_dict(keep_vars=True)
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise Refusal(
                f"TaskStream.continue_from: {given} holds {name} {tuple(value.shape)}, and this model does not; where that is the "
                "head of a classifier, give labels (ClassificationData.labels): those of that run, in its order."
            )
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(like(value, own[name]))
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    states, learned = checkpoint.get("callbacks", {}), stream_state(checkpoint, given)["learned"]
    for callback in callbacks:
        if not getattr(getattr(callback, "traits", None), "continual", False):
            continue
        if state := states.get(callback.state_key):
            callback.load_state_dict(state)
        elif not learned or baseline_of(trainer) is not None:
            continue
        # What it has kept may also be a snapshot, or come from an earlier fit or another file.
        elif not callback.state_dict() and getattr(callback, "snapshot", "") not in now:
            raise Refusal(_keeps_nothing(callback.state_key, learned, states, given))


def _keeps_nothing(key: str, learned: Sequence[str], states: Mapping[str, Any], given: str) -> str:
    kind = key.split("[")[0]
    of_kind = sorted(other for other in states if other.startswith(f"{kind}["))
    there = of_kind or sorted(other for other in states if other.endswith("]"))
    fix = (
        f"give {kind} the name that it had there"
        if of_kind
        else f"learn those tasks with {kind}, leave it out here, or begin from its weights alone (an adapter's init_from, or merge)"
    )
    return (
        f"TaskStream.continue_from: the run of {given} has learned {', '.join(learned)}, and {key} has kept nothing of that there, "
        f"so it would protect none of it (the file has {', '.join(there) or 'no technique'}); {fix}."
    )


__all__ = ["STREAM", "check_labels", "classes_in", "go_on_from", "read", "stream_state"]
