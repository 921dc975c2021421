"""MAML over nets: one step is the plain loop's, however its tasks are dealt; what composes; what is measured."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.func import functional_call

from lightning_ft import EpisodeData
from lightning_ft.engine.attachment import Attachment
from lightning_ft.functional.inner_loop import multi_step_weights
from lightning_ft.nn.small_nets import ConvNet
from tests.contract.subjects import differing, trainer
from tests.modules.episodes import Normed, fit, mlp, module, on_ranks, sines

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def tasks(data, epoch=0):
    """The episodes of an epoch, one after the other."""
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    return [episode for batch in loader for episode in batch.episodes()]


def plain_loop(net, episodes, *, order, steps, alpha, inner=None, weights=None):
    """(mean query loss, its gradient by name): copies of weights, torch.func, no code of the library."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    total = 0.0
    for episode in episodes:
        phi = {name: weight for name, weight in theta.items() if inner is None or name in inner}
        loss_of = lambda fast, rows: ((functional_call(net, {**theta, **fast}, rows.inputs) - rows.targets) ** 2).mean()  # noqa: E731
        for j in range(steps):
            grads = torch.autograd.grad(loss_of(phi, episode.support), list(phi.values()), create_graph=order == 2)
            phi = {
                name: weight - alpha * (g if order == 2 else g.detach())
                for (name, weight), g in zip(phi.items(), grads, strict=True)
            }
            if weights is not None:
                total = total + weights[j] * loss_of(phi, episode.query) / len(episodes)
        if weights is None:
            total = total + loss_of(phi, episode.query) / len(episodes)
    found = torch.autograd.grad(total, list(theta.values()))
    return float(total.detach()), dict(zip(theta, found, strict=True))


LAYOUTS = {
    "at once": ({}, {}, {"tasks": "at_once"}),
    "one by one": ({}, {}, {"tasks": "one_by_one"}),
    "accumulated": ({"batch_size": 2}, {"accumulate_grad_batches": 4}, {}),
    "uneven": ({"batch_size": 3}, {"accumulate_grad_batches": 3}, {"tasks": "one_by_one"}),
    "not to be mapped": ({}, {}, {"net": Normed}),
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_of_a_plain_loop(tmp_path, layout, order):
    data, options, model = LAYOUTS[layout]
    model = {name: value() if name == "net" else value for name, value in model.items()}
    made = module(order=order, **model)
    steps, runner = fit(tmp_path, made, sines(**data), max_steps=1, **options)
    value, gradients = plain_loop(mlp(), tasks(sines()), order=order, steps=2, alpha=0.1)
    assert steps.losses == pytest.approx([value], rel=1e-5)
    assert made._at_once is (None if model.get("tasks") == "one_by_one" else "net" not in model)
    prefix = "model.inner." if "net" in model else "model."
    for name, gradient in gradients.items():
        assert float(gradient.abs().max()) > 1e-4
        torch.testing.assert_close(steps.gradients[0][prefix + name], gradient, rtol=1e-4, atol=1e-6)


def test_the_order_matters(tmp_path):
    first, second = (plain_loop(mlp(), tasks(sines()), order=order, steps=2, alpha=0.1)[1] for order in (1, 2))
    assert max(float((first[n] - second[n]).abs().max()) for n in first) > 1e-2


def test_the_head_alone_adapts(tmp_path):
    """ANIL: the body learns through the head's steps."""
    for how in ("at_once", "one_by_one"):
        steps, _ = fit(tmp_path, module(inner="head", tasks=how), sines(), max_steps=1)
        _, gradients = plain_loop(mlp(), tasks(sines()), order=2, steps=2, alpha=0.1, inner=("4.weight", "4.bias"))
        for name, gradient in gradients.items():
            torch.testing.assert_close(steps.gradients[0][f"model.{name}"], gradient, rtol=1e-4, atol=1e-6)


def test_multi_step_loss(tmp_path):
    steps, _ = fit(tmp_path, module(multi_step=4), sines(), max_steps=2)
    value, gradients = plain_loop(
        mlp(), tasks(sines()), order=2, steps=2, alpha=0.1, weights=multi_step_weights(2, 0.0)
    )
    assert steps.losses[0] == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(steps.gradients[0]["model.4.weight"], gradients["4.weight"], rtol=1e-4, atol=1e-6)
    made = module(multi_step=4)
    made.trainer = type("At", (), {"global_step": 1})()
    assert made._step_weights() == dict(zip((1, 2), multi_step_weights(2, 0.25), strict=True))
    made.trainer = type("At", (), {"global_step": 4})()
    assert made._step_weights() == {2: 1.0}


@pytest.mark.parametrize("rates", ["per_parameter", "per_step"])
def test_learned_rates(tmp_path, rates):
    """They start as the fixed one, get the finite difference of the query loss as gradient, are stepped, and never decay."""
    made = module(rates=rates, weight_decay=0.5, optimizer=None)
    steps, runner = fit(tmp_path, made, sines(), max_steps=1)
    value, _ = plain_loop(mlp(), tasks(sines()), order=2, steps=2, alpha=0.1)
    assert steps.losses == pytest.approx([value], rel=1e-5)
    own = {name: p for name, p in made.named_parameters() if name.startswith("inner_rates")}
    assert len(own) == 6 and all(p.ndim == 1 for p in own.values())
    assert {p.numel() for p in own.values()} == ({2} if rates == "per_step" else {6, 36, 1})
    groups = runner.optimizers[0].param_groups
    assert {g["weight_decay"] for g in groups if any(p is q for p in g["params"] for q in own.values())} == {0.0}
    assert all(float((p.detach() - 0.1).abs().max()) > 1e-4 for p in own.values())
    name, place = "4.weight", 1
    slope = float(steps.gradients[0][f"inner_rates.model/{name.replace(chr(46), chr(47))}"][place])
    ends = [moved_rate(name, place, rates, sign) for sign in (1, -1)]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-6)


