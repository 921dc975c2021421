"""Seam b: the reference of a run that starts from a trained adapter beside a thawed norm is the model at that start."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import injected_layers
from tests.seams import toy
from tests.seams.toy import ONE_DEVICE, TWO_RANKS, D, Data, Module, Net, Run, Shape
from tests.tolerances import TOL

PULL = 0.3
PROBE = torch.arange(toy.V)


class Anchor(Technique):
    """Pulls the logits of scored tokens to the reference's, and writes down both on a probe at each micro-batch."""

    traits: ClassVar[Traits] = Traits(slot="anchor", edits=frozenset({"loss"}), needs=frozenset({"reference"}))

    def __init__(self) -> None:
        self.reference: list[Tensor] = []
        self.policy: list[Tensor] = []

    def register(self, attachment: Attachment) -> None:
        attachment.want_reference()
        attachment.loss_term("anchor", self.term)

    def term(self, module, batch, output) -> Term:
        with Attachment.of(module).reference():
            wanted = module.net(batch.ids).reshape(-1, toy.V)[batch.scored]
            self.reference.append(module.net(PROBE).clone())
        with torch.no_grad():
            self.policy.append(module.net(PROBE).clone())
        logits = module.net(batch.ids).reshape(-1, toy.V)[batch.scored]
        return Term("anchor", (logits - wanted).square().sum(), batch.counts["token"], "token", PULL)


def start_file(folder: str) -> str:
    """A checkpoint whose adapter and norm are trained, made once a folder by rank 0's test process."""
    file = Path(folder) / "start" / "3.ckpt"
    if not file.exists():
        callbacks = [LoRA(2, target=["first", "second"]), Freeze(["norm"])]
        module = Module(toy.only_tokens, torch.float32)
        toy.fit(module, Data(8), Shape(8), str(file.parent), callbacks, save=[3], max_epochs=1)
    return str(file)


def train(shape: Shape, folder: str, **options) -> Run:
    anchor = Anchor()
    callbacks = [anchor, Freeze(["norm"]), LoRA(target=["first", "second"], init_from=f"{folder}/start/3.ckpt")]
    module = Module(toy.only_tokens, torch.float32)
    run = toy.fit(module, Data(shape.batch_size), shape, folder, callbacks, **options)
    return Run(run.weights, run.logged, {"reference": anchor.reference, "policy": anchor.policy})


