"""Meta-learning of sine waves through the Lightning modules, against numbers measured without any of this library's code.

    python -m benchmarks.meta_sinusoid [ROW ...]        (all rows that are not done; `make reproduce-meta`)
    python -m benchmarks.meta_sinusoid --speed [STEPS]  (one meta-iteration beside two plain loops)

Each row is kept in benchmarks/results/meta_sinusoid.json as soon as it is done, so that a run which was stopped goes on where it
was. ``expected`` are means and half widths of 95 % intervals over 600 tasks from an implementation in NumPy and float64, whose
Hessian products were checked against finite differences.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_ft import MAML, EpisodeData, Reptile
from lightning_ft.nn.small_nets import MLP

RESULTS = Path(__file__).parent / "results" / "meta_sinusoid.json"
TASKS = "lightning_ft.data.sinusoids.sinusoids"
BATCH = 25


def maml(iterations: int, *, order: int, steps: int, **expected: tuple[float, float | None]) -> dict[str, Any]:
    """A row of MAML with ten points and a rate of 0.01."""
    model = {"order": order, "steps": steps, "inner_lr": 0.01, "lr": 1e-3}
    data = {"tasks_args": {"shot": 10, "query": 10}, "eval_tasks_args": {"query": 100}}
    return {"kind": "MAML", "iterations": iterations, "model": model, "data": data, "expected": expected}


ROWS: dict[str, dict[str, Any]] = {
    "maml_2k": maml(
        2000, order=2, steps=1, step_0=(2.77, None), step_1=(0.815, None), step_5=(0.458, None), step_10=(0.372, None)
    ),
    "maml_15k": maml(
        15000, order=2, steps=1, step_0=(2.77, None), step_1=(0.387, 0.036), step_5=(0.141, None), step_10=(0.106, None)
    ),
    "fomaml_15k": maml(15000, order=1, steps=1, step_1=(0.545, None), step_5=(0.195, None), step_10=(0.134, None)),
    "maml_5_steps_15k": maml(
        15000, order=2, steps=5, step_1=(0.581, None), step_5=(0.099, 0.013), step_10=(0.073, None)
    ),
    "fomaml_5_steps_15k": maml(
        15000, order=1, steps=5, step_1=(2.307, None), step_5=(0.664, 0.112), step_10=(0.470, None)
    ),
    "reptile_30k": {
        "kind": "Reptile",
        "iterations": 30000,
        "model": {"steps": 5, "inner_lr": 0.02, "inner_batch": 10, "lr": 0.1, "eval_steps": [8, 32]},
        "data": {
            "tasks_args": {"shot": 50, "grid": 50, "max_phase": 6.283185307179586},
            "eval_tasks_args": {"shot": 10},
            "batch_size": 1,
        },
        "expected": {"step_8": (0.105, 0.015), "step_32": (0.112, None)},
    },
}


def run(row: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Trains one row and measures it on 600 tasks."""
    pl.seed_everything(seed, verbose=False)
    batch = row["data"].get("batch_size", BATCH)
    data = EpisodeData(
        tasks=TASKS,
        **{"batch_size": batch, **row["data"]},
        episodes=batch * row["iterations"],
        val_episodes=600,
        val_batch_size=600,
    )
    if row["kind"] == "MAML":
        module: Any = MAML(net=MLP([1, 40, 40, 1]), **row["model"])
    else:
        module = Reptile(net=MLP([1, 64, 64, 1], "tanh"), **row["model"])
    trainer = quiet_trainer(max_epochs=1)
    begin = time.perf_counter()
    trainer.fit(module, data)
    measured = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
    found = {
        name.removesuffix("/loss"): [round(measured[name], 4), round(measured[f"{name}_ci95"], 4)]
        for name in measured
        if name.startswith("step_") and name.endswith("/loss")
    }
    return {"seconds": round(time.perf_counter() - begin, 1), "mse": found, "expected": row["expected"], "seed": seed}


def quiet_trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    """A Trainer that says and writes nothing."""
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )


# ---- speed: one meta-iteration of 25 tasks, one inner step of order 2, Adam, through three programs


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
    return {
        "milliseconds": {name: round(1e3 * statistics.median(one[name] for one in found), 3) for name in kinds},
        "lightning / plain": round(statistics.median(one["lightning"] / one["plain"] for one in found), 2),
        "clone / lightning": round(statistics.median(one["clone"] / one["lightning"] for one in found), 2),
        "steps": steps,
        "rounds": rounds,
    }


def main(words: list[str]) -> None:
    """Runs what is asked for."""
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if words[:1] == ["--speed"]:
        kept["speed"] = speed(int(words[1]) if len(words) > 1 else 300)
        print(json.dumps(kept["speed"], indent=1))
        write(kept)
        return
    for name in words or ROWS:
        if name in kept:
            print(f"{name}: done before")
            continue
        kept[name] = run(ROWS[name])
        write(kept)
        print(f"{name}: {json.dumps(kept[name])}", flush=True)


def write(kept: dict[str, Any]) -> None:
    """Keeps what was measured."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
