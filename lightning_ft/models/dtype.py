"""Which weights are kept in which dtype.

Frozen weights need no more precision than they are multiplied in, and casting float32 ones in every step costs more
than the step's own products on a CPU. Weights that are trained need float32 (see ``nn/master_weights.py``). So: frozen
in the compute dtype, trained in float32, and full training stays in float32 altogether unless pure bfloat16 is asked
for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.master_weights import cast_in_forward, remove_cast

POLICIES = ("auto", "float32", "bfloat16", "pure_bfloat16")

_WANTED = "lightning_ft_dtype"
"""Where a parameter notes the dtype that it is to get before it is sharded."""


def compute_dtype(policy: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype that frozen weights are kept and multiplied in.

    Args:
        policy: "auto" (bfloat16 where the device multiplies it fast, else float32), "float32", "bfloat16" (frozen
            weights only), or "pure_bfloat16" (trained ones too, which loses small steps).
        device: where the model will run.

    Raises:
        Refusal: there is no such policy.
    """
    if policy not in POLICIES:
        raise Refusal(f"dtype '{policy}' is not known; choose one of {', '.join(POLICIES)}.")
    if policy == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(torch.device(device)) else torch.float32
    return torch.float32 if policy == "float32" else torch.bfloat16


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Without these instructions torch emulates bfloat16 products, several times slower than float32 ones.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def apply_dtype_policy(
    model: nn.Module,
    dtype: torch.dtype,
    frozen_only: bool = True,
    *,
    trainable: Collection[str] = (),
    defer: bool = False,
) -> None:
    """Give every parameter the dtype that fits its part; to be called once freezing and injection are done.

    Parameters keep their identity (ties, optimizers). Buffers keep their dtype: rotary frequencies, running statistics
    and counters would lose too much. Quantised weights are left alone, and so are modules that cast themselves
    (attribute ``casts_itself = True``, as injected layers have).

    Args:
        model: the model, on any device.
        dtype: the compute dtype, from :func:`compute_dtype`.
        frozen_only: cast frozen parameters only, trained ones to float32; False casts all of them (pure bfloat16).
        trainable: names of frozen parameters that will be trained later (gradual unfreezing); treated as trained.
        defer: only note the dtypes; :func:`settle` casts, unit by unit, so that weights which are mapped from their file
            are never copied all at once.
    """
    named = list(model.named_parameters(remove_duplicate=False))  # a tied weight goes by all of its names
    trained = {id(p) for name, p in named if p.requires_grad or name in trainable}
    everything = all(id(p) in trained for _, p in named)
    low = dtype != torch.float32 and not (frozen_only and everything)
    for module_name, module in model.named_modules():
        if getattr(module, "casts_itself", False):
            continue
        master = False
        for name, p in module.named_parameters(recurse=False):
            if not p.is_floating_point() or getattr(p, "quant_state", None) is not None:
                continue
            if id(p) in trained:
                _retype(p, torch.float32 if frozen_only else dtype, defer)
                master = True
            else:
                _retype(p, torch.float32 if _keeps_float32(model, f"{module_name}.{name}") else dtype, defer)
        if master and low and frozen_only:
            cast_in_forward(module, dtype)
        else:
            remove_cast(module)


def cast_beside(model: nn.Module, dtype: torch.dtype) -> None:
    """Have layers read their own float32 parameters in the dtype that the rest of a model was cast to; where there is a rest.

    Args:
        model: its frozen weights in ``dtype``, what trains in float32.
        dtype: half of some kind.
    """
    if all(p.dtype != dtype for p in model.parameters()):
        return
    for module in model.modules():
        own = module.parameters(recurse=False)
        if not getattr(module, "casts_itself", False) and any(p.dtype == torch.float32 for p in own):
            cast_in_forward(module, dtype)


def wanted_dtype(p: nn.Parameter) -> torch.dtype:
    """The dtype that a parameter has, or will have once it is settled."""
    dtype: torch.dtype = getattr(p, _WANTED, p.dtype)
    return dtype


def settle(parameters: Iterable[nn.Parameter]) -> None:
    """Cast parameters to the dtypes that a deferred policy has noted for them."""
    for p in parameters:
        _retype(p, wanted_dtype(p))
        p.__dict__.pop(_WANTED, None)


def _retype(p: nn.Parameter, dtype: torch.dtype, defer: bool = False) -> None:
    if defer:
        setattr(p, _WANTED, dtype)
    elif p.dtype != dtype:
        p.data = p.data.to(dtype)


def _keeps_float32(model: nn.Module, name: str) -> bool:
    """Whether the architecture says that this weight is float32 whatever the rest is (routing biases and the like)."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(part in name.split(".") for part in kept)
