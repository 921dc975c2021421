"""The layers of bottleneck adapters: a small two-layer network whose output is added to what the model computes.

``f(x) = scale up(act(down(x)))`` with ``down`` (k, D) and ``up`` (D, k), after Houlsby et al. 2019
(https://arxiv.org/abs/1902.00751), Pfeiffer et al. 2021 (https://arxiv.org/abs/2005.00247) and He et al. 2022
(https://arxiv.org/abs/2110.04366), which differ in what ``x`` is. Parameters are fp32 whatever the dtype of the base; they
are cast to the input's dtype where they meet it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn

from lightning_ft.nn.registry import InjectedLayer
from lightning_ft.nn.seeding import seeded_generator
from lightning_ft.nn.sublayers import Sublayer

if TYPE_CHECKING:
    from lightning_ft.nn.bottleneck import BottleneckConfig

NonLinearity = Literal["relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu"]
Scale = float | Literal["learned", "channel"]
Init = Literal["zero", "houlsby", "bert"]
Reads = Literal["output", "own_input", "stream", "sum"]
"""What ``f`` reads: the wrapped module's output or input, the residual stream before the sublayer, or its sum with the output."""


_UNMERGEABLE = "a function that is not linear stands between its matrices"


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "swish": F.silu,
    "tanh": torch.tanh,
    "leakyrelu": F.leaky_relu,
}


class Passage:
    """What a tap hands to the adapter of the same sublayer, within one forward."""

    def __init__(self) -> None:
        self._stream: Tensor | None = None

    def put(self, stream: Tensor) -> None:
        """Keep the residual stream until it is taken."""
        self._stream = stream

    def take(self) -> Tensor:
        """Return the residual stream, and keep it no longer."""
        stream, self._stream = self._stream, None
        if stream is None:
            raise RuntimeError(
                "A bottleneck adapter ran before its sublayer's entry; the block has another order of parts."
            )
        return stream

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        """A copied model starts with nothing in passage: what a broken-off forward left cannot be copied."""
        return Passage()


