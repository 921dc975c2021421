"""Packing the linear layers of a model into 4 or 8 bits, and back: bases that are frozen and take a quarter of the memory.

Dettmers et al. 2023 (QLoRA, https://arxiv.org/abs/2305.14314): weights in blocks of 64, each the index of one of 16
numbers times the block's largest absolute value. Packed weights cannot be trained; what is trained stands beside them.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.packed import PackedLayer, Sample, has_packed_weights, packed_layers
from lightning_ft.nn.registry import InjectedLayer, pristine_modules, replace_module, shared_parameters
from lightning_ft.nn.select import is_conv1d, linear_names
from lightning_ft.nn.targets import expert_tensors, is_inside, leave_fused_path

Mode = Literal["nf4", "nf4-dq", "fp4", "int8"]

#: What is printed and documented of each mode.
MODES: dict[str, str] = {
    "nf4": "4-bit NormalFloat, a float32 scale for every 64 weights",
    "nf4-dq": "4-bit NormalFloat, the scales in 8 bits as well (double quantisation)",
    "fp4": "4-bit floating point, a float32 scale for every 64 weights",
    "int8": "8-bit integers, a scale for every row",
}


def check_mode(mode: str) -> None:
    """Refuse a mode that nobody knows, or any while bitsandbytes is absent.

    Raises:
        Refusal: see above.
    """
    if mode not in get_args(Mode):
        raise Refusal(f"quantize '{mode}' is not known; choose one of {', '.join(get_args(Mode))}.")
    if find_spec("bitsandbytes") is None:
        raise Refusal(
            f"quantize '{mode}' needs bitsandbytes, which is not installed: pip install 'lightning-ft[quant]'."
        )


@torch.no_grad()
def quantize_(
    model: nn.Module,
    mode: Mode,
    *,
    skip: Collection[str] = (),
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> list[str]:
    """Pack the weights of a model's linear layers, in place; biases, norms, embeddings and heads stay as they are.

    Packed are ``nn.Linear`` and GPT-2's ``Conv1D``. Left alone are the output head of a Hugging Face model, a new head
    of a task, layers whose weight another module shares or PyTorch reads without calling them, injected layers' own
    parameters, and layers that their architecture wants in float32 (T5's ``wo``). In any other net name the head in
    ``skip``.

    Args:
        model: The model, with its weights; Hugging Face or not.
        mode: ``nf4``, ``nf4-dq``, ``fp4`` or ``int8``, see `MODES`.
        skip: Pristine names of modules to leave out with all that they contain, for instance those that are to be trained.
        compute_dtype: What packed layers multiply in, their output keeping the input's dtype; None: in the input's dtype.
        device: Where weights are packed and stay; None: where each is. On CUDA and on CPUs.

    Returns:
        Pristine names of the packed layers, in model order.

    Raises:
        Refusal: If nothing can be packed, weights are not loaded yet, or bitsandbytes cannot work here.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> quantize_(net, "nf4", skip=["2"])
        ['0']
    """
    check_mode(mode)
    names = _packable(model, set(skip))
    places = pristine_modules(model)
    for name in names:
        path, module = places[name]
        while isinstance(module, InjectedLayer):
            path, module = f"{path}.base", module.base
        replace_module(model, path, _packed(module, name, mode, compute_dtype, device))
    leave_fused_path(model)
    return names


def _packable(model: nn.Module, skip: set[str]) -> list[str]:
    """Pristine names of the layers to pack."""
    tied = shared_parameters(model)
    wide = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    wide |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    places = pristine_modules(model)
    found = []
    for name in linear_names(model):
        module = places[name][1]
        while isinstance(module, InjectedLayer):
            module = module.base
        if not name or is_inside(name, skip) or wide & set(name.split(".")):
            continue
        # A subclass may do anything with its weight; packed layers are such.
        if (type(module) is nn.Linear or is_conv1d(module)) and module.weight not in tied:
            found.append(name)
    if not found:
        raise Refusal(_why_nothing(model))
    return found


def _why_nothing(model: nn.Module) -> str:
    kind = type(model).__name__
    if has_packed_weights(model):
        return f"The weights of {kind} are packed already; leave quantize out."
    if experts := expert_tensors(model):
        return (
            f"{kind} keeps its weights in tensors of all experts ({next(iter(experts))}), which cannot be packed; leave "
            "quantize out."
        )
    return f"{kind} has no linear layer that could be packed, other than its head; leave quantize out."


def _packed(
    module: nn.Module, name: str, mode: str, compute_dtype: torch.dtype | None, device: torch.device | str | None
) -> PackedLayer:
    """The packed layer that takes the place of ``module``."""
    from lightning_ft.nn.packed_linear import pack_4bit, pack_8bit  # here: it imports bitsandbytes

    stored = module.weight
    assert isinstance(stored, nn.Parameter)
    if stored.is_meta:
        raise Refusal(f"{name!r} cannot be packed: its values are not loaded yet (meta device); load them first.")
    inputs_first = is_conv1d(module)
    weight: Tensor = stored.data.t() if inputs_first else stored.data
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        weight = weight.float()
    where = torch.device(device) if device is not None else weight.device
    layer: Any
    try:
        if mode == "int8":
            layer = pack_8bit(weight.to(where), where, compute_dtype)
        else:
            layer = pack_4bit(weight.to(where), mode[:3], mode.endswith("-dq"), where, compute_dtype)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refusal(
            f"bitsandbytes cannot pack {name!r} on {where.type} ({reason}); its 4- and 8-bit layers need CUDA, or a CPU with "
            "AVX2 and version 0.50."
        ) from error
    layer.mode, layer.source_dtype, layer.stored_as_inputs_first = mode, stored.dtype, inputs_first
    layer.source = Sample.of(stored)
    layer.register_parameter("bias", module._parameters.get("bias"))
    layer.training = module.training
    return layer


@torch.no_grad()
def try_packed(model: Any, base: str) -> None:
    """Run a Hugging Face model once, on two tokens: some read a weight instead of calling its layer, as Mamba does.

    Raises:
        Refusal: Where that fails on packed weights, which it does with a message that nobody understands.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device="cpu")
    extra = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    training, devices = model.training, {p.device for p in model.parameters()}
    if len(devices) > 1:
        return  # packed on the GPU already, the rest to follow
    try:
        model.eval()(input_ids=ids.to(next(iter(devices))), **{k: v.to(next(iter(devices))) for k, v in extra.items()})
    except RuntimeError as error:
        raise Refusal(
            f"{type(model).__name__} of '{base}' cannot run on packed weights: its code reads some of them without calling "
            f"their layers ({' '.join(str(error).split())[:120]}); leave quantize out."
        ) from error
    finally:
        model.train(training)


