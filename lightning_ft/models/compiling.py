"""``torch.compile`` block by block: one short compilation serves all blocks, and no name changes.

Compiled is each block's forward, on the instance: hooks stay outside (FSDP2 gathers a unit's weights in one), activation
checkpointing runs the compiled forward twice, and state dicts know nothing of it. The packed attention stays out too:
it runs segment by segment, and a graph for every way to cut a row would be compiled anew for most batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn import attention as packed_attention


def check_backend(backend: str, device: torch.device) -> None:
    """Refuses what could not compile here, before a model is loaded.

    Args:
        backend: as ``torch.compile`` takes it.
        device: where the model will run.

    Raises:
        Refusal: there is no such backend, or inductor finds no C++ compiler for a CPU.
    """
    import torch._dynamo as dynamo

    known = dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise Refusal(
            f"compile_blocks {backend!r} is no backend of torch.compile; take one of {', '.join(sorted(known))}."
        )
    if backend == "inductor" and device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise Refusal(
                "compile_blocks 'inductor' needs a C++ compiler on a CPU, and none was found; install one (g++), or leave it out."
            ) from error


def compile_blocks(blocks: Sequence[tuple[str, nn.Module]], *, backend: str = "inductor") -> Callable[[], None]:
    """Compiles the forward of each block in place; nothing is compiled before it first runs.

    Args:
        blocks: (name, module), as `lightning_ft.models.sharding.block_modules` finds them; of two that nest the outer one counts.
        backend: as ``torch.compile`` takes it.

    Returns:
        What takes it off again.

    Raises:
        Refusal: there are no blocks.
    """
    if not blocks:
        raise Refusal("compile_blocks found no repeated blocks in this model; leave it out.")
    outer: dict[str, nn.Module] = {}
    for name, block in blocks:
        if not any(name.startswith(f"{other}.") for other in outer):
            outer[name] = block
    keep_attention_out()
    cleanups = [_compile(block, backend) for block in outer.values()]

    def undo() -> None:
        for cleanup in cleanups:
            cleanup()

    return undo


def _compile(block: nn.Module, backend: str) -> Callable[[], None]:
    plain = block.forward
    compiled = torch.compile(plain, backend=backend, dynamic=True)

    @functools.wraps(plain)  # transformers reads the signature of a forward
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Nothing below a checkpoint would be compiled if the checkpoint were; its inside is, see below.
        checkpoints = block.training and getattr(block, "gradient_checkpointing", False)
        return (plain if checkpoints else compiled)(*args, **kwargs)

    object.__setattr__(block, "forward", forward)
    checkpoint = block.__dict__.get("_gradient_checkpointing_func")  # transformers': called as (function, *inputs)
    inner: dict[Any, Any] = {}

    def checkpoint_compiled(function: Any, *args: Any) -> Any:
        assert checkpoint is not None
        if isinstance(function, functools.partial):
            if function.func not in inner:
                inner[function.func] = torch.compile(function.func, backend=backend, dynamic=True)
            function = functools.partial(inner[function.func], *function.args, **function.keywords)
        return checkpoint(function, *args)

    if checkpoint is not None:
        block.__dict__["_gradient_checkpointing_func"] = checkpoint_compiled

    def undo() -> None:
        block.__dict__.pop("forward", None)
        if checkpoint is not None:
            block.__dict__["_gradient_checkpointing_func"] = checkpoint

    return undo


def keep_attention_out() -> None:
    """Registers the packed attention as a function that compiled code calls and does not look into."""
    from transformers import AttentionInterface

    packed_attention.register()
    AttentionInterface.register(packed_attention.NAME, torch.compiler.disable(packed_attention.attention))
