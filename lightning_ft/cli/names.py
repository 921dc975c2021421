"""What a parser or a class calls its keys, what types they take, and which known name a misspelt one is near to."""

from __future__ import annotations

import difflib
import inspect
import json
import types
import typing
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


def nearest(name: str, known: list[str], most: int = 2) -> list[str]:
    """The known names that a misspelt one is likely to mean, best first; a wrong prefix or suffix counts as near."""
    close = difflib.get_close_matches(name, known, n=most, cutoff=0.6)
    return close or [other for other in known if len(name) > 2 and (name in other or other in name)][:most]


def near_file(path: Path) -> str:
    """``; did you mean configs/sft_lora.yaml?`` when a file of a similar name lies beside a missing one."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    close = nearest(path.name, sorted(other.name for other in path.parent.iterdir()))
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""


def class_at(reference: Any) -> type | None:
    """The class that a dotted path names, or the first class in a (union of) type hint(s); None when there is none."""
    if isinstance(reference, str):
        module, _, name = reference.rpartition(".")
        try:
            found = getattr(import_module(module), name, None)
        except (ImportError, ValueError):
            return None
        return found if isinstance(found, type) else None
    if get_origin(reference) in (Union, types.UnionType, list):
        return next((cls for choice in get_args(reference) if (cls := class_at(choice))), None)
    plain = isinstance(reference, type) and reference not in _WORDS and get_origin(reference) is None
    return reference if plain else None


def hints_of(cls: type) -> dict[str, Any]:
    """Type hints of the constructor's arguments, those that a parent takes through ``**kwargs`` included."""
    found: dict[str, Any] = {}
    for parent in cls.__mro__:
        init = vars(parent).get("__init__")
        if init is None:
            continue
        try:
            hints = typing.get_type_hints(init, include_extras=True)
        except (NameError, TypeError):
            hints = {}
        parameters = inspect.signature(init).parameters.values()
        for parameter in list(parameters)[1:]:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def keys_of(owner: type | ArgumentParser, parent: str = "") -> list[str]:
    """Keys that a class's constructor takes, or that a parser knows right below ``parent`` (``""``: its top level)."""
    if isinstance(owner, type):
        return list(hints_of(owner))
    known: dict[str, None] = {}
    for action in owner._actions:
        name = action.dest
        if parent:
            if name == parent:
                cls = _default_class(action) or class_at(getattr(action, "_typehint", None))
                known.update(dict.fromkeys(keys_of(cls) if cls else []))
            if not name.startswith(parent + "."):
                continue
            name = name[len(parent) + 1 :]
        if not name.startswith(("help", "print_")) and not name.endswith(".help"):
            known[name.split(".")[0]] = None
    return list(known)


def _default_class(action: Any) -> type | None:
    """The class that a subclass-mode argument takes when none is named (``model`` is an SFT)."""
    default = getattr(action, "default", None)
    path = default.get("class_path") if default is not None and hasattr(default, "get") else None
    return class_at(path) if path else None


def type_of(owner: type | ArgumentParser, key: str) -> Any:
    """The type hint of one key of a class or a parser; None when it is not known."""
    if isinstance(owner, type):
        return hints_of(owner).get(key)
    return next((getattr(action, "_typehint", None) for action in owner._actions if action.dest == key), None)


def takes_list_of_text(hint: Any) -> bool:
    """Whether a type hint is, or has as a choice, a list of strings."""
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return any(takes_list_of_text(choice) for choice in get_args(hint))
    return get_origin(hint) is list and get_args(hint) == (str,)


def maps_to_class(hint: Any) -> bool:
    """Whether a type hint is, or has as a choice, a mapping from names to objects of a class."""
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return any(maps_to_class(choice) for choice in get_args(hint))
    return get_origin(hint) in (dict, Mapping) and class_at(get_args(hint)[1]) is not None


def written_as_list(value: str) -> str:
    """``q_proj,v_proj`` as a list on a command line: ``'["q_proj","v_proj"]'``."""
    parts = [part.strip() for part in value.split(",") if part.strip()] if " " not in value.strip() else [value]
    return f"'{json.dumps(parts, ensure_ascii=False, separators=(',', ':'))}'"


def describe_type(hint: Any) -> str:
    """A type hint in words: ``Annotated[int, Ge(1)] | None`` is *a whole number, at least 1, or null*."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *bounds = get_args(hint)
        words = [describe_type(inner)]
        for bound in bounds:
            for name, phrase in _BOUNDS.items():
                if isinstance(bound, annotated_types.BaseMetadata) and hasattr(bound, name):
                    words.append(f"{phrase} {getattr(bound, name)}")
        return ", ".join(words)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        words = list(dict.fromkeys(describe_type(choice) for choice in get_args(hint)))
        if len(words) == 1:
            return words[0]
        comma = "," if ", " in words[-2] else ""  # a number, at least 1, or null
        return f"{', '.join(words[:-1])}{comma} or {words[-1]}"
    if origin in (list, tuple):
        inside = [describe_type(choice) for choice in get_args(hint) if choice is not Ellipsis]
        return f"a list of {inside[0]}" if inside and inside[0] != "text" else "a list"
    if hint in _WORDS or origin in _WORDS:
        return _WORDS.get(hint, _WORDS.get(origin, ""))
    return f"a {hint.__name__}" if isinstance(hint, type) else str(hint).replace("typing.", "")
