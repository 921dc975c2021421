"""Which files a teacher is made of: by them, what was kept of it is not taken for what another of the same name predicts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from lightning_ft.engine.teacher import origin_of

Print = tuple[int, int, str]
"""Size in bytes, time of the last change in nanoseconds, SHA-256 of the content."""

_KINDS = (".safetensors", ".bin", ".gguf")
_NAMES = ("config.json", "adapter_config.json")
_BLOCK = 2**20


def teacher_files(teacher: str, *, trust_remote_code: bool = False, revision: str | None = None) -> dict[str, Path]:
    """The files that make a teacher, those of the base that it stands on among them, by names that say nothing of their place.

    Nothing is asked for over a network: of a hub model these are the files in the local cache.

    Args:
        teacher: as of `Distillation`.
        trust_remote_code: whether Python code in the model's repository may run.
        revision: of a hub model.

    Returns:
        Name -> file; empty where nothing is on this machine, and of a starter asset, whose name holds its content fast.
    """
    path = Path(teacher).expanduser()
    if not path.exists():
        return _in_cache(teacher, revision)
    origin = origin_of(teacher, trust_remote_code=trust_remote_code, revision=revision)
    own = {path.name: path} if path.is_file() else _in_folder(path)
    if origin.kind == "base":
        return own
    base = Path(origin.base).expanduser()
    below = _in_folder(base) if base.is_dir() else _in_cache(origin.base, revision)
    return own | {f"base/{name}": file for name, file in below.items()}


def _in_folder(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in sorted(folder.iterdir()) if file.suffix in _KINDS or file.name in _NAMES}


def _in_cache(repository: str, revision: str | None) -> dict[str, Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError:  # a starter asset, or a path where nothing is
        return {}
    return _in_folder(Path(found).parent) if isinstance(found, str) else {}


def prints_of(files: Mapping[str, Path]) -> dict[str, Print]:
    """What files are known by later."""
    return {name: (*_dated(file), _sum(file)) for name, file in files.items()}


def differing(files: Mapping[str, Path], prints: Mapping[str, Print]) -> str | None:
    """The first file that is not what it was, if there is one.

    A file of the same size and time is the same; of others the content is read, since a copy has a time of its own.
    """
    for name in sorted(files.keys() | prints.keys()):
        if name not in files or name not in prints:
            return name
        size, changed, content = prints[name]
        if _dated(files[name]) == (size, changed):
            continue
        if files[name].stat().st_size != size or _sum(files[name]) != content:
            return name
    return None


def _dated(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _sum(file: Path) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


__all__ = ["Print", "differing", "prints_of", "teacher_files"]
