"""The layers of LoRA (Hu et al. 2022, https://arxiv.org/abs/2106.09685, eq. 3) and DoRA (Liu et al. 2024, eq. 5).

LoRA adds a low-rank product to a frozen weight ``W0``: ``h = W0 x + s B A x``, with ``A`` (r, in), ``B`` (out, r) and
``s = alpha / r`` (``alpha / sqrt(r)`` with rank-stabilised scaling). DoRA also trains the length ``m`` of each row:
``h = m * (W0 + s B A) x / ||W0 + s B A||``, the norm per output and constant in the backward pass.

The factors are fp32 whatever the dtype of the base; they are cast to the input's dtype where they meet it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora_init import FROM_WEIGHT, Init, check_start, difference, factors_of_weight
from lightning_ft.nn.packed import PackedLayer, is_packed
from lightning_ft.nn.registry import InjectedLayer, innermost
from lightning_ft.nn.seeding import seeded_generator
from lightning_ft.nn.select import is_called_by_weight, is_conv1d

if TYPE_CHECKING:
    from lightning_ft.nn.lora import LoRAConfig


class LoRALayer(InjectedLayer, ABC):
    """What the four kinds of LoRA layer share: parameters, initial values, the merged weight.

    Args:
        base: The module to wrap.
        r: Rank of the update.
        alpha: Numerator of the scale.
        dropout: Probability of zeroing an input of ``A`` while training; the path through the base is not dropped.
        rslora: Scale by ``alpha / sqrt(r)`` instead of ``alpha / r`` (Kalajdzievski 2023).
        dora: Also train the magnitude of each output's weight.
        init: Where the factors start, see `lightning_ft.nn.lora_init`.
        adapter_name: Adapter that the layer belongs to.
        seed: Seed of the initial values.
        name: Pristine name of the wrapped module, for the seed and for messages.

    Raises:
        Refusal: If this module cannot carry these options.
    """

    kind = "lora"
    changes_weight = True
    takes_strength = True
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter | None
    """Frozen copies of what the factors started with, where that was a part of the weight; it is subtracted."""
    lora_B0: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    config: LoRAConfig
    """The configuration of the adapter that this layer belongs to; `inject_lora` sets it."""
    out_dim: int = 0
    """Dimension of the base's weight that counts its outputs."""

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        init: Init = "default",
        adapter_name: str = "default",
        seed: int = 0,
        name: str = "",
    ) -> None:
        super().__init__(base, adapter_name)
        self.r, self.alpha, self.dropout, self.rslora, self.name, self.seed = r, alpha, dropout, rslora, name, seed
        self.init = init
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        if dora and isinstance(base, InjectedLayer):
            raise Refusal(
                f"DoRA cannot wrap {name!r}, which already carries the adapter {base.adapter_name!r}: it needs the "
                "norm of the bare weight; inject the DoRA adapter first, or choose other modules."
            )
        self._check()
        shape_a, shape_b = self._shapes()
        if init in FROM_WEIGHT:
            check_start(innermost(self), name, (*shape_b[:1], *shape_a[1:]), r, init)
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(shape_b, dtype=torch.float32, device=device))
        magnitude = torch.empty(shape_b[0], dtype=torch.float32, device=device) if dora else None
        self.lora_magnitude = None if magnitude is None else nn.Parameter(magnitude)
        starts = init in FROM_WEIGHT
        for factor, start in ((self.lora_A, "lora_A0"), (self.lora_B, "lora_B0")):
            self.register_parameter(start, nn.Parameter(torch.empty_like(factor), False) if starts else None)
        self.training = base.training
        self.reset_parameters()

    @property
    def _gain(self) -> float:
        """What multiplies ``B A`` in the forward; DoRA's change is multiplied by the strength as a whole."""
        return self.scale if self.dora else self.scale * self.strength

    @property
    def dora(self) -> bool:
        """Whether this layer trains a magnitude."""
        return self.lora_magnitude is not None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values: ``A`` uniform in ``+-1/sqrt(in)``, ``B`` zero, the magnitude as the base has it."""
        if self.lora_A.is_meta:
            return
        if self.lora_A0 is not None and self.lora_B0 is not None:
            weight = dense_weight(self.base, self.name)
            a, b = factors_of_weight(weight.t() if self.out_dim else weight, self.r, self.scale, self.init)
            for places, values in (((self.lora_A, self.lora_A0), a), ((self.lora_B, self.lora_B0), b)):
                for place in places:
                    place.copy_(values)
        else:
            self._draw()
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self._norm())
        self.starts_as_identity = True

    def _draw(self) -> None:
        """Set ``A`` to random values and ``B`` to zero."""
        # Kaiming's uniform with a = sqrt(5) is U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the initial A of LoRA's authors.
        bound = 1 / math.sqrt(self.lora_A[0].numel())
        # On the CPU in fp32, whatever the default device and dtype are where the model is built.
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32, device="cpu")
        generator = self._generator("lora_A")
        if self.init == "gaussian":
            self.lora_A.copy_(drawn.normal_(0.0, 1 / self.r, generator=generator))
        else:
            self.lora_A.copy_(drawn.uniform_(-bound, bound, generator=generator))
        self.lora_B.zero_()

    def of_outputs(self) -> tuple[str, ...]:
        """Return ``B``, its start and the magnitude, as far as there are any."""
        return tuple(n for n in ("lora_B", "lora_B0", "lora_magnitude") if getattr(self, n) is not None)

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return ``W0 + s B A``, for DoRA with each output's weight rescaled to its magnitude; of the change, `strength`."""
        merged = weight + self.delta().to(weight.dtype)
        if self.lora_magnitude is not None:
            factor = self.lora_magnitude.to(weight.dtype) / self._norm_of(merged)
            merged = merged * factor.view([-1 if d == self.out_dim else 1 for d in range(merged.dim())])
        return merged if self.strength == 1.0 else weight + self.strength * (merged - weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the update: ``A`` and ``B``, or those of ``B A - B0 A0``, of twice the rank."""
        return difference(self.lora_A, self.lora_B, self.lora_A0, self.lora_B0)

    def delta(self) -> Tensor:
        """Return ``s B A`` (less its start) in fp32, in the shape of the base's weight."""
        a, b = self.factors()
        return self.scale * (b @ a)

    def extra_repr(self) -> str:
        """Show what distinguishes this layer."""
        return (
            f"adapter={self.adapter_name!r}, r={self.r}, alpha={self.alpha:g}, scale={self.scale:g}, dora={self.dora}"
        )

    def _check(self) -> None:
        """Refuse a base that this layer cannot wrap correctly."""

    @abstractmethod
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of ``A`` and ``B``."""

    def _generator(self, parameter: str) -> torch.Generator:
        return seeded_generator(self.seed, f"{self.adapter_name}:{self.name}.{parameter}")

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x

    def _norm_of(self, weight: Tensor) -> Tensor:
        """Return the norm of each output's weight: (out,)."""
        return torch.linalg.vector_norm(weight, dim=[d for d in range(weight.dim()) if d != self.out_dim])

    def _norm(self) -> Tensor:
        """Return ``||W0 + s B A||`` per output, fp32 and detached: (out,)."""
        with torch.no_grad():
            return self._norm_of(dense_weight(self.base, self.name).float() + self.delta())

    def _dora_output(self, out: Tensor, undropped: Tensor | None, low_rank: Tensor, feature_dim: int) -> Tensor:
        """Rescale the outputs: ``out + (m/n - 1) W0 x + (m/n) s B A x``, where ``x`` has passed the dropout.

        Args:
            out: What the base returns, with its bias, for the input before dropout.
            undropped: The base's output without bias for the dropped input; None if there was no dropout.
            low_rank: ``s B A x``.
            feature_dim: Dimension of the outputs.
        """
        assert self.lora_magnitude is not None
        shape = [1] * out.dim()
        shape[feature_dim] = -1
        ratio = (self.lora_magnitude / self._norm()).view(shape)
        if undropped is None:
            bias = cast("Tensor | None", getattr(self.base, "bias", None))
            undropped = out if bias is None else out - bias.view(shape).to(out.dtype)
        shrink, ratio = self.strength * (ratio - 1), self.strength * ratio
        return out + self.on_rows(shrink.to(out.dtype) * undropped) + ratio.to(out.dtype) * low_rank


class LoRALinear(LoRALayer):
    """LoRA on ``nn.Linear`` and its subclasses, packed 4-bit ones included: x (..., in) to (..., out)."""

    takes_rows = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus the low-rank update, in the base's output dtype."""
        out = self.base(x)  # (..., out)
        if not self.enabled:
            return out
        dropped = self._dropped(x)
        a, b = self.factors()
        hidden = self.on_rows(F.linear(dropped, a.to(x.dtype)).to(out.dtype))  # (..., r)
        factor = (b * self._gain).to(out.dtype)  # scaling the small factor is cheaper than scaling the output
        if self.dora:
            undropped = None if dropped is x else self._bare(dropped).to(out.dtype)
            return self._dora_output(out, undropped, F.linear(hidden, factor), feature_dim=-1)
        # One fused multiply-add needs no other tensor of the outputs' size: 4 to 9 percent less time in fp32 than
        # to add two matrix products, 0 to 4 in bf16 (1000 x 576 by 576 and by 1536, forward and backward, one core).
        # An own autograd function was no faster.
        flat = torch.addmm(out.reshape(-1, out.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), factor.t())
        # As F.linear does inside: the result is no view to autograd, since FSDP2 warns of a unit that returns a view.
        return torch.ops.aten._unsafe_view(flat, out.shape)

    def _bare(self, x: Tensor) -> Tensor:
        """Return what the base computes without its bias."""
        return F.linear(x, dense_weight(self.base, self.name).to(x.dtype))

    def _check(self) -> None:
        if is_called_by_weight(innermost(self)):
            raise Refusal(
                f"LoRA cannot wrap {self.name!r}: nn.MultiheadAttention reads its weight without calling it, so the "
                "adapter would have no effect; exclude it."
            )

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.r, cast(int, self.in_features)), (cast(int, self.out_features), self.r)


