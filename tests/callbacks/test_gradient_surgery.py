"""GradientSurgery: the contract, and what only it does."""

import pytest
import torch
from torch import Tensor, nn

from lightning_ft import GradientSurgery, Refusal
from lightning_ft.engine import compatibility
from lightning_ft.functional.gradient_surgery import aligned, cagrad, gradvac, mgda, nash, pcgrad, upgrad
from tests.contract import Case, checks_for
from tests.contract.subjects import TermsNet, fit
from tests.seams import toy
from tests.seams.toy import ONE_DEVICE, TWO_RANKS, Data, Module, Net, Run, Shape
from tests.tolerances import TOL

CASE = Case(
    GradientSurgery,
    small={"method": "cagrad", "c": 0.5},
    idle={"method": "sum"},
    known={
        "idle": "two gradients added after their backward passes, not within one: equal to rounding, not to the bit"
    },
)


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def train(shape: Shape, folder: str, method: str = "upgrad", beta: float = 0.01, **options) -> Run:
    callbacks = [GradientSurgery(method, beta=beta)]
    return toy.fit(Module(), Data(shape.batch_size), shape, folder, callbacks, gradient_clip_val=1.0, **options)


def by_hand(method) -> dict[str, Tensor]:
    """One process with the joint batch: gradients of both terms apart, combined on what both reach, clipped."""
    net = Net()
    parameters = list(net.parameters())

    def step(net: Net, rows: list[int]) -> None:
        losses = (toy.token_mean(net, rows), 0.7 * toy.row_mean(net, rows))
        grads = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]
        both = [i for i, pair in enumerate(zip(*grads, strict=True)) if all(g is not None for g in pair)]
        J = torch.stack([torch.cat([g[i].reshape(-1) for i in both]) for g in grads])
        weights = method(J @ J.T)
        for i, parameter in enumerate(parameters):
            parts = [g[i] for g in grads]
            parameter.grad = (
                weights[0] * parts[0] + weights[1] * parts[1] if i in both else next(p for p in parts if p is not None)
            )
        nn.utils.clip_grad_norm_(parameters, 1.0)

    toy.by_hand(net, step)
    return {f"net.{n}": v for n, v in net.state_dict().items()}


METHODS = {
    "pcgrad": pcgrad,  # of two the order does not matter
    "upgrad": lambda gram: 2 * upgrad(gram),
    "cagrad": lambda gram: 2 * cagrad(gram, 0.5),
    "mgda": lambda gram: 2 * mgda(gram),
    "nash": nash,
    "aligned": lambda gram: 2 * aligned(gram),
    "sum": lambda gram: torch.ones(2, dtype=torch.float64),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_device_trains_as_by_hand(method: str, tmp_path) -> None:
    toy.assert_close(train(Shape(8), str(tmp_path), method).weights, by_hand(METHODS[method]), 1e-8)


@pytest.mark.parametrize("shape", ONE_DEVICE[1:], ids=str)
def test_accumulation_changes_nothing(shape: Shape, tmp_path) -> None:
    toy.assert_close(train(shape, str(tmp_path)).weights, by_hand(METHODS["upgrad"]), TOL[torch.float64])


@pytest.mark.parametrize("shape", TWO_RANKS, ids=str)
def test_two_ranks_are_one_process_with_the_joint_batch(shape: Shape, tmp_path, two_ranks) -> None:
    expected = by_hand(METHODS["upgrad"])
    for run in two_ranks.run("tests.callbacks.test_gradient_surgery:train", shape=shape, folder=str(tmp_path)):
        toy.assert_close(run.weights, expected, TOL[torch.float64])


def test_gradvac_remembers_cosines_as_by_hand(tmp_path) -> None:
    """Steps whose targets are the average of all before them; of two terms the order does not matter."""
    kept = [torch.zeros(2, 2, dtype=torch.float64)]

    def method(gram: Tensor) -> Tensor:
        weights, target = gradvac(gram, kept[-1], 0.9)
        kept.append(target)
        turned.append(float(weights.max()))
        return weights

    turned: list[float] = []
    run = train(Shape(8), str(tmp_path), "gradvac", 0.9, save=[2])
    toy.assert_close(run.weights, by_hand(method), 1e-8)
    state = torch.load(tmp_path / "2.ckpt", weights_only=True)["callbacks"]
    cosines = next(value["cosines"] for name, value in state.items() if "Surgery" in name)
    torch.testing.assert_close(cosines, kept[2])
    assert max(turned[2:]) > 1.01, "the cosines of the first steps changed nothing in later ones"
    resumed = train(Shape(8), str(tmp_path), "gradvac", 0.9, resume=str(tmp_path / "2.ckpt"))
    toy.assert_same(resumed.weights, run.weights)


def test_gradvac_knows_cosines_of_as_many_terms(tmp_path) -> None:
    technique = GradientSurgery("gradvac")
    technique.load_state_dict({"cosines": torch.zeros(3, 3, dtype=torch.float64)})
    with pytest.raises(Refusal, match="goes on with the average cosines of 3 terms, and the loss has 2 now"):
        technique._vaccinated(torch.eye(2, dtype=torch.float64), torch.tensor([0, 1]), 2)


def test_a_resumed_pcgrad_draws_the_same_order(tmp_path) -> None:
    whole = train(Shape(8), str(tmp_path), "pcgrad", save=[2])
    resumed = train(Shape(8), str(tmp_path), "pcgrad", resume=str(tmp_path / "2.ckpt"))
    toy.assert_same(resumed.weights, whole.weights)


def test_the_conflict_rate_is_logged(tmp_path) -> None:
    """The contract's two terms pull the same logits up and down."""
    run = fit(tmp_path, TermsNet(), GradientSurgery())
    assert run.callback_metrics["train/conflict_rate"] == 1.0


def test_one_term_is_left_alone(tmp_path) -> None:
    """There is no compromise with oneself, and no conflict to log."""
    one = toy.fit(Module(toy.only_tokens), Data(8), Shape(8), str(tmp_path), [GradientSurgery("nash")])
    plain = toy.fit(Module(toy.only_tokens), Data(8), Shape(8), str(tmp_path), [])
    toy.assert_close(one.weights, plain.weights, TOL[torch.float64])


def test_what_the_method_does_not_read_is_refused() -> None:
    with pytest.raises(
        Refusal, match=r"GradientSurgery\.c belongs to the method cagrad, and the method is pcgrad; leave it"
    ):
        GradientSurgery("pcgrad", c=0.3)
    with pytest.raises(Refusal, match=r"GradientSurgery\.beta belongs to the method gradvac, and the method is mgda"):
        GradientSurgery("mgda", beta=0.5)


def test_fsdp2_and_fp16_are_refused() -> None:
    for word, said in (("fsdp2", "FSDP2"), ("fp16", "fp16 gradient scaling")):
        with pytest.raises(Refusal, match=rf"GradientSurgery cannot work with {said}, because .*; use "):
            compatibility.check([GradientSurgery()], compatibility.Situation(frozenset({word})))
