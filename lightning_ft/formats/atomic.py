"""Write a folder, or a file, so that a reader finds the old content or the new content, and never half of either.

Two renames replace a folder that exists (no portable call swaps two folders): a process killed between them leaves the
target absent and both contents complete beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lightning_ft.functional.errors import Refusal


def check_target(folder: str | Path, *, marker: str) -> None:
    """Refuse a place where `atomic_folder` would not write, before anything is computed for it.

    Args:
        folder: The target.
        marker: Name of the file by which an earlier export is known.

    Raises:
        Refusal: If the target is a file or a folder with something else in it.
    """
    target = Path(folder).absolute()
    if target.is_dir():
        if any(target.iterdir()) and not (target / marker).is_file():
            raise Refusal(
                f"The folder {target} is not empty and holds no {marker}; choose a new folder, so nothing is lost."
            )
    elif target.exists():
        raise Refusal(f"{target} is a file; choose a folder to write to.")


@contextmanager
def atomic_folder(folder: str | Path, *, marker: str, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a temporary folder beside the target, and put it in the target's place if the block succeeds.

    Every file is fsynced before the rename. After an exception the target is as it was.

    Args:
        folder: The target. It may be absent, empty, or hold an earlier export, which is replaced.
        marker: Name of the file by which an earlier export is known, such as ``adapter_config.json``.
        needed_bytes: Refuse at once when the disk has less free space than this.

    Raises:
        Refusal: If the target is a file or a folder with something else in it, or the disk is too full.
    """
    target = Path(folder).absolute()
    check_target(target, marker=marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise Refusal(
            f"Writing {target} needs {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left; free "
            "some space or choose another disk."
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        for path in sorted(temporary.rglob("*"), reverse=True):
            _sync(path)
        _sync(temporary)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old)  # renaming over an empty folder is allowed
            try:
                os.replace(temporary, target)
            except BaseException:
                os.replace(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_folder(
    folder: str | Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    config_file: str,
    weights_file: str,
) -> Path:
    """Write a configuration and tensors, as adapter folders hold them, atomically; see `atomic_folder` for what is refused.

    Args:
        folder: The target.
        config: What the JSON file says.
        tensors: By their names in the file; on any device, and two may be views of one.
        config_file: Name of the JSON file, by which an earlier folder is known.
        weights_file: Name of the safetensors file.

    Returns:
        The folder.
    """
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic_folder(folder, marker=config_file, needed_bytes=size + 2**20) as temporary:
        save_file(tensors, temporary / weights_file, metadata={"format": "pt"})
        (temporary / config_file).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def write_text(file: Path, text: str) -> None:
    """Write a file of text beside its target, fsynced, and rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    _sync(beside)
    os.replace(beside, file)


def _sync(path: Path) -> None:
    """Write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
