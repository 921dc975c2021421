"""Named slots: every technique is a flag of its own, because elements of a list cannot be addressed by a sweep.

``--lora.r 8``, ``lora: {r: 8}`` in YAML, ``--lora null`` for off. Techniques are found by walking the package, so one
that is added needs no line here.
"""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional

import lightning_ft.callbacks
from lightning_ft.cli.names import hints_of, takes_list_of_text, written_as_list
from lightning_ft.functional.errors import Refusal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback


def techniques(package: ModuleType = lightning_ft.callbacks) -> dict[str, type[Callback]]:
    """Slot name -> class, of every class below ``package`` that declares traits with a slot.

    Raises:
        ImportError: two techniques claim one slot.
    """
    found: dict[str, type[Callback]] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = import_module(info.name)
        for cls in vars(module).values():
            if not (isinstance(cls, type) and cls.__module__ == module.__name__ and "traits" in vars(cls)):
                continue
            slot = vars(cls)["traits"].slot
            if slot in found:
                raise ImportError(f"{cls.__name__} and {found[slot].__name__} both claim the slot {slot!r}.")
            found[slot] = cls
    return dict(sorted(found.items()))


def add_slots(parser: ArgumentParser, classes: dict[str, type[Callback]]) -> None:
    """Gives ``parser`` one optional argument a technique; absent means off."""
    for slot, cls in classes.items():
        # Optional[...] is spelled out: the type is made at run time.
        parser.add_argument(f"--{slot}", type=Optional[cls], default=None, help=first_sentence(cls))  # noqa: UP045


def refuse_joined_names(config: Any, classes: dict[str, type[Callback]]) -> None:
    """Refuses ``--lora.target q_proj,v_proj``: one name with a comma, which no module has, is meant as a list.

    Raises:
        Refusal: with the list as it is written.
    """
    for slot, cls in classes.items():
        given = config.get(slot)
        arguments = given.get("init_args", {}) if given is not None and hasattr(given, "get") else {}
        for key, hint in hints_of(cls).items():
            value = arguments.get(key)
            if isinstance(value, str) and "," in value and not value.startswith("re:") and takes_list_of_text(hint):
                raise Refusal(
                    f"{slot}.{key} is one name with a comma, {value!r}; a list is written {written_as_list(value)}."
                )


def filled(config: Any, classes: dict[str, type[Callback]]) -> list[Callback]:
    """The callbacks of all slots that were given, in the order of their names (their phases decide, not this order)."""
    return [config[slot] for slot in classes if config.get(slot) is not None]


def first_sentence(documented: object) -> str:
    """The first sentence of a docstring."""
    text = inspect.getdoc(documented) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."
