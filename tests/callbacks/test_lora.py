"""LoRA as a callback: the contract, and what only it does."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lightning_ft
from lightning_ft import Attachment, Refusal
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.formats.peft import export_peft
from lightning_ft.nn.registry import disabled, injected_layers
from tests.contract import Case, checks_for
from tests.contract.subjects import QUIET, PlainNet, chat_job, fit, rows, state, trainer
from tests.tolerances import TOL

CASE = Case(LoRA, small={"r": 2, "alpha": 8.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def trained_names(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A net trained with rank 2 and alpha 6, its checkpoint, and its PEFT folder."""
    folder = tmp_path_factory.mktemp("adapter")
    net = PlainNet()
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=0)
    fit(folder, net, LoRA(2, alpha=6.0, target=["net.0"]), keep, enable_checkpointing=True)
    export_peft(net, folder / "peft")
    return net, {"checkpoint": folder / "last.ckpt", "peft": folder / "peft"}


def rebuilt(*techniques):
    net = PlainNet()
    Attachment.of(net).rebuild(list(techniques), seed=0)
    return net


@pytest.mark.parametrize("source", ["checkpoint", "peft"])
def test_init_from_starts_where_the_adapter_ended(adapter, source, tmp_path):
    original, files = adapter
    technique = LoRA(init_from=str(files[source]))
    net = rebuilt(technique)
    torch.testing.assert_close(net(rows()[0]), original(rows()[0]), rtol=TOL[torch.float32], atol=TOL[torch.float32])
    assert trained_names(net) == trained_names(original) == {"net.0.lora_A", "net.0.lora_B"}
    again = technique.resolved_arguments()
    assert (again["r"], again["alpha"], again["init_from"]) == (2, 6.0, None)
    assert (technique.r, technique.alpha) == (8, 16.0), "arguments stay as they were given"


@pytest.mark.parametrize("source", ["checkpoint", "peft"])
def test_a_fit_that_started_from_an_adapter_loads_without_it(adapter, source, tmp_path):
    net = PlainNet()
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(tmp_path, net, LoRA(init_from=str(adapter[1][source])), keep, enable_checkpointing=True)
    loaded = lightning_ft.load(tmp_path / "last.ckpt", module=PlainNet())
    assert all(torch.equal(value, state(loaded)[name]) for name, value in state(net).items())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"r": 4}, r"LoRA\.r is 4, but the adapter in .* has 2; leave r out"),
        ({"alpha": 5.0}, r"LoRA\.alpha is 5\.0"),
        ({"dora": True}, r"LoRA\.dora is True"),
        ({"target": ["net.3"]}, r"LoRA\.target is \('net\.3',\)"),
        ({"exclude": ["net.3"]}, r"LoRA\.exclude is \('net\.3',\), but .* has \(\); leave exclude out"),
        ({"layers": "-4:"}, r"LoRA\.layers is '-4:', but .* has None; leave layers out"),
        ({"modules_to_save": ["net.3"]}, r"LoRA\.modules_to_save is \('net\.3',\)"),
        ({"rank_pattern": {"0": 4}}, r"LoRA\.rank_pattern is \{'0': 4\}"),
        ({"alpha_pattern": {"0": 4.0}}, r"LoRA\.alpha_pattern is \{'0': 4\.0\}"),
    ],
)
@pytest.mark.parametrize("source", ["checkpoint", "peft"])
def test_what_contradicts_the_adapter_is_refused(adapter, source, given, words):
    with pytest.raises(Refusal, match=words):
        rebuilt(LoRA(**given, init_from=str(adapter[1][source])))


def test_a_missing_adapter_is_refused_at_once():
    with pytest.raises(Refusal, match="LoRA.init_from names 'nowhere', which does not exist"):
        LoRA(init_from="nowhere")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    with pytest.raises(Refusal, match="junk.ckpt is not a checkpoint that can be read"):
        rebuilt(LoRA(init_from=str(tmp_path / "junk.ckpt")))


