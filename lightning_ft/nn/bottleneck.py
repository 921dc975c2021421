"""Bottleneck adapters on any ``nn.Module``: which sublayers or modules get one, and how it is built.

Three styles, named after who proposed them, with ``s`` a sublayer's output, ``r`` the residual stream that it is added to and
``f`` the bottleneck (`lightning_ft.nn.bottleneck_layers`):

- ``houlsby`` (two per block): ``s`` becomes ``s + f(s)``;
- ``pfeiffer`` (one per block, after the feed-forward): ``s`` becomes ``s + f(r + s)`` in pre-norm blocks and
  ``s + f(norm(r + s))`` with the block's own norm in post-norm ones;
- ``parallel`` (one, beside the feed-forward): ``s`` becomes ``s + f(r)``.

These are AdapterHub's ``double_seq_bn``, ``seq_bn`` and ``par_bn``; the file format is in `lightning_ft.formats.adapterhub`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.names import check_name
from lightning_ft.nn.bottleneck_layers import (
    BottleneckLayer,
    Init,
    NonLinearity,
    NormedBottleneckLayer,
    Passage,
    Reads,
    Scale,
    StreamTap,
)
from lightning_ft.nn.registry import InjectedLayer, injected_layers, innermost, pristine_modules, replace_module
from lightning_ft.nn.select import LayerSpec, is_called_by_weight, is_conv1d, select
from lightning_ft.nn.sublayers import Kind, Sublayer, sublayers
from lightning_ft.nn.targets import freeze_around, is_inside, leave_fused_path, wrapped_names

Style = Literal["houlsby", "pfeiffer", "parallel"]


@dataclass(frozen=True)
class BottleneckConfig:
    """What gets a bottleneck, and how it is built.

    Args:
        style: What the bottleneck reads and, without ``places``, how many a block gets.
        reduction_factor: Width over bottleneck: ``k = D // reduction_factor``, at least 1.
        reduction_factors: Other factors for some blocks, by their number ("0", over all stacks, the encoder's first).
        non_linearity: Between the two matrices.
        scale: Factor of the bottleneck's output: a number, one learned number, or one learned number per channel.
        dropout: Probability of zeroing a number of the bottleneck's output while training.
        norm_before: A trained LayerNorm on what the bottleneck reads.
        norm_after: A trained LayerNorm on what it gives.
        init: ``zero`` starts at the base model, ``houlsby`` and ``bert`` near it.
        places: Which sublayers; empty means all for houlsby, and the feed-forward for the others.
        target: Patterns of modules to wrap instead of sublayers: their output ``h`` becomes ``h + f(h)``, with ``parallel``
            ``h + f(x)`` where ``x`` is their input. Empty means sublayers.
        exclude: Patterns of modules to leave out, with all that they contain.
        layers: Only these repeated blocks: ``"0-3,7"``, ``"-4:"`` or a list of indices.
        adapter_name: Name of the adapter; several adapters on one model need different ones.

    Raises:
        Refusal: For values that mean nothing.
    """

    style: Style = "pfeiffer"
    reduction_factor: float = 16.0
    reduction_factors: Mapping[str, float] = field(default_factory=dict)
    non_linearity: NonLinearity = "relu"
    scale: Scale = 1.0
    dropout: float = 0.0
    norm_before: bool = False
    norm_after: bool = False
    init: Init = "zero"
    places: tuple[Kind, ...] = ()
    target: tuple[str, ...] | str = ()
    exclude: tuple[str, ...] = ()
    layers: LayerSpec | None = None
    adapter_name: str = "adapter"

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """None: what trains beside an adapter is another technique's business."""
        return ()

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_name(self.adapter_name, "BottleneckConfig.adapter_name")
        for key, choices in (("style", Style), ("non_linearity", NonLinearity), ("init", Init)):
            if getattr(self, key) not in get_args(choices):
                raise Refusal(f"BottleneckConfig.{key} must be one of {get_args(choices)}, got {getattr(self, key)!r}.")
        unknown = [place for place in self.places if place not in get_args(Kind)]
        if unknown:
            raise Refusal(f"BottleneckConfig.places must be among {get_args(Kind)}, got {unknown[0]!r}.")
        factors = {"reduction_factor": self.reduction_factor, **self.reduction_factors}
        for name, factor in factors.items():
            if not (factor > 0 and math.isfinite(factor)):
                raise Refusal(f"BottleneckConfig: the reduction factor {name!r} must be above 0, got {factor}.")
            if name != "reduction_factor" and not name.isdecimal():
                raise Refusal(f"BottleneckConfig.reduction_factors is keyed by numbers of blocks ('0'), got {name!r}.")
        if isinstance(self.scale, str) and self.scale not in ("learned", "channel"):
            raise Refusal(f"BottleneckConfig.scale must be a number, 'learned' or 'channel', got {self.scale!r}.")
        if self.target and (self.places or self.reduction_factors):
            raise Refusal(
                "BottleneckConfig.target names modules itself, so places and reduction_factors, which speak of sublayers and "
                "blocks, mean nothing beside it; leave them out."
            )

    def bottleneck(self, width: int, block: int | None = None) -> int:
        """Return k for a width and the number of a block."""
        return max(1, int(width // self.reduction_factors.get(str(block), self.reduction_factor)))


def inject_bottleneck(
    model: nn.Module, config: BottleneckConfig | None = None, *, seed: int = 0, freeze_base: bool = True
) -> dict[str, BottleneckLayer]:
    """Put bottleneck adapters into a model, in place, and return the new layers by the pristine name of what they wrap.

    With ``init="zero"`` the first forward equals the one before. Initial values depend on the seed and the parameter's name
    only, so all ranks agree.

    Args:
        model: Any module, a Hugging Face model or not, possibly with other injected layers.
        config: What gets one and how it is built; None is Pfeiffer's.
        seed: Seed of the initial values.
        freeze_base: Let nothing train but injected layers, of this adapter and of earlier ones.

    Raises:
        Refusal: If a pattern matches nothing, if sublayers are not known, or if a named module has no features that a
            bottleneck could read. The model is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> list(inject_bottleneck(net, BottleneckConfig(target=("0",))))
        ['0']
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['0.down_weight', '0.down_bias', '0.up_weight', '0.up_bias']
    """
    config = config or BottleneckConfig()
    if injected_layers(model, config.adapter_name):
        raise Refusal(
            f"The model already carries an adapter called {config.adapter_name!r}; give the new one another name."
        )
    places = pristine_modules(model)
    now = {name: module for name, (_, module) in places.items()}  # what stands, or will stand, at each name
    layers = _on_targets(model, config, now, seed) if config.target else _on_sublayers(model, config, now, seed)
    for name, (path, module) in places.items():
        if now[name] is not module:
            replace_module(model, path, now[name])
    leave_fused_path(model)
    if freeze_base:
        freeze_around(model)
    return layers


def adapted_sublayers(model: nn.Module, config: BottleneckConfig) -> list[Sublayer]:
    """Return the sublayers that a configuration without ``target`` means, in model order.

    Raises:
        Refusal: As for `inject_bottleneck`.
    """
    found = sublayers(model)
    kinds = config.places or (get_args(Kind) if config.style == "houlsby" else ("feed_forward",))
    for kind in config.places:
        if kind not in {place.kind for place in found}:
            raise Refusal(f"{type(model).__name__} has no {kind} to put an adapter at; leave it out of places.")
    names = list(pristine_modules(model))
    left_out = set(select(names, config.exclude)) if config.exclude else set()
    inside = set(select([p.output for p in found], "*", layers=config.layers))
    chosen = [p for p in found if p.kind in kinds and p.output in inside and not is_inside(p.output, left_out)]
    if not chosen:
        raise Refusal("Every sublayer that places and layers select is excluded; nothing is left to adapt.")
    numbers = {str(place.number) for place in found}
    for number in config.reduction_factors:
        if number not in numbers:
            raise Refusal(f"reduction_factors names block {number}, but the model has blocks 0 to {len(numbers) - 1}.")
    return chosen


def bottleneck_names(model: nn.Module, config: BottleneckConfig) -> list[str]:
    """Return the pristine names of all modules that a configuration wraps, taps included.

    Raises:
        Refusal: As for `inject_bottleneck`.
    """
    if config.target:
        return _target_names(model, config)
    found = adapted_sublayers(model, config)
    adapters = [_adapter_at(place, config) for place in found]
    taps = [p.entry for p, at in zip(found, adapters, strict=True) if at == p.output and config.style != "houlsby"]
    return [*adapters, *taps]


def bottleneck_layers(model: nn.Module, adapter_name: str) -> list[BottleneckLayer]:
    """Return the layers of one adapter, in model order.

    Raises:
        Refusal: If the model carries no bottleneck adapter of that name.
    """
    found = [x for x in injected_layers(model, adapter_name).values() if isinstance(x, BottleneckLayer)]
    if not found:
        carried = sorted({x.adapter_name for x in injected_layers(model).values() if isinstance(x, BottleneckLayer)})
        raise Refusal(
            f"The model carries no bottleneck adapter called {adapter_name!r}; it carries: {', '.join(carried) or 'none'}."
        )
    return found


def _on_sublayers(
    model: nn.Module, config: BottleneckConfig, now: dict[str, nn.Module], seed: int
) -> dict[str, BottleneckLayer]:
    layers: dict[str, BottleneckLayer] = {}
    for place in adapted_sublayers(model, config):
        k = config.bottleneck(place.width, place.number)
        options: dict[str, Any] = {"inputs": place.width, "outputs": place.width, "bottleneck": k, "sublayer": place}
        options["device"] = next(innermost(now[place.block]).parameters()).device
        name = _adapter_at(place, config)
        if name == place.norm:
            layer: BottleneckLayer = NormedBottleneckLayer(now[name], config, **options, seed=seed, name=name)
        else:
            reads: Reads = {"houlsby": "output", "pfeiffer": "sum", "parallel": "stream"}[config.style]  # type: ignore[assignment]
            passage = None
            if reads != "output":
                passage = Passage()
                now[place.entry] = StreamTap(now[place.entry], passage, config.adapter_name)
            options |= {"reads": reads, "passage": passage}
            layer = BottleneckLayer(now[name], config, **options, seed=seed, name=name)
        now[name] = layers[name] = layer
    return layers


def _adapter_at(place: Sublayer, config: BottleneckConfig) -> str:
    """Return the name of the module that carries the adapter of a sublayer."""
    return place.norm if config.style == "pfeiffer" and place.norm is not None else place.output


def _on_targets(
    model: nn.Module, config: BottleneckConfig, now: dict[str, nn.Module], seed: int
) -> dict[str, BottleneckLayer]:
    own = config.style == "parallel"
    layers: dict[str, BottleneckLayer] = {}
    for name in _target_names(model, config):
        inputs, outputs, feature_dim = _features(innermost(now[name]), _hidden_size(model)) or (None, 0, -1)
        layers[name] = BottleneckLayer(
            now[name],
            config,
            inputs=cast(int, inputs) if own else outputs,
            outputs=outputs,
            bottleneck=config.bottleneck(outputs),
            reads="own_input" if own else "output",
            feature_dim=feature_dim,
            device=next(innermost(now[name]).parameters()).device,
            seed=seed,
            name=name,
        )
        now[name] = layers[name]
    return layers


def _target_names(model: nn.Module, config: BottleneckConfig) -> list[str]:
    own, width = config.style == "parallel", _hidden_size(model)

    def wraps(module: nn.Module) -> bool:
        found = _features(module, width)
        return found is not None and not (own and (found[0] is None or found[2] != -1))

    return wrapped_names(
        model,
        config,
        wraps,
        technique="BottleneckAdapter",
        kinds="linear layers, norms, and blocks of Hugging Face models"
        + ("" if own else ", and with the sequential styles embeddings and convolutions"),
    )


def _hidden_size(model: nn.Module) -> int | None:
    """Width of a Hugging Face model's blocks."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "hidden_size", None)
    return found if isinstance(found, int) else None


def _features(module: nn.Module, hidden: int | None) -> tuple[int | None, int, int] | None:
    """Return (width of the input, width of the output, dimension of the features), None for what cannot be wrapped."""
    if is_called_by_weight(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict, InjectedLayer)):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, -1
    weight = cast("Tensor | None", module._parameters.get("weight"))
    if is_conv1d(module) and weight is not None:
        return weight.shape[0], weight.shape[1], -1
    if isinstance(module, nn.Embedding):
        return None, module.embedding_dim, -1
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels, module.out_channels, 1
    if weight is not None and weight.dim() == 1:
        return weight.shape[0], weight.shape[0], 1 if isinstance(module, nn.modules.batchnorm._BatchNorm) else -1
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim, -1
    return None if hidden is None or not list(module.children()) else (hidden, hidden, -1)


__all__ = [
    "BottleneckConfig",
    "BottleneckLayer",
    "Style",
    "adapted_sublayers",
    "bottleneck_layers",
    "bottleneck_names",
    "inject_bottleneck",
]
