"""(IA)^3 on any ``nn.Module``: learned vectors that scale keys, values and the inner activations of the feed-forward.

Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3: ``softmax(Q (l_k K)^T / sqrt(d)) (l_v V)`` and
``(l_ff act(W1 x)) W2``. A layer that makes keys or values has its output scaled, bias included; the feed-forward's second
layer its input. All vectors start at one. `inject_ia3` is what the callback calls; the file format is in
`lightning_ft.formats.peft_ia3`, what ``auto`` means in `lightning_ft.nn.ia3_targets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.names import check_name
from lightning_ft.nn.ia3_targets import AUTO, auto_targets
from lightning_ft.nn.registry import InjectedLayer, injected_layers, innermost, pristine_modules, replace_module
from lightning_ft.nn.select import LayerSpec, is_called_by_weight, is_conv1d, is_linear, matches, select
from lightning_ft.nn.targets import freeze_around, leave_fused_path, whole_modules, wrapped_names


@dataclass(frozen=True)
class IA3Config:
    """What to scale.

    Args:
        target: Patterns of the layers to wrap (see `lightning_ft.nn.select`); ``"auto"`` takes keys, values and the second
            layer of the feed-forward, by the architecture's names.
        feedforward: Patterns of those among them whose input is scaled, the others' output being scaled; None takes what
            ``auto`` finds among the targets.
        exclude: Patterns of modules to leave out, with all that they contain.
        layers: Only these repeated blocks: ``"0-3,7"``, ``"-4:"`` or a list of indices.
        modules_to_save: Patterns of modules to train in full beside the vectors and to store with them (a new head).
        adapter_name: Name of the adapter; several adapters on one model need different ones.

    Raises:
        Refusal: For values that mean nothing.
    """

    target: tuple[str, ...] | str = AUTO
    feedforward: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    layers: LayerSpec | None = None
    modules_to_save: tuple[str, ...] = ()
    adapter_name: str = "ia3"

    def __post_init__(self) -> None:
        """Refuse what cannot work; turn lists into tuples."""
        for name in ("exclude", "modules_to_save"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not isinstance(self.target, str):
            object.__setattr__(self, "target", tuple(self.target))
        if self.feedforward is not None:
            given = (self.feedforward,) if isinstance(self.feedforward, str) else tuple(self.feedforward)
            object.__setattr__(self, "feedforward", given)
        if not self.target:
            raise Refusal("IA3Config.target is empty; name layers such as 'k_proj', or write 'auto'.")
        if self.target == AUTO and self.feedforward is not None:
            raise Refusal("IA3Config.feedforward goes with named targets; with target 'auto' leave it out.")
        check_name(self.adapter_name, "IA3Config.adapter_name")


class IA3Layer(InjectedLayer):
    """A linear layer or a convolution whose input or output features are scaled by a learned vector.

    The vector is fp32 whatever the dtype of the base, and multiplies in fp32: near one, bf16 has steps of 1/128.

    Args:
        base: The module to wrap.
        feedforward: Scale the input instead of the output.
        adapter_name: Adapter that the layer belongs to.
        name: Pristine name of the wrapped module, for messages.

    Raises:
        Refusal: If the module's weight is read without calling it.
    """

    kind = "ia3"
    changes_weight = True
    decays = False  # towards zero would be away from the base
    takes_strength = True
    ia3_scale: nn.Parameter
    config: IA3Config
    """The configuration of the adapter that this layer belongs to; `inject_ia3` sets it."""

    def __init__(self, base: nn.Module, *, feedforward: bool, adapter_name: str = "ia3", name: str = "") -> None:
        super().__init__(base, adapter_name)
        self.feedforward, self.name = feedforward, name
        core = innermost(base)
        if is_called_by_weight(core):
            raise Refusal(
                f"IA3 cannot wrap {name!r}: nn.MultiheadAttention reads its weight without calling it, so the vector would "
                "have no effect; exclude it."
            )
        size = features(core)[0 if feedforward else 1]
        weight = cast(Tensor, core.weight)
        self.ia3_scale = nn.Parameter(torch.empty(size, dtype=torch.float32, device=weight.device))
        self.training = base.training
        self.reset_parameters()

    def of_outputs(self) -> tuple[str, ...]:
        """Return the vector, unless it scales the input."""
        return () if self.feedforward else ("ia3_scale",)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the vector to ones."""
        self.ia3_scale.fill_(1.0)
        self.starts_as_identity = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the base does, its input or its output scaled: (..., in) to (..., out), or (B, C, height, width)."""
        if not self.enabled:
            return cast(Tensor, self.base(x))
        scale = self._scale()
        if isinstance(innermost(self), nn.Conv2d):
            scale = scale.view(-1, 1, 1)
        if self.feedforward:
            return cast(Tensor, self.base((x * scale).to(x.dtype)))
        out = self.base(x)
        return cast(Tensor, (out * scale).to(out.dtype))

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return the weight with its columns (inputs) or rows (outputs) scaled."""
        core, scale = innermost(self), self._scale().to(weight.dtype)
        if isinstance(core, nn.Conv2d):
            if not self.feedforward:
                return weight * scale.view(-1, 1, 1, 1)
            by_group = scale.view(core.groups, -1).repeat_interleave(core.out_channels // core.groups, 0)
            return weight * by_group[:, :, None, None]
        inputs_last = not is_conv1d(core)
        return weight * (scale if self.feedforward == inputs_last else scale[:, None])

    def merge_into_bias(self, bias: Tensor) -> Tensor:
        """Return the bias as scaled with the output; a scaled input leaves it as it is."""
        return bias if self.feedforward else bias * self._scale().to(bias.dtype)

    def extra_repr(self) -> str:
        """Show what distinguishes this layer."""
        return f"adapter={self.adapter_name!r}, scales={'input' if self.feedforward else 'output'}"

    def _scale(self) -> Tensor:
        return self.ia3_scale if self.strength == 1.0 else 1.0 + self.strength * (self.ia3_scale - 1.0)


def inject_ia3(model: nn.Module, config: IA3Config | None = None, *, freeze_base: bool = True) -> dict[str, IA3Layer]:
    """Wrap the chosen layers of a model, in place, and return the new ones by pristine name.

    The first forward equals the one before: all vectors are one.

    Args:
        model: Any module, a Hugging Face model or not, possibly with other injected layers.
        config: What to scale; None is keys, values and the feed-forward.
        freeze_base: Let nothing train but injected layers and modules to save, of this adapter and of earlier ones.

    Raises:
        Refusal: If a pattern matches nothing, or what it matches cannot be wrapped. The model is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> layers = inject_ia3(net, IA3Config(target=("0", "2"), feedforward=("2",)))
        >>> [tuple(layer.ia3_scale.shape) for layer in layers.values()]
        [(3,), (3,)]
    """
    config = config or IA3Config()
    if injected_layers(model, config.adapter_name):
        raise Refusal(
            f"The model already carries an adapter called {config.adapter_name!r}; give the new one another name."
        )
    saved = whole_modules(model, config.modules_to_save)
    chosen = ia3_names(model, config)
    places = pristine_modules(model)
    layers: dict[str, IA3Layer] = {}
    for name, feedforward in chosen.items():
        layers[name] = IA3Layer(places[name][1], feedforward=feedforward, adapter_name=config.adapter_name, name=name)
        layers[name].config = config
    for name, layer in layers.items():
        replace_module(model, places[name][0], layer)
    leave_fused_path(model)
    if freeze_base:
        freeze_around(model)
    for module in saved.values():
        module.requires_grad_(True)
    return layers


def ia3_names(model: nn.Module, config: IA3Config) -> dict[str, bool]:
    """Return the pristine name of each layer that a configuration wraps, and whether its input is scaled.

    Raises:
        Refusal: As for `inject_ia3`.
    """
    targets, inner = config.target, config.feedforward
    if targets == AUTO:
        targets, inner = auto_targets(model)
    elif inner is None:
        try:
            inner = auto_targets(model)[1]
        except Refusal:  # an architecture of one's own: nothing says which layer ends a feed-forward
            inner = ()
    resolved = IA3Config(targets, (), config.exclude, config.layers, config.modules_to_save)
    names = wrapped_names(model, resolved, is_scalable, technique="IA3", kinds="Linear, Conv1D and Conv2d")
    if config.feedforward:
        select(names, config.feedforward)  # refuses what matches no target
    return {name: any(matches(name, pattern) for pattern in inner) for name in names}


def is_scalable(module: nn.Module) -> bool:
    """Say whether (IA)^3 can wrap a module of the pristine model."""
    return is_linear(module) or isinstance(module, nn.Conv2d)


def features(module: nn.Module) -> tuple[int, int]:
    """Return how many features a layer of the pristine model reads and writes."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if is_conv1d(module):
        inputs, outputs = cast(Tensor, module.weight).shape
        return inputs, outputs
    return cast(int, module.in_features), cast(int, module.out_features)


__all__ = ["IA3Config", "IA3Layer", "features", "ia3_names", "inject_ia3", "is_scalable"]
