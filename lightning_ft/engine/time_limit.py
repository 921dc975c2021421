"""A limit on how long somebody else's function may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")


class TooLong(Exception):
    """The function was stopped, or given up."""


class _Ring(BaseException):
    """Not an Exception: what is called may catch those."""


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """Calls ``function``, and gives up after ``seconds``.

    In the main thread of Linux and macOS an alarm interrupts it where it stands (in Python code; a call into C that never
    returns cannot be interrupted), and an alarm that was set before goes on. Elsewhere it runs in a thread that is left behind.

    Raises:
        TooLong: it took longer.
    """
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        return _by_alarm(seconds, function)
    return in_thread(function, seconds)


def _by_alarm(seconds: float, function: Callable[[], Result]) -> Result:
    calling = True

    def ring(number: int, frame: FrameType | None) -> None:
        if calling:
            raise _Ring

    begun = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    # Again each second, in case that one was caught.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        return function()
    except _Ring as error:
        raise TooLong from error
    finally:
        calling = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3), interval)


def in_thread(function: Callable[[], Result], seconds: float | None = None) -> Result:
    """Calls ``function`` in a thread, which is left behind where it takes longer.

    Args:
        function: what is called.
        seconds: most that are waited for; None: any time.

    Raises:
        TooLong: it took longer.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:  # handed to the caller
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TooLong
    fine, found = outcome[0]
    if not fine:
        raise found
    result: Result = found
    return result