def test_an_adapter_of_another_model_is_refused(adapter):
    class Other(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 6))

    net = Other()
    with pytest.raises(Refusal, match=r"net\.0\.lora_A has shape \(2, 4\), this model's \(2, 5\)"):
        Attachment.of(net).rebuild([LoRA(init_from=str(adapter[1]["checkpoint"]))], seed=0)


def test_a_target_without_a_match_names_the_nearest():
    with pytest.raises(Refusal, match=r"net\.00.*net\.0"):
        rebuilt(LoRA(target=["net.00"]))


def test_modules_to_save_train_in_full_and_are_in_the_file(tmp_path):
    net = PlainNet()
    start = state(net)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    technique = LoRA(2, target=["net.0"], modules_to_save=["net.3"])
    fit(tmp_path, net, technique, keep, enable_checkpointing=True)
    expected = {"net.0.lora_A", "net.0.lora_B", "net.3.weight", "net.3.bias"}
    assert trained_names(net) == expected
    assert not torch.equal(net.net[3].weight, start["net.3.weight"])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == expected
    started = rebuilt(LoRA(init_from=str(tmp_path / "last.ckpt")))
    assert torch.equal(started.net[3].weight, net.net[3].weight)


def test_two_adapters_on_one_layer_add_up(tmp_path):
    net = PlainNet()
    fit(tmp_path, net, LoRA(2, target=["net.0"], name="a"), LoRA(3, target=["net.0"], name="b"))
    first, second = injected_layers(net, "a"), injected_layers(net, "b")
    assert len(first) == len(second) == 1
    (a,), (b,) = first.values(), second.values()
    assert (a.r, b.r) == (2, 3)
    base = PlainNet().net[0]
    expected = base(rows()[0]) + rows()[0] @ (a.delta() + b.delta()).T
    torch.testing.assert_close(net.net[0](rows()[0]), expected, rtol=TOL[torch.float32], atol=TOL[torch.float32])


def test_two_adapters_of_one_name_are_refused(tmp_path):
    with pytest.raises(Refusal, match="Two LoRA callbacks are both named 'default'; give one of them another name"):
        fit(tmp_path, PlainNet(), LoRA(2), LoRA(3))