def test_learned_rates_have_a_rate_of_their_own(tmp_path):
    """Adam's first step moves each number by its rate."""
    made = module(rates="per_step", optimizer=None, lr=1e-4, rates_lr=0.02)
    fit(tmp_path, made, sines(), max_steps=1)
    for rate in made.inner_rates.values():
        torch.testing.assert_close((rate.detach() - 0.1).abs(), torch.full((2,), 0.02), rtol=1e-2, atol=0)
    start = dict(mlp().named_parameters())
    assert all(float((p - start[n]).detach().abs().max()) < 1.1e-4 for n, p in made.model.named_parameters())


def moved_rate(name, place, rates, sign):
    """The mean query loss in float64 with one rate changed."""
    net, total = mlp().double(), 0.0
    for episode in tasks(sines()):
        phi = {n: p.detach().clone() for n, p in net.named_parameters()}
        for step in range(2):
            leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
            loss = (
                (functional_call(net, leaves, episode.support.inputs.double()) - episode.support.targets) ** 2
            ).mean()
            loss.backward()
            for n, p in leaves.items():
                alpha = torch.full_like(p, 0.1)
                if n == name and rates == "per_parameter":
                    alpha.view(-1)[place] += sign * 1e-4
                elif n == name and step == place:
                    alpha += sign * 1e-4
                phi[n] = phi[n] - alpha * p.grad
        total += float(((functional_call(net, phi, episode.query.inputs.double()) - episode.query.targets) ** 2).mean())
    return total / 8


@pytest.mark.parametrize("model", [{}, {"tasks": "one_by_one", "order": 1, "rates": "per_step"}], ids=["vmap", "loop"])
def test_two_ranks(tmp_path, two_ranks, model):
    """Seven tasks: the ranks have unequal shares."""
    one, left = on_ranks(str(tmp_path / "one"), "MAML", 1, model, episodes=7)
    asked = {"folder": str(tmp_path), "kind": "MAML", "devices": 2, "model": model, "episodes": 7}
    for measured, found in two_ranks.run("tests.modules.episodes:on_ranks", **asked):
        assert measured == pytest.approx(one, rel=1e-4)
        for name, value in left.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["MAML", "Reptile"])
