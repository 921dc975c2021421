"""iMAML: its gradient is that of MAML to order 2 through inner steps that reach the minimum; what it refuses."""

import pytest
import torch
from torch.func import functional_call

from lightning_ft import EWC, MAML, LoRA, Refusal
from tests.modules.episodes import fit, mlp, module, sines, words, write_words
from tests.modules.tasks import write_base
from tests.modules.test_maml import tasks


def unrolled(episodes, *, lam, steps, alpha, inner):
    """(mean query loss, its gradient by name) in float64, through every step on the pulled loss."""
    net = mlp().double()
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    total = 0.0
    for episode in episodes:
        sides = [(side.inputs.double(), side.targets.double()) for side in (episode.support, episode.query)]
        phi = {name: theta[name] for name in inner}

        def loss_of(fast, side):
            return (functional_call(net, {**theta, **fast}, side[0]) - side[1]).square().mean()

        for _ in range(steps):
            pull = sum((phi[name] - theta[name]).square().sum() for name in phi)
            grads = torch.autograd.grad(loss_of(phi, sides[0]) + lam / 2 * pull, list(phi.values()), create_graph=True)
            phi = {name: weight - alpha * g for (name, weight), g in zip(phi.items(), grads, strict=True)}
        total = total + loss_of(phi, sides[1]) / len(episodes)
    return float(total.detach()), dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))


@pytest.mark.parametrize("inner", ["all", "head"])
def test_the_gradient_through_steps_that_reach_the_minimum(tmp_path, inner):
    made = module(inner=inner, implicit=2.0, cg_steps=30, steps=300, inner_lr=0.05, eval_steps=[])
    steps, _ = fit(tmp_path, made, sines(episodes=2, batch_size=2), max_steps=1)
    names = ("4.weight", "4.bias") if inner == "head" else [name for name, _ in mlp().named_parameters()]
    episodes = tasks(sines(episodes=2, batch_size=2))
    value, gradients = unrolled(episodes, lam=2.0, steps=300, alpha=0.05, inner=names)
    assert steps.losses == pytest.approx([value], rel=1e-4)
    for name, gradient in gradients.items():
        difference = steps.gradients[0][f"model.{name}"].double() - gradient
        assert float(difference.norm()) < 1e-2 * float(gradient.norm()), name


def test_over_lora_with_accumulation_and_validation(tmp_path):
    base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
    made = MAML(str(base), inner="adapter_and_head", implicit=1.0, steps=4, inner_lr=0.3, eval_steps=[0])
    options = {"accumulate_grad_batches": 2, "limit_val_batches": None, "max_steps": 1}
    steps, runner = fit(tmp_path, made, words(path, tmp_path), LoRA(r=2), **options)
    assert steps.gradients[0] and all(torch.isfinite(g).all() for g in steps.gradients[0].values())
    assert "val/accuracy" in runner.callback_metrics


def test_refusals(tmp_path):
    with pytest.raises(Refusal, match="learned rates or multi_step"):
        module(implicit=1.0, rates="per_step")
    with pytest.raises(Refusal, match="solves for the gradient"):
        fit(tmp_path, module(implicit=1.0), sines(), EWC(1.0), max_steps=1)
