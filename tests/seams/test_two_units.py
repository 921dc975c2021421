"""Seam a: a term that counts tokens beside one that counts rows, in windows of uneven counts, the last one incomplete."""

from __future__ import annotations

import pytest
import torch

from lightning_ft.functional.errors import Refusal
from tests.seams import toy
from tests.seams.toy import ONE_DEVICE, TWO_RANKS, Data, Module, Net, Run, Shape
from tests.tolerances import TOL


def train(shape: Shape, folder: str, counted: bool = True, terms=toy.both, **options) -> Run:
    return toy.fit(Module(terms), Data(shape.batch_size, counted), shape, folder, **options)


@pytest.fixture(scope="module")
def oracle() -> tuple[dict[str, torch.Tensor], list[float]]:
    net = Net()
    losses = toy.by_hand(net, lambda net, rows: toy.token_mean(net, rows) + 0.7 * toy.row_mean(net, rows))
    return {f"net.{n}": v for n, v in net.state_dict().items()}, losses


def check(run: Run, oracle, ranks: int = 1) -> None:
    toy.assert_close(run.weights, oracle[0], TOL[torch.float64])
    assert [line["train/loss"] for line in run.logged] == pytest.approx(oracle[1], rel=1e-5)  # logs are float32


@pytest.mark.parametrize("shape", ONE_DEVICE, ids=str)
def test_one_device_trains_as_by_hand(shape: Shape, tmp_path, oracle) -> None:
    run = train(shape, str(tmp_path))
    check(run, oracle)
    assert set(run.logged[0]) == {"train/loss", "train/token", "train/row"}


@pytest.mark.parametrize("shape", TWO_RANKS, ids=str)
def test_two_ranks_train_as_by_hand(shape: Shape, tmp_path, oracle, two_ranks) -> None:
    for run in two_ranks.run("tests.seams.test_two_units:train", shape=shape, folder=str(tmp_path)):
        check(run, oracle)


@pytest.mark.parametrize(("shape", "done"), [(Shape(8), 2), (Shape(2, 4), 4), (Shape(2, 4), 6), (Shape(2, 4), 14)])
def test_a_resumed_run_is_bit_equal_also_from_the_middle_of_a_window(shape: Shape, done: int, tmp_path) -> None:
    whole = train(shape, str(tmp_path), save=[done])
    resumed = train(shape, str(tmp_path), resume=str(tmp_path / f"{done}.ckpt"))
    toy.assert_same(resumed.weights, whole.weights)


def test_two_ranks_resume_from_a_window_s_end_and_refuse_its_middle(tmp_path, two_ranks) -> None:
    shape = Shape(2, 2, 2)
    job = "tests.seams.test_two_units:train"
    whole = two_ranks.run(job, shape=shape, folder=str(tmp_path), save=[2, 3])
    resumed = two_ranks.run(job, shape=shape, folder=str(tmp_path), resume=str(tmp_path / "2.ckpt"))
    for one, other in zip(whole, resumed, strict=True):
        toy.assert_same(other.weights, one.weights)
    for words in two_ranks.run("tests.seams.test_two_units:refusal", shape=shape, folder=str(tmp_path)):
        assert "within an accumulation window on several ranks" in words


def refusal(shape: Shape, folder: str) -> str:
    with pytest.raises(Refusal) as refused:
        train(shape, folder, resume=f"{folder}/3.ckpt")
    return str(refused.value)


# Loaders that do not count their windows: gradients are corrected before the step.


def by_tokens() -> dict[str, torch.Tensor]:
    net = Net()
    toy.by_hand(net, toy.token_mean)
    return {f"net.{n}": v for n, v in net.state_dict().items()}


@pytest.mark.parametrize("shape", ONE_DEVICE, ids=str)
def test_without_window_counts_one_unit_is_still_exact(shape: Shape, tmp_path) -> None:
    run = train(shape, str(tmp_path), counted=False, terms=toy.only_tokens)
    toy.assert_close(run.weights, by_tokens(), TOL[torch.float64])


@pytest.mark.parametrize("shape", TWO_RANKS, ids=str)
def test_without_window_counts_ranks_agree_on_the_divisor(shape: Shape, tmp_path, two_ranks) -> None:
    job = "tests.seams.test_two_units:train"
    for run in two_ranks.run(job, shape=shape, folder=str(tmp_path), counted=False, terms=toy.only_tokens):
        toy.assert_close(run.weights, by_tokens(), TOL[torch.float64])


@pytest.mark.parametrize("done", [4, 6])
def test_without_window_counts_a_resumed_run_is_bit_equal(done: int, tmp_path) -> None:
    options = {"counted": False, "terms": toy.only_tokens}
    whole = train(Shape(2, 4), str(tmp_path), save=[done], **options)
    resumed = train(Shape(2, 4), str(tmp_path), resume=str(tmp_path / f"{done}.ckpt"), **options)
    toy.assert_same(resumed.weights, whole.weights)


def test_without_window_counts_a_second_unit_is_refused(tmp_path) -> None:
    with pytest.raises(Refusal, match="tokens and in rows"):
        train(Shape(8), str(tmp_path), counted=False)
