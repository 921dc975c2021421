"""EWC: the contract, the written-out penalty, what is kept from fit to fit, and what it composes with."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_ft import EWC, MAS, LoRA, Refusal, SynapticIntelligence
from lightning_ft.engine.anchors import Anchors
from lightning_ft.functional.quadratic_penalty import add_gradient_, penalty
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, chat_job, fit, loader, rows, state, trainer
from tests.engine.importances import loop

CASE = Case(EWC, small={"lam": 5.0}, idle={"lam": 0.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def exact(net):
    """The Fisher information of `rows` by a loop over examples and classes."""
    net = copy.deepcopy(net).double().eval()
    found = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for x in rows()[0].double():
        p = net.net(x[None])[0].softmax(-1).detach()
        for c in range(3):
            one = loop(net, [net.net(x[None])[0].log_softmax(-1)[c]])
            for name in found:
                found[name] += p[c] * one[name] / 16
    return found


def values(net):
    return {n: p.detach().clone() for n, p in net.named_parameters()}


class Gradients(pl.Callback):
    """Gradients as each step used them, and the weights before it."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, module):
        self.logged = []

        def read(*_):
            self.seen.append(({n: p.grad.clone() for n, p in module.named_parameters()}, self.before))

        trainer.optimizers[0].register_step_post_hook(read)

    def on_train_batch_start(self, trainer, module, *_):
        self.before = values(module)

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def plain_gradients(weights, index):
    net = PlainNet()
    net.load_state_dict(weights)
    batch = list(loader())[index]
    net.training_step(batch, 0).backward()
    return {n: p.grad for n, p in net.named_parameters()}


# -- the penalty ----------------------------------------------------------------------------------------------------------


def test_by_hand():
    """theta (3, 1), theta* (1, 1), F (2, 5), lam 10: 10/2 * 2 * 4 = 40, gradient (10 * 2 * 2, 0)."""
    theta, star, importance = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 5.0])
    assert float(penalty(theta, star, importance, 10.0)) == 40.0
    assert add_gradient_(torch.tensor([1.0, 1.0]), theta, star, importance, 10.0).tolist() == [41.0, 1.0]


