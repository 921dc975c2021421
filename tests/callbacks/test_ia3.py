"""(IA)^3 as a callback: the contract, and what only it does."""

import json
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import BertForSequenceClassification

import lightning_ft
from lightning_ft import IA3, SFT, Attachment, ExportAdapter, LoRA, Refusal
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.formats.peft import export_peft
from lightning_ft.nn.ia3 import IA3Config, inject_ia3
from lightning_ft.nn.registry import injected_layers
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, chat_job, fit, rows, state, trainer
from tests.modules import tasks
from tests.tolerances import TOL

CASE = Case(IA3, small={"target": "all-linear"})
CLOSE = {"rtol": TOL[torch.float32], "atol": TOL[torch.float32]}


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def rebuilt(*techniques):
    net = PlainNet()
    Attachment.of(net).rebuild(list(techniques), seed=0)
    return net


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A net trained with an output and an input scaled, its checkpoint, and its PEFT folder."""
    folder = tmp_path_factory.mktemp("adapter")
    net = PlainNet()
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=0)
    fit(folder, net, IA3(["net.0", "net.3"], feedforward=["net.3"]), keep, enable_checkpointing=True)
    export_peft(net, folder / "peft")
    return net, {"checkpoint": folder / "last.ckpt", "peft": folder / "peft"}


@pytest.mark.parametrize("source", ["checkpoint", "peft"])
def test_init_from_starts_where_the_adapter_ended(adapter, source, tmp_path):
    original, files = adapter
    technique = IA3(init_from=str(files[source]))
    net = rebuilt(technique)
    torch.testing.assert_close(net(rows()[0]), original(rows()[0]), **CLOSE)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"net.0.ia3_scale", "net.3.ia3_scale"}
    assert technique.resolved_arguments()["feedforward"] == ["net.3"]
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(tmp_path, net := PlainNet(), IA3(init_from=str(files[source])), keep, enable_checkpointing=True)
    loaded = lightning_ft.load(tmp_path / "last.ckpt", module=PlainNet())
    assert all(torch.equal(value, state(loaded)[name]) for name, value in state(net).items())
    with pytest.raises(Refusal, match=r"IA3\.target is \('net\.0',\), but the adapter in .* has"):
        rebuilt(IA3(["net.0"], init_from=str(files[source])))
    for key, value in {"exclude": ["net.3"], "layers": "-4:", "modules_to_save": ["net.3"]}.items():
        with pytest.raises(Refusal, match=rf"IA3\.{key} is .*, but the adapter in .* has .*; leave {key} out"):
            rebuilt(IA3(**{key: value}, init_from=str(files[source])))


def test_it_stacks_with_lora_on_the_same_layer_and_both_merge(tmp_path):
    from lightning_ft.nn.merging import merged_copy

    net = PlainNet()
    fit(tmp_path, net, LoRA(2, target=["net.0"]), IA3(["net.0"]))
    lora, scale, weight = net.net[0], net.net[0].base, PlainNet().net[0].weight
    assert (lora.kind, scale.kind) == ("lora", "ia3")
    x = rows()[0]
    expected = scale.ia3_scale * (x @ weight.T + PlainNet().net[0].bias) + x @ lora.delta().T
    torch.testing.assert_close(net.net[0](x), expected, **CLOSE)
    torch.testing.assert_close(merged_copy(net.net)(x), net(x), **CLOSE)


def test_vectors_are_not_decayed_and_take_their_own_rate(chat, tmp_path):
    module, data = chat_job(chat, tmp_path, model={"lr": None, "optimizer": None, "weight_decay": 0.1})
    run = trainer(tmp_path, IA3())
    run.fit(module, data)
    groups = run.optimizers[0].param_groups
    assert {(group["initial_lr"], group["weight_decay"]) for group in groups} == {(3e-3, 0.0)}
    config = module.model.config
    heads = config.num_key_value_heads * config.head_dim
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert count == config.num_hidden_layers * (2 * heads + config.intermediate_size), "d_k + d_v + d_ff a block"


@pytest.mark.parametrize(("kind", "task"), [("bert", "sequence_classification"), ("t5", "seq2seq_lm")])
def test_a_task_trains_saves_loads_and_exports(kind, task, tmp_path):
    base = tasks.write_base(kind, tmp_path / "base")
    module, data = tasks.job(base, tmp_path, task, model={"lr": 3e-2})
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    tasks.fit(module, data, tmp_path, IA3(), keep, enable_checkpointing=True, max_steps=4)
    layers = injected_layers(module.model)
    attention = "attention.self" if kind == "bert" else "Attention"
    assert sum(attention in path for path in layers) == {"bert": 4, "t5": 12}[kind], "self- and cross-attention alike"
    assert all((layer.ia3_scale - 1).abs().max() > 1e-3 for layer in layers.values())
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    assert isinstance(loaded, SFT) and all(torch.equal(v, state(loaded)[n]) for n, v in state(module).items())
    export_peft(loaded.model, tmp_path / "adapter")
    if kind == "bert":  # with the head that was trained beside the vectors
        ids = torch.randint(5, 20, (2, 7), generator=torch.Generator().manual_seed(0))
        fresh = BertForSequenceClassification.from_pretrained(base, num_labels=3)
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, loaded.model(input_ids=ids).logits, **CLOSE)


def sharded(chat, folder):
    """The vectors of the tiny chat model after three steps of two ranks."""
    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4})
    options = {"devices": 2, "strategy": FSDP2Strategy(process_group_backend="gloo"), "use_distributed_sampler": False}
    trainer(Path(folder), IA3(), **options).fit(module, data)
    return {n: p.full_tensor().detach() for n, p in module.named_parameters() if p.requires_grad}


def test_sharded_it_learns_the_same_and_export_adapter_writes_it(chat, tmp_path, two_ranks):
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, IA3(), ExportAdapter(output=str(tmp_path / "out"))).fit(module, data)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"] == "IA3"
    mine = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    assert all((vector - 1).abs().max() > 1e-4 for vector in mine.values())
    for theirs in two_ranks.run("tests.callbacks.test_ia3:sharded", chat=str(chat), folder=str(tmp_path)):
        assert theirs.keys() == mine.keys()
        for name, vector in theirs.items():
            torch.testing.assert_close(vector, mine[name], **CLOSE)


def test_torch_encoder_by_name_and_auto_refused():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(block, 2).eval()
    x = torch.randn(2, 5, 8)
    before = net(x)
    with pytest.raises(Refusal, match=r"finds no layers that make keys and values .* among linear1, linear2"):
        inject_ia3(net)
    layers = inject_ia3(net, IA3Config(target=("linear2",), feedforward=("linear2",)))
    torch.testing.assert_close(net(x), before, **CLOSE)
    with torch.no_grad():
        for layer in layers.values():
            layer.ia3_scale.copy_(torch.linspace(0.5, 2, 16))
    scaled = net(x)
    oracle = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    oracle.load_state_dict({n.replace(".base.", "."): v for n, v in net.state_dict().items() if "ia3" not in n})
    for each in oracle.layers:
        each.linear2.weight.data *= torch.linspace(0.5, 2, 16)
    torch.testing.assert_close(scaled, oracle(x), **CLOSE)
    assert (scaled - before).abs().max() > 1e-2
