"""Builds, stores, refuses, round trip: what a constructor promises."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
import jsonargparse
import pytest
import yaml

from lightning_ft.cli.slots import add_slots
from lightning_ft.engine.arguments import arguments_of, signature_of
from lightning_ft.functional.errors import Refusal
from tests.contract.case import Case, Check, Place, collect, require
from tests.contract.subjects import PlainNet, fit, subject

CHECKS: list[Check] = []
check = collect(CHECKS)
_PLAIN = (bool, int, float, str, Path, type(None))
# A value just outside a bound.
_OUTSIDE = {at.Ge: lambda b: b.ge - 1, at.Gt: lambda b: b.gt, at.Le: lambda b: b.le + 1, at.Lt: lambda b: b.lt}


@check()
def builds(case: Case, place: Place) -> None:
    """From small values, which name all that has no default; typed, described, no mutable default, honest repr."""
    parameters = signature_of(case.cls)
    required = {name for name, p in parameters.items() if p.default is p.empty}
    require(required <= set(case.small), f"The case of {case.name} gives no small value for {required}.")
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    require(len(positional) <= 1, f"{case.name} takes {positional} by position; at most one may be.")
    hints = typing.get_type_hints(case.cls.__init__, include_extras=True)
    described = set(re.findall(r"^        (\w+):", inspect.getdoc(case.cls) or "", re.M))
    described |= set(re.findall(r"^    (\w+):", inspect.getdoc(case.cls) or "", re.M))
    for name, parameter in parameters.items():
        require(name in hints, f"{case.name}.{name} has no type, so the command line cannot read it.")
        require(_is_allowed(hints[name]), f"{case.name}.{name}: {hints[name]} is no plain type; see style 2.3.")
        require(name in described, f"{case.name}.{name} is not described under Args:, so its --help is empty.")
        require(
            not isinstance(parameter.default, (list, dict, set)),
            f"{case.name}.{name} has a mutable default, which all instances share.",
        )
    technique = case.build()
    shown = {name: value for name, value in case.small.items() if value != parameters[name].default}
    expected = ", ".join(f"{name}={shown[name]!r}" for name in parameters if name in shown)
    require(repr(technique) == f"{case.name}({expected})", f"repr shows {technique!r}, not what differs from defaults.")


@check()
def stores(case: Case, place: Place) -> None:
    """Each argument is kept as it came under its own name, and a fit writes private names only."""
    given = copy.deepcopy(case.small)
    technique = case.cls(**given)
    for name, value in given.items():
        require(getattr(technique, name) is value, f"{case.name} does not keep {name} as it was given.")
    public = {n: v for n, v in vars(technique).items() if not n.startswith("_")}
    require(set(public) == set(signature_of(case.cls)), f"{case.name} has public names beside its arguments: {public}.")
    before = copy.deepcopy(arguments_of(technique))
    fit(place.folder, subject(case.cls)(), technique)
    after = {n: v for n, v in vars(technique).items() if not n.startswith("_")}
    require(after == before, f"A fit has changed public attributes of {case.name}: {before} became {after}.")
    require(given == case.small, f"A fit has written into what was passed to {case.name}.")


@check()
def refuses(case: Case, place: Place) -> None:
    """A value outside each bound or choice is refused by the constructor and, before a model is built, by the flags."""
    hints = typing.get_type_hints(case.cls.__init__, include_extras=True)
    net = f"--model=tests.contract.subjects.{subject(case.cls).__name__}"
    for name in signature_of(case.cls):
        with pytest.raises(Refusal, match=rf"^{case.name}\.{name} must be .*, got .*\.$"):
            case.build(**{name: object()})
        for bad in bad_values(hints[name]):
            with pytest.raises(Refusal, match=rf"^{case.name}\.{name} must be .*, got {re.escape(repr(bad))}\.$"):
                case.build(**{name: bad})
            built = PlainNet.built
            given = flags(case, {**case.small, name: bad})
            outcome = place.command("fit", net, "--data=tests.contract.subjects.PlainData", *given)
            said = f"--{case.cls.traits.slot}.{name}={bad}"
            require(outcome.code == 2, f"{said} ends with code {outcome.code}: {outcome.err}")
            lines = outcome.err.strip().splitlines()
            key = f"{case.cls.traits.slot}.{name}"
            require(len(lines) == 1 and key in lines[0], f"{said} is not refused in one sentence: {outcome.err}")
            require("must be" in lines[0] and "got" in lines[0], f"{said} is not refused in our form: {lines[0]}")
            require(PlainNet.built == built, f"A model was built before {said} was refused.")


@check()
def round_trip(case: Case, place: Place) -> None:
    """Flags become YAML, YAML an equal object; before setup it can be pickled, and copies are equal."""
    slot = case.cls.traits.slot
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_slots(parser, {slot: case.cls})
    parsed = parser.parse_args(flags(case, case.small))
    saved = parser.dump(parsed)
    require(slot in yaml.safe_load(saved), f"The saved YAML of {case.name} lacks its slot: {saved}")
    again = instantiate(parser, parser.parse_string(saved))[slot]
    original = case.build()
    for what, other in (
        ("YAML", again),
        ("a pickle", pickle.loads(pickle.dumps(original))),
        ("a copy", copy.deepcopy(original)),
    ):
        require(type(other) is case.cls, f"{what} of {case.name} gives a {type(other).__name__}.")
        now, then = arguments_of(other), arguments_of(original)
        require(now == then, f"{what} of {case.name} gives {now}, not {then}.")
        require(other.state_key == original.state_key, f"{what} of {case.name} has another state_key.")


def flags(case: Case, values: dict[str, Any]) -> list[str]:
    """The values as a user types them."""
    return [
        f"--{case.cls.traits.slot}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
    ]


def instantiate(parser: jsonargparse.ArgumentParser, config: Any) -> Any:
    """Under the name that the method has in this version of jsonargparse."""
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)


def bad_values(hint: Any) -> list[Any]:
    """One value outside each bound, one beside each list of choices, in a type hint."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *bounds = get_args(hint)
        return [*bad_values(inner), *(_OUTSIDE[type(bound)](bound) for bound in bounds if type(bound) in _OUTSIDE)]
    if origin is Literal:
        return ["no_such_choice"]
    if origin in (Union, types.UnionType):
        choices = [bad_values(choice) for choice in get_args(hint) if choice is not type(None)]
        return choices[0] if len(choices) == 1 else []  # what one choice refuses, another may take
    return []


def _is_allowed(hint: Any) -> bool:
    """Whether a hint is of plain types, lists, tuples and dictionaries of them, choices, or dataclasses of them."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _is_allowed(get_args(hint)[0])
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType, list, tuple, dict):
        return all(choice is Ellipsis or _is_allowed(choice) for choice in get_args(hint))
    return (
        hint in _PLAIN
        or hasattr(hint, "__dataclass_fields__")
        or origin is typing.get_origin(typing.Callable[..., Any])
    )