class LoRAConv1D(LoRALinear):
    """LoRA on transformers' ``Conv1D`` (GPT-2), packed or not, a linear layer whose weight is stored as (in, out)."""

    out_dim = 1

    def delta(self) -> Tensor:
        """Return ``s B A`` transposed, as this layer stores its weight: (in, out)."""
        return super().delta().t()

    def _bare(self, x: Tensor) -> Tensor:
        return x @ dense_weight(self.base, self.name).to(x.dtype)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(innermost(self), PackedLayer):
            return super()._shapes()
        inputs, outputs = self.weight.shape
        return (self.r, inputs), (outputs, self.r)


class LoRAEmbedding(LoRALayer):
    """LoRA on ``nn.Embedding``: ids (...) to (..., D), with ``A`` (r, V) zero and ``B`` (D, r) normal at the start.

    The roles of the initial values are swapped, as in the authors' code: looking ids up in ``A`` costs nothing, and the
    factor that must be zero is the one with a gradient for the ids seen only. There is no dropout on ids.
    """

    out_dim = 1
    takes_rows = True

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ``ids`` plus the low-rank update, in the base's output dtype."""
        out = self.base(ids)  # (..., D)
        if not self.enabled:
            return out
        hidden = F.embedding(ids, self.lora_A.t(), padding_idx=cast("int | None", self.padding_idx))  # (..., r)
        hidden = self.on_rows(hidden.to(out.dtype))
        low_rank = F.linear(hidden, (self.lora_B * self._gain).to(out.dtype))  # (..., D)
        scale = output_scale(innermost(self), out)
        low_rank = low_rank if scale is None else low_rank * scale
        return self._dora_output(out, None, low_rank, feature_dim=-1) if self.dora else out + low_rank

    def _draw(self) -> None:
        """Set ``A`` to zero and ``B`` to standard normal values."""
        self.lora_A.zero_()
        drawn = torch.empty(self.lora_B.shape, dtype=torch.float32, device="cpu")
        self.lora_B.copy_(drawn.normal_(generator=self._generator("lora_B")))

    def delta(self) -> Tensor:
        """Return ``s B A`` transposed: (V, D)."""
        return super().delta().t()

    def _check(self) -> None:
        if self.max_norm is not None:
            raise Refusal(
                f"LoRA cannot wrap the embedding {self.name!r}: its max_norm rewrites the frozen table in place."
            )

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.r, cast(int, self.num_embeddings)), (cast(int, self.embedding_dim), self.r)


