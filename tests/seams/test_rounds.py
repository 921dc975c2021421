"""Seam c: a sized loader that generates its rows from the policy when an epoch begins. What it generated is data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_ft.data.collate import Segment
from lightning_ft.data.loader import PlannedLoader
from tests.seams import toy
from tests.seams.toy import ONE_DEVICE, TWO_RANKS, Data, Module, Net, Run, Shape
from tests.tolerances import TOL

ROUNDS, PROMPTS, STOP, RATE = 3, 12, 0, 1.0


@torch.no_grad()
def rollouts(net: nn.Module, epoch: int) -> list[list[int]]:
    """One answer a prompt, sampled token by token until the stop token or seven tokens."""
    generator = torch.Generator().manual_seed(1000 + epoch)
    rows = []
    for prompt in range(PROMPTS):
        ids = [1 + prompt % (toy.V - 1)]
        while len(ids) < 2 or (ids[-1] != STOP and len(ids) < 7):
            probabilities = net(torch.tensor(ids[-1:]))[0].softmax(-1)
            ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        rows.append(ids)
    return rows


class RoundRows:
    """The rows of the present round; how many there are is known before they are."""

    def __init__(self, data: Rollouts) -> None:
        self.data = data

    def __len__(self) -> int:
        return PROMPTS

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.data.round["rows"]])

    @property
    def units(self) -> dict[str, np.ndarray]:
        return {"token": self.lengths - 1}

    def segments(self, rows: Any) -> list[Segment]:
        found = [(int(r), np.array(self.data.round["rows"][r])) for r in rows]
        return [Segment(ids, np.array([[1, len(ids)]]), row) for row, ids in found]


class RoundLoader(PlannedLoader):
    """Generates before it deals."""

    def __iter__(self):
        self.dataset.data.begin()
        yield from super().__iter__()


class Rollouts(Data):
    """Holds the round; a checkpoint has it, because the weights that it came from are gone by then."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.round: dict[str, Any] = {"epoch": -1, "rows": []}
        self.generated: list[tuple[int, list[list[int]]]] = []

    def begin(self) -> None:
        epoch = self.trainer.current_epoch
        if self.round["epoch"] != epoch:
            self.round = {"epoch": epoch, "rows": rollouts(self.trainer.lightning_module.net, epoch)}
            self.generated.append((epoch, self.round["rows"]))

    def train_dataloader(self) -> RoundLoader:
        return RoundLoader(RoundRows(self), batch_size=self.batch_size, placement=self.place)

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.round = state_dict["round"]


class Fast(Module):
    """Learns so fast that every update changes what is sampled."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def train(shape: Shape, folder: str, **options) -> Run:
    data = Rollouts(shape.batch_size)
    run = toy.fit(Fast(toy.only_tokens), data, shape, folder, max_epochs=ROUNDS, **options)
    return Run(run.weights, run.logged, {"generated": data.generated})


@pytest.fixture(scope="module")
def oracle() -> tuple[dict[str, torch.Tensor], list[tuple[int, list[list[int]]]]]:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    generated: list[tuple[int, list[list[int]]]] = []
    for epoch in range(ROUNDS):
        rows = rollouts(net, epoch)
        generated.append((epoch, rows))
        for begin in range(0, PROMPTS, 8):
            early = rollouts(net, epoch + 1)
            ids = [torch.tensor(row) for row in rows[begin : begin + 8]]
            optimizer.zero_grad()
            torch.cat([cross_entropy(net(i)[:-1], i[1:], reduction="none") for i in ids]).mean().backward()
            optimizer.step()
        assert early != rollouts(net, epoch + 1)  # one update makes a difference: generating too early is caught
    return {f"net.{n}": v for n, v in net.state_dict().items()}, generated


def check(run: Run, oracle) -> None:
    assert run.notes["generated"] == oracle[1]
    toy.assert_close(run.weights, oracle[0], TOL[torch.float64])


@pytest.mark.parametrize("shape", ONE_DEVICE, ids=str)
def test_each_round_comes_from_the_weights_after_the_last(shape: Shape, tmp_path, oracle) -> None:
    check(train(shape, str(tmp_path)), oracle)


@pytest.mark.parametrize("shape", TWO_RANKS, ids=str)
def test_two_ranks_generate_the_same(shape: Shape, tmp_path, oracle, two_ranks) -> None:
    for run in two_ranks.run("tests.seams.test_rounds:train", shape=shape, folder=str(tmp_path)):
        check(run, oracle)


@pytest.mark.parametrize(
    ("shape", "done", "again"),
    [(Shape(8), 2, [1, 2]), (Shape(8), 3, [2]), (Shape(2, 4), 6, [1, 2]), (Shape(2, 4), 8, [2])],
)
def test_a_resumed_run_goes_on_with_its_round(shape: Shape, done: int, again: list[int], tmp_path) -> None:
    whole = train(shape, str(tmp_path), save=[done])
    resumed = train(shape, str(tmp_path), resume=str(tmp_path / f"{done}.ckpt"))
    toy.assert_same(resumed.weights, whole.weights)
    assert resumed.notes["generated"] == [whole.notes["generated"][epoch] for epoch in again]


def test_two_ranks_go_on_with_their_round(tmp_path, two_ranks) -> None:
    job, shape = "tests.seams.test_rounds:train", Shape(4, 1, 2)
    whole = two_ranks.run(job, shape=shape, folder=str(tmp_path), save=[3])
    for run in two_ranks.run(job, shape=shape, folder=str(tmp_path), resume=str(tmp_path / "3.ckpt")):
        toy.assert_same(run.weights, whole[0].weights)
