"""A net small enough to write its training out by hand, rows of uneven length, and Trainer runs over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_ft.data.collate import Segment
from lightning_ft.data.loader import Placement, PlannedLoader
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.technique import Attached
from lightning_ft.engine.terms import Term

V, D, ROWS = 11, 6, 21
EPOCHS, RATE, MOMENTUM = 2, 0.1, 0.9
LENGTHS = np.array([2 + row * 5 % 7 for row in range(ROWS)])


class Norm(nn.Module):
    """A root mean square norm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class Net(nn.Module):
    """Token by token: embedding, norm, two linear layers beside a residual, head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed = nn.Embedding(V, D)
            self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.to(dtype)
        self.norm = Norm(dtype)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        return x + self.second(torch.tanh(self.first(x)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


def ids_of(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, V, LENGTHS[row])


def first_scored(row: int) -> int:
    """The first position that is learned; every third row learns its last token only."""
    return LENGTHS[row] - 1 if row % 3 == 0 else 1


class Rows:
    """What a `PlannedLoader` asks of a data set."""

    lengths = LENGTHS
    units = {"token": np.array([LENGTHS[row] - first_scored(row) for row in range(ROWS)])}

    def __len__(self) -> int:
        return ROWS

    def segments(self, rows: Sequence[int]) -> list[Segment]:
        return [Segment(ids_of(r), np.array([[first_scored(r), LENGTHS[r]]]), int(r)) for r in rows]


class Data(LightningDataModule):
    """The rows in order, dealt by plan, with the counts of each window unless ``counted`` is False."""

    def __init__(self, batch_size: int, counted: bool = True) -> None:
        super().__init__()
        self.batch_size, self.counted = batch_size, counted

    def place(self) -> Placement:
        trainer = self.trainer
        return Placement(
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            position=trainer.fit_loop.epoch_loop.batch_progress.current.ready,
        )

    def train_dataloader(self) -> PlannedLoader:
        kind = PlannedLoader if self.counted else Uncounted
        return kind(Rows(), batch_size=self.batch_size, placement=self.place)


class Uncounted(PlannedLoader):
    """A user's own loader: it has our batches, but knows nothing of windows."""

    def __iter__(self):
        for batch in super().__iter__():
            batch.window = None
            yield batch


def token_term(net: nn.Module, batch: Batch) -> Term:
    logits = net(batch.ids).reshape(-1, V)[batch.scored]
    return Term("token", cross_entropy(logits, batch.labels, reduction="sum"), batch.counts["token"], "token")


def row_term(net: nn.Module, batch: Batch, weight: float = 0.7) -> Term:
    """Squared distance of each row's mean hidden state to a point that depends on the row's number."""
    hidden = net.hidden(batch.ids)[0]
    total = hidden.sum() * 0.0
    for row, begin, end in zip(batch.rows.tolist(), batch.bounds, batch.bounds[1:], strict=False):
        if row >= 0:
            total = total + (hidden[begin:end].mean(0) - row / ROWS).square().sum()
    return Term("row", total, batch.counts["row"], "row", weight)


Terms = Callable[[nn.Module, Batch], list[Term]]


def both(net: nn.Module, batch: Batch) -> list[Term]:
    return [token_term(net, batch), row_term(net, batch)]


def only_tokens(net: nn.Module, batch: Batch) -> list[Term]:
    return [token_term(net, batch)]


class Module(LightningModule):
    """Hands its terms over, as modules of this library do."""

    def __init__(self, terms: Terms = both, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net, self.make = Net(dtype), terms

    def configure_callbacks(self) -> list[Callback]:
        return [Attached()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.make(self.net, batch)
        Attachment.of(self).terms(terms)
        return terms[0].sum

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=RATE, momentum=MOMENTUM)


@dataclass(frozen=True)
class Shape:
    """Eight rows a step, dealt in one of several ways."""

    batch_size: int
    accumulate: int = 1
    devices: int = 1

    def __str__(self) -> str:
        return f"{self.devices}x{self.accumulate}x{self.batch_size}"


ONE_DEVICE = [Shape(8), Shape(2, 4)]
TWO_RANKS = [Shape(4, 1, 2), Shape(2, 2, 2)]


class Recorder(Callback):
    """What is logged at the end of each window, and checkpoints after chosen micro-batches (counted over epochs)."""

    def __init__(self, folder: str, save: Sequence[int] = ()) -> None:
        self.folder, self.save, self.logged, self.done = folder, save, [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.done += 1
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.logged.append({k: float(v) for k, v in trainer.logged_metrics.items()})
        if self.done in self.save:
            trainer.save_checkpoint(Path(self.folder) / f"{self.done}.ckpt")


def trainer_of(shape: Shape, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    options = {"max_epochs": EPOCHS, "strategy": "ddp" if shape.devices > 1 else "auto", **options}
    return Trainer(
        accelerator="cpu",
        devices=shape.devices,
        accumulate_grad_batches=shape.accumulate,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )


@dataclass
class Run:
    """What is left of a fit; plain types, since it may come from another process."""

    weights: dict[str, Tensor]
    logged: list[dict[str, float]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def fit(
    module: LightningModule,
    data: LightningDataModule,
    shape: Shape,
    folder: str,
    callbacks: Sequence[Callback] = (),
    *,
    save: Sequence[int] = (),
    resume: str | None = None,
    **options: Any,
) -> Run:
    recorder = Recorder(folder, save)
    trainer = trainer_of(shape, [*callbacks, recorder], **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return Run(weights_of(module), recorder.logged)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def by_hand(
    net: nn.Module, step: Callable[[nn.Module, list[int]], Tensor | None], trained: Sequence[nn.Parameter] = ()
) -> list[float]:
    """The oracle's loop: eight rows a step in order; ``step`` returns a loss, or None when it has set gradients itself."""
    parameters = list(trained) or list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)
    losses = []
    for _ in range(EPOCHS):
        for begin in range(0, ROWS, 8):
            optimizer.zero_grad()
            loss = step(net, list(range(begin, min(begin + 8, ROWS))))
            if loss is not None:
                losses.append(float(loss.detach()))
                loss.backward()
            optimizer.step()
    return losses


def token_mean(net: Callable[[Tensor], Tensor], rows: Sequence[int]) -> Tensor:
    """Mean cross-entropy over all scored tokens of the rows, row by row."""
    losses = []
    for row in rows:
        ids = torch.as_tensor(ids_of(row))
        start = first_scored(row)
        losses += [cross_entropy(net(ids)[start - 1 : -1], ids[start:], reduction="none")]
    return torch.cat(losses).mean()


def row_mean(net: Net, rows: Sequence[int]) -> Tensor:
    """Mean over rows of what `row_term` sums."""
    return torch.stack(
        [(net.hidden(torch.as_tensor(ids_of(r))).mean(0) - r / ROWS).square().sum() for r in rows]
    ).mean()


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name