class ConvNet(pl.LightningModule):
    """A user's own vision model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.head(self.conv(batch).relu().mean((2, 3))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_conv_net_trains_its_factors_alone(tmp_path):
    net = ConvNet()
    before = state(net)
    images = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    run = pl.Trainer(**{**QUIET, "max_steps": 3, "default_root_dir": tmp_path, "callbacks": [LoRA(2, target=["conv"])]})
    run.fit(net, torch.utils.data.DataLoader(images, batch_size=4))
    assert trained_names(net) == {"conv.lora_A", "conv.lora_B"}
    assert torch.equal(net.conv.base.weight, before["conv.weight"])
    assert torch.equal(net.head.weight, before["head.weight"])
    assert net.conv.lora_B.abs().sum() > 0


def test_the_first_values_depend_on_the_seed_alone():
    nets = {}
    for seed in (0, 0, 1):
        net = PlainNet()
        torch.manual_seed(seed * 7 + len(nets))  # the global generator is of no account
        Attachment.of(net).rebuild([LoRA(2)], seed=seed)
        nets.setdefault(seed, []).append(state(net)["net.0.lora_A"])
    assert torch.equal(*nets[0])
    assert not torch.equal(nets[0][0], nets[1][0])


def test_biases_of_the_layers_train_and_are_in_the_file(tmp_path):
    net = PlainNet()
    start = state(net)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(tmp_path, net, LoRA(2, target=["net.0"], bias="lora_only"), keep, enable_checkpointing=True)
    expected = {"net.0.lora_A", "net.0.lora_B", "net.0.base.bias"}
    assert trained_names(net) == set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]) == expected
    assert not torch.equal(net.net[0].bias, start["net.0.bias"])
    for again in (
        lightning_ft.load(tmp_path / "last.ckpt", module=PlainNet()),
        rebuilt(LoRA(init_from=str(tmp_path / "last.ckpt"))),
    ):
        assert all(torch.equal(value, state(again)[name]) for name, value in state(net).items())


MARKS = ["<|im_end|>", "<|im_start|>"]


def sharded_rows(chat, folder):
    """The rows of the tiny chat model, tied, after three steps of two ranks."""
    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4})
    options = {"devices": 2, "strategy": FSDP2Strategy(process_group_backend="gloo"), "use_distributed_sampler": False}
    trainer(Path(folder), LoRA(2, target=["q_proj"], trainable_tokens=MARKS), **options).fit(module, data)
    return dict(module.named_parameters())["model.model.embed_tokens.token_rows"].full_tensor().detach()


def test_tokens_given_as_texts_learn_their_rows_on_one_device_and_sharded(chat, tmp_path, two_ranks):
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    technique = LoRA(2, target=["q_proj"], trainable_tokens=MARKS)
    module, data = chat_job(chat, tmp_path)
    table = AutoModelForCausalLM.from_pretrained(chat / "model").get_input_embeddings().weight.detach()
    trainer(tmp_path, technique, keep, enable_checkpointing=True).fit(module, data)
    rows_ = module.model.model.embed_tokens.token_rows
    assert rows_ is module.model.lm_head.token_rows and rows_.requires_grad
    assert (rows_ - table[:2]).abs().amax(1).min() > 1e-3, "both rows have learned"
    assert torch.equal(module.model.model.embed_tokens.base.weight, table)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    name = "model.model.embed_tokens.token_rows"
    assert [key for key in saved["state_dict"] if "lora" not in key] == [name]
    assert saved["lightning_ft"]["techniques"][0]["init_args"]["trainable_tokens"] == [1, 0]
    assert torch.equal(lightning_ft.load(tmp_path / "last.ckpt").model.lm_head.token_rows, rows_)
    started, data = chat_job(chat, tmp_path)
    run = trainer(tmp_path, LoRA(init_from=str(tmp_path / "last.ckpt")), max_steps=0)
    run.fit(started, data)
    assert torch.equal(started.model.lm_head.token_rows, rows_)
    for sharded in two_ranks.run("tests.callbacks.test_lora:sharded_rows", chat=str(chat), folder=str(tmp_path)):
        torch.testing.assert_close(sharded, rows_.detach(), rtol=TOL[torch.float32], atol=TOL[torch.float32])


def test_tokens_that_are_none_are_refused(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    with pytest.raises(Refusal, match="names '<.tool.>', which is no token of this model's vocabulary"):
        trainer(tmp_path, LoRA(2, trainable_tokens=["<|tool|>"])).fit(module, data)
    with pytest.raises(Refusal, match="PlainNet has no tokenizer; give their ids"):
        rebuilt(LoRA(2, trainable_tokens=["a"]))
    with pytest.raises(Refusal, match=r"LoRAConfig.trainable_tokens must name each token once, got 3 2 times"):
        LoRA(trainable_tokens=[3, 3])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_the_weight_is_saved_loaded_and_started_from(init, tmp_path):
    net = PlainNet()
    bare = state(net)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(tmp_path, net, LoRA(2, init=init), keep, enable_checkpointing=True)
    layer = net.net[0]
    assert (layer.lora_B - layer.lora_B0).abs().max() > 0 and not layer.lora_B0.requires_grad
    assert torch.equal(layer.base.weight, bare["net.0.weight"])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {"net.0.lora_A0", "net.0.lora_B0"} < set(saved) and "net.0.base.weight" not in saved
    for again in (
        lightning_ft.load(tmp_path / "last.ckpt", module=PlainNet()),
        rebuilt(LoRA(init_from=str(tmp_path / "last.ckpt"))),
    ):
        assert all(torch.equal(value, state(again)[name]) for name, value in state(net).items())
    export_peft(net, tmp_path / "peft")
    started = rebuilt(LoRA(init_from=str(tmp_path / "peft")))
    torch.testing.assert_close(started(rows()[0]), net(rows()[0]), rtol=TOL[torch.float32], atol=TOL[torch.float32])
    with pytest.raises(Refusal, match=r"LoRA\.init is 'pissa', but the adapter in .* has 'default'"):
        rebuilt(LoRA(init="pissa", init_from=str(tmp_path / "peft")))


def pissa_and_plus(chat, folder, **options):
    """The factors of the tiny chat model after three steps from PiSSA's start, B eight times as fast; and the rates."""
    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4 if options else 8}, model={"lr": 0.05})
    run = trainer(Path(folder), LoRA(2, target=["q_proj"], init="pissa", lr_ratio_b=8.0), **options)
    run.fit(module, data)
    named = dict(module.named_parameters())
    names = ["lora_A", "lora_B", "lora_A0", "lora_B0"]
    found = [named[f"model.model.layers.0.self_attn.q_proj.{name}"] for name in names]
    groups = [(group["initial_lr"], [p.shape for p in group["params"]]) for group in run.optimizers[0].param_groups]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in found], groups


