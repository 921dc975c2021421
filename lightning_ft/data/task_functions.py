"""Task distributions that are a function: tasks made in blocks, so that episode i is the same in whatever batch it comes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch

from lightning_ft.engine.episodes import Episode, Rows
from lightning_ft.functional.errors import Refusal

TextKind = Literal["numbers", "tags", "pairs", "answers"]
_KINDS: tuple[tuple[set[str], TextKind], ...] = (
    ({"text", "label"}, "numbers"),
    ({"tokens"}, "tags"),
    ({"chosen", "rejected"}, "pairs"),
)
BLOCK = 64
"""Tasks that are drawn by one generator: few enough to be made anew on each rank, enough for one call to pay."""


class DrawnTasks:
    """The tasks of a split.

    Args:
        function: ``(rng, count, **arguments) -> support x, support y, query x, query y``, arrays (count, ...); or a list of
            ``count`` dictionaries of support and query rows, see `TextTasks`.
        arguments: of the function.
        key: of the split.
        said: how the user named the function.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], key: tuple[int, ...], said: str
    ) -> None:
        self.function, self.arguments, self.key, self.said = function, dict(arguments), key, said
        # A block ends within a batch, as a rule: the last few are kept.
        self._raw = lru_cache(maxsize=4)(self._called)
        self._block = lru_cache(maxsize=4)(self._made)

    def episodes(self, epoch: int, numbers: np.ndarray) -> Episode:
        """These episodes of an epoch, stacked."""
        begin, end = int(numbers[0]), int(numbers[-1]) + 1
        parts: list[list[torch.Tensor]]
        if end - begin == len(numbers) and bool((numbers == np.arange(begin, end)).all()):  # as a rule
            parts = [
                [array[max(0, begin - BLOCK * block) : end - BLOCK * block] for array in self._block(epoch, block)]
                for block in range(begin // BLOCK, (end - 1) // BLOCK + 1)
            ]
        else:
            blocks = numbers // BLOCK
            parts = [
                [array[torch.from_numpy(numbers[blocks == block] % BLOCK)] for array in self._block(epoch, block)]
                for block in sorted(set(blocks.tolist()))
            ]
        # Copies: a block is kept, and no net may write into it.
        xs, ys, xq, yq = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
        return Episode(Rows(xs, ys), Rows(xq, yq))

    def task(self, epoch: int, number: int) -> Any:
        """One task as the function gave it, where it gives a list of them."""
        return self._raw(epoch, number // BLOCK)[number % BLOCK]

    @cached_property
    def of_texts(self) -> bool:
        """Whether the function gives rows of texts, not arrays."""
        made = self._raw(0, 0)
        return isinstance(made, list) and bool(made) and isinstance(made[0], Mapping)

    @cached_property
    def kind(self) -> TextKind | None:
        """What these rows are, told by their columns; None of arrays."""
        if not self.of_texts:
            return None
        rows = self._raw(0, 0)[0].get("support")
        first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], Mapping) else {}
        return next((kind for columns, kind in _KINDS if columns <= first.keys()), "answers")

    @cached_property
    def has_classes(self) -> bool:
        """Whether targets are classes (tokens are)."""
        if self.of_texts:
            return self.kind != "numbers"
        return not self._block(0, 0)[1].is_floating_point()

    def _called(self, epoch: int, block: int) -> Any:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([*self.key, epoch, block])))
        self._check_call(rng)
        made = self.function(rng, BLOCK, **self.arguments)
        if isinstance(made, list) and len(made) != BLOCK:
            raise Refusal(f"tasks {self.said!r} must give {BLOCK} tasks where asked for {BLOCK}; it gave {len(made)}.")
        return made

    def _check_call(self, rng: np.random.Generator) -> None:
        """Refuses arguments that the function does not take; an error inside it stays what it is."""
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # written in C, without a signature
            return
        try:
            signature.bind(rng, BLOCK, **self.arguments)
        except TypeError as error:
            raise Refusal(
                f"tasks {self.said!r} cannot be called with (rng, count) and tasks_args {self.arguments}: {error}."
            ) from error

    def _made(self, epoch: int, block: int) -> list[torch.Tensor]:
        made = [np.asarray(array) for array in self._called(epoch, block)]
        if len(made) != 4 or any(len(array) != BLOCK for array in made) or len(made[0][0]) != len(made[1][0]):
            shapes = [array.shape for array in made]
            raise Refusal(
                f"tasks {self.said!r} must give support x, support y, query x, query y, each of {BLOCK} tasks where asked for "
                f"{BLOCK}; it gave arrays of shapes {shapes}."
            )
        return [torch.from_numpy(_plain(array)) for array in made]


def _plain(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)


__all__ = ["DrawnTasks", "TextKind"]