def several(tasks, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return {n: scale * torch.randn(4, 3, generator=generator, dtype=torch.float64) for n in "ab"}

    return [({n: v.square() * (v > -0.5) for n, v in draw().items()}, draw()) for _ in range(tasks)], draw()


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_value_and_gradient_are_those_of_the_written_out_penalty(mode):
    """Trap 7: separate tasks have optima of their own, online EWC only the last one, and old importances fade."""
    tasks, theta = several(4)
    anchors, gamma, lam = Anchors(), 0.7, 3.0
    for importance, star in tasks:
        if mode == "separate":
            anchors.merge(importance, star)
        else:
            anchors.move(importance, star, gamma)
    parameters = {n: nn.Parameter(v) for n, v in theta.items()}
    total = torch.zeros((), dtype=torch.float64)
    for k, (importance, star) in enumerate(tasks):
        for name, p in parameters.items():
            factor = 1.0 if mode == "separate" else gamma ** (len(tasks) - 1 - k)
            center = star[name] if mode == "separate" else tasks[-1][1][name]
            for f, t, c in zip(importance[name].flatten(), p.flatten(), center.flatten(), strict=True):
                total = total + lam / 2 * factor * f * (t - c) ** 2
    expected = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    assert anchors.value(parameters, lam) == pytest.approx(total.item(), rel=1e-9)
    anchors.add_gradients_(parameters, lam)
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_at_the_optimum_there_is_exactly_nothing():
    (importance, star), *_ = several(1)[0]
    for how in ("merge", "move"):
        anchors = Anchors()
        anchors.merge(importance, star) if how == "merge" else anchors.move(importance, star, 1.0)
        parameters = {n: nn.Parameter(v.clone()) for n, v in star.items()}
        anchors.add_gradients_(parameters, 1e6)
        assert anchors.value(parameters, 1e6) == 0.0
        assert all(not p.grad.any() for p in parameters.values())


# -- from fit to fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_the_second_fit_is_held_to_the_first_by_the_closed_form(mode, tmp_path):
    """Also under clipping, which comes after; the first fit is that without it (trap 7: no penalty in the first task)."""
    first, alone = PlainNet(), PlainNet()
    technique, watch = EWC(4.0, labels="all", mode=mode), Gradients()
    fit(tmp_path, first, technique)
    fit(tmp_path, alone)
    assert all(torch.equal(v, state(alone)[n]) for n, v in state(first).items())
    star, information = values(first), exact(first)
    run = trainer(tmp_path, technique, watch, gradient_clip_val=1e6, log_every_n_steps=1)
    run.fit(first, loader(), loader())
    assert len(watch.seen) == 3
    for index, (grads, weights) in enumerate(watch.seen):
        plain = plain_gradients(weights, index)
        value = 0.0
        for name, grad in grads.items():
            away = weights[name].double() - star[name].double()
            added = 4.0 * information[name] * away
            value += float(2.0 * (information[name] * away**2).sum())
            torch.testing.assert_close(grad.double(), plain[name].double() + added, rtol=1e-5, atol=1e-6)
        assert watch.logged[index]["train/ewc"] == pytest.approx(value, rel=1e-4, abs=1e-8)
    third = {"separate": 2, "online": 2}[mode]
    assert technique.state_dict()["next"]["tasks"] == third


def last(folder, **more):
    return ModelCheckpoint(folder / "files", save_last=True, save_top_k=0, **more)


@pytest.mark.parametrize("how", ["epoch", "steps", "stopped", "validated"])
def test_a_file_holds_what_was_measured_however_the_fit_ended(how, tmp_path):
    options = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True}
    callbacks = [EWC(4.0), last(tmp_path)]
    if how == "steps":
        options["max_steps"] = 6
    if how == "stopped":
        options["max_epochs"] = 9
        callbacks.append(EarlyStopping("val/loss", patience=1, min_delta=100.0))
    if how == "validated":
        options["val_check_interval"] = 0.5
    net = PlainNet()
    fit(tmp_path, net, *callbacks, **options)
    held = torch.load(tmp_path / "files" / "last.ckpt", weights_only=True)["callbacks"]["EWC[ewc]"]["next"]
    assert held["tasks"] == 1
    assert all(torch.equal(v, state(net)[n]) for n, v in held["center"].items())
    again, watch = EWC(4.0, load_from=str(tmp_path / "files" / "last.ckpt")), Gradients()
    other = PlainNet()
    other.load_state_dict(state(net))
    fit(tmp_path, other, again, watch)
    fit(tmp_path, net, callbacks[0])
    assert all(torch.equal(v, state(other)[n]) for n, v in state(net).items()), (
        "load_from is the same callback's memory"
    )
    assert again.resolved_arguments()["load_from"] is None


def test_a_link_to_another_file_is_not_followed(tmp_path):
    """The best file is of an earlier epoch: it stays as it was, and the last one becomes a file of its own."""
    keep = ModelCheckpoint(
        tmp_path / "files", filename="{epoch}", monitor="val/loss", mode="min", save_last="link", every_n_epochs=1
    )

    class Rising(PlainNet):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

    class Stops(pl.Callback):
        def on_validation_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 1

    net = Rising()
    fit(tmp_path, net, EWC(4.0), Stops(), keep, max_steps=-1, max_epochs=9, enable_checkpointing=True)
    best, end = Path(keep.best_model_path), Path(keep.last_model_path)
    assert end.is_file() and not end.is_symlink() and best.resolve() != end.resolve()
    first, after = (torch.load(file, weights_only=True) for file in (best, end))
    assert first["epoch"] == 0 and not first["callbacks"].get("EWC[ewc]", {}).get("next")
    assert after["callbacks"]["EWC[ewc]"]["next"]["tasks"] == 1


