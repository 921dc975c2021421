"""Invariant 9: what cannot work together is refused at setup, with the reason and the fix; never a warning."""

import importlib
import pkgutil
import warnings
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, DeepSpeedPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

import lightning_ft.callbacks
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.callbacks.samples import SampleGenerations
from lightning_ft.engine import compatibility
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal
from tests.invariants import ground


class LossEdit(Technique):
    """The smallest technique with a loss term."""

    traits = Traits(slot="loss_edit", edits=frozenset({"loss"}))

    def register(self, attachment):
        raise AssertionError("refused too late: registered already")


class Plain(LightningModule):
    """A user's own."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Iterates(Plain):
    def training_step(self, dataloader_iter):
        return None


def stub(strategy, **more):
    """What a Trainer is to the rules, for strategies that this machine cannot run."""
    facts = {"world_size": 1, "checkpoint_callbacks": [], "accumulate_grad_batches": 1, "callbacks": []}
    return SimpleNamespace(strategy=strategy, **{**facts, **more})


class Quantised(Plain):
    """As a module of ours says it."""

    quantize = "nf4"


class Packed(Plain):
    """A user's own, with a weight that is stored as integers."""

    def __init__(self):
        super().__init__()
        self.net.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)


class Episodes(Plain):
    """As a module of ours says it."""

    learns_from_episodes = True


def scaling(_):
    strategy = DDPStrategy()
    strategy._precision_plugin = object.__new__(MixedPrecision)  # its constructor wants a GPU for fp16
    strategy._precision_plugin.precision = "16-mixed"
    strategy._precision_plugin.scaler = object()
    return stub(strategy)


def packing_plugin(_):
    strategy = DDPStrategy()
    strategy._precision_plugin = object.__new__(BitsandbytesPrecision)  # its constructor wants CUDA's library
    return stub(strategy)


def deepspeed():
    strategy = object.__new__(DeepSpeedStrategy)  # the package itself is not needed to be refused
    strategy._precision_plugin = object.__new__(DeepSpeedPrecision)
    strategy._start_method = "popen"
    return stub(strategy)


def timed(tmp_path):
    saver = ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=1))
    return stub(DDPStrategy(), world_size=2, checkpoint_callbacks=[saver], accumulate_grad_batches=2)


def real(**options):
    return ground.trainer(".", **options)


# words of the rule -> (a trainer, a module, a technique)
CASES = {
    "deepspeed": (lambda _: deepspeed(), Plain, LoRA),
    "fsdp1": (lambda _: stub(FSDPStrategy()), Plain, LoRA),
    "spawn": (lambda _: real(strategy="ddp_spawn", devices=2), Plain, LoRA),
    "tensor_parallel": (lambda _: stub(ModelParallelStrategy(tensor_parallel_size=2)), Plain, LoRA),
    "stock_fsdp2_files": (lambda _: stub(ModelParallelStrategy()), Plain, LoRA),
    "fsdp2+quantised": (lambda _: stub(FSDP2Strategy()), Quantised, LoRA),
    "episodes+fsdp2": (lambda _: stub(FSDP2Strategy()), Episodes, LoRA),
    "episodes+fp16": (scaling, Episodes, LoRA),
    "bitsandbytes_precision": (packing_plugin, Plain, LoRA),
    "weight_averaging": (lambda _: stub(DDPStrategy(), callbacks=[EMAWeightAveraging()]), Plain, LoRA),
    "manual_optimization": (lambda _: real(), Manual, LossEdit),
    "dataloader_iter": (lambda _: real(), Iterates, LossEdit),
    "time_saves_in_window": (timed, Plain, LoRA),
}


def test_every_rule_has_a_case_here():
    assert {"+".join(sorted(rule.words)) for rule in compatibility.RULES} == set(CASES)
    assert all(rule.words <= compatibility.WORDS.keys() for rule in compatibility.RULES)


@pytest.mark.parametrize("words", CASES)
def test_each_rule_is_refused_at_setup_with_reason_and_fix(words, tmp_path):
    make, kind, technique = CASES[words]
    (rule,) = [r for r in compatibility.RULES if "+".join(sorted(r.words)) == words]
    trainer, module = make(tmp_path), kind()
    trainer.callbacks.append(technique())
    before = dict(vars(module))
    with pytest.raises(Refusal) as refused:
        trainer.callbacks[-1].setup(trainer, module, "fit")
    said = " and ".join(compatibility.WORDS[word] for word in sorted(rule.words))
    who = technique.__name__ if rule.edits else f"({technique.__name__}|lightning_ft)"
    assert refused.match(f"^{who} cannot work with ")
    assert f"{said}, because {rule.why}; {rule.fix}." in str(refused.value)
    after = {key: value for key, value in vars(module).items() if key != "_lightning_ft_attachment"}
    assert after == before  # nothing was wrapped or edited


