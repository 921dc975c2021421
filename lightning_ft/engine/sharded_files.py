"""Sharded checkpoints as files: read whole by one process without a process group, or by every rank for its rows.

``torch.distributed.checkpoint`` keeps its index as a pickle. What is read here may come from somebody else (an adapter
to export, a run to go on with), so of that pickle only the classes of such an index are accepted, and of the shards
only tensors and plain values.
"""

from __future__ import annotations

import enum
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from lightning_ft.functional.errors import Refusal

META = _METADATA_FILENAME
"""The file of a sharded checkpoint that holds all but weights and optimizer state, in plain types."""
KEYS = "sharded_keys"
"""Where ``meta.pt`` lists the keys of the shards beside it."""
GROUPS = "sharded_groups"
"""Where ``meta.pt`` holds each optimizer's parameter groups, parameters by name."""

_INDEX = ".metadata"


class Reader(dcp.FileSystemReader):
    """Reads a sharded checkpoint of this library."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> index.Metadata:
        """The index, of which nothing runs.

        Raises:
            Refusal: it is damaged, or holds more than an index.
        """
        path = Path(self.path) / _INDEX
        try:
            with path.open("rb") as file:
                found = _IndexUnpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError) as error:
            raise Refusal(f"The index of {self.path} cannot be read ({error}); the checkpoint is damaged.") from error
        if not isinstance(found, index.Metadata):
            raise Refusal(f"The index of {self.path} holds a {type(found).__name__}; it is no sharded checkpoint.")
        meta = getattr(found, "storage_meta", None) or index.StorageMeta()
        meta.load_id = self.load_id
        found.storage_meta = meta
        return found


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == index.__name__ and isinstance(getattr(index, name, None), type):
            return getattr(index, name)
        if (module, name) == (_StorageInfo.__module__, _StorageInfo.__name__):
            return _StorageInfo
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout")):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module.startswith("pathlib") and name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            return Path  # of the machine that wrote it
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _member(kind: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 write for a member of an enumeration: ``getattr`` of its class; nothing else is given."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks {kind!r} for {name}")


class PlainPlanner(dcp.DefaultLoadPlanner):
    """Accepts no pickle where a value is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Reads one value of plain types."""
        loaded = torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            _put(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)
        else:
            self.state_dict[read_item.dest_index.fqn] = loaded


def _put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def is_folder(path: Path) -> bool:
    """Whether a path is a sharded checkpoint."""
    return (path / META).is_file()


def read_meta(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside its shards, `KEYS` and `GROUPS` included.

    Raises:
        Refusal: the folder was written by something else.
    """
    meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
    if KEYS not in meta:
        raise Refusal(
            f"{path} was not written by FSDP2Strategy ({META} lists no keys), so it cannot be compared with the model; "
            "resume it with the strategy that wrote it."
        )
    return meta


def read_whole(path: Path, *, optimizers: bool = True) -> dict[str, Any]:
    """A sharded checkpoint as one dictionary, as a single process would have written it; needs no process group.

    Args:
        path: the folder.
        optimizers: also the optimizers' state, which is twice the size of the weights.

    Returns:
        With ``state_dict`` and, if asked for and there, ``optimizer_states``, whole tensors on the CPU.

    Raises:
        Refusal: the folder was written by something else, or is damaged.
    """
    meta = read_meta(path)
    keys, groups = meta.pop(KEYS), meta.pop(GROUPS, [])
    reader = Reader(path)
    found = reader.read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        if isinstance(entry, index.TensorStorageMetadata)
        else None
        for name, entry in found.state_dict_metadata.items()
        if optimizers or name.startswith("state_dict.")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group, as is meant
        dcp.load(flat, storage_reader=reader, planner=PlainPlanner(flatten_state_dict=False), no_dist=True)
    weights = {
        name.removeprefix("state_dict."): value for name, value in flat.items() if name.startswith("state_dict.")
    }
    if missing := set(keys["state_dict"]) - set(weights):
        raise Refusal(
            f"{path} lacks {min(missing)} and {len(missing) - 1} more of the keys that it lists; it is damaged."
        )
    meta["state_dict"] = weights
    if optimizers and groups:
        meta["optimizer_states"] = [
            numbered({"state": _states(flat, f"optimizer_{i}.state.", keys[f"optimizer_{i}"]), "param_groups": group})
            for i, group in enumerate(groups)
        ]
    return meta


def _states(flat: dict[str, Any], prefix: str, names: list[str]) -> dict[str, Any]:
    states: dict[str, Any] = {name: {} for name in names}
    for key, value in flat.items():
        name, _, entry = key.removeprefix(prefix).rpartition(".")
        if key.startswith(prefix) and name in states:
            states[name][entry] = value
    return states


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by name as torch's own optimizers have it: parameters are numbers, in the groups' order."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    return {
        "state": {number[name]: dict(value) for name, value in state["state"].items() if value},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def gathered(value: Any) -> Any:
    """``value`` with whole tensors on the CPU for sharded ones; all ranks must call it on values of one structure."""
    if isinstance(value, DTensor):
        whole: torch.Tensor = value.full_tensor()
        return whole.detach().cpu()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, (DTensor, dict, list, tuple)) for item in value):
        return type(value)(gathered(item) for item in value)
    return value


def put_in_place(partial: Path, path: Path) -> None:
    """``partial`` becomes ``path``; a crash leaves one of the two whole, the old one perhaps under its hidden name."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir():
        path.rename(old)
    elif path.exists():
        path.unlink()
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    shutil.rmtree(old, ignore_errors=True)