class Adapted(nn.Module):
    """The same by hand: the toy net with two low-rank products written out."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.net = Net(torch.float32).requires_grad_(False)
        self.net.norm.weight = nn.Parameter(state["net.norm.weight"].clone())
        self.factors = nn.ParameterDict(
            {f"{n}_{f}": state[f"net.{n}.lora_{f}"].clone() for n in ("first", "second") for f in "AB"}
        )

    def layer(self, name: str, x: Tensor) -> Tensor:
        a, b = self.factors[f"{name}_A"], self.factors[f"{name}_B"]
        return getattr(self.net, name)(x) + 16 / 2 * linear(linear(x, a), b)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.net.norm(self.net.embed(ids))
        return self.net.head(x + self.layer("second", torch.tanh(self.layer("first", x))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("reference"))
    start_file(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(folder: str) -> tuple[dict[str, Tensor], Tensor]:
    policy = Adapted(torch.load(start_file(folder), weights_only=True)["state_dict"])
    reference = deepcopy(policy)

    def step(policy: nn.Module, rows: list[int]) -> Tensor:
        distances = []
        for row in rows:
            ids = torch.as_tensor(toy.ids_of(row))[toy.first_scored(row) - 1 : -1]
            distances.append((policy(ids) - reference(ids).detach()).square().sum(-1))
        return toy.token_mean(policy, rows) + PULL * torch.cat(distances).mean()

    toy.by_hand(policy, step, [p for p in policy.parameters() if p.requires_grad])
    trained = {f"net.{n.replace('_', '.lora_')}": p.detach() for n, p in policy.factors.items()}
    return trained | {"net.norm.weight": policy.net.norm.weight.detach()}, reference(PROBE).detach()


def check(run: Run, oracle) -> None:
    trained, start = oracle
    toy.assert_close({n: run.weights[n] for n in trained}, trained, TOL[torch.float32])
    assert torch.equal(run.notes["policy"][0], run.notes["reference"][0])  # the first step's ratio is exactly one
    for logits in run.notes["reference"]:
        assert torch.equal(logits, run.notes["reference"][0])
        torch.testing.assert_close(logits, start, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run.notes["policy"][-1], start, atol=1e-2)


@pytest.mark.parametrize("shape", ONE_DEVICE, ids=str)
def test_one_device_trains_as_by_hand(shape: Shape, folder: str, oracle) -> None:
    check(train(shape, folder), oracle)


@pytest.mark.parametrize("shape", TWO_RANKS, ids=str)
def test_two_ranks_train_as_by_hand(shape: Shape, folder: str, oracle, two_ranks) -> None:
    for run in two_ranks.run("tests.seams.test_reference:train", shape=shape, folder=folder):
        check(run, oracle)


@pytest.mark.parametrize(("shape", "done"), [(Shape(8), 2), (Shape(2, 4), 6), (Shape(2, 4), 15)])
def test_a_resumed_run_keeps_the_first_start(shape: Shape, done: int, folder: str, oracle) -> None:
    whole = train(shape, folder, save=[done])
    resumed = train(shape, folder, resume=f"{folder}/{done}.ckpt")
    toy.assert_same(resumed.weights, whole.weights)
    for logits in resumed.notes["reference"]:
        assert torch.equal(logits, whole.notes["reference"][0])
    assert not torch.equal(resumed.notes["policy"][0], resumed.notes["reference"][0])


def test_two_ranks_resume_with_the_first_start(folder: str, two_ranks) -> None:
    job, shape = "tests.seams.test_reference:train", Shape(4, 1, 2)
    whole = two_ranks.run(job, shape=shape, folder=folder, save=[4])
    for resumed in two_ranks.run(job, shape=shape, folder=folder, resume=f"{folder}/4.ckpt"):
        toy.assert_same(resumed.weights, whole[0].weights)
        assert torch.equal(resumed.notes["reference"][-1], whole[0].notes["reference"][0])


def test_a_second_fit_starts_from_where_the_first_ended(tmp_path) -> None:
    module = Module(toy.only_tokens, torch.float32)
    anchors = [Anchor(), Anchor()]
    for anchor in anchors:
        toy.fit(module, Data(8), Shape(8), str(tmp_path), [LoRA(2, target=["first"]), Freeze(["norm"]), anchor])
    assert torch.equal(anchors[1].reference[-1], anchors[1].policy[0])
    assert not torch.equal(anchors[1].reference[0], anchors[0].reference[0])


def test_resuming_a_run_that_kept_no_start_is_refused(tmp_path) -> None:
    parts = [LoRA(2, target=["first"]), Freeze(["norm"])]
    toy.fit(Module(toy.only_tokens), Data(8), Shape(8), str(tmp_path), parts, save=[2])
    with pytest.raises(Refusal, match="holds no reference 'start'"):
        resume = str(tmp_path / "2.ckpt")
        toy.fit(Module(toy.only_tokens), Data(8), Shape(8), str(tmp_path), [*parts, Anchor()], resume=resume)


def test_what_a_snapshot_copies(tmp_path) -> None:
    """Layers that are exactly nothing are switched off; a layer that is not, by however little, is copied."""
    module = Module(toy.only_tokens, torch.float32)
    parts = [LoRA(2, target=["first", "second", "embed"], dora=False), Freeze(["norm"])]
    toy.fit(module, Data(8), Shape(8), str(tmp_path), parts, max_steps=0)
    references = Attachment.of(module).references
    references.take()
    fresh = references.snapshots["start"]
    assert fresh.off == {"net.first", "net.second", "net.embed"} and set(fresh.tensors) == {"net.norm.weight"}
    layers = injected_layers(module)
    with torch.no_grad():
        layers["net.first"].lora_B[0, 0] = 1e-30
        layers["net.embed"].lora_A[0, 0] = 1e-30
    references.take()
    moved = references.snapshots["start"]
    assert moved.off == {"net.second"}
    assert set(moved.tensors) - set(fresh.tensors) == {f"net.{n}.lora_{f}" for n in ("first", "embed") for f in "AB"}


def test_dora_is_nothing_only_while_its_magnitude_is_the_weight_s(tmp_path) -> None:
    module = Module(toy.only_tokens, torch.float32)
    toy.fit(module, Data(8), Shape(8), str(tmp_path), [LoRA(2, target=["first"], dora=True)], max_steps=0)
    references = Attachment.of(module).references
    references.take()
    assert references.snapshots["start"].off == {"net.first"}
    with torch.no_grad():
        injected_layers(module)["net.first"].lora_magnitude[0] += 1e-3
    references.take()
    assert references.snapshots["start"].off == set()


def test_the_bare_base_is_refused_once_it_was_trained_in_place(tmp_path) -> None:
    module = Module(toy.only_tokens, torch.float32)
    toy.fit(module, Data(8), Shape(8), str(tmp_path), [LoRA(2, target=["first"])])
    with Attachment.of(module).reference("base"):
        assert torch.equal(module.net(PROBE), Net(torch.float32)(PROBE))
    assert module.net.first.lora_B.shape == (D, 2) and bool(module.net.first.lora_B.any())
    other = Module(toy.only_tokens, torch.float32)
    toy.fit(other, Data(8), Shape(8), str(tmp_path), [LoRA(2, target=["first"]), Freeze(["norm"])])
    with pytest.raises(Refusal, match="norm.weight is trained in place"), Attachment.of(other).reference("base"):
        pass
