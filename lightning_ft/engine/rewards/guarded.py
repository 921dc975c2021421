"""Calls of other people's functions and models: limited in time, and an answer that makes one fail is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning_ft.engine.rewards.source import Completions, finite
from lightning_ft.engine.time_limit import TooLong, within
from lightning_ft.functional.errors import Refusal

Result = TypeVar("Result")


def guarded(
    name: str,
    call: Callable[[Completions], Any],
    answers: Completions,
    seconds: float | None,
    help: str = "let it give None for what it cannot judge",
    first: Callable[[], Any] | None = None,
) -> list[float | None]:
    """Rewards of all answers by one call.

    If that raises or takes too long, each answer is tried alone, to say which one it is.

    Args:
        name: of the reward.
        call: gives a reward for each answer.
        answers: at least one.
        seconds: most that the call may take; None: any time, as a model of this library takes no longer than it must.
        help: what can be done where it raises.
        first: gives or raises what came of that one call, where it was made before; None: it is made now.

    Raises:
        Refusal: it raised or refused, took too long, or gave something that is no reward; of which answer.
    """
    try:
        given = first() if first is not None else _within(seconds, lambda: call(answers))
    except TooLong as error:
        assert seconds is not None
        which = _which(call, answers, max(seconds / len(answers), 1.0))
        raise Refusal(
            f"The reward {name} took longer than its timeout of {seconds:g} seconds for {len(answers)} answers{which}; make it "
            "faster, or raise the timeout."
        ) from error
    except Refusal as refusal:
        raise Refusal(f"The reward {name} refused{_which(call, answers, seconds)}: {refusal}") from refusal
    except Exception as error:
        which = _which(call, answers, seconds)
        problem = f" ({' '.join(str(error).split())})" if str(error) else ""
        raise Refusal(f"The reward {name} raised {type(error).__name__}{problem}{which}; {help}.") from error
    return finite(name, given, answers)


def _within(seconds: float | None, function: Callable[[], Result]) -> Result:
    return function() if seconds is None else within(seconds, function)


def _which(call: Callable[[Completions], Any], answers: Completions, seconds: float | None) -> str:
    for number in range(len(answers)):
        try:
            _within(seconds, lambda number=number: call(answers.only(number)))  # type: ignore[misc]
        except Exception:
            return f", at {answers.said(number)}"
    return f", though at none of {len(answers)} answers alone" if len(answers) > 1 else ""
