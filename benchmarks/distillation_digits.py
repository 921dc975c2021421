"""Digits of `benchmarks.distillation_runs`: a user's own nets, of which the student sees few labels or none; on a CPU."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.distillation_cells import Sizes
from benchmarks.silent import silent_trainer

LABELLED, TRAINED = 100, 1400


def digits(seed: int, sizes: Sizes) -> dict[str, Any]:
    """A teacher 64-512-512-10 of 1,400 labelled images, students 64-32-10 of 100 labelled and 1,300 unlabelled ones."""
    import lightning.pytorch as pl
    import torch
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, RandomSampler, TensorDataset

    from lightning_ft import Distillation

    pixels, classes = (torch.tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    images, classes = pixels[order].float() / 16, classes[order]

    class Digits(pl.LightningModule):
        """A user's own module; a class of -1 is not known."""

        def __init__(self, *widths: int) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for before, after in zip((64, *widths), (*widths, 10), strict=True):
                layers += [nn.Linear(before, after), nn.ReLU()]
            self.net = nn.Sequential(*layers[:-1])

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            logits, known = self.net(batch[0]), batch[1] >= 0
            if not known.any():
                return logits.sum() * 0.0
            return nn.functional.cross_entropy(logits[known], batch[1][known])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    def accuracy(module: Digits, known: int, rows: int, epochs: int, *callbacks: Any) -> float:
        told = classes[:rows].clone()
        told[known:] = -1
        seen = TensorDataset(images[:rows], told)
        # As many steps for all: a hundred rows are gone through fourteen times an epoch.
        loader = DataLoader(seen, batch_size=100, sampler=RandomSampler(seen, num_samples=TRAINED))
        silent_trainer(None, callbacks, max_epochs=epochs, accelerator="cpu").fit(module, loader)
        with torch.no_grad():
            return float((module.net(images[TRAINED:]).argmax(1) == classes[TRAINED:]).double().mean())

    begun, long = time.perf_counter(), sizes.digit_epochs[1]
    pl.seed_everything(seed, verbose=False)
    teacher = Digits(512, 512)
    scores = {"teacher": accuracy(teacher, TRAINED, TRAINED, sizes.digit_epochs[0])}
    for name, known, rows, task in (
        ("alone", LABELLED, LABELLED, None),
        ("teacher alone", 0, TRAINED, 0.0),
        ("labels and teacher", LABELLED, TRAINED, 1.0),
    ):
        pl.seed_everything(seed, verbose=False)
        taught = [] if task is None else [_digit_teacher(Distillation, teacher.net, task)]
        scores[name] = accuracy(Digits(32), known, rows, long, *taught)
    return {"seconds": time.perf_counter() - begun, "scores": scores}


def _digit_teacher(cls: Any, net: Any, task: float) -> Any:
    return cls(teacher_module=lambda: net, student="net", temperature=4.0, task=task)
