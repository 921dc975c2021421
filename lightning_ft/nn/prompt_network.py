"""The network of P-tuning: soft tokens that are not learned one by one, but share weights that change them all.

Liu et al. 2021 (P-tuning, https://arxiv.org/abs/2103.10385, section 3.2) found that vectors learned each by itself change little
from where they start, and put a small network between them and the model. Razdaibiedina et al. 2023 (residual prompt tuning,
https://arxiv.org/abs/2305.03937, section 3) keep the vectors beside it: ``p = e + F(e)``, which trains faster and at less
careful rates. Here F is the three layers of PEFT's ``PromptEncoder``, its last one zero at first, so that the
prompt begins as the vectors it is made of. Once trained only ``p`` matters: (P, D) numbers, as of any soft prompt.

Axes: P tokens of the prompt, D width of the model, m of the network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn

from lightning_ft.nn.seeding import seeded_generator


class PromptNetwork(nn.Module):
    """``e + W3 relu(W2 relu(W1 e + b1) + b2) + b3``: e (P, D), W1 (m, D), W2 (m, m), W3 (D, m).

    Args:
        dim: D.
        width: m.
        dtype: Of its weights, in which it also computes, under autocast too.
        device: Where they lie.
    """

    first: nn.Parameter
    first_bias: nn.Parameter
    second: nn.Parameter
    second_bias: nn.Parameter
    last: nn.Parameter
    last_bias: nn.Parameter

    def __init__(self, dim: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        sizes = {"first": (width, dim), "second": (width, width), "last": (dim, width)}
        for name, shape in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(shape[:1], dtype=dtype, device=device)))

    @torch.no_grad()
    def reset_parameters(self, seed: int, name: str) -> None:
        """Draw the first two layers as torch draws linear ones, by seed and name; the last one is zero."""
        for own, parameter in self.named_parameters():
            if own.startswith("last"):
                parameter.zero_()
                continue
            bound = self.get_parameter(own.removesuffix("_bias")).shape[1] ** -0.5
            generator = seeded_generator(seed, f"{name}.network.{own}")
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def forward(self, vectors: Tensor) -> Tensor:
        """(P, D) to (P, D)."""
        with torch.autocast(vectors.device.type, enabled=False):
            hidden = F.relu(F.linear(vectors, self.first, self.first_bias))
            hidden = F.relu(F.linear(hidden, self.second, self.second_bias))
            return vectors + F.linear(hidden, self.last, self.last_bias)


__all__ = ["PromptNetwork"]
