"""Leaves: after a run, or an exception in it, nothing is there that was not there without the technique."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_ft.nn.registry import base_name
from tests.contract.case import Case, Check, Place, collect, require
from tests.contract.subjects import PlainNet, differing, fit, loader, state, subject, trainer

CHECKS: list[Check] = []
check = collect(CHECKS)


@check()
def leaves(case: Case, place: Place) -> None:
    """After teardown no wrapper, hook, flag, mode, Trainer field or global generator differs from a fit without it."""
    kind = subject(case.cls)
    plain, edited = kind(), kind()
    run_plain = fit(place.folder, plain)
    before = _generators()
    run_edited = fit(place.folder, edited, case.build())
    require(_generators() == before, f"A fit with {case.name} leaves a global generator elsewhere.")
    _compare(case, (plain, run_plain), (edited, run_edited), "a fit")


@check()
def leaves_after_an_exception(case: Case, place: Place) -> None:
    """The same when a step fails; afterwards another fit works on the same module."""
    kind = subject(case.cls)
    plain, edited = kind(fail_at=1), kind(fail_at=1)
    run_plain, run_edited = _failing(place.folder, plain), _failing(place.folder, edited, technique := case.build())
    _compare(case, (plain, run_plain), (edited, run_edited), "a failed step")
    edited.fail_at = None
    run = fit(place.folder, edited, technique)
    require(run.global_step == 3, f"After a failed step, a fit with {case.name} made {run.global_step} of 3 steps.")


@check()
def second_fit(case: Case, place: Place) -> None:
    """A second fit trains on, with the same parts; so does one with the same Trainer's successor."""
    net, technique = subject(case.cls)(), case.build()
    fit(place.folder, net, technique)
    first, trained = state(net), {n for n, p in net.named_parameters() if p.requires_grad}
    run = fit(place.folder, net, technique)
    require(run.global_step == 3, f"The second fit with {case.name} made {run.global_step} of 3 steps.")
    require(first.keys() == state(net).keys(), f"The second fit with {case.name} changed the model's parts.")
    now = {n for n, p in net.named_parameters() if p.requires_grad}
    require(now == trained, f"The second fit with {case.name} trains {now}, the first trained {trained}.")
    require(differing(first, state(net)), f"The second fit with {case.name} moved nothing.")


@check()
def validate_before_fit(case: Case, place: Place) -> None:
    """A validation before the fit changes nothing of what the fit does."""
    kind = subject(case.cls)
    direct, validated = kind(), kind()
    fit(place.folder, direct, case.build())
    run = trainer(place.folder, case.build())
    run.validate(validated, loader(), verbose=False)
    fit(place.folder, validated, case.build())
    different = differing(state(direct), state(validated))
    require(not different, f"After a validation, a fit with {case.name} ends with other values of {different}.")


def _failing(folder: Path, net: PlainNet, *techniques: Any) -> pl.Trainer:
    run = trainer(folder, *techniques)
    before = _generators()
    with pytest.raises(RuntimeError, match="a step that fails"):
        run.fit(net, loader(), loader())
    if techniques:
        require(_generators() == before, f"A failed fit with {techniques} leaves a global generator elsewhere.")
    return run


def _generators() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()


def _compare(case: Case, plain: tuple[PlainNet, pl.Trainer], edited: tuple[PlainNet, pl.Trainer], after: str) -> None:
    for what, one, other in (
        ("wrappers", _wrappers(plain[0]), _wrappers(edited[0])),
        ("hooks", _hooks(plain[0]), _hooks(edited[0])),
        ("modes", _modes(plain[0]), {n: m for n, m in _modes(edited[0]).items() if n in _modes(plain[0])}),
        ("fields of the Trainer", _fields(plain[1]), _fields(edited[1])),
        ("flags of torch", _flags(), _flags()),
    ):
        different = sorted(k for k in one.keys() | other.keys() if one.get(k, "absent") != other.get(k, "absent"))
        said = "; ".join(f"{k}: {other.get(k, 'absent')!r} instead of {one.get(k, 'absent')!r}" for k in different[:5])
        require(not different, f"After {after}, {case.name} leaves {what} behind: {said}.")


def _wrappers(net: nn.Module) -> dict[str, str]:
    """Functions on instances, where only classes have methods."""
    return {
        f"{path}.{name}": type(value).__name__
        for path, module in net.named_modules()
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, (nn.Module, type)) and not name.startswith("_lightning_ft")
    }


def _hooks(net: nn.Module) -> dict[str, int]:
    """How many hooks each module and parameter has, by kind; none is no entry."""
    found = {
        f"{path}.{name}": len(value)
        for path, module in net.named_modules()
        for name, value in vars(module).items()
        if name.endswith("_hooks") and value
    }
    for path, parameter in net.named_parameters():
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(parameter, name, None):
                found[f"{path}.{name}"] = len(getattr(parameter, name))
    return found


def _modes(net: nn.Module) -> dict[str, bool]:
    return {base_name(path, net): module.training for path, module in net.named_modules()}


def _flags() -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
    }


def _fields(run: pl.Trainer) -> dict[str, Any]:
    """Plain fields of the Trainer, its strategy, precision and loops; of every other field its type."""
    parts = {
        "trainer": run,
        "strategy": run.strategy,
        "precision": run.strategy.precision_plugin,
        "fit_loop": run.fit_loop,
        "epoch_loop": run.fit_loop.epoch_loop,
        "validate_loop": run.validate_loop,
    }
    found: dict[str, Any] = {}
    for part, owner in parts.items():
        for name, value in vars(owner).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            found[f"{part}.{name}"] = value if plain else type(value).__name__
    return found