def test_a_rank_without_a_task(tmp_path, two_ranks, kind):
    """Five tasks, four a step, one a micro-batch and rank: of the last window the second rank has nothing."""
    asked = {"kind": kind, "model": {}, "episodes": 5, "a_step": 4, "accumulate": 2}
    one, left = on_ranks(str(tmp_path / "one"), devices=1, **asked)
    start = {f"model.{name}": p.detach() for name, p in mlp().named_parameters()}
    assert all(float((value - start[name]).abs().max()) > 1e-4 for name, value in left.items())
    for measured, found in two_ranks.run("tests.modules.episodes:on_ranks", folder=str(tmp_path), devices=2, **asked):
        assert measured == pytest.approx(one, rel=1e-4)
        for name, value in left.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("step", [2, 3])
def test_resume_is_exact(tmp_path, step):
    """From the middle of an epoch and from its end."""
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    data = {"batch_size": 2, "episodes": 12}
    options = {"max_steps": 6, "accumulate_grad_batches": 2}
    model = {"rates": "per_step", "optimizer": None}
    whole = module(**model)
    fit(tmp_path, whole, sines(**data), save, enable_checkpointing=True, **options)
    again = module(**model)
    made = trainer(tmp_path, limit_val_batches=0, max_epochs=3, **options)
    made.fit(again, sines(**data), ckpt_path=tmp_path / f"saved/step={step}.ckpt")
    assert not differing(dict(whole.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("how", ["at_once", "one_by_one"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("inner", ["all", "head"])
def test_in_mixed_precision_no_part_loses_its_gradient(tmp_path, how, order, inner):
    """A cast that was kept from a pass without a graph would cut the body off, silently."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        made = module(tasks=how, order=order, inner=inner)
        steps, _ = fit(tmp_path, made, sines(), max_steps=1, precision=precision)
        found.append(steps.gradients[0])
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).norm()) < 0.1 * float(gradient.norm()), name


class Pull(Callback):
    """What EWC does: a closed form added to the gradients, towards the start."""

    def on_fit_start(self, trainer, pl_module):
        star = {name: p.detach().clone() + 1 for name, p in pl_module.named_parameters()}

        class Edit:
            name = "pull"

            def edit_(self, parameters):
                for name, p in parameters.items():
                    p.grad.add_(0.5 * (p.detach() - star[name]))

        Attachment.of(pl_module).gradient_edit(Edit())


def images(rng, count):
    """Two classes of stripes, upright or lying, of 16 x 16 points."""
    x = rng.normal(size=(count, 8, 1, 16, 16))
    y = np.tile([0, 1, 0, 1, 0, 1, 0, 1], (count, 1))
    x[:, ::2, :, ::2] += 2
    x[:, 1::2, :, :, ::2] += 2
    return x[:, :4], y[:, :4], x[:, 4:], y[:, 4:]


def test_convolutions_to_the_second_order(tmp_path):
    """At once where `torch.vmap` can, else one by one; the gradient is that of a plain loop over the net."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ConvNet(2, image_size=16, channels=1, width=8)
    data = EpisodeData(tasks=f"{__name__}.images", episodes=3, batch_size=3, seed=0)
    expected = {}
    for episode in tasks(data):
        theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        loss = nn.functional.cross_entropy(functional_call(net, theta, episode.support.inputs), episode.support.targets)
        slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        phi = {name: p - 0.1 * slope for (name, p), slope in zip(theta.items(), slopes, strict=True)}
        loss = nn.functional.cross_entropy(functional_call(net, phi, episode.query.inputs), episode.query.targets)
        for name, slope in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
            expected[name] = expected.get(name, 0) + slope / 3
    for how in ("auto", "one_by_one"):
        steps, _ = fit(tmp_path, module(net=copy.deepcopy(net), steps=1, tasks=how), data, max_steps=1)
        for name, gradient in expected.items():
            torch.testing.assert_close(steps.gradients[0][f"model.{name}"], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_with_an_edit_of_gradients_and_clipping(tmp_path):
    steps, _ = fit(tmp_path, module(), sines(), Pull(), max_steps=1, gradient_clip_val=0.1)
    _, gradients = plain_loop(mlp(), tasks(sines()), order=2, steps=2, alpha=0.1)
    pulled = {name: gradient - 0.5 for name, gradient in gradients.items()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in pulled.values()))
    assert norm > 0.2
    for name, gradient in pulled.items():
        torch.testing.assert_close(steps.gradients[0][f"model.{name}"], gradient * 0.1 / norm, rtol=1e-4, atol=1e-6)


def test_one_task_s_graph_is_held_at_a_time(tmp_path):
    """When a task begins, nothing is left of those before."""
    made = module(tasks="one_by_one")
    original, alive = made._task, []

    def task(episode, *, transform):
        assert not [ref for ref in alive if ref() is not None]
        loss, hits = original(episode, transform=transform)
        alive.append(weakref.ref(loss))
        return loss, hits

    made._task = task
    fit(tmp_path, made, sines(), max_steps=1)
    assert len(alive) == 8


# ---- what is measured


def test_validation_adapts_under_inference_mode(tmp_path):
    """Each number by a loop over copies of the net, with torch's own optimizer."""
    made, data = module(eval_steps=[0, 3]), sines()
    _, runner = fit(tmp_path, made, data, max_steps=1, limit_val_batches=None, val_check_interval=1)
    values = {step: [] for step in (0, 2, 3)}
    for batch in data.val_dataloader():
        for episode in batch.episodes():
            net = mlp()
            net.load_state_dict(made.model.state_dict())
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for step in range(4):
                if step in values:
                    with torch.no_grad():
                        loss = nn.functional.mse_loss(net(episode.query.inputs), episode.query.targets)
                    values[step].append(float(loss))
                optimizer.zero_grad()
                nn.functional.mse_loss(net(episode.support.inputs), episode.support.targets).backward()
                optimizer.step()
    logged = {name: float(value) for name, value in runner.callback_metrics.items() if name.startswith("val/")}
    expected = {}
    for step, found in values.items():
        x = torch.tensor(found, dtype=torch.float64)
        half = 2.570582 * float(x.std()) / math.sqrt(len(found))  # Student, five degrees
        expected |= {f"val/step_{step}/loss": float(x.mean()), f"val/step_{step}/loss_ci95": half}
    expected |= {"val/loss": expected["val/step_2/loss"], "val/loss_ci95": expected["val/step_2/loss_ci95"]}
    assert len(values[0]) == 6 and logged == pytest.approx(expected, rel=1e-4)
    # The same one by one, and in a validation by itself.
    alone = module(eval_steps=[0, 3], tasks="one_by_one", net=made.model)
    (again,) = trainer(tmp_path, limit_val_batches=None).validate(alone, sines(val_batch_size=2), verbose=False)
    assert again == pytest.approx(expected, rel=1e-4)


def test_a_start_that_was_learned_adapts_better(tmp_path):
    """Fifty steps on sine waves: after two steps of adapting the loss is lower than it was."""
    losses = []
    for steps in (1, 50):
        made = module(optimizer=None, lr=1e-2, net=mlp(1))
        data = sines(batch_size=25, episodes=25 * steps, val_episodes=100)
        _, runner = fit(tmp_path, made, data, max_epochs=1, max_steps=-1, limit_val_batches=None)
        losses.append(float(runner.callback_metrics["val/loss"]))
    assert losses[1] < 0.9 * losses[0]
