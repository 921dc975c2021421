"""The attachment in a Trainer: order, users' own modules, tuners, exceptions, second fits, what is refused."""

from __future__ import annotations

import random
from copy import deepcopy
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.terms import Term
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import injected_layers
from tests.seams import toy
from tests.seams.parts import Decay, Noise, Small
from tests.seams.toy import Data, Module, Net, Shape
from tests.tolerances import TOL

WRAPPED = ("configure_model", "training_step", "backward", "on_before_optimizer_step")
WRAPPED += ("on_save_checkpoint", "on_load_checkpoint")


# The order of the callback list


def test_the_order_of_callbacks_never_matters(tmp_path) -> None:
    ends = []
    for order in list(permutations(range(5)))[::5]:  # 24 of the 120
        parts = [LoRA(2, target=["first"], dropout=0.3), Freeze(["norm"]), Decay(), Small(), Noise()]
        run = toy.fit(Module(), Data(8), Shape(8), str(tmp_path), [parts[i] for i in order], max_steps=2)
        ends.append(run.weights)
    for weights in ends[1:]:
        toy.assert_same(weights, ends[0])
    assert len(ends) == 24 and not torch.equal(ends[0]["net.norm.weight"], Net().norm.weight)


# A user's own LightningModule


class Own(LightningModule):
    """Somebody's classifier: a mean loss, a plain DataLoader, nothing of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.lr = toy.RATE

    def loss(self, batch: Any) -> torch.Tensor:
        ids, labels = batch
        return cross_entropy(self.net(ids), labels)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class BatchOnly(Own):
    def training_step(self, batch):
        return self.loss(batch)


class DefaultIndex(Own):
    def training_step(self, batch, batch_idx=0):
        assert batch_idx < 4
        return self.loss(batch)


class Star(Own):
    def training_step(self, *args):
        return self.loss(args[0])


class Dictionary(Own):
    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch), "kept": batch_idx}


class Nothing(Own):
    def training_step(self, batch, batch_idx):
        return None


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(toy.V, (2, 12), generator=generator)
    return DataLoader(list(zip(ids, labels, strict=True)), batch_size=4)


def fit(module: LightningModule, *parts: Callback, shape: Shape | None = None, **options: Any) -> Trainer:
    trainer = toy.trainer_of(shape or Shape(4), parts, **{"max_epochs": 1, **options})
    trainer.fit(module, loader())
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class TestOwnModule:
    @pytest.mark.parametrize("kind", [Own, BatchOnly, DefaultIndex, Star, Dictionary])
    def test_its_step_keeps_lightning_s_mean_and_terms_are_added(self, kind: type[Own]) -> None:
        module = kind()
        seen: list[Any] = []

        class Look(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
                seen.append((outputs, dict(trainer.logged_metrics)))

        fit(module, Small(), Decay(), Look(), shape=Shape(4, 2))
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=toy.RATE)
        batches = list(loader())
        for window in (batches[:2], batches[2:]):
            optimizer.zero_grad()
            for ids, labels in window:
                small = sum(p.square().sum() for p in net.parameters())
                ((cross_entropy(net(ids), labels) + 0.5 * small) / 2).backward()
            for parameter in net.parameters():
                parameter.grad += 0.1 * parameter.detach()
            optimizer.step()
        wanted = {f"net.{n}": v for n, v in net.state_dict().items()}
        toy.assert_close(toy.weights_of(module), wanted, TOL[torch.float64])
        assert "train/small" in seen[-1][1] and "train/loss" not in seen[-1][1]
        if kind is Dictionary:
            assert seen[1][0]["kept"] == 1

    def test_a_step_without_a_loss_leaves_the_terms(self) -> None:
        module = Nothing()
        fit(module, Small())
        with torch.no_grad():
            factor = (1 - toy.RATE) ** 3  # the gradient of half a squared norm is the parameter
            toy.assert_close(
                toy.weights_of(module), {f"net.{n}": factor * v for n, v in Net().state_dict().items()}, 1e-10
            )

    def test_it_trains_as_without_us_when_nothing_is_added(self) -> None:
        bare, ours = Own(), Own()
        fit(bare)
        fit(ours, Freeze(freeze=["embed"], name="a"))
        other = Own()
        other.net.embed.requires_grad_(False)
        fit(other)
        toy.assert_same(toy.weights_of(ours), toy.weights_of(other))
        assert not torch.equal(bare.net.embed.weight, ours.net.embed.weight)

    def test_its_own_hooks_still_run(self) -> None:
        class Hooked(Own):
            def configure_model(self):
                self.called = [*getattr(self, "called", []), "configure_model"]

            def on_before_optimizer_step(self, optimizer):
                self.called.append("on_before_optimizer_step")

        module = Hooked()
        fit(module, LoRA(2, target=["first"]))
        assert module.called == ["configure_model"] + ["on_before_optimizer_step"] * 3

    def test_one_that_rebuilds_its_net_is_refused(self) -> None:
        class Rebuilt(Own):
            def configure_model(self):
                self.net = Net()

        module = Rebuilt()
        fit(module, LoRA(2, target=["first"]))
        with pytest.raises(Refusal, match=r"lost injected layers such as net\.first"):
            fit(module, LoRA(2, target=["first"]))

    def test_two_terms_of_one_name_are_refused(self) -> None:
        class Twice(Small):
            traits = deepcopy(Small.traits)

            def register(self, attachment):
                attachment.loss_term("small", self.term)
                attachment.loss_term("small", self.term)

        with pytest.raises(Refusal, match="Two loss terms are named 'small'"):
            fit(Own(), Twice())

    @pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # Lightning's, before we put the trained ones right
    def test_a_net_in_eval_mode_is_trained_in_train_mode_where_it_is_trained(self) -> None:
        module = Own()
        module.net.eval()
        fit(module, Freeze(["norm"]))
        assert module.net.norm.training and not module.net.first.training


# Tuners take the callback list away


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class TestTuner:
    def test_lr_find_runs_the_whole_pipeline_and_leaves_the_start(self, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        module, decay = Own(), Decay()
        trainer = toy.trainer_of(Shape(4, 2), [decay, LoRA(2, target=["first"]), Small()], default_root_dir=tmp_path)
        before = Net().state_dict()
        Tuner(trainer).lr_find(module, loader(), num_training=4, update_attr=False)
        assert decay.calls == 4
        base = {n.replace(".base", ""): v for n, v in module.net.state_dict().items() if "lora" not in n}
        toy.assert_same(base, before)
        assert not module.net.first.lora_B.any()
        assert not set(WRAPPED) & set(module.__dict__)
        trainer.fit(module, loader())
        assert bool(module.net.first.lora_B.any())

    def test_lr_find_divides_sums_as_the_fit_does(self, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        module, decay = Module(), Decay()
        module.lr = toy.RATE
        trainer = toy.trainer_of(Shape(2, 4), [decay], default_root_dir=tmp_path)
        Tuner(trainer).lr_find(module, datamodule=Data(2), num_training=2, update_attr=False)
        first = decay.norms[0]
        decay.norms.clear()
        trainer.fit(module, datamodule=Data(2))
        assert decay.norms[0] == pytest.approx(first, rel=1e-12)

    def test_a_rate_finder_inside_a_fit_changes_nothing_after_it(self, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)

        class Fixed(Own):
            def configure_optimizers(self):
                return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=toy.RATE)

        with_finder, without = Fixed(), Fixed()
        fit(with_finder, Freeze(["norm", "head"]), Small(), LearningRateFinder(num_training_steps=4, update_attr=False))
        fit(without, Freeze(["norm", "head"]), Small())
        toy.assert_same(toy.weights_of(with_finder), toy.weights_of(without))


# What is left behind


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


class Trouble(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        raise RuntimeError("trouble")


@pytest.mark.parametrize("trouble", [False, True])
def test_no_wrapper_generator_or_flag_is_left(trouble: bool, tmp_path) -> None:
    module = Module()

    def own(checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1

    object.__setattr__(module, "on_save_checkpoint", own)
    module.strict_loading = None
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    before = states()
    trainer = toy.trainer_of(Shape(8), [LoRA(2, target=["first"]), Small(), *([Trouble()] if trouble else [])])
    plugin = trainer.strategy.checkpoint_io
    if trouble:
        with pytest.raises(RuntimeError, match="trouble"):
            trainer.fit(module, datamodule=Data(8))
    else:
        trainer.fit(module, datamodule=Data(8))
    assert states() == before
    assert module._strict_loading is None and module.on_save_checkpoint is own
    assert not (set(WRAPPED) - {"on_save_checkpoint"}) & set(module.__dict__)
    assert trainer.strategy.checkpoint_io is plugin
    assert set(injected_layers(module)) == {"net.first"}  # what was trained stays
    toy.fit(module, Data(8), Shape(8), str(tmp_path), [LoRA(2, target=["first"])])  # and another fit works


def test_fit_may_follow_fit_and_validation(tmp_path) -> None:
    module = Module()
    for _ in range(2):
        toy.fit(module, Data(8), Shape(8), str(tmp_path), [LoRA(2, target=["first"]), Freeze(["norm"])], max_epochs=1)
    assert set(injected_layers(module)) == {"net.first"}
    wanted = Module()
    parts = [LoRA(2, target=["first"]), Freeze(["norm"])]
    optimizer_restarts = toy.fit(wanted, Data(8), Shape(8), str(tmp_path), parts, max_epochs=1)
    before = optimizer_restarts.weights
    assert not torch.equal(before["net.norm.weight"], module.net.norm.weight)
    toy.fit(wanted, Data(8), Shape(8), str(tmp_path), parts, max_epochs=1)
    toy.assert_same(toy.weights_of(wanted), toy.weights_of(module))


def test_a_copy_of_the_module_gets_an_attachment_of_its_own() -> None:
    module = Module()
    first = Attachment.of(module)
    copy = deepcopy(module)
    assert Attachment.of(copy) is not first and Attachment.of(copy).module is copy and Attachment.of(module) is first


@pytest.mark.parametrize("watched", [False, True])
def test_gradients_of_the_last_window_are_gone_when_the_next_begins(watched: bool, tmp_path) -> None:
    """Not those of the window's own first half, and not where a hook may want to see them."""
    held, kept = [], []

    class Look(Callback):
        pass

    if watched:
        Look.on_before_zero_grad = lambda self, trainer, module, optimizer: kept.append(_has_gradients(module))

    class Held(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            held.append(_has_gradients(self))
            return super().training_step(batch, batch_idx)

    toy.fit(Held(), Data(4), Shape(4, 2), str(tmp_path), [Freeze(["norm"]), Look()], max_steps=2)
    assert held == [False, True, watched, True] and kept == ([False, True] if watched else [])


def _has_gradients(module: nn.Module) -> bool:
    return any(p.grad is not None for p in module.parameters())


# What is refused


def test_parameters_without_a_gradient_are_named() -> None:
    module = Module()
    module.net.spare = nn.Linear(2, 2)
    with pytest.raises(Refusal, match=r"2 trainable parameters got no gradient .*net\.spare\.weight, net\.spare\.bias"):
        toy.trainer_of(Shape(2, 4)).fit(module, datamodule=Data(2))
    module = Module()
    module.net.spare = nn.Linear(2, 2)
    Attachment.of(module)
    declared = Declared()
    toy.trainer_of(Shape(2, 4), [declared]).fit(module, datamodule=Data(2))


class Declared(Small):
    """Says that the spare layer may lack a gradient."""

    def register(self, attachment: Attachment) -> None:
        attachment.conditional({"net.spare.weight", "net.spare.bias"})


def test_nothing_trainable_is_refused() -> None:
    module = Module()
    module.requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(Refusal, match="Nothing is trainable"):
        toy.trainer_of(Shape(8)).fit(module, datamodule=Data(8))


def test_a_unit_that_the_loader_does_not_count_is_refused() -> None:
    def pairs(net: nn.Module, batch: Any) -> list[Term]:
        return [Term("pairs", net(batch.ids).sum(), 1.0, "pair")]

    with pytest.raises(Refusal, match=r"counts in pairs, but the loader only counted \['row', 'token'\]"):
        toy.trainer_of(Shape(8)).fit(Module(pairs), datamodule=Data(8))
