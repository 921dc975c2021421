"""`lightning_ft.load`: a module from a checkpoint, with its injected parts.

Lightning's ``load_from_checkpoint`` runs no callbacks, so it could not rebuild what they injected.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.checkpoints import (
    difference,
    fingerprint,
    kept_keys,
    record_of,
    refuse_earlier,
    restore_adapters,
)
from lightning_ft.engine.sharded_files import is_folder, read_whole
from lightning_ft.engine.technique import Technique
from lightning_ft.functional.errors import Refusal


def load(
    path: str | Path,
    module: pl.LightningModule | None = None,
    *,
    base: str | None = None,
    attention: str | None = None,
    unquantised: bool = False,
    techniques: Sequence[type[Technique]] = (),
) -> Any:
    """A LightningModule as a checkpoint left it: base loaded, parts injected, trained values in place, in eval mode.

    Args:
        path: a ``.ckpt`` file that a fit of this library wrote (weights-only files too), or the folder of a sharded one, which
            needs no process group. It is read without pickle.
        module: your own module, freshly constructed, for checkpoints of modules that are not ours.
        base: another place of the same base model (it has moved, say); its weights are compared by fingerprint.
        attention: another implementation than the run's, as of `SFT` (``eager`` keeps its maps); the same up to rounding.
        unquantised: leave the base as its file has it, though the run had packed it (``quantize``): to merge, export, or train
            on in full. What was trained then meets weights that differ from the packed ones by their rounding.
        techniques: classes of your own techniques that the run used, where they are not imported yet: a file may not
            import code of its choice.

    Raises:
        Refusal: for a missing, foreign or damaged file, another base, or an own module or technique that was not given.

    Example::

        module = lightning_ft.load("runs/sft/checkpoints/last.ckpt")
        module.generate(["What is the capital of France?"])
    """
    file = Path(path).expanduser()
    checkpoint = read_checkpoint(file)
    record = record_of(checkpoint)
    if module is None:
        if record["module"] is None:
            raise Refusal(
                f"{file} was written by a LightningModule of your own; construct it and call load({str(file)!r}, module=it)."
            )
        recipe = record["module"]
        arguments = {**recipe["init_args"], **({"base": base} if base is not None else {})}
        if attention is not None and "attention" in arguments:
            arguments["attention"] = attention
        if unquantised and "quantize" in arguments:
            arguments["quantize"] = None
        module = _built(recipe["class_path"], arguments, pl.LightningModule, (), "construct it and pass module=it")
    attachment = Attachment.of(module)
    attachment.rebuild([_technique(recipe, techniques) for recipe in record["techniques"]], seed=record["seed"])
    listed, expected = set(record["keys"]), kept_keys(module)
    refuse_earlier(listed, expected)
    problem = difference(listed, expected)
    if problem:
        raise Refusal(
            f"{file} does not fit the model that its own recipe builds: {problem}; it was made by another version."
        )
    if record["fingerprint"] != fingerprint(module):
        raise Refusal(
            f"The frozen weights are not those that {file} was trained on (their fingerprints differ); give the same base "
            "model and revision."
        )
    own = module.state_dict(keep_vars=True)
    state = checkpoint["state_dict"]
    missing = sorted(set(record["keys"]) - set(state))
    if missing:
        raise Refusal(
            f"{file} lacks {missing[0]} and {len(missing) - 1} more of the keys that it lists; it is damaged."
        )
    with torch.no_grad():
        for name in record["keys"]:
            if own[name].shape != state[name].shape:
                raise Refusal(
                    f"{file}: {name} has shape {tuple(state[name].shape)}, the model's {tuple(own[name].shape)}."
                )
            own[name].copy_(state[name])
    for name in attachment.late:
        own[name].requires_grad_(True)  # as at the end of the run, so that an export knows of them
    attachment.references.load(record["references"])
    restore_adapters(module, record)
    module.eval()
    return module


def read_recipe(file: Path) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of the module that wrote a checkpoint, before anything is loaded; of a user's own none.

    Raises:
        Refusal: there is no checkpoint of ours.
    """
    return record_of(read_checkpoint(file, mapped=True))["module"] or {}


def of_kind(recipe: dict[str, Any], kind: type) -> bool:
    """Whether a module of ours that a checkpoint names is of this class, or of one below it."""
    cls = _ours(recipe.get("class_path", ""))
    return isinstance(cls, type) and issubclass(cls, kind)


def read_checkpoint(file: Path, *, mapped: bool = False) -> dict[str, Any]:
    """What a checkpoint file, or the folder of a sharded one, holds; read without pickle, and sharded ones without optimizers.

    Args:
        file: one of the two.
        mapped: leave the tensors of a file on disk until they are looked at.

    Raises:
        Refusal: there is none, or it cannot be read.
    """
    if not file.exists():
        raise Refusal(f"There is no checkpoint {file}; give a file that a fit has written.")
    try:
        checkpoint: dict[str, Any] = (
            read_whole(file, optimizers=False)
            if is_folder(file)
            else torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        )
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(
            f"{file} is not a checkpoint that can be read ({type(error).__name__}); give a file that a fit has written."
        ) from error
    return checkpoint


def _technique(recipe: dict[str, Any], own: Sequence[type[Technique]]) -> Technique:
    arguments = dict(recipe["init_args"])
    if "init_from" in arguments:
        arguments["init_from"] = None  # the trained values are in the checkpoint; the start is not needed
    path, name = recipe["class_path"], recipe["class_path"].rpartition(".")[2]
    advice = f"import {name} first, or pass techniques=[{name}]"
    built: Technique = _built(path, arguments, Technique, [*_imported(path), *own], advice)
    return built


def _built(path: str, arguments: dict[str, Any], kind: type, own: Sequence[type], advice: str) -> Any:
    """An object of the class at ``path``: one of ours, or of the user's."""
    cls = _given(path, own) or _ours(path)
    if cls is None and path.startswith("lightning_ft."):
        raise Refusal(f"The checkpoint asks for {path}, which this version lacks; use the version that wrote it.")
    if cls is None:
        raise Refusal(
            f"The checkpoint asks for {path}, which is not part of lightning_ft, and a file may not import it: {advice}."
        )
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise Refusal(f"The checkpoint asks for {path}, which is no {kind.__name__}; it was made by another version.")
    try:
        return cls(**arguments)
    except TypeError as error:  # a constructor with other arguments than those that were recorded
        raise Refusal(
            f"{path} cannot be built as the checkpoint says: {error}; it was made by another version."
        ) from error


def _given(path: str, own: Sequence[type]) -> type | None:
    by_path = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in own}
    by_name = {cls.__name__: cls for cls in own}  # a class that has moved to another file since
    return by_path.get(path) or by_name.get(path.rpartition(".")[2])


def _ours(path: str) -> Any:
    """What this library has at ``path``, which a hostile file may choose: not always a class."""
    module, _, name = path.rpartition(".")
    if not module.startswith("lightning_ft."):
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _imported(path: str) -> list[type[Technique]]:
    """The technique that ``path`` names in a module that the user has imported already, if there is one."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        if found is not None:
            for name in parts[end:]:
                found = getattr(found, name, None)
            return [found] if isinstance(found, type) and issubclass(found, Technique) else []
    return []
