"""Oracle: PEFT itself. Logits and gradients are compared with trained, non-zero factors, both ways."""

import json

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lightning_ft.formats.peft import export_peft, load_peft_, read_peft
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.registry import disabled, injected_layers
from tests.tolerances import TOL

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:fan_in_fan_out is set to",
    "ignore:LoRA adapter added to ConvNd",
    "ignore:Model has `tie_word_embeddings=True`",
)
LLAMA = dict(
    hidden_size=32, num_hidden_layers=3, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, pad_token_id=0,
)  # fmt: skip


class Net(nn.Module):
    """A net that is not Hugging Face's, with convolutions (one grouped), a batch norm and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8, padding_idx=0)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
        self.block.add_module("fc", nn.Linear(5, 3))

    def forward(self, input_ids):
        x = self.grouped(self.conv(self.embed(input_ids)[:, None]))
        return self.block(self.fc(self.norm(x).mean((2, 3))))


def llama(**kwargs):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **kwargs)).eval()


def classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=1)
    ).eval()


def net():
    torch.manual_seed(0)
    return Net().eval()


# name -> (model, our configuration, PEFT's options that mean the same)
QV = dict(target_modules=["q_proj", "v_proj"])
CASES = {
    "linear": (llama, LoRAConfig(r=4, alpha=12, target=("q_proj", "v_proj")), dict(r=4, lora_alpha=12, **QV)),
    "all_linear": (llama, LoRAConfig(r=2), dict(r=2, lora_alpha=16, target_modules="all-linear")),
    "rslora": (llama, LoRAConfig(r=4, rslora=True, target=("q_proj", "v_proj")),
               dict(r=4, lora_alpha=16, use_rslora=True, **QV)),
    "dora": (llama, LoRAConfig(r=4, dora=True, target=("q_proj", "v_proj")),
             dict(r=4, lora_alpha=16, use_dora=True, **QV)),
    "patterns": (
        llama,
        LoRAConfig(r=4, target=("q_proj", "v_proj"), rank_pattern={"v_proj": 2},
                   alpha_pattern={r"layers\.1\..*q_proj": 3}),
        dict(r=4, lora_alpha=16, rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\..*q_proj": 3}, **QV),
    ),
    "layers": (llama, LoRAConfig(r=4, target=("q_proj", "down_proj"), layers="-2:"),
               dict(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 2])),
    "excluded": (llama, LoRAConfig(r=4, exclude=("model.layers.1.self_attn.q_proj", "gate_proj")),
                 dict(r=4, lora_alpha=16, target_modules="all-linear",
                      exclude_modules=["model.layers.1.self_attn.q_proj", "gate_proj"])),
    "regex": (llama, LoRAConfig(r=4, target=r"re:.*layers\.[02]\..*up_proj"),
              dict(r=4, lora_alpha=16, target_modules=r".*layers\.[02]\..*up_proj")),
    "modules_to_save": (
        classifier, LoRAConfig(r=4, target=("q_proj",), modules_to_save=("score", "input_layernorm")),
        dict(r=4, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["score", "input_layernorm"],
             task_type="SEQ_CLS"),
    ),
    "head": (llama, LoRAConfig(r=4, target=("q_proj", "lm_head")),
             dict(r=4, lora_alpha=16, target_modules=["q_proj", "lm_head"])),
    "bias": (lambda: llama(attention_bias=True), LoRAConfig(r=4, dora=True, target=("o_proj",)),
             dict(r=4, lora_alpha=16, use_dora=True, target_modules=["o_proj"])),
    "conv1d": (gpt2, LoRAConfig(r=4, target=("c_attn", "c_proj")),
               dict(r=4, lora_alpha=16, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "conv1d_dora": (gpt2, LoRAConfig(r=4, target=("c_attn",), dora=True),
                    dict(r=4, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "embedding": (llama, LoRAConfig(r=4, target=("embed_tokens", "q_proj")),
                  dict(r=4, lora_alpha=16, target_modules=["embed_tokens", "q_proj"])),
    "embedding_dora": (llama, LoRAConfig(r=4, target=("embed_tokens",), dora=True),
                       dict(r=4, lora_alpha=16, target_modules=["embed_tokens"], use_dora=True)),
    "tied_embedding": (lambda: llama(tie_word_embeddings=True), LoRAConfig(r=4, target=("embed_tokens",)),
                       dict(r=4, lora_alpha=16, target_modules=["embed_tokens"])),
    "conv2d": (net, LoRAConfig(r=4, target=("conv", "grouped", "fc"), exclude=("block.fc",)),
               dict(r=4, lora_alpha=16, target_modules="conv|grouped|fc")),
    "conv2d_dora": (net, LoRAConfig(r=4, target=("conv", "embed"), dora=True),
                    dict(r=4, lora_alpha=16, target_modules=["conv", "embed"], use_dora=True)),
    "buffers_saved": (net, LoRAConfig(r=4, target=("fc",), modules_to_save=("norm",)),
                      dict(r=4, lora_alpha=16, target_modules=["fc"], modules_to_save=["norm"])),
    "all_biases": (lambda: llama(attention_bias=True, mlp_bias=True),
                   LoRAConfig(r=4, target=("q_proj",), bias="all"),
                   dict(r=4, lora_alpha=16, target_modules=["q_proj"], bias="all")),
    "biases_of_lora": (gpt2, LoRAConfig(r=4, target=("c_attn",), bias="lora_only"),
                       dict(r=4, lora_alpha=16, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)),
    "biases_and_saved": (net, LoRAConfig(r=4, target=("fc",), exclude=("block.fc",), modules_to_save=("norm",), bias="all"),
                         dict(r=4, lora_alpha=16, target_modules=["fc"], exclude_modules=["block.fc"],
                              modules_to_save=["norm"], bias="all")),
    "tokens": (llama, LoRAConfig(r=4, target=("q_proj",), trainable_tokens=(9, 3, 15)),
               dict(r=4, lora_alpha=16, target_modules=["q_proj"], trainable_token_indices=[9, 3, 15])),
    "tied_tokens": (lambda: llama(tie_word_embeddings=True),
                    LoRAConfig(r=4, target=("q_proj",), trainable_tokens=(9, 3, 15)),
                    dict(r=4, lora_alpha=16, target_modules=["q_proj"], trainable_token_indices=[9, 3, 15])),
    "tokens_by_table": (llama, LoRAConfig(r=4, target=("q_proj",), trainable_tokens={"embed_tokens": (9, 3), "lm_head": (7, 5)}),
                        dict(r=4, lora_alpha=16, target_modules=["q_proj"],
                             trainable_token_indices={"embed_tokens": [9, 3], "lm_head": [7, 5]})),
    "tokens_of_gpt2": (gpt2, LoRAConfig(r=4, target=("c_attn",), trainable_tokens=(9, 3, 15)),
                       dict(r=4, lora_alpha=16, target_modules=["c_attn"], trainable_token_indices=[9, 3, 15],
                            fan_in_fan_out=True)),
    "tokens_outside_transformers": (net, LoRAConfig(r=4, target=("conv",), trainable_tokens={"embed": (9, 3)}),
                                    dict(r=4, lora_alpha=16, target_modules=["conv"],
                                         trainable_token_indices={"embed": [9, 3]})),
}  # fmt: skip
case = pytest.mark.parametrize("make, ours, theirs", CASES.values(), ids=CASES)


def ids():
    return torch.randint(1, 16, (2, 9), generator=torch.Generator().manual_seed(1))


def output(model):
    out = model(input_ids=ids())
    return out if isinstance(out, torch.Tensor) else out.logits


@torch.no_grad()
def train(model):
    """Give everything trainable (and a saved batch norm's statistics) values that no initialisation has."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight.requires_grad:
            module.running_mean.add_(0.2)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOL[torch.float32], atol=TOL[torch.float32])


