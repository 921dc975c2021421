"""Adapters that have the name of a task: they compute on its rows alone, beside those that all tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ft.engine.batch import Batch
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import InjectedLayer, injected_layers


class TaskAdapters:
    """Which injected layers are one task's own."""

    def __init__(self) -> None:
        self._layers: dict[str, list[InjectedLayer]] = {}
        self._sharded = False

    def find(self, module: nn.Module, names: Iterable[str], *, mixed: bool, sharded: bool) -> None:
        """Looks for them once all are injected.

        Args:
            module: whose they are.
            names: of the tasks.
            mixed: whether batches hold rows of several.
            sharded: whether FSDP2 trains them.

        Raises:
            Refusal: batches are mixed or parameters sharded, and one of them cannot compute on some rows alone.
        """
        found: dict[str, list[InjectedLayer]] = {name: [] for name in names}
        for layer in injected_layers(module).values():
            if layer.adapter_name in found:
                found[layer.adapter_name].append(layer)
        self._layers = {name: layers for name, layers in found.items() if layers}
        self._sharded = sharded
        why = "mixed ones hold rows of several tasks" if mixed else "under FSDP2 all ranks must run the same layers"
        for name, layers in self._layers.items() if mixed or sharded else ():
            for layer in layers:
                _refuse_whole_batches(name, layer, why)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Those of one task."""
        return [p for layer in self._layers.get(name, []) for p in layer.injected_parameters().values()]

    @property
    def are_there(self) -> bool:
        """Whether a task has some, on or off."""
        return bool(self._layers)

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
        self._compute({name: None})
        try:
            yield
        finally:
            self.all_on()

    def choose(self, batch: Batch, here: Mapping[str, Tensor]) -> None:
        """Lets each task's own adapter compute on its rows of a batch.

        Args:
            batch: of rows of any tasks.
            here: task -> which of the batch's rows are its.
        """
        if not self._layers:
            return
        where = {name: _layout(batch, mine) if len(here) > 1 else None for name, mine in here.items()}
        if self._sharded and torch.is_grad_enabled():
            # In FSDP2's units all ranks must have gradients of the same parameters, and another rank may have other tasks' rows.
            nowhere = _layout(batch, batch.rows[:0])
            where |= {name: nowhere for name in self._layers if name not in here}
        self._compute(where)

    def _compute(self, where: dict[str, Tensor | None]) -> None:
        """Name of a task -> where its own adapter computes, None: everywhere; the others are off."""
        for name, layers in self._layers.items():
            for layer in layers:
                if where.get(name) is not None:
                    _refuse_whole_batches(name, layer, "this one holds rows of several tasks")
                layer.enabled, layer.own_rows = name in where, where.get(name)

    def all_on(self) -> None:
        """Switches all on, as checkpoints and exports are to find them."""
        for layers in self._layers.values():
            for layer in layers:
                layer.enabled, layer.own_rows = True, None


def _layout(batch: Batch, mine: Tensor) -> Tensor:
    """1 on the tokens of these rows, in the layout of the ids."""
    whose = torch.zeros(len(batch.rows), device=batch.ids.device).index_fill(0, mine, 1.0)
    if batch.bounds is None:
        return whose[:, None].expand(batch.ids.shape)
    lengths = torch.tensor(batch.bounds, device=whose.device).diff()
    return whose.repeat_interleave(lengths, output_size=batch.bounds[-1])[None]


def _refuse_whole_batches(name: str, layer: InjectedLayer, why: str) -> None:
    if not layer.takes_rows:
        raise Refusal(
            f"The adapter {name!r} is one task's own, and {layer.kind} computes on whole batches, while {why}; take "
            "LoRA on linear layers and embeddings for it, give it another name, so that all tasks share it, or set --data.batches "
            "homogeneous, without FSDP2."
        )


__all__ = ["TaskAdapters"]
