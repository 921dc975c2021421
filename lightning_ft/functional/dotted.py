"""Objects that a user names by the module they lie in: ``package.module.name``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from lightning_ft.functional.errors import Refusal


def named_function(path: str, argument: str) -> Callable[..., Any]:
    """The function at a dotted path.

    Args:
        path: ``package.module.name``.
        argument: whose value it is, for the sentence.

    Raises:
        Refusal: no such module or name, or nothing that can be called.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise Refusal(
            f"{argument} {path!r} cannot be imported ({error}); give package.module.function, and make the package "
            "importable from here."
        ) from error
    if not callable(found):
        raise Refusal(f"{argument} {path!r} is {type(found).__name__}, not a function.")
    function: Callable[..., Any] = found
    return function


__all__ = ["named_function"]
