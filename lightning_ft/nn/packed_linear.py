"""The packed linear layers, on bitsandbytes: 4 bits (Dettmers et al. 2023, QLoRA) and 8 (Dettmers et al. 2022, LLM.int8).

They are bitsandbytes' own layers with another forward and less state, because of what its forward does on the way:
on CPUs with AVX512-BF16 it repacks the weight at the first evaluation, and every later gradient is wrong; it casts the
layer's bias in place, a trained one too; and the scales of its 8-bit weights stay behind when the model moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ft.nn.packed import PackedLayer, without_hub_kernels

with without_hub_kernels():
    import bitsandbytes as bnb


class Packed4bit(PackedLayer, bnb.nn.Linear4bit):
    """x (..., in) to (..., out) by a weight in 4 bits, multiplied in ``compute_dtype`` or, without one, in x's dtype."""

    weight: bnb.nn.Params4bit
    compute_dtype: torch.dtype | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in the dtype of ``x``."""
        given = x.dtype
        out = bnb.matmul_4bit(x.to(self.compute_dtype or given), self.weight, quant_state=self.weight.quant_state)
        out = out.to(given)
        return out if self.bias is None else out + self.bias.to(given)

    def dense(self) -> Tensor:
        """Return the weight that the packed one stands for, in the shape and dtype that it had."""
        weight = bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state).to(self.source_dtype)
        return weight.t() if self.stored_as_inputs_first else weight

    def packed_bytes(self) -> int:
        """Return the bytes of the codes and of all scales."""
        state = self.weight.quant_state
        tensors = [self.weight.data, state.absmax]
        if state.nested:
            tensors += [state.state2.absmax, state.offset]
        return sum(t.numel() * t.element_size() for t in tensors)


class Packed8bit(PackedLayer, bnb.nn.Linear8bitLt):
    """x (..., in) to (..., out) by a weight in 8 bits with one scale a row, ``row_scale`` (out,), float32.

    On CUDA inputs are rounded to 8 bits as well, but for features beyond 6 (LLM.int8); on a CPU the weight is unpacked.
    """

    row_scale: Tensor
    compute_dtype: torch.dtype | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in the dtype of ``x``."""
        state, given = self.state, x.dtype
        # Read anew each time: the model may have moved. On CPUs training and evaluation are to compute the same.
        state.CB, state.SCB = self.weight.data, self.row_scale
        state.is_training = self.training or x.device.type == "cpu"
        out = bnb.matmul(x.to(self.compute_dtype or given), self.weight, state=state).to(given)
        return out if self.bias is None else out + self.bias.to(given)

    def dense(self) -> Tensor:
        """Return the weight that the packed one stands for, in the shape and dtype that it had."""
        weight = (self.weight.data.float() * (self.row_scale / 127.0)[:, None]).to(self.source_dtype)
        return weight.t() if self.stored_as_inputs_first else weight

    def packed_bytes(self) -> int:
        """Return the bytes of the codes and of the rows' scales."""
        return self.weight.numel() + 4 * self.row_scale.numel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.row_scale
        super()._apply(fn, recurse)
        self.row_scale = scale.to(self.weight.device)  # moved, but never rounded by a cast of the whole model
        return self


def pack_4bit(
    weight: Tensor, quant_type: str, nested: bool, device: torch.device, compute_dtype: torch.dtype | None
) -> Packed4bit:
    """Return a layer without bias that stores ``weight`` (out, in) in blocks of 64 codes with one scale each.

    Args:
        weight: The matrix, in float32, float16 or bfloat16.
        quant_type: ``nf4`` or ``fp4``.
        nested: Whether the scales are stored in 8 bits as well.
        device: Where it is packed and stays.
        compute_dtype: What the layer multiplies in; None is its input's dtype.
    """
    out_features, in_features = weight.shape
    layer = Packed4bit(
        in_features,
        out_features,
        bias=False,
        compute_dtype=compute_dtype,
        compress_statistics=nested,
        quant_type=quant_type,
        device="meta",
    )
    packed = bnb.nn.Params4bit(
        weight.contiguous(), requires_grad=False, compress_statistics=nested, quant_type=quant_type
    )
    layer.weight = cast(Any, packed).to(device)
    layer.support_avx512bf16_for_cpu = False
    return layer


def pack_8bit(weight: Tensor, device: torch.device, compute_dtype: torch.dtype | None) -> Packed8bit:
    """Return a layer without bias that stores ``weight`` (out, in) in 8 bits with one scale a row.

    Args:
        weight: The matrix, of any floating dtype that fits float16.
        device: Where it is packed and stays.
        compute_dtype: What the layer multiplies in; None is its input's dtype.
    """
    out_features, in_features = weight.shape
    layer = Packed8bit(in_features, out_features, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.contiguous().to(device, torch.float16))
    layer.compute_dtype = compute_dtype
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.register_buffer("row_scale", scale.float(), persistent=False)
    return layer


__all__ = ["Packed4bit", "Packed8bit", "pack_4bit", "pack_8bit"]
