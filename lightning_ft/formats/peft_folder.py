"""What every kind of adapter folder in PEFT's format has in common: files, names, modules stored whole, strict key sets."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.formats.atomic import write_folder
from lightning_ft.formats.heads import adapter_task, task_type, trained_head
from lightning_ft.formats.peft_reading import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import base_name, injected_layers, innermost, pristine_modules, replace_module
from lightning_ft.nn.select import matches
from lightning_ft.nn.targets import whole_modules


def write_peft(folder: str | Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    """Write a configuration and tensors under PEFT's names, atomically; under several ranks only one calls this."""
    return write_folder(folder, config, tensors, config_file=CONFIG_FILE, weights_file=WEIGHTS_FILE)


def common_config(model: nn.Module, peft_type: str, base_model_name: str | None) -> dict[str, object]:
    """Return the keys of ``adapter_config.json`` that all kinds of adapters have."""
    return {
        "peft_type": peft_type,
        # A prefix or prompt is put in by the class that PEFT takes for a task, a head or none.
        "task_type": task_type(model) if peft_type in ("PREFIX_TUNING", "PROMPT_TUNING") else adapter_task(model),
        "base_model_name_or_path": base_model_name
        or getattr(getattr(model, "config", None), "_name_or_path", None)
        or None,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
    }


def meant_adapter(model: nn.Module, adapter_name: str) -> str:
    """Return the adapter's name; ``default`` also means the only one that there is, whatever it is called."""
    names = {layer.adapter_name for layer in injected_layers(model).values()}
    return next(iter(names)) if adapter_name == "default" and len(names) == 1 else adapter_name


def stored_modules(model: nn.Module, modules_to_save: Collection[str]) -> dict[str, nn.Module]:
    """Return what is stored whole beside the adapter: modules to save, and a new head that was trained with it.

    Raises:
        Refusal: For a head that carries an adapter as well, and for names that PEFT would read otherwise.
    """
    listed, places = whole_modules(model, modules_to_save), pristine_modules(model)
    head = [name for name in trained_head(model) if name not in listed]
    for name in head:
        if injected_layers(places[name][1]):
            raise Refusal(
                f"The head {name!r} is trained in full and carries an adapter as well, and PEFT stores one or the other; "
                "leave it out of the adapter's targets."
            )
    return listed | whole_modules(model, head)


def stored_names(model: nn.Module, modules_to_save: Collection[str]) -> list[str]:
    """Return PEFT's ``modules_to_save``.

    Raises:
        Refusal: As in `stored_modules`; if PEFT, which compares the ends of names, would take more.
    """
    saved = list(stored_modules(model, modules_to_save))
    for name in pristine_modules(model):
        if name not in saved and any(name.endswith(end) for end in saved):
            raise Refusal(
                f"modules_to_save {saved} cannot be written: PEFT compares the ends of names and would take {name!r} "
                "as well; rename one of the modules."
            )
    return saved


def stored_state(model: nn.Module, modules_to_save: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of the modules that are stored whole, under PEFT's names, gathered."""
    tensors: dict[str, Tensor] = {}
    for name, module in stored_modules(model, modules_to_save).items():
        if injected_layers(module):
            raise Refusal(
                f"{name!r} is among modules_to_save and carries another adapter inside; merge or exclude that one."
            )
        tensors.update({f"{PREFIX}{name}.{key}": whole(tensor) for key, tensor in module.state_dict().items()})
    return tensors


def refuse_others(
    model: nn.Module,
    modules_to_save: Collection[str] = (),
    more: Iterable[nn.Parameter] = (),
    *,
    late: Collection[str] = (),
    instead: str = "keep the checkpoint, or train the adapter alone",
) -> None:
    """Refuse to leave out what was trained beside the adapter and what the format has no place for.

    Args:
        model: The model that carries the adapter.
        modules_to_save: Names of modules that the folder holds whole.
        more: Parameters of the base that it holds besides.
        late: Names of parameters that are frozen now and will be trained.
        instead: What to do about it, which depends on the kind of adapter, as an imperative.

    Raises:
        Refusal: With the names of the others.
    """
    written = {p for layer in injected_layers(model).values() for p in layer.injected_parameters().values()}
    written |= {p for module in stored_modules(model, modules_to_save).values() for p in module.parameters()}
    written |= {*more}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad or name in late}
    others = [base_name(name, model) for name, p in trained.items() if p not in written]
    if others:
        raise Refusal(
            f"{shown(others)} trained beside the adapter, and an adapter folder has no place for single weights of the base; "
            f"{instead}."
        )


