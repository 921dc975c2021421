"""`lightning_ft.load`: a module from a checkpoint, with its injected parts.

Lightning's ``load_from_checkpoint`` runs no callbacks, so it could not rebuild what they injected.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.checkpoints import difference, fingerprint, kept_keys, record_of
from lightning_ft.engine.technique import Technique
from lightning_ft.functional.errors import Refusal


def load(path: str | Path, module: pl.LightningModule | None = None, *, base: str | None = None) -> Any:
    """A LightningModule as a checkpoint left it: base loaded, parts injected, trained values in place, in eval mode.

    Args:
        path: a ``.ckpt`` file that a fit of this library wrote (weights-only files too). It is read without pickle.
        module: your own module, freshly constructed, for checkpoints of modules that are not ours.
        base: another place of the same base model (it has moved, say); its weights are compared by fingerprint.

    Raises:
        Refusal: for a missing, foreign or damaged file, another base, or an own module that was not given.

    Example::

        module = lightning_ft.load("runs/sft/checkpoints/last.ckpt")
        module.generate(["What is the capital of France?"])
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise Refusal(f"There is no checkpoint {file}; give a file that a fit has written.")
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Refusal(
            f"{file} is not a checkpoint that can be read ({type(error).__name__}); give a file that a fit has written."
        ) from error
    record = record_of(checkpoint)
    if module is None:
        if record["module"] is None:
            raise Refusal(
                f"{file} was written by a LightningModule of your own; construct it and call load({str(file)!r}, module=it)."
            )
        recipe = record["module"]
        arguments = {**recipe["init_args"], **({"base": base} if base is not None else {})}
        module = _class(recipe["class_path"], pl.LightningModule)(**arguments)
    techniques = [_technique(recipe) for recipe in record["techniques"]]
    attachment = Attachment.of(module)
    attachment.rebuild(techniques, seed=record["seed"])
    problem = difference(set(record["keys"]), kept_keys(module))
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
    attachment.references.load(record["references"])
    module.eval()
    return module


def _technique(recipe: dict[str, Any]) -> Technique:
    arguments = dict(recipe["init_args"])
    if "init_from" in arguments:
        arguments["init_from"] = None  # the trained values are in the checkpoint; the start is not needed
    technique: Technique = _class(recipe["class_path"], Technique)(**arguments)
    return technique


def _class(path: str, kind: type) -> Any:
    """A class by its path, which must be one of ours or the user's own kind of it: a file may not import at will."""
    module, _, name = path.rpartition(".")
    if not module.startswith("lightning_ft."):
        raise Refusal(f"The checkpoint asks for {path}, which is not part of lightning_ft; pass the module yourself.")
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise Refusal(f"The checkpoint asks for {path}, which is no {kind.__name__}; it was made by another version.")
    return found
