"""How much of a task's fall in loss each parameter has brought about: the path integral of synaptic intelligence.

Along the path of training ``omega_i = - sum_t g_ti (theta_{t+1,i} - theta_ti)``, with g the gradient of the task's loss alone,
adds up to the fall of the loss where steps are small. A task's importance is ``omega_i / ((theta_end,i - theta_start,i)^2 + xi)``.
"""

from __future__ import annotations

from torch import Tensor


def add_step_(omega: Tensor, grad: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Adds ``-g (after - before)`` of one step to omega, in place; all of one shape."""
    return omega.addcmul_(grad.to(omega.dtype), (after.to(omega.dtype) - before.to(omega.dtype)), value=-1.0)


def path_importance(omega: Tensor, start: Tensor, end: Tensor, xi: float, *, clamp: bool) -> Tensor:
    """``omega / ((end - start)^2 + xi)``, with ``clamp`` at least 0: a negative one would push a number away."""
    away = end.to(omega.dtype) - start.to(omega.dtype)
    found = omega / (away * away + xi)
    return found.clamp_(min=0.0) if clamp else found


__all__ = ["add_step_", "path_importance"]
