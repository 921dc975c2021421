"""Bounds stand in annotations; the command line and this constructor check read the same ones."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at

from lightning_ft.functional.errors import Refusal

_BOUNDS = {
    at.Ge: ("at least", lambda value, bound: value >= bound.ge, "ge"),
    at.Gt: ("greater than", lambda value, bound: value > bound.gt, "gt"),
    at.Le: ("at most", lambda value, bound: value <= bound.le, "le"),
    at.Lt: ("less than", lambda value, bound: value < bound.lt, "lt"),
}


def arguments_of(obj: object) -> dict[str, Any]:
    """The constructor's arguments of ``obj`` by name, read from the attributes that store them unchanged."""
    return {name: getattr(obj, name) for name in signature_of(type(obj))}


def signature_of(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters without ``self``; none for a class that has no constructor of its own."""
    parameters = dict(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    parameters.pop("self", None)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in named}


def check_arguments(obj: object) -> None:
    """Raises in one sentence when a stored argument breaks the bounds or choices in its annotation.

    Raises:
        Refusal: e.g. ``EWC.lam must be at least 0, got -1.``
    """
    hints = typing.get_type_hints(type(obj).__init__, include_extras=True)
    for name in signature_of(type(obj)):
        problem = _problem(hints.get(name, Any), getattr(obj, name))
        if problem:
            raise Refusal(f"{type(obj).__name__}.{name} must be {problem}, got {getattr(obj, name)!r}.")


def refuse_idle(obj: object, used_by: Mapping[str, Sequence[str]], method: str) -> None:
    """Refuses arguments that differ from their defaults and that the chosen method does not read.

    Args:
        obj: a technique with several methods.
        used_by: argument -> the methods that read it.
        method: the chosen one.

    Raises:
        Refusal: ``LossBalancing.weights belongs to the method static, and the method is dwa; leave it out.``
    """
    for name, methods in used_by.items():
        if method not in methods and getattr(obj, name) != signature_of(type(obj))[name].default:
            many = "s" if len(methods) > 1 else ""
            raise Refusal(
                f"{type(obj).__name__}.{name} belongs to the method{many} {', '.join(methods)}, and the method is {method}; "
                "leave it out."
            )


def refuse_unread(obj: object, names: Sequence[str], why: str) -> None:
    """Refuses arguments that differ from their defaults and that nothing reads, as the others are.

    Args:
        obj: a technique or module.
        names: the arguments.
        why: the rest of the sentence after "but", without a full stop.

    Raises:
        Refusal: ``GRPO.clip_low is 0.1, but cispo is bounded by cispo_most; leave it out.``
    """
    for name in names:
        if (value := getattr(obj, name)) != signature_of(type(obj))[name].default:
            raise Refusal(f"{type(obj).__name__}.{name} is {value}, but {why}; leave it out.")


def describe(obj: object) -> str:
    """``Class(argument=value, ...)`` with the arguments that differ from their defaults."""
    shown = []
    for name, parameter in signature_of(type(obj)).items():
        value = getattr(obj, name)
        if parameter.default is inspect.Parameter.empty or value != parameter.default:
            shown.append(f"{name}={value!r}")
    return f"{type(obj).__name__}({', '.join(shown)})"


def _problem(hint: Any, value: Any) -> str | None:
    """What ``value`` should have been, or None when it fits."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *bounds = get_args(hint)
        if get_origin(inner) in (Union, types.UnionType) and value is None:
            return None
        problem = _problem(inner, value)
        if problem:
            return problem
        for bound in bounds:
            words, holds, attribute = _BOUNDS.get(type(bound), (None, None, ""))
            if words is None or holds is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return "a number"
            if not holds(value, bound):
                return f"{words} {getattr(bound, attribute)}"
        return None
    if origin is Literal:
        choices = get_args(hint)
        return None if value in choices else "one of " + ", ".join(repr(choice) for choice in choices)
    if origin in (Union, types.UnionType):
        problems = [_problem(choice, value) for choice in get_args(hint) if choice is not type(None) or value is None]
        return None if None in problems else " or ".join(str(p) for p in problems)
    if hint is type(None):
        return None if value is None else "None"
    if hint in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        return "a number"
    if hint is int and not isinstance(value, int):
        return "a whole number"
    if hint is bool and not isinstance(value, bool):
        return "true or false"
    if hint is str and not isinstance(value, str):
        return "a string"
    if origin in (list, tuple, dict) and not isinstance(value, (list, tuple, dict)):
        return f"a {origin.__name__}"
    return None
