"""GradNorm's toy: ten regressions of one input whose targets differ a hundredfold in size (Chen et al., 2018, section 4)."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_ft import Attachment, LossBalancing
from lightning_ft.engine.terms import Term
from tests.contract.subjects import QUIET

TASKS, INPUTS, OUTPUTS, WIDTH, ROWS, STEPS = 10, 50, 20, 100, 48, 100
NAMES = [f"task{n}" for n in range(TASKS)]


class Toy(pl.LightningModule):
    """f_i(x) = sigma_i tanh((B + eps_i) x), learnt by four shared layers of 100 with ReLU and a linear head a task.

    B and eps_i as in the paper, N(0, 10) and N(0, 3.5), sigma from 1 to 100; the dimensions are cut, and x is small enough for
    tanh not to be a sign.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
        common = 10**0.5 * draw(OUTPUTS, INPUTS)
        self.maps = common + 3.5**0.5 * draw(TASKS, OUTPUTS, INPUTS)
        self.sizes = torch.logspace(0, 2, TASKS)
        self.held_out, self.draws = 0.1 * draw(512, INPUTS), generator
        torch.manual_seed(seed)
        sizes = [INPUTS, *[WIDTH] * 4]
        layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        self.trunk, self.heads = nn.Sequential(*layers), nn.Linear(WIDTH, TASKS * OUTPUTS)

    def losses(self, x: Tensor) -> Tensor:
        """(TASKS,) mean squared errors."""
        targets = self.sizes[:, None, None] * torch.einsum("toi,ni->tno", self.maps, x).tanh()
        found = self.heads(self.trunk(x)).reshape(-1, TASKS, OUTPUTS).transpose(0, 1)
        return (found - targets).square().mean((1, 2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        losses = self.losses(0.1 * torch.randn(ROWS, INPUTS, generator=self.draws))
        Attachment.of(self).terms([Term(name, one, 1.0, "mean") for name, one in zip(NAMES, losses, strict=True)])
        return losses.sum()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(STEPS, 1))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def left(folder: Path, seed: int, *callbacks: pl.Callback) -> float:
    """The mean over tasks of L_i(end) / L_i(0) on held-out rows."""
    module = Toy(seed)
    with torch.no_grad():
        first = module.losses(module.held_out)
    more = {"max_steps": STEPS, "default_root_dir": folder, "callbacks": list(callbacks)}
    pl.Trainer(**{**QUIET, **more}).fit(module)
    with torch.no_grad():
        return float((module.losses(module.held_out) / first).mean())


@pytest.mark.parametrize("seed", range(4))
def test_gradnorm_leaves_less_than_equal_weights_and_uncertainty(seed: int, tmp_path) -> None:
    """The paper's claim for ten tasks, in its measure, without a margin: the first of three on four seeds, by chance once in 81.

    Left after 100 steps (equal, uncertainty, gradnorm) by seed: .966 .969 .885, 1.018 1.010 .905, .944 .942 .894, 1.006 1.007 .883,
    .973 .975 .912, .963 .971 .919; after 300 on seven seeds .86 to .89, .86 to .89, and .73 to .82.
    """
    equal = left(tmp_path, seed)
    uncertainty = left(tmp_path, seed, LossBalancing("uncertainty", terms=NAMES, squared=NAMES))
    gradnorm = left(tmp_path, seed, LossBalancing("gradnorm", alpha=0.12))
    assert gradnorm < min(equal, uncertainty), (gradnorm, equal, uncertainty)
