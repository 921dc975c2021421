"""FSDP2 for any LightningModule: which blocks become units, and how its steps count as forward passes.

A unit is what FSDP2 gathers at once. Each repeated transformer block is one; the LightningModule itself is the root
unit and holds the rest (embeddings, last norm, head), so that code in a step may use the head's weight outside its own
forward, as a chunked loss does. That only works while the root is gathered: the steps are registered as forwards.

What may live in one unit, on torch 2.13: frozen tensors of any dtype (dtypes that differ are gathered as bytes), and
trained tensors of one dtype. Frozen bfloat16 weights with float32 factors injected beside them need nothing special.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.dtype import settle, wanted_dtype
from lightning_ft.nn.select import select

STEPS = ("training_step", "validation_step", "test_step", "predict_step", "score", "draw", "measure")


def block_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a net, in the order of ``named_modules``, none inside another.

    Hugging Face models name the classes of their blocks (``_no_split_modules``); of these only the members of a list
    count, since embeddings are named there too. In any other net it is the ``nn.ModuleList`` or ``nn.Sequential`` of at
    least two children of one class that holds the most parameters.

    Args:
        model: any net, also one with a Hugging Face model somewhere inside.

    Returns:
        (name, module) pairs; empty when the net repeats nothing.
    """
    names = {
        name
        for module in model.modules()
        for name in (getattr(module, "_no_split_modules", None) or ())
        if isinstance(name, str)
    }
    lists = {
        f"{name}.": [child for child in module.children() if any(True for _ in child.parameters())]
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    }
    members = {id(child) for children in lists.values() for child in children}
    chosen = {id(m) for m in model.modules() if id(m) in members and _class_name(m) in names}
    if not chosen:
        repeated = [children for children in lists.values() if len(children) > 1 and len(set(map(type, children))) == 1]
        largest = max(repeated, key=_size, default=[])
        chosen = {id(child) for child in largest}
    blocks: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if id(module) in chosen and not (blocks and name.startswith(f"{blocks[-1][0]}.")):
            blocks.append((name, module))
    return blocks


def modules_named(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules with parameters that patterns mean, in the order of ``named_modules``; one may lie inside another.

    Args:
        model: any net.
        patterns: see `lightning_ft.nn.select`: ends of names (``mlp``), globs (``model.layers.*``), ``re:`` expressions.
            A glob also crosses dots, so that one which ends in ``*`` means what is below a block too; of a chain of
            modules that a glob means only the outermost is taken.

    Raises:
        Refusal: for a pattern that means nothing, with the nearest names.
    """
    present = {
        name: module
        for name, module in model.named_modules()
        if name
        and next(module.parameters(), None) is not None
        and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    }
    chosen: set[str] = set()
    for pattern in patterns:
        found: list[str] = []
        for name in select(present, [pattern]):
            if not any(name.startswith(f"{outer}.") for outer in found):
                found.append(name)
        chosen.update(found)
    return [(name, module) for name, module in present.items() if name in chosen]


def shard_(
    module: pl.LightningModule,
    mesh: DeviceMesh,
    *,
    units: Callable[[nn.Module], list[tuple[str, nn.Module]]] = block_modules,
    **options: Any,
) -> None:
    """Shards a LightningModule in place with FSDP2; call it in ``configure_model``, after every edit of the model.

    A second call only registers the steps again, so that ``fit`` may follow ``fit``.

    Args:
        module: becomes the root unit. Its parameters must be the same on all ranks; each rank keeps its rows of each.
        mesh: ``module.device_mesh`` as Lightning's model-parallel strategies make it (the dimension ``data_parallel``
            is used), or a mesh of one dimension.
        units: which submodules become units of their own, in the order of ``named_modules``. A block that shares a
            parameter with the rest of the model stays in the root unit, where both owners are gathered together.
        options: for ``fully_shard``: ``reshard_after_forward``, ``mp_policy``, ``offload_policy``.

    Raises:
        Refusal: when the trained parameters of one unit differ in dtype: FSDP2 reduces them in one tensor.
    """
    if not isinstance(module, FSDPModule):
        if mesh.ndim > 1:
            mesh = mesh["data_parallel"]
        blocks = _self_contained(module, units(module))
        _check_dtypes(module, blocks)
        for _, block in reversed(blocks):  # what lies inside another unit becomes one first
            settle(block.parameters())
            fully_shard(block, mesh=mesh, **options)  # copies this rank's rows and drops the rest
        settle(module.parameters())
        fully_shard(module, mesh=mesh, **options)
    register_steps(module)


def shard_frozen_(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the repeated blocks of a model that is only asked, in place; the rest of it stays whole on each rank.

    Each block is gathered for its own forward pass and released after it, by itself: no module around the blocks need be called,
    and what lies outside them (embeddings, the head of a chunked loss) may be used at any time, however often. All ranks must
    make equally many passes. A net that repeats nothing stays whole.

    Args:
        model: frozen, with its values; the same on all ranks.
        mesh: as of `shard_`.
    """
    if mesh.ndim > 1:
        mesh = mesh["data_parallel"]
    for _, block in reversed(_self_contained(model, block_modules(model))):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def held_whole(module: nn.Module) -> int:
    """Bytes of parameters that lie in this process's own memory, not mapped from the file they were loaded from.

    Linux tells; elsewhere it is 0.
    """
    table = Path("/proc/self/maps")
    if not table.exists():
        return 0
    files: list[tuple[int, int]] = []  # ascending, as the system lists them
    for line in table.read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith("/"):
            begin, end = (int(number, 16) for number in words[0].split("-"))
            files.append((begin, end))
    begins = [begin for begin, _ in files]

    def is_mapped(p: nn.Parameter) -> bool:
        at = bisect_right(begins, p.data_ptr()) - 1
        return at >= 0 and p.data_ptr() < files[at][1]

    return sum(p.numel() * p.element_size() for p in module.parameters() if p.device.type == "cpu" and not is_mapped(p))


