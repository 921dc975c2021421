"""Rewards that wait for something elsewhere, as ``async def`` functions do: all of them at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from lightning_ft.engine.time_limit import TooLong, in_thread

Ask = Callable[[], Awaitable[Any]]
_GRACE = 1.0
"""Seconds beyond the longest timeout that a loop is given before it counts as stuck."""


def wait_for(ask: Ask) -> Any:
    """What ``ask`` gives, in an event loop of its own: one that runs in this thread already, as in a notebook, is no hindrance."""
    return in_thread(lambda: asyncio.run(_awaited(ask)))


async def _awaited(ask: Ask) -> Any:
    return await ask()


class AtOnce:
    """Asks several at once, in a thread, while others are asked here.

    A function that blocks the loop, by waiting without ``await``, stops all of them: then none has a result, and whoever asks each
    alone finds the one.
    """

    def __init__(self, asks: Mapping[str, tuple[Ask, float]]) -> None:
        """Begins.

        Args:
            asks: name -> what is asked, and the seconds that it may take.
        """
        self._outcomes: dict[str, Any] = {}
        self._longest = max((seconds for _, seconds in asks.values()), default=0.0) + _GRACE
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all(asks)), daemon=True)
        if asks:
            self._thread.start()

    def outcome(self, name: str) -> Callable[[], Any] | None:
        """Gives what came of one, or raises what it raised, or `TooLong`; None where nothing came since the loop is stuck."""
        self._thread.join(self._longest)
        if name not in self._outcomes:
            return None

        def outcome() -> Any:
            found = self._outcomes[name]
            if isinstance(found, BaseException):
                raise found
            return found

        return outcome

    async def _all(self, asks: Mapping[str, tuple[Ask, float]]) -> None:
        await asyncio.gather(*(self._one(name, ask, seconds) for name, (ask, seconds) in asks.items()))

    async def _one(self, name: str, ask: Ask, seconds: float) -> None:
        task = asyncio.ensure_future(_awaited(ask))
        # Not wait_for: its TimeoutError could not be told from one that the function itself has met.
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            self._outcomes[name] = TooLong()
            return
        self._outcomes[name] = task.exception() or task.result()
