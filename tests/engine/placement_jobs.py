"""Fits that the tests of placement run on one process, and on both of a pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_ft import (
    IA3,
    BottleneckAdapter,
    Freeze,
    FSDP2Strategy,
    GradualUnfreezing,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Refusal,
)
from tests.contract.subjects import chat_job, trainer
from tests.modules.tasks import job as task_job

METHODS: dict[str, Callable[[], list[Any]]] = {
    "full": list,
    "lora": lambda: [LoRA(4)],
    "dora": lambda: [LoRA(4, dora=True)],
    "adapter": lambda: [BottleneckAdapter("parallel", reduction_factor=4.0)],
    "prefix": lambda: [PrefixTuning(3)],
    "prompt": lambda: [PromptTuning(3)],
    "ia3": lambda: [IA3()],
    "freeze": lambda: [Freeze(["norms"])],
    "gradual": lambda: [GradualUnfreezing(1, unit="step")],
}
#: Those that start from an adapter.
STARTS: dict[str, Callable[..., Any]] = {
    "lora": LoRA,
    "adapter": BottleneckAdapter,
    "prefix": PrefixTuning,
    "prompt": PromptTuning,
    "ia3": IA3,
}
#: Well conditioned, so that rounding stays rounding: Adam's own eps divides gradients near zero by themselves.
ADAM = functools.partial(torch.optim.AdamW, eps=1e-2)


def strategy_of(name: str, **options: Any) -> Any:
    return FSDP2Strategy(process_group_backend="gloo", **options) if name == "fsdp2" else name


def train(
    base: str,
    kind: str,
    folder: str,
    method: str,
    *,
    placement: str = "single",
    devices: int | None = None,
    rows: int = 8,
    options: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    save: str | None = None,
    resume: str | None = None,
    steps: int = 3,
) -> dict[str, Tensor]:
    """Trained weights after ``steps`` of ``rows`` rows, dealt to the ranks of a placement."""
    devices = devices or (1 if placement == "single" else 2)
    settings = {"batch_size": rows // devices, **(data or {})}
    if kind == "chat":
        module, source = chat_job(Path(base), Path(folder), model=model or {}, data=settings)
    else:
        task = {"bert": "sequence_classification", "t5": "seq2seq_lm"}[kind]
        given = {"optimizer": torch.optim.SGD, "lr": 0.1, **(model or {})}
        module, source = task_job(Path(base), Path(folder), task, model=given, **settings)
    more: dict[str, Any] = {"limit_val_batches": 0, "max_steps": steps, "use_distributed_sampler": False}
    if placement != "single":
        more |= {"devices": devices, "strategy": strategy_of(placement, **(options or {}))}
    callbacks = METHODS[method]()
    if save is not None:
        callbacks.append(ModelCheckpoint(save, filename="{step}", every_n_train_steps=2, save_top_k=-1))
        more["enable_checkpointing"] = True
    trainer(Path(folder), *callbacks, **more).fit(module, source, ckpt_path=resume)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def many(methods: list[str], **job: Any) -> dict[str, dict[str, Tensor]]:
    """One fit after another."""
    return {method: train(method=method, **job) for method in methods}


def save_each(methods: list[str], save: str, **job: Any) -> None:
    """A fit of each method with its checkpoints in a folder of its own."""
    for method in methods:
        train(method=method, save=f"{save}/{method}", **job)


def started(base: str, folder: str, method: str, init_from: str) -> dict[str, Tensor]:
    """What trains in a run that starts from an adapter, before its first step."""
    module, source = chat_job(Path(base), Path(folder))
    technique = STARTS[method](init_from=init_from)
    trainer(Path(folder), technique, max_steps=0, limit_val_batches=0).fit(module, source)
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def refused(**job: Any) -> str:
    """The sentence with which a fit is refused."""
    try:
        train(**job)
    except Refusal as refusal:
        return str(refusal)
    return "nothing was refused"


def compiled(backend: str, **job: Any) -> tuple[dict[str, Tensor], int]:
    """Weights of a fit with compiled blocks, and how many graphs the backend was given."""
    import torch._dynamo as dynamo

    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    dynamo.reset()
    if backend not in dynamo.list_backends(exclude_tags=()):
        dynamo.register_backend(counting, name=backend)
    model = {**job.pop("model", {}), "compile_blocks": backend}
    return train(**job, model=model), len(graphs)


def units(base: str, folder: str, patterns: list[str] | None, reshard: bool) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the units that FSDP2 made, and the weights after a fit with them."""
    from torch.distributed.fsdp import FSDPModule

    found: list[str] = []

    class Seen(FSDP2Strategy):
        def shard(self, module: Any) -> None:
            super().shard(module)
            found.extend(name for name, part in module.named_modules() if isinstance(part, FSDPModule))

    strategy = Seen(process_group_backend="gloo", units=patterns, reshard_after_forward=reshard)
    module, data = chat_job(Path(base), Path(folder), data={"batch_size": 4}, model={"gradient_checkpointing": True})
    options = {"devices": 2, "strategy": strategy, "limit_val_batches": 0, "use_distributed_sampler": False}
    trainer(Path(folder), LoRA(4), **options).fit(module, data)
    return found, {n: p.full_tensor() for n, p in module.named_parameters() if p.requires_grad}


def mapped(base: str, folder: str) -> dict[str, Any]:
    """What lies where before a bfloat16 base is cut, its dtypes after, and the trained weights."""
    from lightning_ft.models.sharding import held_whole

    found: dict[str, Any] = {}

    class Seen(FSDP2Strategy):
        def shard(self, module: Any) -> None:
            found["held"] = held_whole(module)
            found["factors"] = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
            found["before"] = {p.dtype for p in module.parameters()}
            super().shard(module)
            found["after"] = {(p.requires_grad, p.dtype) for p in module.parameters()}

    model = {"base_dtype": "bfloat16"}
    module, data = chat_job(Path(base), Path(folder), data={"batch_size": 4}, model=model)
    options = {"devices": 2, "strategy": Seen(process_group_backend="gloo"), "limit_val_batches": 0}
    trainer(Path(folder), LoRA(4), use_distributed_sampler=False, **options).fit(module, data)
    return {**found, "weights": {n: p.full_tensor() for n, p in module.named_parameters() if p.requires_grad}}