def register_steps(module: pl.LightningModule) -> None:
    """Makes FSDP2 gather the root unit around ``training_step`` and the others, outside whatever wraps them now.

    Steps that are registered already, and modules that are not sharded, are left alone. Call it again after a wrapper
    has been put on a step or taken off: a wrapper outside of FSDP2's sees sharded parameters.

    After a step without a backward pass FSDP2 would leave the root gathered, and whoever then thaws, snapshots or saves
    a parameter would meet a temporary copy of it. Such steps therefore release it at their end.

    Args:
        module: the LightningModule that was given to :func:`shard_`.
    """
    if not isinstance(module, FSDPModule):
        return
    for name in STEPS:
        step = getattr(module, name, None)
        if step is None or _is_forward_method(step):
            continue
        register_fsdp_forward_method(module, name)
        if name != "training_step":
            object.__setattr__(module, name, _releasing(module, getattr(module, name), step))


def _releasing(module: FSDPModule, forward: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    def releasing(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        module.reshard()
        return output

    releasing.__wrapped__ = step  # type: ignore[attr-defined]  # Lightning reads the signature one level down
    return releasing


def _is_forward_method(step: Callable[..., Any]) -> bool:
    # torch leaves no mark on what it registers, but all of them run the one function defined there; so do ours.
    code = getattr(getattr(step, "__func__", step), "__code__", None)
    place = (getattr(code, "co_name", ""), getattr(code, "co_filename", ""))
    return place == ("releasing", __file__) or (place[0] == "wrapped_method" and "_fully_shard" in place[1])


def _class_name(module: nn.Module) -> str:
    kind = type(module)
    return kind.__mro__[2].__name__ if issubclass(kind, FSDPModule) else kind.__name__


def _size(children: list[nn.Module]) -> int:
    return sum(p.numel() for child in children for p in child.parameters())


def _self_contained(module: nn.Module, blocks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    owners = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    kept = []
    for name, block in blocks:
        inside = Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))
        if all(owners[key] == count for key, count in inside.items()):
            kept.append((name, block))
    return kept


def _check_dtypes(module: nn.Module, blocks: list[tuple[str, nn.Module]]) -> None:
    unit_of = {id(p): name for name, block in blocks for p in block.parameters()}  # inner units come after outer ones
    found: dict[str, dict[torch.dtype, str]] = defaultdict(dict)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[unit_of.get(id(parameter), "")].setdefault(wanted_dtype(parameter), name)
    for unit, dtypes in found.items():
        if len(dtypes) > 1:
            examples = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items())
            where = f"block {unit}" if unit else "the part of the model outside its blocks"
            raise Refusal(
                f"FSDP2 cannot train {where}: its trained parameters have {len(dtypes)} dtypes ({examples}) and their "
                "gradients are reduced together; train them in one dtype, or freeze those of the other dtypes."
            )
