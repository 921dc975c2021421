"""--ckpt_path, checked before any model is loaded: it is there, it is a checkpoint, it serves the command."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from lightning_ft.cli.names import near_file
from lightning_ft.cli.run_folder import newest_checkpoint
from lightning_ft.functional.errors import Refusal

WORDS = ("last", "best", "hpc")  # Lightning's names for files that it looks for itself
RESUMABLE = ("optimizer_states", "loops")  # what Lightning needs to go on; a weights-only file lacks them


def resolve(given: str, folder: Path) -> Path:
    """The file that ``--ckpt_path`` means: itself, or for ``last`` the newest of this run.

    Lightning starts from scratch, with a warning, when there is no last checkpoint: here that is an error.
    """
    if given == "last":
        newest = newest_checkpoint(folder)
        if newest is None:
            raise Refusal(f"--ckpt_path last: {folder} holds no checkpoint.")
        return newest
    if given == "best":
        raise Refusal("--ckpt_path best is known only while a fit runs; name the file, or say last.")
    return Path(given)


def check(path: Path, *, resume: bool, ours: bool) -> dict[str, Any]:
    """Refuses what is no checkpoint, and for ``resume`` one that holds weights alone.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        resume: whether `fit` is to go on from it.
        ours: whether the module or a callback is ours, so that the file must hold our record of what was trained;
            a run without any is plain Lightning, and so is its file.

    Returns:
        The checkpoint, its tensors memory-mapped and not read; empty for a sharded one.

    Raises:
        Refusal: see above.
    """
    if path.is_dir():
        if not (path / ".metadata").is_file():
            raise Refusal(f"{path} is a folder, not a checkpoint; name the .ckpt file in it.")
        return {}
    if not path.is_file():
        raise Refusal(f"There is no checkpoint {path}{near_file(path)}.")
    if not zipfile.is_zipfile(path):
        more = "; an adapter starts a run through --lora.init_from" if path.suffix == ".safetensors" else ""
        raise Refusal(f"{path} is not a checkpoint, or was cut short: it is no zip archive{more}.")
    import torch  # late: everything above is answered without it

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever torch raises on a foreign archive
        reason = " ".join(str(error).split(".")[0].split())
        raise Refusal(f"{path} is not a checkpoint of ours: {reason}.") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
        keys = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise Refusal(f"{path} is not a checkpoint of a Lightning run: it holds {keys}.")
    if ours:
        from lightning_ft.engine import checkpoints

        checkpoints.record_of(checkpoint)
    if resume and not all(key in checkpoint for key in RESUMABLE):
        raise Refusal(
            f"{path} holds weights alone, so fit cannot resume from it; it can be loaded, exported, "
            "or start a new run through --lora.init_from."
        )
    return checkpoint