def test_rows_without_an_end_are_refused_before_the_first_step(chat, tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from zip(*rows(), strict=True)

    endless = DataLoader(Endless(), batch_size=4)
    net, start = PlainNet(), state(PlainNet())
    with pytest.raises(Refusal, match=r"EWC goes over the rows .* does not say how many batches .*limit_train_batches"):
        trainer(tmp_path, EWC(4.0)).fit(net, endless, loader())
    assert all(torch.equal(v, start[n]) for n, v in state(net).items())
    for technique, limit in ((EWC(4.0, importance="uniform"), {}), (EWC(4.0), {"limit_train_batches": 4})):
        trainer(tmp_path, technique, **limit).fit(PlainNet(), endless, loader())
        assert technique.state_dict()["next"]["tasks"] >= 1
    module, data = chat_job(chat, tmp_path, data={"streaming": True})
    with pytest.raises(Refusal, match=r"EWC goes over the rows .* are streamed .*streaming false"):
        trainer(tmp_path, EWC(4.0), use_distributed_sampler=False).fit(module, data)
    assert not hasattr(module, "model") or module.model is None, "before the model is loaded"


def test_a_longer_run_that_resumes_is_the_unbroken_one(tmp_path):
    """What a finished fit has measured is for the next fit, not for the same one that goes on."""
    options = {"max_steps": -1, "enable_checkpointing": True}
    held = EWC(4.0, labels="all")
    fit(tmp_path, PlainNet(), held, max_epochs=1)  # so that there is a penalty in the run that is broken
    states = []
    for epochs, resume in ((4, None), (2, None), (4, "last.ckpt")):
        technique, folder = EWC(4.0, labels="all"), tmp_path / ("whole" if epochs == 4 and not resume else "broken")
        if resume is None:
            technique.load_state_dict(copy.deepcopy(held.state_dict()))
        net = PlainNet()
        run = trainer(tmp_path, technique, last(folder), max_epochs=epochs, **options)
        run.fit(net, loader(), loader(), ckpt_path=folder / "files" / resume if resume else None)
        states.append((state(net), technique.state_dict()))
    (whole, kept), _, (resumed, kept_again) = states
    assert all(torch.equal(v, resumed[n]) for n, v in whole.items())
    for part in ("held", "next"):
        for what in ("importance", "center"):
            assert all(torch.equal(v, kept_again[part][what][n]) for n, v in kept[part][what].items())


def test_uniform_importances_hold_to_the_start(tmp_path):
    """L2-SP: a gradient of lam (theta - theta_0) from the first step on."""
    net, watch = PlainNet(), Gradients()
    start = values(net)
    fit(tmp_path, net, EWC(0.3, importance="uniform"), watch)
    for index, (grads, weights) in enumerate(watch.seen):
        plain = plain_gradients(weights, index)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, plain[name] + 0.3 * (weights[name] - start[name]), rtol=1e-5, atol=1e-6)


# -- what is refused --------------------------------------------------------------------------------------------------------


def test_other_trained_parts_than_were_measured_are_refused(tmp_path):
    """Trap 5: only what is trained is held; another choice of it invalidates what was measured."""
    technique = EWC(4.0)
    fit(tmp_path, PlainNet(), technique, LoRA(2))
    assert all(".lora_" in name for name in technique.state_dict()["next"]["importance"])
    before = copy.deepcopy(technique.state_dict())
    with pytest.raises(
        Refusal, match=r"EWC holds the values of .*lora_A, which is not trained now.*same parts in every task"
    ):
        fit(tmp_path, PlainNet(), technique)
    for adapter, words in (
        (LoRA(3), r"was measured on .* of shape \(2, 4\), which now has \(3, 4\); use the same rank"),
        (LoRA(2, modules_to_save=["net.2"]), r"EWC knows nothing of net.2.\w+, which is trained now"),
    ):
        fresh = EWC(4.0)
        fresh.load_state_dict(copy.deepcopy(before))
        with pytest.raises(Refusal, match=words):
            fit(tmp_path, PlainNet(), fresh, adapter)


