"""Forward passes that are to be differentiated twice, as the inner loop of second-order meta-learning does.

Of the kernels behind ``scaled_dot_product_attention`` only the one made of plain operations has a second derivative: the fused
ones raise, on a CPU too, where the fused one is the default. ``tests/nn/test_double_backward.py`` records which have one on the
installed torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.packed import PackedLayer, is_packed, packed_layers


def twice_differentiable() -> AbstractContextManager[Any]:
    """Inside, attention runs as plain operations; ``enable_math`` of older interfaces would leave the fused ones allowed."""
    return sdpa_kernel([SDPBackend.MATH])


def check_net(net: nn.Module, *, order: int, owner: str) -> None:
    """Refuses nets that cannot be run with other weights than their own, or not be differentiated ``order`` times.

    Args:
        net: with everything injected that will be.
        order: of the inner loop, 1 or 2.
        owner: the module that asks, for the sentence.

    Raises:
        Refusal: a compiled net, activation checkpointing, batch norms with running statistics, dropout that is on, or packed
            layers without a second derivative.
    """
    for name, part in net.named_modules():
        said = name or type(part).__name__
        if isinstance(part, torch._dynamo.eval_frame.OptimizedModule) or part._compiled_call_impl is not None:
            raise compiled(owner, said)
        if getattr(part, "gradient_checkpointing", False) is True:
            raise Refusal(
                f"{owner} cannot work with activation checkpointing ({said}), because what is recomputed in backward would "
                "see the start's weights, not the adapted ones; leave it off."
            )
        if isinstance(part, _BatchNorm) and part.track_running_stats:
            raise Refusal(
                f"{owner} cannot work with running statistics ({said} is {type(part).__name__}), because support and query of all "
                "tasks would share them; use GroupNorm or LayerNorm, or track_running_stats=False, which takes those of the "
                "batch."
            )
    packed = packed_layers(net)
    if order == 2 and (packed or any(is_packed(p) for p in net.parameters())):
        unproven = next((name for name, layer in packed.items() if not has_second_derivative(layer)), None)
        if unproven is not None or not packed:
            raise Refusal(
                f"{owner} cannot work to order 2 over the packed base ({unproven or 'packed by another library'}), because its "
                "second derivative is not right; set order to 1, or leave quantize out."
            )


def compiled(owner: str, what: str) -> Refusal:
    """The refusal of what `torch.compile` has made."""
    return Refusal(
        f"{owner} cannot work with torch.compile ({what}), because compiled code has no second derivative and keeps the weights "
        "that it was compiled with; give it as it is."
    )


def no_checkpointing(owner: str) -> AbstractContextManager[None]:
    """Inside, a forward that would recompute activations later raises; `explained` turns that into a refusal."""
    return torch.autograd.graph.disable_saved_tensors_hooks(f"{owner}: {_HOOKS}")


def explained(error: RuntimeError, owner: str) -> BaseException:
    """The refusal that an error of torch means, or the error itself."""
    text = str(error)
    if _HOOKS in text:
        return Refusal(_CHECKPOINTED.format(owner=owner))
    # Of a function in the net's forward; which of the two it says depends on what it saves for its backward pass.
    if "does not currently support double backward" in text or "donated buffers" in text:
        return compiled(owner, "a function in the net's forward")
    # "derivative for aten::x_backward is not implemented", or "the derivative for 'x_backward' is not implemented."
    if "derivative for " in text and "is not implemented" in text:
        return Refusal(
            f"{owner} cannot work to order 2 with this net ({text.splitlines()[0][:120]}), because an operation of it has no "
            "second derivative; set order to 1."
        )
    return error


def check_graph(loss: torch.Tensor, owner: str) -> None:
    """Refuses a loss whose graph holds a reentrant checkpoint, inside which weights get no gradient from `torch.autograd.grad`.

    Raises:
        Refusal: it does.
    """
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise Refusal(_CHECKPOINTED.format(owner=owner))
        waiting += [following for following, _ in node.next_functions]


_HOOKS = "the inner loop takes no saved-tensor hooks"
_CHECKPOINTED = (
    "{owner} cannot work with activation checkpointing, because what is recomputed in backward would see the start's weights, not "
    "the adapted ones; take torch.utils.checkpoint out of the net's forward."
)


def has_second_derivative(layer: PackedLayer, rows: int = 3) -> bool:
    """Whether a packed layer's second derivative is that of the matrix it stands for, tried on a few random rows.

    Compared is the Hessian-vector product of ``sum tanh(layer(x))``, to 2 % of its norm.
    """
    weight = layer.dense().detach().float()
    weight = weight.t() if layer.stored_as_inputs_first else weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator, device="cpu").to(weight.device)
    v = torch.randn(rows, weight.shape[1], generator=generator, device="cpu").to(weight.device)
    bias = layer.bias.detach().float() if isinstance(layer.bias, torch.Tensor) else None

    def product(of: Any) -> torch.Tensor:
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(of(at).float()).sum(), at, create_graph=True)
        (second,) = torch.autograd.grad((slope * v).sum(), at)
        return second

    with torch.inference_mode(False), torch.enable_grad():
        try:
            ours = product(layer)
        except RuntimeError:
            return False
        truth = product(lambda at: nn.functional.linear(at, weight, bias))
    return bool((ours - truth).norm() <= 0.02 * truth.norm())


__all__ = [
    "check_graph",
    "check_net",
    "compiled",
    "explained",
    "has_second_derivative",
    "no_checkpointing",
    "twice_differentiable",
]
