"""Optimizer, parameter groups and schedule, built from what is trainable after all edits.

Weight decay acts on matrices alone: biases, norms and embeddings' rows have no scale to shrink (GPT-3's and LLaMA's
practice). Schedules are pure functions of the step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_ft.engine.checkpoints import kept_keys
from lightning_ft.engine.freezing import refuse_frozen
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import injected_layers

Schedule = Literal["cosine", "linear", "constant"]
FULL_LR = 2e-5
"""Rate of full fine-tuning, TRL's SFT default; parameter-efficient techniques suggest their own in their traits."""


def parameter_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
    late: Collection[str] = (),
    apart: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters by (rate, decay), each with the ``names`` of what it holds.

    Args:
        module: everything in it that requires a gradient is trained.
        late: names of frozen parameters that will be trained later; they have their place from the first step.
        lr: rate of every group that ``rates`` does not change.
        weight_decay: of matrices that are not embeddings; 0 for all else.
        rates: name of a parameter -> factor of ``lr`` (LoRA+, layer-wise decay, a head of its own).
        apart: name of a parameter -> the group that is its own, whatever rate and decay others have.

    Raises:
        Refusal: when nothing is trainable.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    layers = injected_layers(module).items()
    factors = {f"{path}.{name}" for path, layer in layers if layer.decays for name in layer.injected_parameters()}
    embeddings |= {id(p) for _, layer in layers if not layer.decays for p in layer.injected_parameters().values()}
    groups: dict[tuple[float, float, str], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and name not in late:
            continue
        matrix = parameter.ndim >= 2 and (id(parameter) not in embeddings or name in factors)
        rate = lr * (rates or {}).get(name, 1.0)
        decay = weight_decay if matrix else 0.0
        key = (rate, decay, (apart or {}).get(name, ""))
        group = groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay, "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        refuse_frozen(module)
    return list(groups.values())


def build_optimizer(
    groups: list[dict[str, Any]], factory: Callable[[Iterable[Any]], Optimizer] | None = None
) -> Optimizer:
    """AdamW over the groups, fused where torch has it; or what ``factory(groups)`` makes.

    Betas are (0.9, 0.999), as in TRL and transformers, so that runs compare.
    """
    for group in groups:
        group.pop("names", None)
    if factory is not None:
        optimizer = factory(groups)
        if getattr(optimizer, "is_paged", False) and not all(p.is_cuda for g in groups for p in g["params"]):
            raise Refusal(
                f"{type(optimizer).__name__} pages its state between a GPU's memory and the CPU's, and this run has no GPU; use "
                f"{type(optimizer).__name__.removeprefix('Paged')}."
            )
        return optimizer
    floating = all(p.is_floating_point() for g in groups for p in g["params"])
    optimizer = AdamW(groups, betas=(0.9, 0.999), fused=floating)
    # Fused AdamW offers to unscale fp16 gradients inside its step. Then Lightning neither unscales before the gradient
    # pipeline nor clips (it refuses, under bf16-mixed too): leave unscaling to the precision plugin.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def learning_rate_factor(step: int, *, total: int, warmup: int, schedule: Schedule, floor: float = 0.0) -> float:
    """Factor of the rate at optimizer step ``step`` (from 0): linear warm-up, then the schedule down to ``floor``.

    cosine: floor + (1 - floor) (1 + cos(pi t)) / 2 with t the share of the steps after warm-up; linear: 1 - (1 - floor) t.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return 1.0 - (1.0 - floor) * share
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share))


def build_scheduler(
    optimizer: Optimizer,
    *,
    total: int | Sequence[int],
    warmup: int | None = None,
    schedule: Schedule,
    floor: float = 0.0,
) -> LambdaLR:
    """The schedule as Lightning steps it, once per optimizer step.

    Args:
        optimizer: whose rates it scales.
        total: steps of the run; a list where it begins anew after so many steps, once for each task.
        warmup: steps of each beginning; None: 3 % of its steps, and at least one.
        schedule: after the warm-up.
        floor: factor that it ends with.
    """
    totals = [total] if isinstance(total, int) else list(total)
    begins = [0, *accumulate(totals)]

    def factor(step: int) -> float:
        part = min(bisect_right(begins, step) - 1, len(totals) - 1)
        first = warmup if warmup is not None else max(1, round(0.03 * totals[part]))
        at = step - begins[part]
        return learning_rate_factor(at, total=totals[part], warmup=first, schedule=schedule, floor=floor)

    return LambdaLR(optimizer, factor)


def moments_of(factory: Callable[[Iterable[Any]], Optimizer] | None) -> int | None:
    """Numbers that an optimizer keeps for each weight, by its factory; None where only the optimizer knows.

    Args:
        factory: as given to a module; None is AdamW, and plain SGD keeps nothing.
    """
    if factory is None or factory is AdamW:
        return 2
    return 0 if factory is SGD else None


def state_bytes(module: nn.Module, moments: int) -> int:
    """Bytes that a checkpoint will take: what is trained, now or later, in fp32, with so many numbers more for each weight."""
    kept = kept_keys(module)
    return sum((1 + moments) * 4 * p.numel() for name, p in module.named_parameters() if name in kept)


__all__ = [
    "FULL_LR",
    "Schedule",
    "build_optimizer",
    "build_scheduler",
    "learning_rate_factor",
    "moments_of",
    "parameter_groups",
    "state_bytes",
]