@case
def test_export_gives_the_same_logits_in_peft(make, ours, theirs, tmp_path):
    model = make()
    before = output(model)
    inject_lora(model, ours)
    torch.testing.assert_close(output(model), before, rtol=0, atol=0)  # a fresh adapter is the identity
    train(model)
    expected = output(model)
    assert (expected - before).abs().max() > 1e-2
    export_peft(model, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "a").eval()
    close(output(loaded), expected)


@case
def test_import_gives_the_logits_and_gradients_of_peft(make, ours, theirs, tmp_path):
    theirs_model = peft.get_peft_model(make(), peft.LoraConfig(**theirs)).eval()
    train(theirs_model)
    theirs_model.save_pretrained(tmp_path / "a")
    model = make()
    layers = load_peft_(model, tmp_path / "a")
    close(output(model), output(theirs_model))
    assert set(layers) == set(inject_lora(make(), ours))  # our patterns and theirs mean the same modules
    output(model).square().sum().backward()
    output(theirs_model).square().sum().backward()
    gradients = {}
    for name, parameter in theirs_model.named_parameters():
        if parameter.grad is not None:
            for part in ("base_model.model.", ".default", ".weight", ".modules_to_save", "_vector", "embedding_"):
                name = name.replace(part, "")
            name = name.replace("token_adapter.trainable_tokens_delta", "token_rows").replace("base_layer", "base")
            gradients[name] = parameter.grad
            if name.endswith("token_rows"):  # theirs are in the order in which the ids were given
                given = theirs["trainable_token_indices"]
                given = given[name.split(".")[-2]] if isinstance(given, dict) else given
                gradients[name] = parameter.grad[torch.tensor(given).argsort()]
    own = {n.replace(".weight", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert set(own) == set(gradients)
    for name, gradient in own.items():
        other = gradients[name].view_as(gradient)
        scale = other.abs().max().clamp(min=1)
        close(gradient / scale, other / scale)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_draws_and_drops_as_peft(dora, tmp_path):
    options = dict(r=4, lora_alpha=16, lora_dropout=0.5, use_dora=dora, **QV)
    theirs_model = peft.get_peft_model(llama(attention_bias=True), peft.LoraConfig(**options))
    train(theirs_model)
    theirs_model.save_pretrained(tmp_path)
    model = llama(attention_bias=True)
    layers = load_peft_(model, tmp_path)
    found = []
    for each in (model.train(), theirs_model.train()):
        torch.manual_seed(3)
        found.append(output(each))
        found[-1].square().sum().backward()
    close(*found)
    other = theirs_model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.grad
    scale = other.abs().max()
    close(layers["model.layers.1.self_attn.q_proj"].lora_A.grad / scale, other / scale)


def test_round_trip_of_our_own_file_is_exact_and_keeps_the_configuration(tmp_path):
    model = llama()
    config = LoRAConfig(r=4, alpha=6.5, dropout=0.1, rslora=True, dora=True, target=("q_proj", "up_proj"), layers="0,2")
    inject_lora(model, config)
    train(model)
    export_peft(model, tmp_path)
    other = llama()
    layers = load_peft_(other, tmp_path, adapter_name="again")
    assert torch.equal(output(model), output(other))
    assert not any(layer.starts_as_identity for layer in layers.values())
    read, _ = read_peft(tmp_path)
    assert (read.r, read.alpha, read.dropout, read.rslora, read.dora) == (4, 6.5, 0.1, True, True)


def test_layers_pattern_of_peft_is_understood(tmp_path):
    config = peft.LoraConfig(r=2, layers_to_transform=[1], layers_pattern="layers", **QV)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    assert list(load_peft_(llama(), tmp_path)) == [f"model.layers.1.self_attn.{p}_proj" for p in "qv"]


def test_short_name_inside_a_longer_one_is_not_matched_by_peft_too(tmp_path):
    model = net()
    inject_lora(model, LoRAConfig(r=2, target=("fc",), exclude=("block.fc",)))
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert sum("lora_A.default" in name for name, _ in loaded.named_parameters()) == 1


def test_each_of_two_nested_adapters_is_exported_alone(tmp_path):
    model = llama()
    inject_lora(model, LoRAConfig(r=2, target=("q_proj",), adapter_name="a"))
    inject_lora(model, LoRAConfig(r=3, target=("q_proj", "v_proj"), adapter_name="b"))
    train(model)
    for name, other in (("a", "b"), ("b", "a")):
        export_peft(model, tmp_path / name, adapter_name=name)
        with disabled(model, [other]):
            expected = output(model)
        close(output(peft.PeftModel.from_pretrained(llama(), tmp_path / name).eval()), expected)
    both = llama()
    for name in "ab":
        load_peft_(both, tmp_path / name, adapter_name=name)
    close(output(both), output(model))


def exported(tmp_path, **kwargs):
    model = llama()
    inject_lora(model, LoRAConfig(r=2, **{"target": ("q_proj",), **kwargs}))
    return export_peft(model, tmp_path / "a")


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_and_unexpected_tensors_are_listed_and_the_model_is_unchanged(tmp_path):
    folder = exported(tmp_path)
    edit(folder, target_modules=["q_proj", "v_proj"])
    model = llama()
    with pytest.raises(Refusal, match=r"missing model.layers.0.self_attn.v_proj.lora_A, .*; not expected none"):
        load_peft_(model, folder)
    edit(folder, target_modules=["model.layers.0.self_attn.q_proj"])
    with pytest.raises(Refusal, match=r"missing none; not expected model.layers.1.self_attn.q_proj.lora_A"):
        load_peft_(model, folder)
    assert not injected_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_base_is_refused(tmp_path):
    folder = exported(tmp_path)
    wide = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "hidden_size": 16}))
    with pytest.raises(Refusal, match=r"another base: .* is \(2, 32\) in the file and \(2, 16\) in this model"):
        load_peft_(wide, folder)
    with pytest.raises(Refusal, match="matches nothing"):
        load_peft_(gpt2(), folder)
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path / "b")
    other = llama()
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(Refusal, match="weight of 'model.embed_tokens' that it stores differs"):
        load_peft_(other, tmp_path / "b")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="IA3"), "type IA3, not LORA"),
        (dict(bias="some"), "bias must be none, all or lora_only, got 'some'"),
        (dict(target_parameters=["experts.w"]), "sets target_parameters"),
        (dict(init_lora_weights="pissa"), "initialised with 'pissa', which changes the base"),
        (dict(r=0), "r must be a whole number of at least 1, got 0"),
        (dict(target_modules=None), "damaged or incomplete"),
    ],
)
def test_foreign_configuration_is_refused(change, message, tmp_path):
    folder = exported(tmp_path)
    edit(folder, **change)
    with pytest.raises(Refusal, match=message):
        read_peft(folder)


