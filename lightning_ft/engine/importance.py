"""How much each trained number matters to what a model has learned: a mean over examples, out of one pass over their rows.

The model is in eval mode meanwhile; its modes, gradients and random generators are put back. What is found is laid out like the
parameters, in fp32. At the first batch it is proven that the gradients which the layers give example by example add up to the
ordinary ones, with another weight for each example; a parameter that fails (one that another module reads, say) gets a
backward pass for each example instead; under FSDP2, which knows gradients of all ranks together only, a whole pass for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial

from lightning_ft.engine.likelihood import Ask, keys_of, likelihood
from lightning_ft.engine.per_example import Recorder
from lightning_ft.engine.randomness import GlobalState
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.fisher import Power, Share, powered, total, weighted
from lightning_ft.models.admission import evaluating

_STEP = "_lightning_ft_ask"


@dataclass
class Importance:
    """A mean over examples of ``|gradient|^power``.

    Attributes:
        diagonal: name of each trained parameter -> fp32, laid out like it.
        examples: how many there were, on all ranks.
        trace: the sum of all numbers; of the Fisher information, its trace.
        slow: names of parameters that needed a backward pass for each example.
    """

    diagonal: dict[str, Tensor]
    examples: int
    trace: float
    slow: frozenset[str]


def trained_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by the name that a state is kept under, whatever wraps parts of the module."""
    return {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters() if p.requires_grad}


def importance(
    trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], ask: Ask, *, power: Power = 2
) -> Importance:
    """The mean over the examples of ``batches`` on all ranks of ``|d ask / d theta|^power`` for every trained number.

    Args:
        trainer: of the present run.
        module: whose trained parameters it is of.
        batches: micro-batches of this rank as its loader gives them; under FSDP2 as many on every rank.
        ask: what is asked of each example.
        power: 2 for the Fisher information, 1 for MAS.

    Raises:
        Refusal: a module that cannot answer; no examples.
    """
    with _undisturbed(module):
        estimate = _Estimate(trainer, module, ask, power)
        with estimate.recorder.watching(), estimate.prepared():
            for batch in batches:
                estimate.add(batch)
        return estimate.result()


