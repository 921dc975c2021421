"""A technique with the values that the contract builds it with, and the place where a check may work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from tests.two_ranks import TwoRanks


@dataclass(frozen=True)
class Case:
    """One technique in the contract.

    Attributes:
        cls: the technique.
        small: arguments that make it act, on a net of linear layers and on a tiny language model alike.
        idle: arguments with which training is as if it were not there; None when it has no such values.
        second: arguments of another instance beside the first; None takes ``small``.
        known: check -> why it fails today; a strict expected failure.
    """

    cls: type[Technique]
    small: dict[str, Any] = field(default_factory=dict)
    idle: dict[str, Any] | None = None
    second: dict[str, Any] | None = None
    known: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.cls.__name__

    def build(self, **more: Any) -> Technique:
        """The technique with its small values."""
        return self.cls(**{**self.small, **more})


@dataclass
class Place:
    """Where a check works: an empty folder, a tiny chat model with rows, the command line, two processes."""

    folder: Path
    chat: Path
    capsys: pytest.CaptureFixture[str]
    request: pytest.FixtureRequest

    @property
    def two_ranks(self) -> TwoRanks:
        """The pair of processes of this session; a failure when they do not start."""
        pair: TwoRanks = self.request.getfixturevalue("two_ranks")
        return pair

    def command(self, *words: str) -> Any:
        """One command line in this process: (code, out, err). It sets seeds by environment, which is put back."""
        from tests.cli.conftest import call

        with environment_kept():
            return call(self.capsys, *words)


@contextmanager
def environment_kept() -> Iterator[None]:
    """Puts the environment back as it was."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Check:
    """One property, and which techniques it is asked of."""

    run: Callable[[Case, Place], None]
    fits: Callable[[Traits], bool]
    two_ranks: bool

    @property
    def name(self) -> str:
        """The function's name."""
        return self.run.__name__

    def __call__(self, case: Case, place: Place) -> None:
        self.run(case, place)

    def parameter(self, case: Case) -> Any:
        """As pytest takes it: named, in the pair's group, an expected failure where the case says so."""
        marks: list[pytest.MarkDecorator] = []
        if self.two_ranks:
            marks.append(pytest.mark.xdist_group("two_ranks"))
        if self.name in case.known:
            marks.append(pytest.mark.xfail(reason=case.known[self.name], strict=True))
        return pytest.param(self, id=self.name, marks=marks)


def collect(checks: list[Check]) -> Callable[..., Any]:
    """A decorator that adds a function to a file's list of checks."""

    def add(
        *, fits: Callable[[Traits], bool] = lambda traits: True, two_ranks: bool = False
    ) -> Callable[[Callable[[Case, Place], None]], Callable[[Case, Place], None]]:
        def decorate(function: Callable[[Case, Place], None]) -> Callable[[Case, Place], None]:
            checks.append(Check(function, fits, two_ranks))
            return function

        return decorate

    return add


def require(holds: object, sentence: str) -> None:
    """Fails with a sentence."""
    if not holds:
        raise AssertionError(sentence)
