"""Layers injected into a model: what they have in common, how to find them, switch them off and take them out again.

An injected layer wraps one module of the model and stands in its place under the same name; the wrapped module is its
child ``base``. Two adapters on one module are two wrappers, one inside the other. The *pristine* name of anything is
the name it has in the model before injection; patterns, files and checkpoint comparisons always speak pristine names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal

_BASE = "base"


class InjectedLayer(nn.Module):
    """A layer that wraps another module, computes what that module computes, and adds something trainable.

    Public attributes that the wrapper lacks (``weight``, ``bias``, ``in_features``, ``kernel_size`` ...) are read from
    the wrapped module, because model code looks at them (``layer.weight.dtype``) without calling the layer.

    Args:
        base: The module to wrap; it may be a wrapper itself.
        adapter_name: Which adapter this layer belongs to. A model may carry several.
    """

    kind: str = "injected"
    casts_itself: bool = True
    """Own parameters stay fp32 and are cast to the input's dtype in the forward, so no caller may cast them."""
    changes_weight: bool = False
    """The effect is a change of the wrapped module's weight, which `merge_into` makes."""
    decays: bool = True
    """Weight decay may shrink own matrices; rows of an embedding, for one, have no scale to shrink."""
    takes_strength: bool = False
    """The effect can be had in part, multiplied by `strength`, which `lightning_ft.nn.adapters.set_adapters` sets."""
    strength: float = 1.0
    takes_rows: bool = False
    """The effect can be had on some of a batch's rows alone, which `own_rows` says."""
    own_rows: Tensor | None = None
    """The layout of the batch, (1, T) or (S, L), 1 on the tokens on which it computes and 0 on the others; None: on all."""

    def __init__(self, base: nn.Module, adapter_name: str = "default") -> None:
        super().__init__()
        self.base = base
        self.adapter_name = adapter_name
        self.enabled = True
        self.starts_as_identity = False

    def __getattr__(self, name: str) -> Any:
        """Look a missing public attribute up in the wrapped module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if name.startswith("_") or _BASE not in modules:
                raise
            # Straight to the pristine module: an inner wrapper's own parameters are not attributes of the outer one.
            return getattr(innermost(modules[_BASE]), name)

    def on_rows(self, effect: Tensor) -> Tensor:
        """Return an effect (..., D), zero on the tokens that are not this layer's.

        Raises:
            Refusal: If the effect has another layout than the batch, so that nobody knows whose rows it is on.
        """
        if self.own_rows is None:
            return effect
        lead, rows = effect.shape[:-1], self.own_rows.to(effect)
        if lead != rows.shape and lead != (rows.numel(),):
            raise Refusal(
                f"The adapter {self.adapter_name!r} is for some rows of a batch, and {type(innermost(self)).__name__} in it sees "
                f"inputs of another layout, {tuple(lead)} where the batch has {tuple(rows.shape)}; exclude that layer, or set "
                "--data.batches homogeneous."
            )
        return effect * rows.reshape(*lead, 1)

    def injected_parameters(self) -> dict[str, nn.Parameter]:
        """Return this layer's own parameters by their name in the layer, without those of the wrapped module."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(f"{_BASE}.")}

    def of_outputs(self) -> tuple[str, ...] | None:
        """Return which own parameters have a first dimension that counts the wrapped module's outputs; None if nobody has said."""
        return None

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return the weight that does alone what the wrapped module with ``weight`` and this layer do together.

        Args:
            weight: The wrapped module's weight, in the dtype in which to compute.

        Raises:
            Refusal: For a layer whose effect is not a change of weight.
        """
        raise Refusal(f"{type(self).__name__} cannot be merged into a weight; export it as an adapter instead.")

    def merge_into_bias(self, bias: Tensor) -> Tensor:
        """Return the bias that goes with what `merge_into` returns; most layers leave it as it is."""
        return bias


def innermost(module: nn.Module) -> nn.Module:
    """Return the module of the pristine model under any number of wrappers."""
    while isinstance(module, InjectedLayer):
        module = module.base
    return module


def pristine_modules(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Map the pristine name of each module to (its present path, the module standing there, wrapped or not).

    The parts of a wrapper are left out: a wrapper is seen as the module that it wraps. A module registered under two
    names is listed under the first one, as in ``named_modules``.
    """
    found: dict[str, tuple[str, nn.Module]] = {}
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str, path: str) -> None:
        if module in seen:
            return
        seen.add(module)
        found[name] = (path, module)
        while isinstance(module, InjectedLayer):
            module, path = module.base, f"{path}.{_BASE}" if path else _BASE
            seen.add(module)
        for key, child in module._modules.items():
            if child is not None:
                walk(child, f"{name}.{key}" if name else key, f"{path}.{key}" if path else key)

    walk(model, "", "")
    return found


def injected_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, InjectedLayer]:
    """Return the injected layers of a model by their present path, outer wrappers before inner ones.

    Args:
        model: Any module.
        adapter_name: Only layers of this adapter; None for all.
    """
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, InjectedLayer) and adapter_name in (None, layer.adapter_name)
    }


def base_name(path: str, model: nn.Module | None = None) -> str:
    """Return the pristine name of a parameter or module: ``q_proj.base.weight`` becomes ``q_proj.weight``.

    Args:
        path: A name as ``named_parameters`` or ``named_modules`` gives it. Names of injected parameters keep their last
            part: ``q_proj.base.lora_A`` (an inner adapter's) becomes ``q_proj.lora_A``.
        model: The model that the name belongs to. With it, only the ``base`` of wrappers is stripped; without it every
            ``base`` but a leading one is, which is wrong for a model that has a submodule of its own called ``base``.
    """
    parts = path.split(".")
    if model is None:
        return ".".join(part for i, part in enumerate(parts) if i == 0 or part != _BASE)
    kept, module = [], model
    for part in parts:
        if not (part == _BASE and isinstance(module, InjectedLayer)):
            kept.append(part)
        module = module._modules.get(part) or module  # the last part may be a parameter
    return ".".join(kept)


@contextmanager
def disabled(model: nn.Module, adapter_names: Collection[str] | None = None) -> Iterator[None]:
    """Switch injected layers off for a while, then back to the state that each of them had before.

    Args:
        model: Any module.
        adapter_names: The adapters to switch off; None for all.
    """
    layers = [x for x in injected_layers(model).values() if adapter_names is None or x.adapter_name in adapter_names]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer.enabled = state


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module at ``path``, under each name where that module is registered.

    Args:
        model: The model to change; it cannot itself be replaced.
        path: Present path of the module, as ``named_modules`` gives it.
        new: The module to put there; it may contain the old one.
    """
    if not path:
        raise Refusal("The model itself cannot be wrapped or replaced; name one of its submodules.")
    old = model.get_submodule(path)
    inside_new = set(new.modules())
    for parent in list(model.modules()):
        if parent not in inside_new:
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new


def shared_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the parameters that several modules hold (tied embeddings), with their pristine names, in model order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, (_, module) in pristine_modules(model).items():
        for key, parameter in innermost(module)._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, []).append(f"{name}.{key}" if name else key)
    return {parameter: where for parameter, where in names.items() if len(where) > 1}
