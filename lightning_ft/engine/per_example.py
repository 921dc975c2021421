"""Gradients of single examples, read off the layers while one backward pass goes through a batch.

Every module that holds a trained parameter of its own is watched: what went into a call, what came back for its output, and
which example each entry belongs to give the parameter's share by `lightning_ft.functional.fisher`; for kinds of layer that have no
formula there, by running the layer alone under `vmap`. A parameter that is used otherwise (read by another module, called
with entries that belong to no example) shows in `unseen`, or in a comparison with its ordinary gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap

from lightning_ft.functional.fisher import Groups, Lookup, Product, Share, Transposed, Values
from lightning_ft.nn.lora_layers import LoRAEmbedding, LoRALinear, output_scale
from lightning_ft.nn.packed import has_packed_weights
from lightning_ft.nn.registry import innermost
from lightning_ft.nn.select import is_conv1d

Finished = Callable[[str, list[Share]], None]
"""Called with a parameter's name and its shares once the last call that uses it has come back."""


class Recorder:
    """Watches the calls of layers with trained parameters."""

    def __init__(self, module: nn.Module, names: set[str], layouts: Callable[[], list[Groups]]) -> None:
        """Args: module: the model; names: of its parameters that matter; layouts: where examples lie in the present call."""
        self._module = module
        self._layouts = layouts
        self._owners = owners(module, names)
        self._recording = False
        self._finished: Finished = lambda name, shares: None
        self.unseen: set[str] = set()
        """Names of parameters of which a call could not be told apart by examples."""
        self.begins: list[GradientEdge] = []
        """Where a backward pass may end: what no other watched call lies before, and calls that could not be told apart."""
        self._forget()

    def _forget(self) -> None:
        self.begins = []
        self._pending: dict[str, int] = {}
        self._shares: dict[str, list[Share]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, there are hooks on the layers."""
        handles = [
            owner.register_forward_hook(partial(self._called, names), with_kwargs=True)
            for owner, names in self._owners.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, calls are noted."""
        self._forget()
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    @contextmanager
    def backward(self, finished: Finished) -> Iterator[None]:
        """Inside, what comes back is turned into shares."""
        self._finished = finished
        try:
            yield
        finally:
            self._finished = lambda name, shares: None
            self._forget()

    @property
    def called(self) -> set[str]:
        """Names of the parameters that the last forward pass used, as far as it was seen."""
        return set(self._pending)

    def _called(self, names: dict[str, str], layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._recording or not torch.is_grad_enabled():
            return
        first = args[0] if args else next(iter(kwargs.values()), None)
        groups = None
        if isinstance(first, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            groups = next((g for g in self._layouts() if g.fits(first) and g.fits(output)), None)
        if groups is None:
            self._unknown(set(names.values()), output)
            return
        for name in names.values():
            self._pending[name] = self._pending.get(name, 0) + 1
        if isinstance(first, Tensor) and not first.requires_grad:
            self.begins.append(get_gradient_edge(output))
        # Not the graph itself: what the layer saw is kept as plain numbers.
        seen = tuple(one.detach() if isinstance(one, Tensor) else one for one in args)
        output.register_hook(partial(self._arrived, names, layer, seen, kwargs, groups))

    def _unknown(self, names: set[str], output: Any) -> None:
        """A call of no known layout; where nothing comes back for it (a pooler whose output nobody reads) it does not matter."""
        if isinstance(output, Tensor):
            if output.requires_grad:
                self.begins.append(get_gradient_edge(output))
                output.register_hook(lambda delta: self.unseen.update(names if self._pending else ()))
        else:
            self.unseen |= names

    def _arrived(
        self,
        names: dict[str, str],
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        groups: Groups,
        delta: Tensor,
    ) -> None:
        if not self._pending:
            return  # somebody else's backward pass through the same graph
        with torch.no_grad():
            try:
                shares = shares_of(layer, list(names), args, kwargs, delta, groups)
            except torch.OutOfMemoryError:
                raise
            except (
                RuntimeError
            ):  # a layer that cannot run by itself: it looks at another one, or vmap knows an operation of it not
                self.unseen |= set(names.values())
                return
            for own, name in names.items():
                self._shares.setdefault(name, []).append(shares[own])
                self._pending[name] -= 1
                if not self._pending[name]:
                    self._finished(name, self._shares.pop(name))


def owners(module: nn.Module, names: set[str]) -> dict[nn.Module, dict[str, str]]:
    """The modules that hold parameters themselves: module -> {name there: name in the whole model}."""
    canonical = {id(p): name for name, p in module.named_parameters() if name in names}
    found: dict[nn.Module, dict[str, str]] = {}
    for part in module.modules():
        own = {key: canonical[id(p)] for key, p in part._parameters.items() if p is not None and id(p) in canonical}
        if own:
            found[part] = own
    return found


def shares_of(
    layer: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], delta: Tensor, groups: Groups
) -> dict[str, Share]:
    """What one call of a layer adds to the gradients of its own parameters.

    Args:
        layer: any module.
        names: of its own parameters.
        args: what it was called with; the first one is what groups describe.
        kwargs: likewise.
        delta: gradient of its output.
        groups: which example each leading entry belongs to.
    """
    x = args[0] if args else next(iter(kwargs.values()))
    found: dict[str, Share] = {}
    if isinstance(layer, nn.Linear) or is_conv1d(layer):
        if "weight" in names:
            found["weight"] = Product(x, delta, groups, transposed=is_conv1d(layer))
        if "bias" in names:
            flat = groups.flat(delta)  # (R, K, O)
            found["bias"] = Values(groups.summed(flat.sum(1)), groups)
    elif isinstance(layer, nn.Embedding):
        scale = output_scale(layer, delta)
        if names == ["weight"]:
            rows = cast(int, layer.num_embeddings)
            found["weight"] = Lookup(x, delta, groups, rows, padding=layer.padding_idx, scale=scale)
    elif isinstance(layer, LoRALinear) and not layer.dora:
        wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
        if "lora_B" in names:
            hidden = F.linear(x.to(layer.lora_A.dtype), layer.lora_A)  # (..., r)
            found["lora_B"] = Product(hidden, wide, groups, factor=layer._gain)
        if "lora_A" in names:
            found["lora_A"] = Product(x, wide @ layer.lora_B.to(wide.dtype), groups, factor=layer._gain)
    elif isinstance(layer, LoRAEmbedding) and not layer.dora:
        scale = output_scale(innermost(layer), delta)
        wide = delta.to(torch.promote_types(delta.dtype, torch.float32)) * (1.0 if scale is None else scale)
        padding = cast("int | None", layer.padding_idx)
        if "lora_B" in names:
            found["lora_B"] = Product(F.embedding(x, layer.lora_A.t(), padding), wide, groups, factor=layer._gain)
        if "lora_A" in names:
            back = layer._gain * (wide @ layer.lora_B.to(wide.dtype))  # (..., r)
            rows = layer.lora_A.shape[1]
            found["lora_A"] = Transposed(Lookup(x, back, groups, rows, padding=padding, scale=None))
    missing = [name for name in names if name not in found]
    if missing:
        found |= _alone(layer, missing, args, kwargs, delta, groups)
    return found


def _alone(
    layer: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], delta: Tensor, groups: Groups
) -> dict[str, Share]:
    """By running the layer once more on each leading entry, under vmap where its operations know how."""
    own = {name: cast(Tensor, layer._parameters[name]).detach() for name in names}
    x, lead = args[0] if args else next(iter(kwargs.values())), len(groups.shape)
    entries, backs = x.reshape(-1, *x.shape[lead:]), delta.reshape(-1, *delta.shape[lead:])  # (R, ...)

    def call(own: dict[str, Tensor], some: Tensor) -> Tensor:
        there = some.reshape(*[1] * (lead - 1), *some.shape)
        if args:
            return functional_call(layer, own, (there, *args[1:]), kwargs)
        return functional_call(layer, own, (), {**kwargs, next(iter(kwargs)): there})

    def of_entry(entry: Tensor, back: Tensor) -> dict[str, Tensor]:
        made = vjp(lambda p: call(p, entry[None]), own)
        out, pull = made[0], made[1]
        found: dict[str, Tensor] = pull(back.reshape(out.shape).to(out.dtype))[0]
        return found

    with torch.enable_grad():
        if has_packed_weights(layer):  # its kernels know nothing of vmap
            examples = [_of_example(call, own, entries[at], backs[at]) for at in groups.places]
            return {name: Values(torch.stack([one[i] for one in examples]), groups) for i, name in enumerate(names)}
        per_entry = vmap(of_entry)(entries, backs)
    return {name: Values(groups.summed(_wide(values)), groups) for name, values in per_entry.items()}


def _of_example(
    call: Callable[[dict[str, Tensor], Tensor], Tensor], own: dict[str, Tensor], entries: Tensor, backs: Tensor
) -> list[Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
    out = call(leaves, entries)
    return [
        _wide(grad) for grad in torch.autograd.grad(out, list(leaves.values()), backs.reshape(out.shape).to(out.dtype))
    ]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
