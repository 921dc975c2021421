"""The quadratic penalty that holds parameters to an earlier value, each with its own weight, and its gradient.

``P(theta) = lam / 2 * sum_i F_i (theta_i - theta*_i)^2`` and ``dP / d theta_i = lam F_i (theta_i - theta*_i)``: at theta* both
are exactly zero. Several tasks that are kept apart have one such term each; their sum is one term with ``F = sum_k F_k`` and
``theta* = sum_k F_k theta*_k / F``, up to a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalty(theta: Tensor, theta_star: Tensor, importance: Tensor, lam: float) -> Tensor:
    """The penalty of one tensor, a scalar in fp32 or above.

    Args:
        theta: present values.
        theta_star: values to stay near, of the same shape.
        importance: F, how much each number matters; of the same shape.
        lam: its strength.
    """
    away = theta.to(torch.promote_types(theta.dtype, torch.float32)) - theta_star
    return 0.5 * lam * (importance * away * away).sum()


def add_gradient_(grad: Tensor, theta: Tensor, theta_star: Tensor, importance: Tensor, lam: float) -> Tensor:
    """Adds the penalty's gradient to ``grad`` in place and returns it; arguments as in `penalty`."""
    away = theta.to(torch.promote_types(theta.dtype, torch.float32)) - theta_star
    return grad.add_((away.mul_(importance).mul_(lam)).to(grad.dtype))
