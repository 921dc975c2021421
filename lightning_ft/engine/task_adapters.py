"""Adapters that have the name of a task: they compute on its rows alone, beside those that all tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import InjectedLayer, injected_layers


class TaskAdapters:
    """Which injected layers are one task's own."""

    def __init__(self) -> None:
        self._layers: dict[str, list[InjectedLayer]] = {}

    def find(self, module: nn.Module, names: Iterable[str], *, mixed: bool) -> None:
        """Looks for them once all are injected.

        Args:
            module: whose they are.
            names: of the tasks.
            mixed: whether batches hold rows of several.

        Raises:
            Refusal: one is there and batches are mixed.
        """
        found: dict[str, list[InjectedLayer]] = {name: [] for name in names}
        for layer in injected_layers(module).values():
            if layer.adapter_name in found:
                found[layer.adapter_name].append(layer)
        self._layers = {name: layers for name, layers in found.items() if layers}
        if self._layers and mixed:
            raise Refusal(
                f"The adapter {next(iter(self._layers))!r} is one task's own, and mixed batches hold rows of several; set "
                "--data.batches homogeneous, or give the adapter another name, so that all tasks share it."
            )

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Those of one task."""
        return [p for layer in self._layers.get(name, []) for p in layer.injected_parameters().values()]

    @property
    def names(self) -> list[str]:
        """Tasks that have some, from which one is to be chosen: none where someone has chosen already (`set_adapters`)."""
        return list(self._layers) if self._all_are_on else []

    @property
    def _all_are_on(self) -> bool:
        return all(layer.enabled for layers in self._layers.values() for layer in layers)

    @contextmanager
    def chosen(self, name: str | None) -> Iterator[None]:
        """Inside, the own adapter of one task computes alone, unless someone has chosen already."""
        if name is None or not self._all_are_on:
            yield
            return
        self.choose([name])
        try:
            yield
        finally:
            self.all_on()

    def choose(self, here: Sequence[str]) -> None:
        """Lets the own adapter of the one task that a batch holds compute, and no other's."""
        if not self._layers:
            return
        if len(here) > 1:
            raise Refusal(
                f"A batch holds rows of {', '.join(here)}, and adapters of single tasks need one task a batch."
            )
        for name, layers in self._layers.items():
            for layer in layers:
                layer.enabled = name in here

    def all_on(self) -> None:
        """Switches all on, as checkpoints and exports are to find them."""
        for layers in self._layers.values():
            for layer in layers:
                layer.enabled = True


__all__ = ["TaskAdapters"]
