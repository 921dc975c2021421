"""Seam d: per-term gradient surgery, then a closed-form penalty, then clipping."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal
from tests.seams import toy
from tests.seams.toy import ONE_DEVICE, TWO_RANKS, Data, Module, Net, Run, Shape
from tests.tolerances import TOL

LAM, CLIP = 0.05, 3.0


class PCGrad(Technique):
    """Projects each of two conflicting gradients off the other (Yu et al., 2020), on the Gram matrix alone."""

    traits: ClassVar[Traits] = Traits(slot="pcgrad", edits=frozenset({"gradients"}))

    def register(self, attachment: Attachment) -> None:
        attachment.surgery(self.weights)

    @staticmethod
    def weights(gram: Tensor) -> Tensor:
        conflict = gram[0, 1].clamp(max=0)
        return 1 - conflict / gram.diagonal()


class PullBack(Technique):
    """lam (theta - start), added to the gradient."""

    traits: ClassVar[Traits] = Traits(slot="pull_back", edits=frozenset({"gradients"}))
    name = "pull_back"

    def register(self, attachment: Attachment) -> None:
        attachment.gradient_edit(self)

    def edit_(self, parameters: dict[str, nn.Parameter]) -> None:
        start = {f"net.{n}": p for n, p in Net().named_parameters()}
        for name, parameter in parameters.items():
            parameter.grad.add_(LAM * (parameter.detach() - start[name].detach()))


def train(shape: Shape, folder: str, backwards: bool = False, **options) -> Run:
    parts = [PullBack(), PCGrad()]
    data = Data(shape.batch_size)
    return toy.fit(Module(), data, shape, folder, parts[:: -1 if backwards else 1], gradient_clip_val=CLIP, **options)


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    net = Net()
    parameters = list(net.parameters())
    start = parameters_to_vector(parameters).detach().clone()
    conflicts, norms = [], []

    def step(net: Net, rows: list[int]) -> None:
        losses = (toy.token_mean(net, rows), 0.7 * toy.row_mean(net, rows))
        first, second = (
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])
            for loss in losses
        )
        # The head is reached by the tokens' term alone, and so is no matter of compromise.
        shared = torch.cat([torch.full((p.numel(),), float(p is not net.head.weight)) for p in parameters]).double()
        one, two = first * shared, second * shared
        product = one @ two
        conflicts.append(bool(product < 0))
        if product < 0:
            first, second = first - product / (two @ two) * two, second - product / (one @ one) * one
        penalty = LAM * (parameters_to_vector(parameters).detach() - start)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        gradient = [p.grad for p in parameters]
        vector_to_parameters(first + second + penalty, gradient)
        for parameter, piece in zip(parameters, gradient, strict=True):
            parameter.grad = piece.clone()
        norms.append(float(clip_grad_norm_(parameters, CLIP)))

    toy.by_hand(net, step)
    assert any(conflicts) and max(norms) > CLIP > min(norms), (conflicts, norms)
    return {f"net.{n}": v for n, v in net.state_dict().items()}


@pytest.mark.parametrize("shape", ONE_DEVICE, ids=str)
@pytest.mark.parametrize("backwards", [False, True])
def test_one_device_trains_as_by_hand(shape: Shape, backwards: bool, tmp_path, oracle) -> None:
    run = train(shape, str(tmp_path), backwards)
    toy.assert_close(run.weights, oracle, TOL[torch.float64])


@pytest.mark.parametrize("shape", TWO_RANKS, ids=str)
def test_two_ranks_train_as_by_hand(shape: Shape, tmp_path, oracle, two_ranks) -> None:
    for run in two_ranks.run("tests.seams.test_gradients:train", shape=shape, folder=str(tmp_path)):
        toy.assert_close(run.weights, oracle, TOL[torch.float64])


@pytest.mark.parametrize(("shape", "done"), [(Shape(8), 2), (Shape(2, 4), 6), (Shape(2, 4), 14)])
def test_a_resumed_run_is_bit_equal_also_from_the_middle_of_a_window(shape: Shape, done: int, tmp_path) -> None:
    whole = train(shape, str(tmp_path), save=[done])
    resumed = train(shape, str(tmp_path), resume=str(tmp_path / f"{done}.ckpt"))
    toy.assert_same(resumed.weights, whole.weights)


def test_two_ranks_resume(tmp_path, two_ranks) -> None:
    job, shape = "tests.seams.test_gradients:train", Shape(4, 1, 2)
    whole = two_ranks.run(job, shape=shape, folder=str(tmp_path), save=[2])
    for run in two_ranks.run(job, shape=shape, folder=str(tmp_path), resume=str(tmp_path / "2.ckpt")):
        toy.assert_same(run.weights, whole[0].weights)


def test_two_surgeries_are_refused(tmp_path) -> None:
    class Other(PCGrad):
        traits: ClassVar[Traits] = Traits(slot="other", edits=frozenset({"gradients"}))

    with pytest.raises(Refusal, match="only one surgery"):
        toy.fit(Module(), Data(8), Shape(8), str(tmp_path), [PCGrad(), Other()])


def test_a_parameter_that_no_term_reaches_is_named_under_surgery_too(tmp_path) -> None:
    module = Module()
    module.net.unused = nn.Linear(2, 2)
    with pytest.raises(Refusal, match=r"2 trainable parameters got no gradient .* net\.unused\.weight"):
        toy.fit(module, Data(8), Shape(8), str(tmp_path), [PCGrad()])
