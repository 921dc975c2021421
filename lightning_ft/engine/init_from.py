"""Starting an adapter from one that a checkpoint of this library holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.engine.checkpoints import record_of
from lightning_ft.engine.loading import read_checkpoint
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import base_name, injected_layers


def is_adapter_folder(source: Path) -> bool:
    """Whether a path is a folder in PEFT's format and not a checkpoint, which may be a folder of shards."""
    return source.is_dir() and not (source / ".metadata").exists()


def check_source(given: str | None, technique: str) -> None:
    """Refuses an ``init_from`` that does not exist, before anything is loaded."""
    if given is not None and not Path(given).expanduser().exists():
        raise Refusal(
            f"{technique}.init_from names {given!r}, which does not exist; give an adapter folder or a checkpoint."
        )


@dataclass(frozen=True)
class Stored:
    """An adapter in a checkpoint.

    Attributes:
        source: the file.
        name: what the adapter is called there.
        arguments: its technique's.
        beside: the arguments of all adapters of that technique there, by name.
        state: the whole state.
    """

    source: Path
    name: str
    arguments: dict[str, Any]
    beside: dict[str, dict[str, Any]]
    state: dict[str, Tensor]


def stored_adapter(source: Path, technique: str, name: str) -> Stored:
    """What a checkpoint holds of one adapter.

    Args:
        source: a checkpoint file, or the folder of a sharded one.
        technique: name of the class, ``LoRA`` say.
        name: of the adapter; it decides only where the file holds several.

    Raises:
        Refusal: when the file cannot be read, holds none, or holds several and none of this name.
    """
    checkpoint = read_checkpoint(source)
    recipes = [t["init_args"] for t in record_of(checkpoint)["techniques"] if t["class_path"].endswith(f".{technique}")]
    beside = {arguments.get("name", "default"): arguments for arguments in recipes}
    chosen = next(iter(beside)) if len(beside) == 1 else name
    if not beside:
        raise Refusal(f"{source} holds no {technique} adapter; init_from needs a checkpoint with one.")
    if chosen not in beside:
        raise Refusal(
            f"{source} holds the {technique} adapters {', '.join(map(repr, beside))} and none called {name!r}; give the callback "
            "the name of the one that is meant."
        )
    return Stored(source, chosen, beside[chosen], beside, checkpoint["state_dict"])


def agree(
    technique: str,
    source: Path,
    *,
    asked: Mapping[str, Any],
    default: Mapping[str, Any],
    stored: Mapping[str, Any],
    free: Collection[str] = (),
    kind: str = "adapter",
) -> None:
    """Refuses an argument beside ``init_from`` that contradicts what is stored, and would be of no effect.

    Args:
        technique: name of the class.
        source: what ``init_from`` names.
        asked: the arguments of this run by name; a list and a tuple of the same are the same.
        default: what they are where none is given.
        stored: those of the stored adapter.
        free: names of arguments that this run decides, whatever is stored.
        kind: what the message calls the adapter.

    Raises:
        Refusal: ``LoRA.r is 4, but the adapter in ... has 2; leave r out when init_from is given.``
    """
    for key, has in stored.items():
        if key not in free and _settled(asked[key]) not in (_settled(default[key]), _settled(has)):
            raise Refusal(
                f"{technique}.{key} is {asked[key]!r}, but the {kind} in {source} has {has!r}; leave {key} out when init_from is "
                "given."
            )


def _settled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def one_start(technique: str, init_from: str | None, **starts: Any) -> None:
    """Refuses a second thing to begin from beside ``init_from``, whose values replace it.

    Args:
        technique: name of the class.
        init_from: as it was given.
        starts: argument -> its value, or None where it is not given.
    """
    given = [key for key, value in starts.items() if value is not None]
    if init_from is not None and given:
        raise Refusal(
            f"{technique} has both init_from and {given[0]} {starts[given[0]]!r} to begin from; leave one of them out."
        )


def copy_adapter_(
    model: nn.Module, prefix: str, stored: Stored, name: str, wrapped: Callable[[dict[str, Any]], Collection[str]]
) -> None:
    """Copies an adapter's values, those of its buffers, and of other trained parts that the file holds too.

    Where several adapters wrap one module, their keys in the file tell only which one wraps which. Techniques are injected
    in the order of their adapters' names, so the first name is the innermost.

    Args:
        model: the model with the adapter in place.
        prefix: where the model is in its LightningModule: ``"model."`` or ``""``.
        stored: the adapter in the file.
        name: the adapter's name in the model.
        wrapped: arguments of a technique -> pristine names of the modules that it wraps in this model.

    Raises:
        Refusal: when the file lacks some of the adapter, or holds it in other shapes.
    """
    layers = injected_layers(model, name)
    inner_first = {
        n: set(wrapped(arguments)) for n, arguments in sorted(stored.beside.items()) if len(stored.beside) > 1
    }
    copies: list[tuple[Tensor, str]] = []
    missing: dict[int, str] = {}
    for path, layer in layers.items():
        module = base_name(path, model)
        kept = {n: b for n, b in layer._buffers.items() if n not in layer._non_persistent_buffers_set}
        for key, place in {**layer.injected_parameters(), **kept}.items():
            if place is None:
                continue
            found = _keys(stored.state, prefix, f"{module}.{key}")
            order = [n for n, names in inner_first.items() if module in names] or [stored.name]
            if len(found) == 1:
                copies.append((place, found[0]))
            elif len(found) == len(order) and stored.name in order:
                copies.append((place, found[order.index(stored.name)]))
            else:
                missing[id(place)] = f"{module}.{key}"
    lacking = [key for place, key in missing.items() if place not in {id(p) for p, _ in copies}]  # shared: stored once
    if lacking:
        raise Refusal(
            f"{stored.source} lacks {lacking[0]} and {len(lacking) - 1} more factors of this model; it was trained on another."
        )
    injected = {p for layer in injected_layers(model).values() for p in layer.injected_parameters().values()}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in injected:
            copies += [(parameter, key) for key in _keys(stored.state, prefix, base_name(path, model))[:1]]
    for place, key in copies:
        if place.shape != stored.state[key].shape:
            raise Refusal(
                f"{stored.source}: {key} has shape {tuple(stored.state[key].shape)}, this model's {tuple(place.shape)}."
            )
    with torch.no_grad():
        for place, key in copies:
            place.copy_(stored.state[key])
    for layer in layers.values():
        layer.starts_as_identity = False


def _keys(state: dict[str, Tensor], prefix: str, pristine: str) -> list[str]:
    """The file's keys of one pristine name, those of inner wrappers first."""
    pattern = re.compile(re.escape(prefix) + r"(\.base)*\.".join(re.escape(part) for part in pristine.split(".")))
    return sorted((key for key in state if pattern.fullmatch(key)), key=len, reverse=True)
