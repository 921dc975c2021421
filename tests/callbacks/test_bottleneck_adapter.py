"""Bottleneck adapters as a callback: the contract, and what only it does."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from lightning_ft import Attachment, LoRA, Refusal
from lightning_ft.callbacks.bottleneck_adapter import BottleneckAdapter
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.formats.adapterhub import export_adapterhub
from lightning_ft.nn.registry import injected_layers
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, chat_job, fit, state, trainer
from tests.modules.tasks import fit as fit_task
from tests.modules.tasks import job, write_base
from tests.tolerances import TOL

TARGET = r"re:net\.0|.*\.mlp"  # on the plain net and on the tiny language model
CASE = Case(BottleneckAdapter, small={"reduction_factor": 2.0, "target": [TARGET]})
STYLES = ("houlsby", "pfeiffer", "parallel")


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def trained_names(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("style", STYLES)
def test_a_fit_of_a_chat_model_is_loaded_resumed_and_started_from(chat, tmp_path, style):
    given = {"reduction_factor": 4.0, "scale": "learned", "norm_before": True}
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    options = {"lr": 0.05}
    module, data = chat_job(chat, tmp_path, model=options)
    trainer(tmp_path, BottleneckAdapter(style, **given), LoRA(2), keep, enable_checkpointing=True).fit(module, data)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == trained_names(module)
    assert {x.adapter_name for x in injected_layers(module).values()} == {"adapter", "default"}
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    assert all(torch.equal(value, state(loaded)[name]) for name, value in state(module).items())
    with pytest.raises(Refusal, match="a function that is not linear"):
        lightning_ft.nn.merging.merged_copy(loaded.model)

    started, data = chat_job(chat, tmp_path, model=options)
    technique = BottleneckAdapter(init_from=str(tmp_path / "last.ckpt"))
    trainer(tmp_path, technique, max_steps=0).fit(started, data)
    ours = {n: p for n, p in state(started).items() if n in trained_names(started)}
    assert ours and all(torch.equal(p, saved["state_dict"][n.replace(".base", "")]) for n, p in ours.items())
    assert technique.resolved_arguments()["style"] == style and technique.style == "pfeiffer"

    resumed, data = chat_job(chat, tmp_path, model=options)
    keep = ModelCheckpoint(tmp_path / "again", save_last=True, save_top_k=0)
    techniques = (BottleneckAdapter(style, **given), LoRA(2), keep)
    again = trainer(tmp_path, *techniques, max_steps=5, enable_checkpointing=True)
    again.fit(resumed, data, ckpt_path=tmp_path / "last.ckpt")
    whole, data = chat_job(chat, tmp_path, model=options)
    trainer(tmp_path, BottleneckAdapter(style, **given), LoRA(2), max_steps=5).fit(whole, data)
    assert all(torch.equal(value, state(resumed)[name]) for name, value in state(whole).items())


def sharded(chat, folder, style):
    """What was trained after three steps of two ranks, gathered."""
    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4})
    options = {"devices": 2, "strategy": FSDP2Strategy(process_group_backend="gloo"), "use_distributed_sampler": False}
    trainer(Path(folder), BottleneckAdapter(style, reduction_factor=4.0), **options).fit(module, data)
    return {name: p.full_tensor().detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("style", ["pfeiffer", "parallel"])
def test_sharded_over_two_ranks_it_learns_what_one_process_learns(chat, tmp_path, two_ranks, style):
    """Of the three styles these hand the stream from one module of a block to another."""
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, BottleneckAdapter(style, reduction_factor=4.0)).fit(module, data)
    alone = {name: p for name, p in state(module).items() if name in trained_names(module)}
    job_ = "tests.callbacks.test_bottleneck_adapter:sharded"
    for found in two_ranks.run(job_, chat=str(chat), folder=str(tmp_path), style=style):
        assert found.keys() == alone.keys() and any(p.abs().sum() > 0 for n, p in found.items() if "up_" in n)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=TOL[torch.float32], atol=TOL[torch.float32])


@pytest.mark.parametrize(
    ("kind", "task", "adapters"), [("bert", "sequence_classification", 4), ("t5", "seq2seq_lm", 10)]
)
def test_encoders_and_encoder_decoders_learn(tmp_path, kind, task, adapters):
    module, rows = job(write_base(kind, tmp_path / "base"), tmp_path, task)
    adapter = BottleneckAdapter("houlsby", reduction_factor=4.0)
    fit_task(module, rows, tmp_path, adapter, max_steps=1)
    assert len(injected_layers(module, "adapter")) == adapters
    first = fit_task(module, rows, tmp_path, adapter, max_steps=1).callback_metrics["val/loss"]
    assert fit_task(module, rows, tmp_path, adapter, max_steps=20).callback_metrics["val/loss"] < first


def test_a_folder_of_adapterhub_is_a_start(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, BottleneckAdapter("houlsby", reduction_factor=4.0)).fit(module, data)
    export_adapterhub(module.model, tmp_path / "hub")
    started, data = chat_job(chat, tmp_path)
    technique = BottleneckAdapter(init_from=str(tmp_path / "hub"), name="other")
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, technique, keep, max_steps=1, enable_checkpointing=True).fit(started, data)
    arguments = torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_ft"]["techniques"][0]["init_args"]
    assert (arguments["style"], arguments["reduction_factor"], arguments["init_from"]) == ("houlsby", 4.0, None)
    assert arguments["places"] == ["attention", "feed_forward"] and arguments["name"] == "other"
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    assert all(torch.equal(value, state(loaded)[name]) for name, value in state(started).items())
    assert json.loads((tmp_path / "hub/adapter_config.json").read_text())["name"] == "adapter"
    with pytest.raises(Refusal, match=r"reduction_factor is 8.0, but the adapter in .* has 4.0; leave"):
        Attachment.of(chat_job(chat, tmp_path)[0]).rebuild(
            [BottleneckAdapter(reduction_factor=8.0, init_from=str(tmp_path / "hub"))], seed=0
        )


def test_a_model_without_known_sublayers_asks_for_a_target(tmp_path):
    with pytest.raises(Refusal, match=r"The sublayers of PlainNet are not known.*name the modules.*by target"):
        fit(tmp_path, PlainNet(), BottleneckAdapter())


def test_a_missing_adapter_is_refused_at_once():
    with pytest.raises(Refusal, match="BottleneckAdapter.init_from names 'nowhere', which does not exist"):
        BottleneckAdapter(init_from="nowhere")