def pissa_and_plus_sharded(chat, folder):
    options = {"devices": 2, "strategy": FSDP2Strategy(process_group_backend="gloo"), "use_distributed_sampler": False}
    return pissa_and_plus(chat, folder, **options)[0]


def test_lora_plus_gives_b_its_own_rate_and_pissa_shards(chat, tmp_path, two_ranks):
    (a, b, a0, b0), groups = pissa_and_plus(chat, tmp_path)
    rates = dict(groups)
    assert set(rates) == {0.05, 0.05 * 8}
    assert all(shape[0] == 2 for shape in rates[0.05]) and all(shape[1] == 2 for shape in rates[0.05 * 8])
    assert not torch.equal(a, a0) and not torch.equal(b, b0)
    for sharded in two_ranks.run(
        "tests.callbacks.test_lora:pissa_and_plus_sharded", chat=str(chat), folder=str(tmp_path)
    ):
        for mine, its in zip((a, b, a0, b0), sharded, strict=True):
            torch.testing.assert_close(its, mine, rtol=TOL[torch.float32], atol=TOL[torch.float32])


def test_lora_plus_steps_b_as_many_times_as_far(chat, tmp_path):
    moved = {}
    for ratio in (None, 8.0):
        module, data = chat_job(chat, tmp_path, model={"lr": 0.05})
        trainer(tmp_path, LoRA(2, target=["q_proj"], lr_ratio_b=ratio), max_steps=1).fit(module, data)
        layer = module.model.model.layers[0].self_attn.q_proj
        moved[ratio] = (layer.lora_A.detach(), layer.lora_B.detach())
    assert torch.equal(moved[None][0], moved[8.0][0]), "at the start B is zero, so A has no gradient yet"
    torch.testing.assert_close(moved[8.0][1], 8 * moved[None][1])  # plain SGD: one step is rate times gradient
    with pytest.raises(Refusal, match="LoRA.lr_ratio_b sets rates .* PlainNet builds its own"):
        fit(tmp_path, PlainNet(), LoRA(2, lr_ratio_b=16.0))


def test_each_of_several_adapters_starts_from_its_own(tmp_path):
    net = PlainNet()
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    # b wraps a on net.0 alone, so the names in the file say of neither which one it is.
    both = LoRA(2, target=["net.0"], name="a"), LoRA(2, target=["net.0", "net.3"], name="b")
    fit(tmp_path, net, *both, keep, enable_checkpointing=True)
    file = str(tmp_path / "last.ckpt")
    for name in "ab":
        export_peft(net, tmp_path / name, adapter_name=name)
    for name, other in (("a", "b"), ("b", "a")):
        started = rebuilt(LoRA(init_from=file, name=name))
        with disabled(net, [other]):
            assert torch.equal(started(rows()[0]), net(rows()[0]))
    for sources in ((file, file), (str(tmp_path / "a"), str(tmp_path / "b")), (str(tmp_path / "a"), file)):
        started = rebuilt(LoRA(init_from=sources[0], name="a"), LoRA(init_from=sources[1], name="b"))
        torch.testing.assert_close(started(rows()[0]), net(rows()[0]), rtol=TOL[torch.float32], atol=TOL[torch.float32])
    with pytest.raises(Refusal, match="holds the LoRA adapters 'a', 'b' and none called 'c'"):
        rebuilt(LoRA(init_from=file, name="c"))