class StreamTap(InjectedLayer):
    """Notes the first argument of a sublayer's first module, the residual stream, and changes nothing."""

    kind = "bottleneck"
    unmergeable = _UNMERGEABLE

    def __init__(self, base: nn.Module, passage: Passage, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name)
        self.passage = passage
        self.starts_as_identity = True
        self.training = base.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the base does."""
        if self.enabled:
            self.passage.put(_first(args, kwargs))
        return self.base(*args, **kwargs)


class BottleneckLayer(InjectedLayer):
    """Adds ``f(x)`` to a module's output, or to the first of its outputs.

    Args:
        base: The module to wrap.
        config: How ``f`` is built.
        inputs: Width of ``x``.
        outputs: Width of the wrapped module's output.
        bottleneck: k, the width between the two matrices.
        reads: What ``x`` is.
        passage: Where the residual stream comes from, if ``f`` reads it.
        feature_dim: Dimension of the features: -1, or 1 behind convolutions.
        sublayer: The sublayer whose output is wrapped; None for a module that the user named.
        device: Where the parameters are made; the wrapped module, a dropout perhaps, may have none to tell.
        seed: Seed of the initial values.
        name: Pristine name of the wrapped module.
    """

    kind = "bottleneck"
    unmergeable = _UNMERGEABLE
    norm_before_weight: nn.Parameter | None
    norm_before_bias: nn.Parameter | None
    norm_after_weight: nn.Parameter | None
    norm_after_bias: nn.Parameter | None
    adapter_scale: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        config: BottleneckConfig,
        *,
        inputs: int,
        outputs: int,
        bottleneck: int,
        reads: Reads = "output",
        passage: Passage | None = None,
        feature_dim: int = -1,
        sublayer: Sublayer | None = None,
        device: torch.device | None = None,
        seed: int = 0,
        name: str = "",
    ) -> None:
        super().__init__(base, config.adapter_name)
        # Not `config`: model code may ask the wrapped attention for its own.
        self.recipe, self.reads, self.passage, self.feature_dim = config, reads, passage, feature_dim
        self.sublayer, self.seed, self.name = sublayer, seed, name
        sizes = {"down_weight": (bottleneck, inputs), "down_bias": (bottleneck,)}
        sizes |= {"up_weight": (outputs, bottleneck), "up_bias": (outputs,)}
        optional = {"norm_before": inputs * config.norm_before, "norm_after": outputs * config.norm_after}
        for norm, size in optional.items():
            sizes |= {f"{norm}_weight": (size,), f"{norm}_bias": (size,)}
        sizes["adapter_scale"] = ({"learned": 1, "channel": outputs}.get(str(config.scale), 0),)
        for key, shape in sizes.items():
            empty = torch.empty(shape, dtype=torch.float32, device=device)
            setattr(self, key, nn.Parameter(empty) if empty.numel() else None)
        self.training = base.training
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values: ``zero`` makes ``f`` zero, ``houlsby`` and ``bert`` small."""
        if self.down_weight.is_meta:
            return
        for key, parameter in self.injected_parameters().items():
            parameter.fill_(1.0 if key == "adapter_scale" or key.endswith(("before_weight", "after_weight")) else 0.0)
        for key, matrix in (("down_weight", self.down_weight), ("up_weight", self.up_weight)):
            # On the CPU in fp32, whatever the default device and dtype are where the model is built.
            drawn = torch.zeros(matrix.shape, dtype=torch.float32, device="cpu")
            generator = seeded_generator(self.seed, f"{self.adapter_name}:{self.name}.{key}")
            if self.recipe.init == "houlsby":
                nn.init.trunc_normal_(drawn, std=1e-2, a=-2e-2, b=2e-2, generator=generator)
            elif self.recipe.init == "bert":
                drawn.normal_(std=0.02, generator=generator)
            elif key == "down_weight":
                bound = 1 / math.sqrt(drawn.shape[1])  # Kaiming's uniform with a = sqrt(5), as He et al. start
                drawn.uniform_(-bound, bound, generator=generator)
            matrix.copy_(drawn)
        self.starts_as_identity = self.recipe.init == "zero"

    def adapted(self, x: Tensor) -> Tensor:
        """Return ``f(x)``: (..., inputs) to (..., outputs), in the dtype of ``x``."""
        dtype = x.dtype
        if self.norm_before_weight is not None and self.norm_before_bias is not None:
            x = F.layer_norm(x, x.shape[-1:], self.norm_before_weight.to(dtype), self.norm_before_bias.to(dtype))
        hidden = F.linear(x, self.down_weight.to(x.dtype), self.down_bias.to(x.dtype))  # (..., k)
        hidden = NON_LINEARITIES[self.recipe.non_linearity](hidden)
        change = F.linear(hidden, self.up_weight.to(hidden.dtype), self.up_bias.to(hidden.dtype))  # (..., outputs)
        if self.adapter_scale is not None:
            change = change * self.adapter_scale.to(change.dtype)
        elif not isinstance(self.recipe.scale, str) and self.recipe.scale != 1:
            change = change * self.recipe.scale
        if self.training and self.recipe.dropout > 0:
            change = F.dropout(change, self.recipe.dropout)
        if self.norm_after_weight is not None and self.norm_after_bias is not None:
            weight, bias = self.norm_after_weight.to(change.dtype), self.norm_after_bias.to(change.dtype)
            change = F.layer_norm(change, change.shape[-1:], weight, bias)
        return change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's outputs, the first of them changed."""
        outputs = self.base(*args, **kwargs)
        if not self.enabled:
            return outputs
        state = outputs[0] if isinstance(outputs, tuple) else outputs
        x = self._read(args, kwargs, state)
        # Behind convolutions features are not the last dimension; movedim is a view.
        change = self.adapted(x.movedim(self.feature_dim, -1)).movedim(-1, self.feature_dim)
        state = state + change.to(state.dtype)
        return (state, *outputs[1:]) if isinstance(outputs, tuple) else state

    def extra_repr(self) -> str:
        """Show what distinguishes this layer."""
        sizes = f"{self.down_weight.shape[1]} -> {self.down_weight.shape[0]} -> {self.up_weight.shape[0]}"
        return f"adapter={self.adapter_name!r}, {self.recipe.style}, {sizes}, {self.recipe.non_linearity}"

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor) -> Tensor:
        if self.reads == "own_input":
            return _first(args, kwargs)
        if self.passage is None:
            return state
        stream = self.passage.take()
        return state + stream if self.reads == "sum" else stream


class NormedBottleneckLayer(BottleneckLayer):
    """Pfeiffer's adapter in a post-norm block, on the norm: ``norm(y + f(norm(y)))`` where ``y`` is stream plus sublayer."""

    def forward(self, y: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        if not self.enabled:
            return self.base(y)
        return self.base(y + self.adapted(self.base(y)).to(y.dtype))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a module, by position or by name."""
    first = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(first, Tensor)
    return first


__all__ = ["NON_LINEARITIES", "BottleneckLayer", "NormedBottleneckLayer", "Passage", "StreamTap"]