@torch.no_grad()
def dequantize_(model: nn.Module) -> list[str]:
    """Put ordinary layers in the place of packed ones, with the weights that those stand for, in the dtype of the original.

    The model computes the same up to rounding; merging, exporting and full training work on it again.

    Args:
        model: A model of which `quantize_` has packed layers; injected layers around them stay.

    Returns:
        Pristine names of the layers, in model order.
    """
    done = packed_layers(model)
    for path, layer in done.items():
        replace_module(model, path, _unpacked(layer))
    return list(done)


def _unpacked(layer: PackedLayer) -> nn.Module:
    weight = layer.dense().contiguous()
    plain: nn.Module
    if layer.stored_as_inputs_first:
        from transformers.pytorch_utils import Conv1D

        plain = Conv1D(weight.shape[1], weight.shape[0])
    else:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.register_parameter("bias", layer._parameters.get("bias"))
    plain.training = layer.training
    return plain


def describe(model: nn.Module) -> str | None:
    """What a summary says of packed layers, ``nf4: 16,384 numbers of 4 layers in 4.50 bits each``; None without any."""
    layers = packed_layers(model).values()
    if not layers:
        return None
    numbers = sum(layer.packed_numbers() for layer in layers)
    bits = 8 * sum(layer.packed_bytes() for layer in layers) / numbers
    modes = ", ".join(sorted({layer.mode for layer in layers}))
    said = f"{len(layers)} layers" if len(layers) > 1 else "one layer"
    return f"{modes}: {numbers:,} numbers of {said} in {bits:.2f} bits each"


__all__ = ["MODES", "Mode", "check_mode", "dequantize_", "describe", "quantize_", "try_packed"]