@pytest.mark.parametrize("words", [words for words, (*_, technique) in CASES.items() if technique is LossEdit])
def test_a_rule_for_some_techniques_lets_the_others_pass(words, tmp_path):
    make, kind, _ = CASES[words]
    compatibility.check([LoRA()], compatibility.situation(make(tmp_path), kind()))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}])
def test_what_works_passes(options):
    compatibility.check([LoRA(), LossEdit()], compatibility.situation(real(**options), Plain()))


def test_packed_weights_are_seen_wherever_they_come_from():
    where = compatibility.situation(stub(FSDP2Strategy()), Packed())
    assert {"fsdp2", "quantised"} <= where.words
    assert "quantised" not in compatibility.situation(stub(FSDP2Strategy()), Plain()).words
    with pytest.raises(Refusal, match="FSDP2 and a quantised base, because .* use ddp, or FSDP2 without quantize"):
        compatibility.check_packed_for_fsdp2(Packed())  # those that configure_model has packed
    compatibility.check_packed_for_fsdp2(Plain())


def test_lightnings_plugin_would_thaw_frozen_biases():
    """Why it is refused: it makes new layers once techniques have frozen and wrapped the old ones."""
    pytest.importorskip("bitsandbytes")
    from lightning.fabric.plugins.precision import bitsandbytes as plugin

    with warnings.catch_warnings():  # it adds filters
        plugin._import_bitsandbytes()
    module = Plain()
    Attachment.of(module).rebuild([LoRA(2)], seed=0)
    assert not module.net.base.bias.requires_grad
    plugin._convert_layers(module, type("Packing", (torch.nn.Linear,), {}), set())
    assert module.net.base.bias.requires_grad


def techniques():
    for found in pkgutil.iter_modules(lightning_ft.callbacks.__path__, "lightning_ft.callbacks."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, type) and issubclass(value, Technique) and value.__module__ == found.name:
                yield value


def declared():
    return [(kind, cannot) for kind in techniques() for cannot in kind.traits.cannot]


@pytest.mark.parametrize("kind, cannot", declared(), ids=lambda value: getattr(value, "meets", None))
def test_what_a_technique_declares_is_refused(kind, cannot):
    technique = object.__new__(kind)
    technique.name = None
    others = []
    if cannot.meets not in compatibility.WORDS:  # the slot of another technique
        other = LossEdit()
        other.traits = replace(LossEdit.traits, slot=cannot.meets)
        others = [other]
    where = compatibility.Situation(frozenset({cannot.meets}))
    with pytest.raises(Refusal, match=f"^{kind.__name__} cannot work with ") as refused:
        compatibility.check([technique, *others], where)
    assert f"because {cannot.why}; {cannot.fix}." in str(refused.value)
    compatibility.check([technique], compatibility.Situation(frozenset()))


def test_the_table_for_the_docs_lists_them_all():
    rows = compatibility.table(list(techniques()))
    assert len(rows) == len(compatibility.RULES) + len(declared())
    assert all(len(row) == 4 and all(row) for row in rows)


def test_two_of_one_name(base, rows, cache, tmp_path):
    run = ground.trainer(tmp_path, LoRA(2, target=["q_proj"]), LoRA(2, target=["v_proj"]))
    module = ground.sft(base)
    with pytest.raises(Refusal, match="Two LoRA callbacks are both named 'default'; give one of them another name"):
        run.fit(module, ground.data(rows, cache))
    assert module.model is None  # before anything was loaded
    names = LoRA(2, target=["q_proj"]), LoRA(2, target=["v_proj"], name="second")
    ground.trainer(tmp_path, *names, max_steps=1).fit(ground.sft(base), ground.data(rows, cache))


def test_a_technique_that_needs_what_the_module_lacks(tmp_path):
    module = Plain()
    with pytest.raises(Refusal, match="SampleGenerations needs a module with generate.*leave the callback out"):
        run = ground.trainer(tmp_path, SampleGenerations(["a"]))
        run.callbacks[0].setup(run, module, "fit")


def test_a_refusal_leaves_the_module_as_it_was(base, rows, cache, tmp_path):
    module = ground.sft(base)
    before = set(vars(module))
    with pytest.raises(Refusal):
        ground.trainer(tmp_path, LoRA(name="a"), LoRA(name="a")).fit(module, ground.data(rows, cache))
    assert set(vars(module)) - before <= {"_lightning_ft_attachment", "_hparams"}  # the latter is Lightning's
    assert not Attachment.of(module)._installed
    run = ground.trainer(tmp_path, LoRA(2), max_steps=1)
    run.fit(module, ground.data(rows, cache))  # and it still trains
    assert isinstance(run, Trainer) and run.global_step == 1