def test_a_file_without_its_state_is_refused(tmp_path):
    fit(tmp_path, PlainNet(), last(tmp_path), LoRA(2), enable_checkpointing=True)
    with pytest.raises(Refusal, match="EWC.load_from names nowhere.ckpt, which does not exist"):
        fit(tmp_path, PlainNet(), EWC(load_from="nowhere.ckpt"))
    with pytest.raises(
        Refusal, match="which holds no importances of EWC; give a checkpoint that was saved after a task"
    ):
        fit(tmp_path, PlainNet(), EWC(load_from=str(tmp_path / "files" / "last.ckpt")), LoRA(2))


# -- language models, quantised bases, several ranks ---------------------------------------------------------------------


PENALTIES = {"ewc": lambda: EWC(50.0), "si": lambda: SynapticIntelligence(5.0, xi=1e-2), "mas": lambda: MAS(0.1)}


def two_fits(chat, folder, techniques, strategy=None, model=None, kinds=("ewc",), **data):
    """Two fits of the tiny chat model with penalties: what is held to, and how far the second one went."""
    from lightning_ft.engine.strategies import FSDP2Strategy
    from tests.engine.importances import whole

    penalties = {kind: PENALTIES[kind]() for kind in kinds}
    options = {"max_steps": 2, "limit_val_batches": 0, "use_distributed_sampler": False}
    module, source = chat_job(Path(chat), Path(folder), model=model or {}, data=data)
    for _ in range(2):
        if strategy:
            options |= {"devices": 2, "strategy": FSDP2Strategy() if strategy == "fsdp2" else strategy}
        trainer(Path(folder), *penalties.values(), *techniques(), **options).fit(module, source)
    held = {kind: technique._held for kind, technique in penalties.items()}
    return {
        "importance": {f"{kind} {n}": v for kind, one in held.items() for n, v in whole(one.importance).items()},
        "center": {f"{kind} {n}": v for kind, one in held.items() for n, v in whole(one.center).items()},
        "kinds": {type(v).__name__ for one in held.values() for v in one.importance.values()},
        "after": whole({n: p for n, p in module.named_parameters() if p.requires_grad}),
    }


def lora():
    return [LoRA(2)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_what_one_does(strategy, chat, tmp_path, two_ranks):
    """All three kinds of importances at once: sampled Fisher, path integral and sensitivity."""
    job = {"chat": str(chat), "folder": str(tmp_path), "techniques": lora, "kinds": tuple(PENALTIES)}
    both = two_ranks.run("tests.callbacks.test_ewc:two_fits", **job, strategy=strategy, batch_size=4)
    one = two_fits(**job, batch_size=8)
    for kind in PENALTIES:
        assert max(float(v.max()) for n, v in one["importance"].items() if n.startswith(kind)) > 1e-3, kind
    for rank in both:
        assert rank["kinds"] == {"DTensor" if strategy == "fsdp2" else "Tensor"}
        for what in ("importance", "center", "after"):
            for name, value in one[what].items():
                torch.testing.assert_close(rank[what][name], value, rtol=1e-3, atol=1e-5, msg=f"{what} {name}")


def test_lora_on_a_packed_base(chat, tmp_path):
    pytest.importorskip("bitsandbytes")
    found = two_fits(str(chat), str(tmp_path), lora, model={"quantize": "nf4"})
    assert found["importance"] and all(".lora_" in name for name in found["importance"])
    assert any(v.any() for n, v in found["importance"].items() if n.endswith("lora_B"))


def test_the_information_of_a_fresh_adapter_s_inner_factor_is_zero(tmp_path):
    """While B is zero A has no say: never measure before training."""
    technique = EWC(4.0, labels="all")
    net = PlainNet()
    fit(tmp_path, net, technique, LoRA(2), max_steps=1)
    importance = technique.state_dict()["next"]["importance"]
    fresh = EWC(4.0, labels="all")
    still = PlainNet()
    still.configure_optimizers = lambda: torch.optim.SGD([p for p in still.parameters() if p.requires_grad], lr=0.0)
    fit(tmp_path, still, fresh, LoRA(2), max_steps=1)
    untrained = fresh.state_dict()["next"]["importance"]
    assert all(not v.any() for n, v in untrained.items() if n.endswith("lora_A"))
    assert all(v.any() for n, v in importance.items())
