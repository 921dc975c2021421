"""Speed of one meta-iteration: 25 sine waves, one inner step of order 2, Adam, through Lightning and through two plain loops."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.meta_sinusoid import BATCH, TASKS, quiet_trainer
from lightning_ft import MAML, EpisodeData
from lightning_ft.nn.small_nets import MLP


def tasks(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a plain loop would draw."""
    a, p, x = (torch.rand(shape, generator=generator) for shape in ((BATCH, 1, 1), (BATCH, 1, 1), (BATCH, 20, 1)))
    x = 10 * x - 5
    y = (0.1 + 4.9 * a) * torch.sin(x - torch.pi * p)
    return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]


def plain_loop(steps: int) -> float:
    """Seconds of ``steps`` meta-iterations in torch.func alone."""
    net = MLP([1, 40, 40, 1])
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    adam, generator = torch.optim.Adam(theta.values(), lr=1e-3, fused=True), torch.Generator().manual_seed(0)

    def support_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(net, weights, (x,)) - y).square().mean()

    def query_loss(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        slopes = grad(support_loss)(theta, xs, ys)
        return support_loss({name: weight - 0.01 * slopes[name] for name, weight in theta.items()}, xq, yq)

    def step() -> None:
        loss = vmap(query_loss)(*tasks(generator)).mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()

    return timed(step, steps)


def clone_and_loop(steps: int) -> float:
    """The same in learn2learn's manner: the module is cloned for each task, and the tasks come one after the other."""
    net = MLP([1, 40, 40, 1])
    adam, generator = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True), torch.Generator().manual_seed(0)

    def clone(module: nn.Module) -> nn.Module:
        twin = module.__new__(type(module))
        twin.__dict__ = module.__dict__.copy()
        twin._parameters = {name: p.clone() if p is not None else None for name, p in module._parameters.items()}  # type: ignore[assignment, misc]
        twin._buffers = dict(module._buffers)
        twin._modules = {name: clone(child) for name, child in module._modules.items() if child is not None}  # type: ignore[assignment]
        return twin

    def update(module: nn.Module, slopes: dict[int, Tensor]) -> None:
        for child in module.modules():
            for name, p in child._parameters.items():
                if p is not None:
                    child._parameters[name] = p - 0.01 * slopes[id(p)]  # type: ignore[assignment]

    def step() -> None:
        total = torch.zeros(())
        for xs, ys, xq, yq in zip(*tasks(generator), strict=True):
            learner = clone(net)
            loss = (learner(xs) - ys).square().mean()
            weights = [p for child in learner.modules() for p in child._parameters.values() if p is not None]
            found = torch.autograd.grad(loss, weights, create_graph=True)
            update(learner, {id(p): g for p, g in zip(weights, found, strict=True)})
            total = total + (learner(xq) - yq).square().mean()
        adam.zero_grad()
        (total / BATCH).backward()  # type: ignore[no-untyped-call]
        adam.step()

    return timed(step, steps)


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds a step, the first ten not counted."""
    for _ in range(10):
        step()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps


class Clock(Callback):
    """Seconds a training step, the first ten not counted."""

    def __init__(self) -> None:
        self.begin, self.seconds = 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins at the eleventh."""
        if batch_idx == 10:
            self.begin = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Ends with the last."""
        self.seconds = (time.perf_counter() - self.begin) / (trainer.global_step - 10)


def through_lightning(steps: int) -> float:
    """Seconds of a step of MAML through Lightning, data and logging included."""
    data = EpisodeData(
        tasks=TASKS, tasks_args={"shot": 10, "query": 10}, batch_size=BATCH, episodes=BATCH * (steps + 10)
    )
    clock = Clock()
    trainer = quiet_trainer(clock, max_epochs=1, limit_val_batches=0)
    trainer.fit(MAML(net=MLP([1, 40, 40, 1]), lr=1e-3), data)
    return clock.seconds


def speed(steps: int, rounds: int = 5) -> dict[str, Any]:
    """Medians of the three, and of their ratios within a round."""
    kinds = {"lightning": through_lightning, "plain": plain_loop, "clone": clone_and_loop}
    found = [{name: measure(steps) for name, measure in kinds.items()} for _ in range(rounds)]
    ratios = [one["lightning"] / one["plain"] for one in found]
    return {
        "milliseconds": {name: round(1e3 * statistics.median(one[name] for one in found), 3) for name in kinds},
        "lightning / plain": round(statistics.median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "clone / lightning": round(statistics.median(one["clone"] / one["lightning"] for one in found), 2),
        "steps": steps,
        "rounds": rounds,
    }