class _Estimate:
    """What is summed while batches come."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, ask: Ask, power: Power) -> None:
        self.trainer, self.module, self.ask, self.power = trainer, module, ask, power
        self.parameters = trained_names(module)
        self.sharded = isinstance(module, FSDPModule)
        plain = {name for name, p in module.named_parameters() if p.requires_grad}
        self.clean = {name: name.replace("_orig_mod.", "") for name in plain}
        self.recorder = Recorder(module, plain, lambda: ask.layouts)
        self.sums: dict[str, Tensor] = {}
        self.slow: set[str] = set()
        self.count = self.rows = 0
        self.proven = False
        self.real = torch.zeros(0, device="cpu")
        half = (torch.bfloat16, torch.float16)
        coarse = torch.is_autocast_enabled(module.device.type) or any(p.dtype in half for p in module.parameters())
        self.tolerance = 5e-2 if coarse or "16" in str(trainer.precision) else 1e-3

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Asking the module is a forward pass, of which FSDP2 has to know."""
        object.__setattr__(self.module, _STEP, lambda batch: likelihood(self.module, batch, self.ask))
        if self.sharded:
            register_fsdp_forward_method(self.module, _STEP)
        try:
            yield
        finally:
            self.module.__dict__.pop(_STEP, None)

    def add(self, batch: Any) -> None:
        """Adds the examples of one micro-batch."""
        world = self.trainer.world_size
        keys = keys_of(batch, self.trainer.global_rank + world * self.rows, world)
        self.rows += len(keys)
        batch = _moved(self.trainer, self.module, batch)
        self.ask.passes, self.ask.now = 1, 0
        while self.ask.now < self.ask.passes:
            self._add_pass(batch, keys)
            self.ask.now += 1
        self.count += int(self.real.sum())

    def _losses(self, batch: Any, keys: list[int]) -> Tensor:
        """(S,) what was asked, zero for fillers."""
        self.ask.keys = list(keys)
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context():
            losses: Tensor = getattr(self.module, _STEP)(batch)
        self.real = torch.tensor([key >= 0 for key in self.ask.keys], device=losses.device)
        return torch.where(self.real, losses, losses.new_zeros(()))

    def _add_pass(self, batch: Any, keys: list[int]) -> None:
        recorder, found, proof = self.recorder, {}, {}  # type: ignore[var-annotated]

        def finished(name: str, shares: list[Share]) -> None:
            if self.clean[name] in self.slow:
                return
            found[self.clean[name]] = total(shares, self.power)
            if not self.proven:
                proof[self.clean[name]] = shares

        with recorder.forward():
            losses = self._losses(batch, keys)
        called = {self.clean[name] for name in recorder.called}
        self.slow |= {self.clean[name] for name in recorder.unseen}
        if len(self.ask.keys) and losses.requires_grad:
            ours: dict[str, tuple[Tensor, float]] = {}
            weights = 0.5 + torch.rand(len(losses), generator=torch.Generator().manual_seed(0), device="cpu").to(losses)
            with recorder.backward(_proving(finished, proof, weights, ours)):
                self._back(losses.sum(), called)
            self.slow |= {self.clean[name] for name in recorder.unseen} | self._uncalled(called)
            self._clear()
            if not self.proven:
                self.slow |= self._disagree(batch, keys, weights, ours)
                self.proven = True
        if self.sharded:
            self.slow = self._anywhere(self.slow)
        if self.slow:
            found = {name: value for name, value in found.items() if name not in self.slow}
            found |= self._in_turn(batch, keys) if self.sharded else self._one_by_one(batch, keys)
        self._sum(found)

    def _back(self, loss: Tensor, called: set[str]) -> None:
        """Backward for the sake of the layers' hooks alone: gradients of the matrices themselves are left out.

        Those of parameters that no layer was seen to use are not; FSDP2 has to see a whole backward pass.
        """
        if self.sharded:
            loss.backward()
            return
        others = [p for name, p in self.parameters.items() if name not in called or name in self.slow]
        ends: list[Any] = [*self.recorder.begins, *others]  # torch's annotation knows no list of both
        grads = torch.autograd.grad(loss, ends, allow_unused=True) if ends else ()
        for parameter, grad in zip(others, grads[len(ends) - len(others) :], strict=True):
            parameter.grad = grad

    def _uncalled(self, called: set[str]) -> set[str]:
        """Names that have a gradient here although no layer of their own was called; `_anywhere` unites those of all ranks.

        What was called may differ from rank to rank, so nothing is reduced here: T5's table of biases is a row of positions,
        which looks like one of examples where there happen to be as many.
        """
        return {n for n, p in self.parameters.items() if n not in called and p.grad is not None and _any(p.grad)}

    def _disagree(
        self, batch: Any, keys: list[int], weights: Tensor, layers: dict[str, tuple[Tensor, float]]
    ) -> set[str]:
        """Names whose ordinary gradient, with a weight for each example, is not what the layers gave."""
        (self._losses(batch, keys) * weights).sum().backward()
        off, size = {}, {}
        for name, parameter in self.parameters.items():
            ours, scale = layers.get(name, (torch.zeros((), device=weights.device), 0.0))
            theirs = parameter.grad
            if isinstance(parameter, DTensor):  # the mean over ranks
                both = (ours + torch.zeros(parameter.shape, device=weights.device)).float()
                summed = torch.tensor(scale, device=weights.device)
                dist.all_reduce(both)
                dist.all_reduce(summed)
                ours, scale = both / self.trainer.world_size, float(summed) / self.trainer.world_size
                theirs = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs
            off[name] = float((ours - theirs).norm()) if theirs is not None else float(ours.norm())
            size[name] = max(scale, float(theirs.norm()) if theirs is not None else 0.0)
        self._clear()
        # A gradient that is zero but for rounding (of a key's bias) is as right as any other.
        floor = 1e-3 * max(size.values(), default=0.0)
        return {name for name, away in off.items() if not away <= self.tolerance * max(size[name], floor)}

    def _one_by_one(self, batch: Any, keys: list[int]) -> dict[str, Tensor]:
        """A backward pass for each example."""
        losses = self._losses(batch, keys)
        names = sorted(self.slow)
        parameters = [self.parameters[name] for name in names]
        found = {name: torch.zeros_like(p, dtype=_kept(p.dtype)) for name, p in zip(names, parameters, strict=True)}
        for loss in losses[self.real]:
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    found[name] += powered(grad.to(_kept(grad.dtype)), self.power)
        return found

    def _in_turn(self, batch: Any, keys: list[int]) -> dict[str, Tensor]:
        """The same under FSDP2, which reduces all ranks' gradients: a forward and backward pass for each example of each rank."""
        found = {name: torch.zeros_like(self.parameters[name], dtype=torch.float32) for name in sorted(self.slow)}
        world, most = self.trainer.world_size, torch.tensor(len(self.ask.keys), device=self.module.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        for rank in range(world):
            for s in range(int(most)):
                losses = self._losses(batch, keys)
                mine = rank == self.trainer.global_rank and s < len(losses)
                (losses[s] if mine else losses.sum() * 0.0).backward()
                for name, value in found.items():
                    grad = self.parameters[name].grad
                    if grad is not None:  # the mean over ranks, of which one has a loss
                        found[name] = value + powered(grad.float() * world, self.power)
                self._clear()
        return found

    def _anywhere(self, names: set[str]) -> set[str]:
        """Those that are in the set of any rank."""
        known = sorted(self.parameters)
        flags = torch.tensor([float(name in names) for name in known], device=self.module.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return {name for name, flag in zip(known, flags.tolist(), strict=True) if flag}

    def _clear(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def _sum(self, found: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            value = found.get(name)
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                whole = torch.zeros(parameter.shape, device=parameter.device) if value is None else value
                partial = [Partial() for _ in parameter.placements]
                value = DTensor.from_local(whole, parameter.device_mesh, partial).redistribute(
                    placements=parameter.placements
                )
            if value is not None:
                self.sums[name] = value if name not in self.sums else self.sums[name].add_(value)

    def result(self) -> Importance:
        """The mean over the examples of all ranks."""
        several = self.trainer.world_size > 1
        count = torch.tensor(float(self.count), device=self.module.device, dtype=torch.float32)
        if several:
            dist.all_reduce(count)
        if not count:
            raise Refusal("There is no example to measure importances on; the loader gave none.")
        diagonal: dict[str, Tensor] = {}
        trace = torch.zeros((), device=self.module.device, dtype=torch.float64)
        for name, parameter in self.parameters.items():
            value = self.sums.get(name)
            if value is None:
                value = torch.zeros_like(parameter, dtype=_kept(parameter.dtype))
            value = value.detach()
            if several and not isinstance(value, DTensor):
                value = value.contiguous()
                dist.all_reduce(value)
            diagonal[name] = value / float(count)
            local = diagonal[name]
            trace += (local.to_local() if isinstance(local, DTensor) else local).double().sum()
        if several and self.sharded:
            dist.all_reduce(trace)
        return Importance(diagonal, int(count), float(trace), frozenset(self.slow))


def _proving(
    finished: Callable[[str, list[Share]], None],
    proof: dict[str, list[Share]],
    weights: Tensor,
    found: dict[str, tuple[Tensor, float]],
) -> Callable[[str, list[Share]], None]:
    """Also sums the examples' gradients with their weights into ``found``, where shares are left in ``proof``."""

    def both(name: str, shares: list[Share]) -> None:
        finished(name, shares)
        while proof:
            clean, kept = proof.popitem()
            found[clean] = weighted(kept, weights)

    return both


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _any(grad: Tensor) -> bool:
    return bool((grad.to_local() if isinstance(grad, DTensor) else grad).any())


def _moved(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """As Lightning's loops move a batch."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _undisturbed(module: pl.LightningModule) -> Iterator[None]:
    """Eval mode inside; modes, gradients and generators as they were afterwards."""
    grads = {p: p.grad for p in module.parameters()}
    state = GlobalState.capture()
    cuda = torch.cuda.get_rng_state_all() if module.device.type == "cuda" else []
    for parameter in grads:
        parameter.grad = None
    try:
        with evaluating(module):
            yield
    finally:
        for parameter, grad in grads.items():
            parameter.grad = grad
        state.restore()
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
