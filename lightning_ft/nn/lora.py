"""LoRA and DoRA on any ``nn.Module``: choose modules, wrap them, and let train what belongs to the adapter.

Hu et al. 2022, https://arxiv.org/abs/2106.09685. `inject_lora` is what the callback calls; it is also usable inside a
user's own ``configure_model``. The layers are in `lightning_ft.nn.lora_layers`, merging is in `lightning_ft.nn.merging`,
the file format in `lightning_ft.formats.peft`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar, get_args

from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.names import check_name
from lightning_ft.nn.lora_init import Init
from lightning_ft.nn.lora_layers import LoRALayer, layer_class
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.registry import (
    InjectedLayer,
    base_name,
    injected_layers,
    innermost,
    pristine_modules,
    replace_module,
)
from lightning_ft.nn.select import ALL_LINEAR, LayerSpec
from lightning_ft.nn.targets import freeze_around, is_inside, leave_fused_path, whole_modules, wrapped_names
from lightning_ft.nn.trainable_tokens import ascending, inject_token_rows, rows_by_table

Biases = Literal["none", "all", "lora_only"]
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class LoRAConfig:
    """What to wrap with LoRA and how.

    Args:
        r: Rank of the updates, at least 1.
        alpha: Numerator of the scale ``alpha / r``; 16 with r 8 doubles the update, the ratio most recipes use.
        dropout: Probability of zeroing inputs of ``A`` while training.
        target: Patterns of module names (see `lightning_ft.nn.select`), or ``"all-linear"``: every linear layer but the
            output head, which reaches the quality of full training where attention alone does not (QLoRA, section 4).
        exclude: Patterns of modules to leave out, with all that they contain.
        layers: Only these repeated blocks: ``"0-3,7"``, ``"-4:"`` or a list of indices.
        rank_pattern: Other ranks for some modules: a regular expression for the end of the name, from a dot on, to r.
        alpha_pattern: Other alphas, likewise. The first key that matches counts.
        rslora: Scale by ``alpha / sqrt(r)``, which keeps the update's size when r grows (Kalajdzievski 2023).
        dora: Also train the magnitude of each output (Liu et al. 2024); slower, better at small r.
        init: Where the factors start: ``default``, ``gaussian`` (``A`` normal with deviation 1/r), or at a part of the weight
            itself, ``pissa`` (its principal singular triplets) or ``olora`` (its QR factors), see `lightning_ft.nn.lora_init`.
        modules_to_save: Patterns of modules to train in full beside the adapter and to store with it (a new head).
        bias: Which of the model's own biases train too: none, all, or only those of the wrapped modules.
        trainable_tokens: Tokens whose rows of the input embedding (and of a head tied to it) train and are stored: their
            ids, or ids by the name of an embedding or head. Kept in ascending order.
        adapter_name: Name of the adapter; several adapters on one model need different ones.

    Raises:
        Refusal: For values that mean nothing.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: tuple[str, ...] | str = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    layers: LayerSpec | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    init: Init = "default"
    modules_to_save: tuple[str, ...] = ()
    bias: Biases = "none"
    trainable_tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    adapter_name: str = "default"

    def __post_init__(self) -> None:
        """Refuse what cannot work; turn lists into tuples."""
        for name in ("exclude", "modules_to_save"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not isinstance(self.target, str):
            object.__setattr__(self, "target", tuple(self.target))
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for where, r in ranks.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise Refusal(f"LoRAConfig.{where} must be a whole number of at least 1, got {r!r}.")
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for where, a in alphas.items():
            if not a > 0:
                raise Refusal(f"LoRAConfig.{where} must be above 0, got {a!r}.")
        if not 0 <= self.dropout < 1:
            raise Refusal(f"LoRAConfig.dropout must be at least 0 and below 1, got {self.dropout!r}.")
        if not self.target:
            raise Refusal("LoRAConfig.target is empty; name modules such as 'q_proj', or write 'all-linear'.")
        if self.bias not in get_args(Biases):
            raise Refusal(f"LoRAConfig.bias must be none, all or lora_only, got {self.bias!r}.")
        if self.init not in get_args(Init):
            raise Refusal(f"LoRAConfig.init must be default, gaussian, pissa or olora, got {self.init!r}.")
        given, where = self.trainable_tokens, "LoRAConfig.trainable_tokens"
        tokens: object = ascending(given, where) if given and not isinstance(given, Mapping) else ()
        if isinstance(given, Mapping):
            tokens = {table: ascending(ids, f"{where}[{table!r}]") for table, ids in given.items()}
        object.__setattr__(self, "trainable_tokens", tokens)
        check_name(self.adapter_name, "LoRAConfig.adapter_name")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except re.error as error:
                raise Refusal(f"The rank or alpha pattern {key!r} is not a regular expression: {error}.") from error

    def __repr__(self) -> str:
        """Show what differs from the defaults."""
        default: dict[str, object] = {f.name: f.default if f.default_factory is not dict else {} for f in fields(self)}
        changed = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"LoRAConfig({', '.join(f'{name}={value!r}' for name, value in changed if value != default[name])})"

    def rank_of(self, name: str) -> int:
        """Return the rank for a module's pristine name."""
        return _first_match(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """Return alpha for a module's pristine name."""
        return _first_match(self.alpha_pattern, name, self.alpha)


def inject_lora(
    model: nn.Module, config: LoRAConfig, *, seed: int = 0, freeze_base: bool = True
) -> dict[str, LoRALayer]:
    """Wrap the chosen modules of a model, in place, and return the new layers by pristine name.

    The first forward equals the one before: ``B`` is zero, or the start is subtracted. Initial values depend on the seed
    and the parameter's name only, or on the weight, so all ranks agree. A model may carry several adapters, on different
    modules or one around the other.

    Args:
        model: Any module, a Hugging Face model or not, possibly with other injected layers.
        config: What to wrap and how.
        seed: Seed of the initial values.
        freeze_base: Let nothing train but injected layers and modules to save, of this adapter and of earlier ones.

    Raises:
        Refusal: If a pattern matches nothing, or what it matches cannot be wrapped. The model is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(inject_lora(net, LoRAConfig(r=2, target=("0",))))
        ['0']
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B']
    """
    if injected_layers(model, config.adapter_name):
        raise Refusal(
            f"The model already carries an adapter called {config.adapter_name!r}; give the new one another name."
        )
    saved = saved_modules(model, config)
    names = target_names(model, config)
    _check_tokens(model, config, names, saved)
    biases = bias_parameters(model, config, names)
    for what, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not any(_is_match(key, name) for name in names):
                raise Refusal(f"The {what} key {key!r} matches none of the modules that get LoRA; correct or drop it.")
    places = pristine_modules(model)
    layers: dict[str, LoRALayer] = {}
    for name in names:
        module = places[name][1]
        kind = layer_class(innermost(module))
        assert kind is not None
        layers[name] = kind(
            module,
            r=config.rank_of(name),
            alpha=config.alpha_of(name),
            dropout=config.dropout,
            rslora=config.rslora,
            dora=config.dora,
            init=config.init,
            adapter_name=config.adapter_name,
            seed=seed,
            name=name,
        )
        layers[name].config = config
    for name, layer in layers.items():
        replace_module(model, places[name][0], layer)
    if config.trainable_tokens:
        inject_token_rows(model, config.trainable_tokens, adapter_name=config.adapter_name)
    leave_fused_path(model)
    if freeze_base:
        others = adapter_configs(model).values()
        freeze_around(model, [bias for other in others for bias in bias_parameters(model, other).values()])
    for module in saved.values():
        module.requires_grad_(True)
    for parameter in biases.values():
        parameter.requires_grad_(True)
    return layers


def target_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the pristine names of the modules that a configuration wraps, in model order.

    Raises:
        Refusal: As for `inject_lora`.
    """
    return wrapped_names(
        model,
        config,
        lambda module: layer_class(module) is not None,
        technique="LoRA",
        kinds="Linear, Conv1D, Conv2d and Embedding",
    )


def saved_modules(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Return the modules that are trained in full beside the adapter, by pristine name.

    Raises:
        Refusal: If a pattern matches nothing, or if another module holds the same parameter.
    """
    return whole_modules(model, config.modules_to_save)


def bias_parameters(
    model: nn.Module, config: LoRAConfig, targets: Collection[str] | None = None
) -> dict[str, nn.Parameter]:
    """Return the biases of the base that a configuration trains beside the factors, by pristine name.

    Biases of modules to save are left out: they are trained and stored with their module.

    Args:
        model: The model, with the adapter or before it gets it.
        config: The adapter's configuration.
        targets: Pristine names of the modules that it wraps; None for those that it has wrapped.

    Raises:
        Refusal: If there is none, or if another adapter of the model trains biases already.
    """
    if config.bias == "none":
        return {}
    for name, other in adapter_configs(model).items():
        if name != config.adapter_name and other.bias != "none":
            raise Refusal(
                f"The adapters {name!r} and {config.adapter_name!r} both train the model's own biases, and neither could be "
                "stored or switched off alone; leave bias at 'none' for one of them."
            )
    if targets is None:
        layers = injected_layers(model, config.adapter_name).items()
        targets = {base_name(path, model) for path, layer in layers if isinstance(layer, LoRALayer)}
    saved = set(saved_modules(model, config))
    found: dict[str, nn.Parameter] = {}
    for name, (_, module) in pristine_modules(model).items():
        bias = innermost(module)._parameters.get("bias")
        if bias is not None and (config.bias == "all" or name in targets) and not is_inside(name, saved):
            found[f"{name}.bias" if name else "bias"] = bias
    if not found:
        raise Refusal(f"bias={config.bias!r} trains nothing: there is no such bias in this model; leave it at 'none'.")
    return found


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """Return the configuration of each LoRA adapter that a model carries, by adapter name."""
    return {x.adapter_name: x.config for x in injected_layers(model).values() if isinstance(x, LoRALayer)}


def _check_tokens(model: nn.Module, config: LoRAConfig, targets: list[str], saved: Collection[str]) -> None:
    """Refuse trainable tokens whose table cannot be wrapped, or gets factors or full training as well."""
    for name in rows_by_table(model, config.trainable_tokens) if config.trainable_tokens else ():
        if name in targets or is_inside(name, set(saved)):
            raise Refusal(
                f"{name!r} cannot have both trainable_tokens and {'factors' if name in targets else 'full training'}: the "
                "rows would learn twice; drop one of the two."
            )


def _is_match(key: str, name: str) -> bool:
    """Say whether a rank or alpha pattern means a name: a regular expression for its end, from a dot on."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _first_match(pattern: Mapping[str, _Number], name: str, default: _Number) -> _Number:
    return next((value for key, value in pattern.items() if _is_match(key, name)), default)


__all__ = ["InjectedLayer", "LoRAConfig", "LoRALayer", "inject_lora", "merged_copy"]
