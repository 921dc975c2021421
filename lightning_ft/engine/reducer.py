"""DDP's reducer knows the parameters that required a gradient when it was made, and no later one."""

from __future__ import annotations

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.ddp import DDPStrategy
from torch.nn.parallel import DistributedDataParallel


def rebuild_reducer(strategy: Strategy) -> None:
    """Wraps the module anew, so that gradients are reduced of exactly what requires one now; without DDP it does nothing.

    To be called on all ranks at the same step, between an optimizer step and the next forward pass. The old reducer is let
    go first: its hooks would reduce each gradient a second time.

    Args:
        strategy: of the running Trainer.
    """
    wrapped = strategy.model
    if not (isinstance(strategy, DDPStrategy) and isinstance(wrapped, DistributedDataParallel)):
        return
    synchronised = wrapped.require_backward_grad_sync
    for holder in ("reducer", "logger"):  # the logger holds the reducer, which takes its hooks off when it dies
        wrapped.__dict__.pop(holder, None)
    strategy.model = strategy.lightning_module
    del wrapped
    strategy.configure_ddp()
    assert isinstance(strategy.model, DistributedDataParallel)
    strategy.model.require_backward_grad_sync = synchronised  # False while gradient surgery reduces by itself
