"""Python functions as rewards: ``package.module.function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from lightning_ft.engine.rewards.guarded import guarded
from lightning_ft.engine.rewards.source import Completions
from lightning_ft.engine.rewards.waiting import Ask, wait_for
from lightning_ft.functional.errors import Refusal

_OURS = ("prompts", "completions", "completion_ids", "ended")
"""What every function may ask for, beside the columns of the data."""


class FunctionReward:
    """``reward(prompts, completions, **columns) -> list[float | None]``, called once for all answers of a rank and round.

    One that is ``async def`` may be asked beside others, see `ask`.
    """

    def __init__(self, function: str | Callable[..., Any], timeout: float) -> None:
        """Args: function: itself, or where it is; timeout: seconds that a call may take."""
        self.given = function
        self.timeout = timeout
        self._function: Callable[..., Any] | None = None if isinstance(function, str) else function

    @property
    def function(self) -> Callable[..., Any]:
        """The function, imported at first use."""
        if self._function is None:
            assert isinstance(self.given, str)
            self._function = function_at(self.given)
        return self._function

    def check(self, name: str, columns: Collection[str] | None) -> None:
        """Imports it, and compares its arguments with the columns of the data."""
        if columns is None:
            _ = self.function
            return
        missing = sorted(set(self._required()) - set(_OURS) - set(columns))
        if missing:
            raise Refusal(
                f"The reward {name} wants {missing[0]}, which is no column of the data (they have {_list(columns)}); add the "
                "column, or give the argument a default."
            )
        clash = sorted(set(columns) & set(_OURS))
        if clash:
            raise Refusal(
                f"The data have a column {clash[0]}, which is what rewards are called with; rename the column."
            )

    @property
    def waits(self) -> bool:
        """Whether it is ``async def``, a function or an object that is called like one."""
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004 - whether it can be called is not the question
        )

    def ask(self, answers: Completions) -> Ask:
        """Of one that `waits`: the question for all answers, to be awaited."""
        return lambda: self._call(answers)  # type: ignore[no-any-return]

    def score(
        self, name: str, answers: Completions, device: torch.device, first: Callable[[], Any] | None = None
    ) -> list[float | None]:
        """What the function gives; ``first`` gives it where it was asked before, see `guarded`."""
        _ = self.function  # that it is not there is no answer's fault
        call = (lambda some: wait_for(self.ask(some))) if self.waits else self._call
        return guarded(name, call, answers, self.timeout, first=first)

    def _call(self, answers: Completions) -> Any:
        offered: dict[str, Any] = {
            **{column: list(values) for column, values in answers.columns.items()},
            "prompts": list(answers.prompts),
            "completions": list(answers.texts),
            "completion_ids": [list(ids) for ids in answers.ids],
            "ended": list(answers.ended),
        }
        parameters = inspect.signature(self.function).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return self.function(**offered)
        return self.function(**{key: value for key, value in offered.items() if key in parameters})

    def _required(self) -> list[str]:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(self.function).parameters.values()
        return [p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty]


def function_at(where: str) -> Callable[..., Any]:
    """The function at ``file.py:function``, or at ``package.module.function``, which Python can import.

    Raises:
        Refusal: nothing that can be called is there.
    """
    place, colon, name = where.rpartition(":")
    if not colon:
        place, _, name = where.rpartition(".")
        if not place or where.endswith(".py"):
            raise Refusal(
                f"The reward function {where!r} names no function: write file.py:function or package.module.function."
            )
    module = _file(Path(place).expanduser()) if place.endswith(".py") else _module(place, where)
    found = getattr(module, name, None)
    if not callable(found):
        there = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise Refusal(f"{place} has no function {name!r}; it has {_list(there) if there else 'none'}.")
    function: Callable[..., Any] = found
    return function


def _file(path: Path) -> Any:
    if not path.is_file():
        raise Refusal(
            f"There is no file {path} with a reward function; paths are relative to where the run is started."
        )
    spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Refusal(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    return module


def _module(place: str, where: str) -> Any:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise Refusal(
            f"The reward function {where!r} cannot be imported ({error}); install its package, or write file.py:function."
        ) from error


def _list(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"