def test_biases_that_this_model_has_not_do_not_keep_an_adapter_out(tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, bias="all", **QV)).save_pretrained(tmp_path)
    layers = load_peft_(llama(), tmp_path)
    assert len(layers) == 6 and next(iter(layers.values())).config.bias == "none"


def test_rows_that_peft_would_compute_otherwise_are_not_written(tmp_path):
    class Tied(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=bias)
            self.head.weight = self.embed.weight

    for bias, message in ((True, "PEFT leaves out the bias of such a head"), (False, "configuration does not say so")):
        model = Tied(bias)
        inject_lora(model, LoRAConfig(2, target=("fc",), trainable_tokens=(1, 2)))
        with pytest.raises(Refusal, match=message):
            export_peft(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(tmp_path):
    folder = exported(tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(Refusal, match="adapter_model.safetensors is damaged"):
        read_peft(folder)
    weights.write_bytes(b"")
    with pytest.raises(Refusal, match="adapter_model.safetensors is damaged"):
        read_peft(folder)
    weights.unlink()
    with pytest.raises(Refusal, match="holds no adapter_model.safetensors"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(Refusal, match="cannot be read as an adapter's configuration"):
        read_peft(folder)
    with pytest.raises(Refusal, match="cannot be read as an adapter's configuration"):
        read_peft(tmp_path / "nowhere")


def test_only_an_adapter_is_overwritten_and_nothing_is_left_beside_it(tmp_path):
    folder = exported(tmp_path)
    exported(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    model = llama()
    inject_lora(model, LoRAConfig(r=2))
    with pytest.raises(Refusal, match="is not empty and holds no adapter_config.json"):
        export_peft(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "kept"


def test_what_the_format_cannot_express_is_refused(tmp_path):
    with pytest.raises(Refusal, match="no LoRA adapter called 'default'; it carries: none"):
        export_peft(llama(), tmp_path / "a")
    model = nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2))
    inject_lora(model, LoRAConfig(r=2, target=("0",)))
    with pytest.raises(Refusal, match="PEFT ignores the dilation"):
        export_peft(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
