"""ExportAdapter: the contract, and what only it does."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

import lightning_ft
from lightning_ft import (
    IA3,
    BottleneckAdapter,
    Freeze,
    GradualUnfreezing,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Refusal,
    WeightEMA,
)
from lightning_ft.callbacks.export_adapter import ExportAdapter
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.formats.peft import export_peft
from tests.contract import Case, checks_for
from tests.contract.subjects import AdaptedNet, PlainNet, chat_job, fit, loader, trainer
from tests.modules import tasks

CASE = Case(ExportAdapter, small={"every": "validation"}, idle={"every": "validation"})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_it_is_what_export_writes_from_the_checkpoint_and_peft_gives_the_same_logits(chat, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module, data = chat_job(chat, tmp_path)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, LoRA(2), ExportAdapter(), keep, enable_checkpointing=True, max_steps=2).fit(module, data)
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    export_peft(loaded.model, tmp_path / "by_hand", base_model_name=loaded.base)
    assert same(tensors(tmp_path / "adapter"), tensors(tmp_path / "by_hand"))
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "by_hand")]
    assert configs[0] == configs[1] and configs[0]["base_model_name_or_path"] == str(chat / "model")
    base = AutoModelForCausalLM.from_pretrained(chat / "model", dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    bare = base(ids).logits
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    ours = module.model.eval()(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs, bare, atol=1e-3), "an adapter that does nothing would prove nothing"


class Scored(PlainNet):
    """Validations with given scores."""

    scores = (3.0, 1.0, 2.0)

    def validation_step(self, batch, batch_idx):
        self.log("val/score", self.scores[self.current_epoch])


@pytest.mark.parametrize(("mode", "best"), [("min", 1), ("max", 0)])
def test_only_the_best_validation_is_written(mode, best, tmp_path):
    seen = []

    class Watching(ExportAdapter):
        def _write(self, trainer, module):
            super()._write(trainer, module)
            seen.append(trainer.current_epoch)

    technique = Watching("validation", monitor="val/score", mode=mode)
    fit(tmp_path, Scored(), LoRA(2), technique, max_steps=12, max_epochs=3)
    assert seen[-1] == best and technique.state_dict() == {"best": Scored.scores[best]}
    plain = Watching("validation", name="each")
    seen.clear()
    fit(tmp_path, Scored(), LoRA(2), plain, max_steps=12, max_epochs=3)
    assert seen == [0, 1, 2] and (tmp_path / "each" / "adapter_config.json").is_file()


def test_a_resumed_run_compares_with_the_best_before(tmp_path):
    first = ExportAdapter("validation", monitor="val/score")
    fit(tmp_path, Scored(), LoRA(2), first, max_steps=-1, max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    held = tensors(tmp_path / "adapter")
    second = ExportAdapter("validation", monitor="val/score")
    run = trainer(tmp_path, LoRA(2), second, max_steps=-1, max_epochs=3)
    run.fit(Scored(), loader(), loader(), ckpt_path=tmp_path / "two.ckpt")
    assert run.global_step == 12 and second.state_dict() == {"best": 1.0}
    assert same(held, tensors(tmp_path / "adapter"))  # 2.0 is not below 1.0


@pytest.mark.parametrize("first", [True, False])
def test_beside_an_average_it_holds_the_averaged_factors(first, tmp_path):
    order = [ExportAdapter(), LoRA(2), WeightEMA(0.5)]
    net = PlainNet()
    fit(tmp_path, net, *(order if first else order[::-1]))
    export_peft(net, tmp_path / "by_hand")
    assert same(tensors(tmp_path / "adapter"), tensors(tmp_path / "by_hand"))
    plain = PlainNet()
    fit(tmp_path, plain, LoRA(2))
    export_peft(plain, tmp_path / "plain")
    assert not same(tensors(tmp_path / "adapter"), tensors(tmp_path / "plain"))


def test_what_cannot_be_exported_is_refused_before_a_step(tmp_path):
    moved = PlainNet()
    before = moved.net[0].weight.detach().clone()
    with pytest.raises(Refusal, match=r"ExportAdapter found no adapter named 'default' \(there are none\); train one"):
        fit(tmp_path, moved, ExportAdapter())
    assert torch.equal(moved.net[0].weight, before)
    with pytest.raises(Refusal, match=r"no adapter named 'other' \(there are \['default'\]\)"):
        fit(tmp_path, AdaptedNet(), ExportAdapter(adapter="other"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(Refusal, match=r"ExportAdapter.output .*full already holds something that is no adapter"):
        fit(tmp_path, AdaptedNet(), ExportAdapter(output=str(tmp_path / "full")))
    with pytest.raises(Refusal, match="ExportAdapter.monitor is 'val/loss', but at the end of a fit"):
        ExportAdapter(monitor="val/loss")
    with pytest.raises(
        Refusal, match="ExportAdapter.monitor names 'val/los', which was not logged; there are .*val/loss"
    ):
        fit(tmp_path, AdaptedNet(), ExportAdapter("validation", monitor="val/los"), max_steps=4)


KINDS = {
    "adapter": lambda: BottleneckAdapter("pfeiffer", reduction_factor=4.0),
    "ia3": IA3,
    "prefix": lambda: PrefixTuning(3),
    "prompt": lambda: PromptTuning(3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_in_its_own_format_with_the_checkpoints_values(kind, chat, tmp_path):
    module, data = chat_job(chat, tmp_path, model={"lr": 0.05})
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, KINDS[kind](), ExportAdapter(), keep, enable_checkpointing=True, max_steps=2).fit(module, data)
    folder = tmp_path / "adapter"
    again, data = chat_job(chat, tmp_path)
    start = type(KINDS[kind]())(init_from=str(folder))
    trainer(tmp_path, start, max_steps=0).fit(again, data)
    ids = torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    expected = loaded.model(ids).logits
    assert torch.equal(again.model.eval()(ids).logits, expected)
    assert (folder / "adapter.safetensors").is_file() == (kind == "adapter")


def test_what_trains_beside_the_adapter_or_will_is_refused_before_a_step(tmp_path):
    with pytest.raises(Refusal, match=r"net.2.* trained beside the adapter, .* by lora.modules_to_save"):
        fit(tmp_path, PlainNet(), LoRA(2, target=["net.0"]), Freeze(["net.2"]), ExportAdapter())
    with pytest.raises(Refusal, match=r"net.2.* trained beside the adapter"):
        later = GradualUnfreezing(unit="step", schedule=[{"at": 1, "train": ["net.2"]}])
        fit(tmp_path, PlainNet(), LoRA(2, target=["net.0"]), later, ExportAdapter())


def test_a_classifiers_head_goes_only_where_there_is_a_place_for_it(tmp_path):
    base = tasks.write_base("bert", tmp_path / "base")

    def run(technique, **given):
        module, data = tasks.job(base, tmp_path, "sequence_classification")
        tasks.fit(module, data, tmp_path, technique, ExportAdapter(**given), max_steps=1)

    run(LoRA(2))
    assert any("classifier" in name for name in tensors(tmp_path / "adapter"))
    with pytest.raises(
        Refusal, match="has a head that was trained with the adapter, and this format has no place for it"
    ):
        run(BottleneckAdapter(reduction_factor=4.0), output=str(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()
    run(BottleneckAdapter(reduction_factor=4.0), output=str(tmp_path / "hub"), without_head=True)
    assert (tmp_path / "hub" / "adapter.safetensors").is_file()


def sharded(folder, chat):
    """A fit under FSDP2 on two ranks."""
    from pathlib import Path

    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4})
    options = {"devices": 2, "strategy": FSDP2Strategy(), "use_distributed_sampler": False, "max_steps": 2}
    trainer(Path(folder), LoRA(2), ExportAdapter(), WeightEMA(0.5), **options).fit(module, data)
    return True


def test_sharded_factors_are_gathered(chat, tmp_path, two_ranks):
    two_ranks.run("tests.callbacks.test_export_adapter:sharded", folder=str(tmp_path / "two"), chat=str(chat))
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, LoRA(2), ExportAdapter(), WeightEMA(0.5), max_steps=2).fit(module, data)
    one, two = tensors(tmp_path / "adapter"), tensors(tmp_path / "two" / "adapter")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


def kinds_of_ranks():
    """What has to be gathered otherwise than factors are: what a network gives, vectors, and a table before the embedding."""
    return {"prefix": PrefixTuning(3, network=8), "ia3": IA3(), "prompt": PromptTuning(3, network=5)}


def other_kinds(folder, chat, sharded):
    """Fits of those kinds, each with its folder; ``sharded``: on two ranks."""
    from pathlib import Path

    for kind, technique in kinds_of_ranks().items():
        module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4 if sharded else 8})
        two = {"devices": 2, "strategy": FSDP2Strategy(), "use_distributed_sampler": False} if sharded else {}
        export = ExportAdapter(output=f"{folder}/{kind}")
        trainer(Path(folder), technique, export, max_steps=2, **two).fit(module, data)


def test_what_is_no_factor_is_gathered_too(chat, tmp_path, two_ranks):
    job = {"chat": str(chat), "folder": str(tmp_path / "two"), "sharded": True}
    two_ranks.run("tests.callbacks.test_export_adapter:other_kinds", **job)
    other_kinds(str(tmp_path / "one"), str(chat), sharded=False)
    for kind in kinds_of_ranks():
        one, two = tensors(tmp_path / "one" / kind), tensors(tmp_path / "two" / kind)
        assert one.keys() == two.keys() and one
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=f"{kind}: {name}")
        configs = [json.loads((tmp_path / n / kind / "adapter_config.json").read_text()) for n in ("one", "two")]
        assert configs[0] == configs[1]