def target_modules(chosen: list[str], names: Iterable[str], saved: Collection[str]) -> list[str] | str:
    """Return PEFT's ``target_modules``: ends of names if they mean the same modules, else whole names, else a regex.

    Args:
        chosen: Pristine names of the wrapped modules.
        names: Those of all modules.
        saved: Those of the modules that are stored whole.
    """
    free = [name for name in names if not any(name == s or name.startswith(f"{s}.") for s in saved)]
    wanted = [name for name in free if name in set(chosen)]
    for parts in (1, 2):
        ends = {end_of(name, parts) for name in chosen}
        if [name for name in free if any(matches(name, end) for end in ends)] == wanted:
            return sorted(ends)
    if [name for name in free if any(matches(name, end) for end in chosen)] == wanted:
        return sorted(chosen)
    return "|".join(re.escape(name) for name in chosen)


def end_of(name: str, parts: int) -> str:
    """Return the last parts of a name."""
    return ".".join(name.split(".")[-parts:])


def useful(patterns: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Drop patterns that mean none of the names, which PEFT allows."""
    names = list(names)
    return tuple(p for p in patterns if any(matches(name, p) for name in names))


def copy_(places: dict[str, Tensor], tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """Copy a file's tensors into an adapter and into the modules that are stored whole, by our names.

    Args:
        places: What is to be filled; a module to save is added by `whole_places`.
        tensors: The file's tensors under our names.
        folder: For messages.

    Raises:
        Refusal: If a tensor is missing, left over, or of another shape.
    """
    missing, left_over = sorted(set(places) - set(tensors)), sorted(set(tensors) - set(places))
    if missing or left_over:
        raise Refusal(
            f"{folder} does not fit this model: missing {shown(missing)}; not expected {shown(left_over)}; load "
            "the base that the adapter was trained on."
        )
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise Refusal(
                f"{folder} was trained on another base: {name!r} is {tuple(tensors[name].shape)} in the file and "
                f"{tuple(place.shape)} in this model."
            )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])


def whole_places(model: nn.Module, modules_to_save: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of the modules to save by name, to be filled."""
    return {
        f"{name}.{key}": tensor
        for name, module in whole_modules(model, modules_to_save).items()
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


def head_places(model: nn.Module, head: Mapping[str, Tensor], folder: str | Path) -> dict[str, nn.Parameter]:
    """Return the parameters that a head goes into which a prefix's or prompt's folder stores whole, by pristine name.

    Args:
        model: The model, with the adapter or before it gets it.
        head: The stored tensors by those names.
        folder: For messages.

    Raises:
        Refusal: If the model has none of such a name and shape.
    """
    own = {base_name(name, model): parameter for name, parameter in model.named_parameters()}
    wrong = [name for name, tensor in head.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise Refusal(
            f"{folder} does not fit this model: it stores {shown(wrong)} of other names or shapes; load the base, the task and "
            "the number of classes that it was trained with."
        )
    return {name: own[name] for name in head}


def fill_head_(places: Mapping[str, nn.Parameter], head: Mapping[str, Tensor]) -> None:
    """Copy a stored head into its places, and let it train on."""
    with torch.no_grad():
        for name, tensor in head.items():
            places[name].copy_(tensor)
            places[name].requires_grad_(True)


@contextmanager
def whole_or_not_at_all(model: nn.Module) -> Iterator[None]:
    """Inside, an adapter is injected and filled; should that fail, the model is as it was before."""
    there = set(injected_layers(model).values())
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for path, layer in reversed(injected_layers(model).items()):  # inner wrappers first
            if layer not in there:
                replace_module(model, path, layer.base)
        for parameter, state in before.items():
            parameter.requires_grad_(state)
        raise


def names_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of the pristine model but itself, by name."""
    return {name: innermost(module) for name, (_, module) in pristine_modules(model).items() if name}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all ranks, detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shown(names: list[str]) -> str:
    """Return the first of some names, for a message."""
    return "none" if not names else ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


__all__ = [
    "common_config", "copy_", "end_of", "fill_head_", "head_places",
    "meant_adapter", "names_of", "refuse_others", "shown", "stored_modules", "stored_names",
    "stored_state", "target_modules", "useful", "whole", "whole_or_not_at_all", "whole_places",
    "write_peft",
]  # fmt: skip
