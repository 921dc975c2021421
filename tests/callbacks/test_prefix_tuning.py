"""Prefix tuning as a callback: the contract, and what only it does."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_ft
from lightning_ft import Attachment, LoRA, Refusal
from lightning_ft.callbacks.prefix_tuning import PrefixTuning
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.formats.peft import export_peft
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.prefix import PrefixAttention
from lightning_ft.nn.registry import injected_layers
from tests.contract import Case, checks_for
from tests.contract.subjects import AttentionNet, PlainNet, chat_job, fit, rows, state, trainer
from tests.modules import tasks
from tests.tolerances import TOL

CASE = Case(PrefixTuning, small={"tokens": 3}, idle={"tokens": 0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def rebuilt(net, *techniques):
    Attachment.of(net).rebuild(list(techniques), seed=0)
    return net


def test_a_text_begins_as_its_own_keys_and_values(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, PrefixTuning(6, text="abcd"), max_steps=0).fit(module, data)
    plain, _ = chat_job(chat, tmp_path)
    plain.configure_model()
    ids = plain.tokenizer("abcd", add_special_tokens=False)["input_ids"]
    start = torch.tensor([(ids * 6)[:6]])
    row = torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = plain.model(torch.cat([start, row], 1)).logits[:, 6:]
    torch.testing.assert_close(module.model(row).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [None, 8], ids=["direct", "network"])
def test_a_checkpoint_loads_generates_exports_and_starts_another_fit(network, chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, PrefixTuning(4, network=network), keep, enable_checkpointing=True).fit(module, data)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved and all(".prefix_" in key for key in saved)
    assert any("prefix_out" in key for key in saved) == (network is not None)
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    assert loaded.generate(["ask 1:"], max_new_tokens=4) == module.generate(["ask 1:"], max_new_tokens=4)
    export_peft(loaded.model, tmp_path / "peft", adapter_name="prefix")
    row = torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    for source in ("last.ckpt", "peft"):
        again, data = chat_job(chat, tmp_path)
        started = PrefixTuning(init_from=str(tmp_path / source))
        trainer(tmp_path, started, max_steps=0).fit(again, data)
        torch.testing.assert_close(
            again.model(row).logits, loaded.model(row).logits, rtol=TOL[torch.float32], atol=TOL[torch.float32]
        )
        assert started.resolved_arguments()["network"] == (network if source == "last.ckpt" else None)
        assert all(p.requires_grad == (".prefix_" in name) for name, p in again.named_parameters())
        with pytest.raises(Refusal, match=r"PrefixTuning\.tokens is 7, but the prefix in .* has 4; leave tokens out"):
            fit_again, data = chat_job(chat, tmp_path)
            trainer(tmp_path, PrefixTuning(7, init_from=str(tmp_path / source)), max_steps=0).fit(fit_again, data)


def test_merging_is_refused():
    net = rebuilt(AttentionNet(), PrefixTuning(3))
    with pytest.raises(Refusal, match="carries the prefix adapter 'prefix', which cannot be merged into a weight"):
        merged_copy(net)


def test_packed_rows_train_as_padded_ones(chat, tmp_path):
    trained = []
    for packing in (True, False):
        module, data = chat_job(chat, tmp_path, data={"packing": packing})
        trainer(tmp_path, PrefixTuning(3, network=8)).fit(module, data)
        trained.append({n: v for n, v in state(module).items() if "prefix_" in n})
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_beside_lora_both_train(tmp_path):
    net = AttentionNet()
    fit(tmp_path, net, PrefixTuning(3), LoRA(2))
    moved = {n.rpartition(".")[2] for n, p in net.reader.named_parameters() if p.requires_grad and p.grad is not None}
    assert moved == {"prefix_key", "prefix_value", "lora_A", "lora_B"}


def test_the_reference_is_the_base_and_the_start(tmp_path):
    net = AttentionNet()
    net.net.requires_grad_(False)
    plain = net(rows()[0]).detach()
    rebuilt(net, PrefixTuning(3))
    start = net(rows()[0]).detach()
    attachment = Attachment.of(net)
    attachment.references.take("start")
    with torch.no_grad():
        for layer in injected_layers(net).values():
            if isinstance(layer, PrefixAttention):
                layer.prefix_value.add_(1.0)
    with attachment.reference("base"):
        assert torch.equal(net(rows()[0]), plain)
    with attachment.reference("start"):
        assert torch.equal(net(rows()[0]), start)
    assert not torch.equal(net(rows()[0]), start)


@pytest.mark.parametrize(
    ("kind", "task"),
    [("bert", "sequence_classification"), ("llama", "sequence_classification"), ("t5", "seq2seq_lm")],
)
def test_other_tasks_train_the_prefix_and_a_new_head(kind, task, tmp_path):
    base = tasks.write_base(kind, tmp_path / "base")
    parts = ["encoder", "decoder", "cross"] if kind == "t5" else None
    module, data = tasks.job(base, tmp_path, task, batch_size=8)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    tasks.fit(module, data, tmp_path, PrefixTuning(3, parts=parts), keep, enable_checkpointing=True)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert len({n for n in trained if "prefix_" in n}) == (12 if kind == "t5" else 4)
    assert all("prefix_" in n or "classifier" in n or "score" in n or "pooler" in n for n in trained)
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    assert all(torch.equal(value, state(loaded)[name]) for name, value in state(module).items())
    if kind == "t5":
        with pytest.raises(Refusal, match="to a decoder's attention on itself alone"):
            export_peft(loaded.model, tmp_path / "peft", adapter_name="prefix")
    else:
        export_peft(loaded.model, tmp_path / "peft", adapter_name="prefix")


def sharded(chat, folder, network):
    """The prefix of the tiny chat model after three steps of two ranks under FSDP2."""
    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4})
    options = {"devices": 2, "strategy": FSDP2Strategy(process_group_backend="gloo"), "use_distributed_sampler": False}
    trainer(Path(folder), PrefixTuning(3, network=network), **options).fit(module, data)
    return {n: p.full_tensor().detach() for n, p in module.named_parameters() if "prefix_" in n}


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("network", [None, 8], ids=["direct", "network"])
def test_sharded_it_trains_as_on_one_device(network, chat, tmp_path, two_ranks):
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, PrefixTuning(3, network=network)).fit(module, data)
    alone = {n: v for n, v in state(module).items() if "prefix_" in n}
    job = {"chat": str(chat), "folder": str(tmp_path), "network": network}
    for rank in two_ranks.run("tests.callbacks.test_prefix_tuning:sharded", **job):
        assert rank.keys() == alone.keys()
        for name, value in rank.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": "a", "start": "random"}, "has both a text and start 'random'"),
        ({"text": ""}, "text is empty"),
        ({"tokens": 8, "network": 4}, r"network must be at least tokens \(8\)"),
        ({"init_from": ".", "text": "a"}, "has both init_from and text 'a' to begin from; leave one of them out"),
        ({"init_from": ".", "start": "random"}, "has both init_from and start 'random' to begin from"),
        ({"init_from": "nowhere"}, "init_from names 'nowhere', which does not exist"),
        ({"parts": []}, "must name encoder, decoder or cross"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(given, words):
    with pytest.raises(Refusal, match=words):
        PrefixTuning(**given)


def test_modules_without_attention_are_refused():
    with pytest.raises(Refusal, match="needs one Hugging Face model of text, and PlainNet is none"):
        rebuilt(PlainNet(), PrefixTuning(3))
    with pytest.raises(Refusal, match="text needs a tokenizer, and AttentionNet has none"):
        rebuilt(AttentionNet(), PrefixTuning(3, text="a"))


class Encoder(PlainNet):
    """Torch's own encoder, whose fused attention takes no prefix."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)


def test_torchs_own_encoder_is_refused():
    with pytest.raises(Refusal, match="needs one Hugging Face model of text, and Encoder is none; use LoRA"):
        rebuilt(Encoder(), PrefixTuning(3))
