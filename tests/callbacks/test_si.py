"""Synaptic intelligence: the contract, and the path integral against a written-out loop."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft import EWC, SynapticIntelligence
from lightning_ft.engine.anchors import Anchors
from lightning_ft.functional.path_integral import add_step_, path_importance
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, fit, loader, state, trainer

CASE = Case(SynapticIntelligence, small={"lam": 3.0, "xi": 0.01}, idle={"lam": 0.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def test_by_hand():
    """Two steps of one number: gradients 2 and -1, moves -0.5 and 0.1: omega 1.1; over 0.4^2 + 0.04: 5.5."""
    omega = torch.zeros(1)
    add_step_(omega, torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.5]))
    add_step_(omega, torch.tensor([-1.0]), torch.tensor([0.5]), torch.tensor([0.6]))
    assert omega.item() == pytest.approx(1.1)
    found = path_importance(omega, torch.tensor([1.0]), torch.tensor([0.6]), 0.04, clamp=True)
    assert found.item() == pytest.approx(5.5)
    negative = (-omega, torch.tensor([1.0]), torch.tensor([0.6]), 0.04)
    assert path_importance(*negative, clamp=True).item() == 0.0
    assert path_importance(*negative, clamp=False).item() == pytest.approx(-5.5)


def by_loop(net, tasks, lam, xi, accumulate=1, clip=None, ewc=0.0, clamp=True):
    """SGD at rate 0.5 with the penalty, in plain torch: (omega, importance, values) after the last task.

    As the paper has it (equations 4 and 5): importances of all tasks so far in one sum, around where the last one ended.
    """
    parameters = dict(net.named_parameters())
    importance = {n: torch.zeros_like(p) for n, p in parameters.items()}
    center = {n: p.detach().clone() for n, p in parameters.items()}
    origin = {n: p.detach().clone() for n, p in parameters.items()}
    for steps in tasks:
        omega = {n: torch.zeros_like(p) for n, p in parameters.items()}
        start = {n: p.detach().clone() for n, p in parameters.items()}
        batches = list(loader())
        for step in range(steps):
            window = batches[step * accumulate : (step + 1) * accumulate]
            loss = sum(net.training_step(batch, 0) for batch in window) / len(window)
            grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
            total = {
                n: g
                + lam * importance[n] * (parameters[n].detach() - center[n])
                + ewc * (parameters[n].detach() - origin[n])
                for n, g in grads.items()
            }
            norm = torch.stack([g.norm() for g in total.values()]).norm()
            shrink = min(1.0, clip / float(norm)) if clip else 1.0
            for name, p in parameters.items():
                move = -0.5 * shrink * total[name]
                omega[name] -= grads[name] * move
                p.data += move
        for name, p in parameters.items():
            found = omega[name] / ((p.detach() - start[name]) ** 2 + xi)
            importance[name] += found.clamp(min=0) if clamp else found
            center[name] = p.detach().clone()
    return omega, importance, center


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"clamp": False}], ids=str
)
def test_the_path_is_that_of_a_loop(options, tmp_path):
    """Trap 6: the gradient without any penalty and before clipping; the true step whatever made it. Trap 7: one center."""
    options = dict(options)
    clamp = options.pop("clamp", True)
    steps = 2 if "accumulate_grad_batches" in options else 3
    ours, theirs, technique = PlainNet(), PlainNet(), SynapticIntelligence(3.0, xi=0.01, clamp=clamp)
    beside = EWC(0.2, importance="uniform")  # another penalty that the path must not see
    for _ in range(3):
        fit(tmp_path, ours, beside, technique, max_steps=steps, **options)
        beside = EWC(0.2, importance="uniform")
        beside.load_state_dict({"held": first_anchor(), "next": {}, "own": {}})
    accumulate, clip = options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val")
    omega, importance, center = by_loop(theirs, (steps,) * 3, 3.0, 0.01, accumulate, clip, 0.2, clamp)
    kept = technique.state_dict()
    for name in omega:
        torch.testing.assert_close(kept["own"]["path"][name], omega[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(kept["next"]["importance"][name], importance[name], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(kept["next"]["center"][name], center[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state(ours)[name], state(theirs)[name], rtol=1e-4, atol=1e-6)


def test_without_the_clamp_negative_importances_add_up_like_others():
    """Two tasks by hand: (-2 + 0.5) (0.5 - 3) = 3.75 and (4 - 1) (0.5 - 1) = -1.5, around where the second ended."""
    technique, anchors = SynapticIntelligence(1.0, clamp=False), Anchors()
    technique.absorb(anchors, {"p": torch.tensor([-2.0, 4.0])}, {"p": torch.tensor([7.0, 9.0])})
    technique.absorb(anchors, {"p": torch.tensor([0.5, -1.0])}, {"p": torch.tensor([3.0, 1.0])})
    theta = {"p": torch.nn.Parameter(torch.tensor([0.5, 0.5]))}
    anchors.add_gradients_(theta, 1.0)
    assert theta["p"].grad.tolist() == [3.75, -1.5]
    assert anchors.value(theta, 1.0) == pytest.approx(0.5 * (-1.5 * 2.5**2 + 3 * 0.5**2))


def first_anchor():
    net = dict(PlainNet().named_parameters())
    tensors = {n: p.detach().clone() for n, p in net.items()}
    return {
        "importance": {n: torch.ones_like(p) for n, p in tensors.items()},
        "center": tensors,
        "constant": 0.0,
        "tasks": 1,
    }


def test_small_steps_add_up_to_the_fall_of_the_loss(tmp_path):
    batch = next(iter(loader()))
    net, technique = PlainNet(), SynapticIntelligence()
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=1e-3)
    before = float(net.training_step(batch, 0).detach())
    few = DataLoader(TensorDataset(*batch), 4)
    trainer(tmp_path, technique, max_steps=200, max_epochs=200, limit_val_batches=0).fit(net, few, few)
    fallen = before - float(net.training_step(batch, 0).detach())
    path = sum(float(v.sum()) for v in technique.state_dict()["own"]["path"].values())
    assert fallen > 0.01 and path == pytest.approx(fallen, rel=0.01)


def test_a_resumed_run_goes_on_along_the_path(tmp_path):
    """In the middle of the second task, which is held to the first."""
    states = []
    for folder, resume in ((tmp_path / "whole", None), (tmp_path / "again", tmp_path / "whole" / "epoch=0.ckpt")):
        technique, net = SynapticIntelligence(3.0, xi=0.01), PlainNet()
        if resume is None:
            technique.load_state_dict({"held": first_anchor(), "next": {}, "own": {}})
        keep = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        run = trainer(tmp_path, technique, keep, max_steps=-1, max_epochs=2, enable_checkpointing=True)
        run.fit(net, loader(), loader(), ckpt_path=resume)
        assert run.global_step == 8
        states.append((state(net), technique.state_dict()["own"]))
    (whole, kept), (resumed, kept_again) = states
    assert all(torch.equal(v, resumed[n]) for n, v in whole.items())
    assert all(torch.equal(v, kept_again[part][n]) for part in kept for n, v in kept[part].items())


def test_a_part_that_most_steps_do_not_use_is_no_reason_to_stop(tmp_path):
    """Trap 5: a head without a gradient has no share in a step's path, and nothing frozen has a place in the state."""

    class TwoHeads(PlainNet):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(4, 3)
            self.frozen = torch.nn.Linear(4, 3).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            logits = self(batch[0]) + (self.other(batch[0]) if batch_idx == 0 else 0.0) + self.frozen(batch[0])
            return torch.nn.functional.cross_entropy(logits, batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.5)

    technique, net = SynapticIntelligence(xi=0.01), TwoHeads()
    start = net.other.weight.detach().clone()
    run = trainer(tmp_path, technique, max_steps=3)
    run.fit(net, loader(), loader())
    held = technique.state_dict()["next"]["importance"]
    assert set(held) == {n for n, p in net.named_parameters() if p.requires_grad}
    move = net.other.weight.detach() - start  # of the first step alone: omega = move^2 / rate
    torch.testing.assert_close(held["other.weight"], (move**2 / 0.5) / (move**2 + 0.01))
