"""Invariant 8: all that is trainable gets a gradient and is in train mode; nothing frozen gets one or changes a byte."""

import hashlib

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.functional.errors import Refusal
from lightning_ft.modules.sft import SFT
from lightning_ft.nn.registry import injected_layers
from tests.invariants import ground

WAYS = {
    "lora": lambda: [LoRA(r=2, dropout=0.1)],
    "dora": lambda: [LoRA(r=2, dora=True)],
    "lora and norms": lambda: [LoRA(r=2), Freeze(train=["*norm*"])],
    "last layer": lambda: [Freeze(train=["layers.1"])],
    "everything": lambda: [],
}


class Watch(Callback):
    """At each window: who lacks a gradient, who has one too many, and which trained parts are in eval mode."""

    def __init__(self):
        self.without, self.frozen, self.evaluating, self.windows = set(), set(), set(), 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.windows += 1
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                self.without.add(name)
            if not parameter.requires_grad and parameter.grad is not None:
                self.frozen.add(name)
        for name, part in pl_module.named_modules():
            if any(p.requires_grad for p in part._parameters.values() if p is not None) and not part.training:
                self.evaluating.add(name)
        for layer in injected_layers(pl_module).values():  # its dropout with it
            self.evaluating |= {f"{type(part).__name__}" for part in layer.modules() if not part.training}


def digest(module, names):
    found = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if name in names:
            found.update(name.encode() + str(parameter.dtype).encode())
            found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Frozen(Callback):
    """A digest of the frozen bytes as training begins."""

    def on_train_start(self, trainer, pl_module):
        self.names = {n for n, p in pl_module.named_parameters() if not p.requires_grad}
        self.before = digest(pl_module, self.names)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_and_modes(base, rows, cache, tmp_path, way, checkpointing):
    watch = Watch()
    module = ground.sft(base, gradient_checkpointing=checkpointing)
    run = ground.trainer(
        tmp_path, *WAYS[way](), watch, val_check_interval=2, limit_val_batches=2, limit_train_batches=6
    )
    run.fit(module, ground.data(rows, cache, val_fraction=0.2))
    assert watch.windows == 6
    assert not watch.without and not watch.frozen
    assert not watch.evaluating  # neither at first nor after a validation
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    assert trained and (way == "everything") == (len(trained) == len(list(module.parameters())))


@pytest.mark.parametrize("way", list(WAYS)[:-1])
@pytest.mark.parametrize(
    "dtype, precision",
    [("float32", "32-true"), ("bfloat16", "32-true"), ("float32", "bf16-mixed"), ("bfloat16", "bf16-true")],
)
def test_frozen_bytes_stay(base, rows, cache, tmp_path, way, dtype, precision):
    frozen = Frozen()
    module = ground.sft(base, base_dtype=dtype)
    run = ground.trainer(tmp_path, *WAYS[way](), frozen, precision=precision, limit_train_batches=3)
    run.fit(module, ground.data(rows, cache))
    assert len(frozen.names) >= 9 and digest(module, frozen.names) == frozen.before
    by_name = dict(module.named_parameters())
    assert {by_name[n].dtype for n in frozen.names if "norm" not in n} == {getattr(torch, dtype)}
    assert {p.dtype for p in by_name.values() if p.requires_grad} == {torch.float32}


def test_the_digest_sees_one_bit(base):
    module = ground.built(base)
    names = {n for n, _ in module.named_parameters()}
    before = digest(module, names)
    with torch.no_grad():
        next(module.parameters()).view(torch.uint8).view(-1)[5] ^= 1
    assert digest(module, names) != before


class Unused(SFT):
    """A user's module with a part that the loss does not touch."""

    def configure_model(self):
        first = self.model is None
        super().configure_model()
        if first:
            self.idle = torch.nn.Linear(2, 2)


def test_a_trainable_parameter_without_gradient_is_named(base, rows, cache, tmp_path):
    with pytest.raises(Refusal, match=r"2 trainable parameters got no gradient.*idle\.weight, idle\.bias.*Freeze them"):
        ground.trainer(tmp_path).fit(Unused(str(base), base_dtype="float32"), ground.data(rows, cache))


class Meddle(Callback):
    """Leaves a gradient on a frozen parameter."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameter = dict(pl_module.named_parameters())["model.model.norm.weight"]
        parameter.grad = torch.ones_like(parameter)


def test_a_frozen_parameter_with_a_gradient_is_named(base, rows, cache, tmp_path):
    with pytest.raises(Refusal, match=r"1 frozen parameters got a gradient: model\.model\.norm\.weight"):
        ground.trainer(tmp_path, LoRA(r=2), Meddle()).fit(ground.sft(base), ground.data(rows, cache))


def test_nothing_to_train_is_refused(base, rows, cache, tmp_path):
    with pytest.raises(Refusal, match="[Nn]othing is trainable"):
        ground.trainer(tmp_path, Freeze(freeze=["*"])).fit(ground.sft(base), ground.data(rows, cache))