class LoRAConv2d(LoRALayer):
    """LoRA on ``nn.Conv2d``: a convolution to r channels with the base's kernel, then a 1 x 1 one to its outputs.

    ``A`` is (r, in, kh, kw) and sees all input channels; ``B`` is (out, r / groups, 1, 1).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, height, width) to (B, out, height', width')."""
        out = self.base(x)
        if not self.enabled:
            return out
        conv = cast(nn.Conv2d, innermost(self))
        dropped = self._dropped(x)
        hidden = F.conv2d(dropped, self.lora_A.to(x.dtype), None, conv.stride, conv.padding, conv.dilation)
        low_rank = F.conv2d(hidden, (self.lora_B * self._gain).to(hidden.dtype), groups=conv.groups).to(out.dtype)
        if not self.dora:
            return out + low_rank
        undropped = None
        if dropped is not x:
            weight = conv.weight.to(x.dtype)
            undropped = F.conv2d(dropped, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups).to(
                out.dtype
            )
        return self._dora_output(out, undropped, low_rank, feature_dim=-3)

    def delta(self) -> Tensor:
        """Return the update of the kernel: (out, in, kh, kw)."""
        if cast(int, self.groups) > 1:
            raise Refusal(
                f"The adapter on {self.name!r} cannot be merged: the convolution has {self.groups} groups, and each "
                "output of the adapter sees all input channels; export it as an adapter instead."
            )
        return self.scale * torch.einsum("or,rikl->oikl", self.lora_B[:, :, 0, 0], self.lora_A)

    def _check(self) -> None:
        conv = cast(nn.Conv2d, innermost(self))
        if conv.padding_mode != "zeros":
            raise Refusal(
                f"LoRA cannot wrap the convolution {self.name!r} with padding_mode {conv.padding_mode!r}; exclude it."
            )
        if self.r % conv.groups:
            raise Refusal(
                f"r = {self.r} on {self.name!r} must be a multiple of the convolution's {conv.groups} groups."
            )

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv = cast(nn.Conv2d, innermost(self))
        return (self.r, conv.in_channels, *conv.kernel_size), (conv.out_channels, self.r // conv.groups, 1, 1)


def layer_class(module: nn.Module) -> type[LoRALayer] | None:
    """Return the LoRA layer that wraps a module of the pristine model, None if there is none."""
    if is_conv1d(module) or (isinstance(module, PackedLayer) and module.stored_as_inputs_first):
        return LoRAConv1D
    if isinstance(module, nn.Linear):
        return LoRALinear
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding
    return LoRAConv2d if isinstance(module, nn.Conv2d) else None


def output_scale(embedding: nn.Module, like: Tensor) -> Tensor | None:
    """Return what an embedding multiplies its rows by in the forward (Gemma's does), None for an ordinary one."""
    scale = getattr(embedding, "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale, dtype=like.dtype, device=like.device)


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """Return the weight matrix of a module, unpacked if it is stored in 4 or 8 bits.

    Raises:
        Refusal: If the weight is packed in another way.
    """
    core = innermost(module)
    if isinstance(core, PackedLayer):
        return core.dense()
    weight = cast(Tensor, module.weight)
    if not is_packed(weight):
        return weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise Refusal(
            f"{name!r} stores its weight as {weight.dtype}; DoRA, PiSSA and OLoRA need a floating-point or 4-bit weight."
        )
    import bitsandbytes.functional as bnb  # only here: an optional dependency, present where such weights are

    return cast(Tensor, bnb.dequantize_4bit(weight.data, state))
