"""A head that expects a number: what an answer that has come so far will be worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """One linear output in float32 on hidden states of any dtype; first it expects 0 everywhere.

    Zero is known to be safe: a value drawn at random would only add noise to the first advantages (Huang et al., 2024).
    """

    techniques_pass_by = True

    def __init__(self, width: int) -> None:
        """Args: width: D, of the hidden states."""
        super().__init__()
        # A Trainer in bf16-true has another default.
        self.weight = nn.Parameter(torch.zeros(1, width, dtype=torch.float32, device="cpu"))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (N,) of hidden states (N, D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())[:, 0]
