"""Oracle: AdapterHub's definition of a bottleneck, written down anew below and put between the base's own modules by hand.

The library itself runs on other versions of transformers. Its keys are written down here as its files have them.
"""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_ft.formats.adapterhub import export_adapterhub, load_adapterhub_
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.bottleneck import BottleneckConfig, inject_bottleneck
from lightning_ft.nn.registry import injected_layers

SIZE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 33}
IDS = torch.tensor([[1, 2, 2, 11, 7], [30, 30, 5, 2, 3]])
# AdapterHub's presets, by their names there.
PRESETS = {
    "seq_bn": {"style": "pfeiffer", "reduction_factor": 4.0},
    "double_seq_bn": {"style": "houlsby", "reduction_factor": 4.0, "non_linearity": "swish", "init": "bert"},
    "par_bn": {"style": "parallel", "reduction_factor": 2.0, "scale": 4.0},
}


def build(name):
    torch.manual_seed(0)
    model = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=33, n_positions=16)
        ),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZE)),
        "distilbert": lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(n_layers=2, dim=16, hidden_dim=24, n_heads=2, vocab_size=33)
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=33)
        ),
    }[name]()
    return model.eval().double().requires_grad_(False)


MODELS = ("llama", "gpt2", "bert", "distilbert", "t5")


@torch.no_grad()
def trained(model, config):
    """The model with an adapter whose parameters are all unlike their start."""
    inject_bottleneck(model, config)
    generator = torch.Generator().manual_seed(4)
    for layer in injected_layers(model).values():
        for parameter in layer.injected_parameters().values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
    return model


def run(model):
    if isinstance(model, hf.T5ForConditionalGeneration):
        return model(input_ids=IDS, decoder_input_ids=IDS).logits
    return model(IDS).logits


class Hub:
    """AdapterHub's forward, from a folder's flags and tensors alone."""

    def __init__(self, folder):
        stored = json.loads((folder / "adapter_config.json").read_text())
        self.flags, self.name = stored["config"], stored["name"]
        self.tensors = {key: tensor.double() for key, tensor in load_file(folder / "adapter.safetensors").items()}
        self.used = set()

    def has(self, place):
        return any(key.startswith(f"{place}.adapters.{self.name}.") for key in self.tensors)

    def part(self, place, part):
        key = f"{place}.adapters.{self.name}.{part}"
        self.used.add(key)
        return self.tensors[key]

    def bottleneck(self, place, x):
        flags, at = self.flags, 0
        if flags["ln_before"]:
            x = nn.functional.layer_norm(
                x, (16,), self.part(place, "adapter_down.0.weight"), self.part(place, "adapter_down.0.bias")
            )
            for end in ("weight", "bias"):  # the same module under its second name
                twin = self.part(place, f"adapter_norm_before.{end}")
                assert torch.equal(twin, self.part(place, f"adapter_down.0.{end}"))
            at = 1
        x = x @ self.part(place, f"adapter_down.{at}.weight").T + self.part(place, f"adapter_down.{at}.bias")
        x = {"relu": torch.relu, "swish": nn.functional.silu, "gelu": nn.functional.gelu}[flags["non_linearity"]](x)
        x = x @ self.part(place, "adapter_up.weight").T + self.part(place, "adapter_up.bias")
        x = x * (self.part(place, "scaling") if isinstance(flags["scaling"], str) else flags["scaling"])
        if flags["ln_after"]:
            names = (self.part(place, f"adapter_norm_after.{end}") for end in ("weight", "bias"))
            x = nn.functional.layer_norm(x, (16,), *names)
        return x

    def sublayer(self, place, s, r, norm=None):
        """What a block goes on with: ``s`` the sublayer's output, ``r`` what it is added to, ``norm`` behind the sum."""
        flags = self.flags

        def close(y):
            return y if norm is None else norm(y)

        if not self.has(place):
            return close(s + r)
        if flags["is_parallel"]:
            out = self.bottleneck(place, r) + s
        elif flags["original_ln_before"]:
            assert flags["residual_before_ln"] is True
            out = self.bottleneck(place, close(s + r)) + s
        else:
            out = self.bottleneck(place, s) + s
        assert flags["original_ln_after"] is True
        return close(out + r)


def hub_llama(model, hub):
    h = model.model.embed_tokens(IDS)
    positions = model.model.rotary_emb(h, torch.arange(5)[None])
    for i, block in enumerate(model.model.layers):
        at = f"model.layers.{i}"
        s = block.self_attn(block.input_layernorm(h), position_embeddings=positions, attention_mask=None)[0]
        h = hub.sublayer(f"{at}.attention_adapters", s, h)
        h = hub.sublayer(f"{at}.output_adapters", block.mlp(block.post_attention_layernorm(h)), h)
    return model.lm_head(model.model.norm(h))


def hub_gpt2(model, hub):
    h = model.transformer.wte(IDS) + model.transformer.wpe(torch.arange(5))
    for i, block in enumerate(model.transformer.h):
        at = f"transformer.h.{i}"
        h = hub.sublayer(f"{at}.attention_adapters", block.attn(block.ln_1(h))[0], h)
        h = hub.sublayer(f"{at}.output_adapters", block.mlp(block.ln_2(h)), h)
    return model.lm_head(model.transformer.ln_f(h))


def hub_bert(model, hub):
    h = model.bert.embeddings(IDS)
    for i, block in enumerate(model.bert.encoder.layer):
        at, attention = f"bert.encoder.layer.{i}", block.attention
        s = attention.output.dense(attention.self(h)[0])
        h = hub.sublayer(f"{at}.attention.output", s, h, attention.output.LayerNorm)
        h = hub.sublayer(f"{at}.output", block.output.dense(block.intermediate(h)), h, block.output.LayerNorm)
    return model.cls(h)


def hub_distilbert(model, hub):
    h = model.distilbert.embeddings(IDS)
    for i, block in enumerate(model.distilbert.transformer.layer):
        at = f"distilbert.transformer.layer.{i}"
        h = hub.sublayer(f"{at}.attention_adapters", block.attention(h)[0], h, block.sa_layer_norm)
        h = hub.sublayer(f"{at}.output_adapters", block.ffn(h), h, block.output_layer_norm)
    h = model.vocab_layer_norm(model.activation(model.vocab_transform(h)))
    return model.vocab_projector(h)


def hub_t5(model, hub):
    def stack(name, source=None):
        part = getattr(model, name)
        h = part.embed_tokens(IDS)
        first = part.block[0].layer[0].SelfAttention
        bias = first.compute_bias(5, 5)
        causal = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        for i, block in enumerate(part.block):
            for j, layer in enumerate(block.layer):
                x = layer.layer_norm(h)
                if hasattr(layer, "SelfAttention"):
                    s = layer.SelfAttention(x, mask=None if source is None else causal, position_bias=bias)[0]
                elif hasattr(layer, "EncDecAttention"):
                    s = layer.EncDecAttention(
                        x, key_value_states=source, position_bias=torch.zeros(1, 2, 5, 5).double()
                    )[0]
                else:
                    s = layer.DenseReluDense(x)
                h = hub.sublayer(f"{name}.block.{i}.layer.{j}", s, h)
        return part.final_layer_norm(h)

    h = stack("decoder", stack("encoder"))
    return model.lm_head(h * 16**-0.5 if model.config.scale_decoder_outputs else h)


FORWARDS = {"llama": hub_llama, "gpt2": hub_gpt2, "bert": hub_bert, "distilbert": hub_distilbert, "t5": hub_t5}
MORE = {
    "seq_bn everywhere": {"style": "pfeiffer", "reduction_factor": 4.0, "places": ("attention", "feed_forward")},
    "par_bn everywhere": {"style": "parallel", "scale": "channel", "places": ("attention", "feed_forward")},
    "with norms": {"style": "houlsby", "norm_before": True, "norm_after": True, "non_linearity": "gelu"},
    "learned scale, uneven": {"scale": "learned", "reduction_factors": {"1": 2.0}},
    "some blocks": {"style": "houlsby", "layers": [1]},
}


@pytest.mark.parametrize("preset", {**PRESETS, **MORE})
@pytest.mark.parametrize("name", MODELS)
def test_a_written_folder_computes_by_adapterhubs_definition_what_the_model_does(name, preset, tmp_path):
    model = trained(build(name), BottleneckConfig(**{**PRESETS, **MORE}[preset]))
    export_adapterhub(model, tmp_path / "hub")
    hub, base = Hub(tmp_path / "hub"), build(name)
    expected = FORWARDS[name](base, hub)
    assert hub.used == set(hub.tensors), "every tensor of the file has a part in it"
    torch.testing.assert_close(run(model), expected, rtol=1e-9, atol=1e-9)
    assert (expected - run(base)).abs().max() > 1e-2
    # And back: onto a new base, under another name.
    layers = load_adapterhub_(base, tmp_path / "hub", adapter_name="other")
    assert torch.equal(run(base), run(model)) and {x.adapter_name for x in layers} == {"other"}
    export_adapterhub(base, tmp_path / "again", adapter_name="other")
    again = load_file(tmp_path / "again/adapter.safetensors")
    assert {k.replace(".other.", ".adapter."): t.tolist() for k, t in again.items()} == {
        k: t.tolist() for k, t in load_file(tmp_path / "hub/adapter.safetensors").items()
    }
    configs = [json.loads((tmp_path / part / "adapter_config.json").read_text()) for part in ("hub", "again")]
    assert {**configs[1], "name": "adapter"} == configs[0]


# Written down by hand from AdapterHub's files: (model, preset, name) -> key -> shape.
GOLDEN = {
    ("llama", "double_seq_bn"): {
        f"model.layers.{i}.{place}_adapters.adapters.adapter.{key}": shape
        for i in (0, 1)
        for place in ("attention", "output")
        for key, shape in {
            "adapter_down.0.weight": (4, 16),
            "adapter_down.0.bias": (4,),
            "adapter_up.weight": (16, 4),
            "adapter_up.bias": (16,),
        }.items()
    },
    ("bert", "seq_bn"): {
        "bert.encoder.layer.0.output.adapters.adapter.adapter_down.0.weight": (4, 16),
        "bert.encoder.layer.0.output.adapters.adapter.adapter_down.0.bias": (4,),
        "bert.encoder.layer.0.output.adapters.adapter.adapter_up.weight": (16, 4),
        "bert.encoder.layer.0.output.adapters.adapter.adapter_up.bias": (16,),
        "bert.encoder.layer.1.output.adapters.adapter.adapter_down.0.weight": (4, 16),
        "bert.encoder.layer.1.output.adapters.adapter.adapter_down.0.bias": (4,),
        "bert.encoder.layer.1.output.adapters.adapter.adapter_up.weight": (16, 4),
        "bert.encoder.layer.1.output.adapters.adapter.adapter_up.bias": (16,),
    },
    ("gpt2", "par_bn"): {
        "transformer.h.0.output_adapters.adapters.adapter.adapter_down.0.weight": (8, 16),
        "transformer.h.0.output_adapters.adapters.adapter.adapter_down.0.bias": (8,),
        "transformer.h.0.output_adapters.adapters.adapter.adapter_up.weight": (16, 8),
        "transformer.h.0.output_adapters.adapters.adapter.adapter_up.bias": (16,),
        "transformer.h.1.output_adapters.adapters.adapter.adapter_down.0.weight": (8, 16),
        "transformer.h.1.output_adapters.adapters.adapter.adapter_down.0.bias": (8,),
        "transformer.h.1.output_adapters.adapters.adapter.adapter_up.weight": (16, 8),
        "transformer.h.1.output_adapters.adapters.adapter.adapter_up.bias": (16,),
    },
    ("bert", "some blocks with norms"): {
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_norm_before.weight": (16,),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_norm_before.bias": (16,),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_down.0.weight": (16,),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_down.0.bias": (16,),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_down.1.weight": (1, 16),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_down.1.bias": (1,),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_up.weight": (16, 1),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_up.bias": (16,),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_norm_after.weight": (16,),
        "bert.encoder.layer.1.attention.output.adapters.adapter.adapter_norm_after.bias": (16,),
        "bert.encoder.layer.1.attention.output.adapters.adapter.scaling": (1,),
    },
    ("t5", "cross attention"): {
        "decoder.block.0.layer.1.adapters.adapter.adapter_down.0.weight": (1, 16),
        "decoder.block.0.layer.1.adapters.adapter.adapter_down.0.bias": (1,),
        "decoder.block.0.layer.1.adapters.adapter.adapter_up.weight": (16, 1),
        "decoder.block.0.layer.1.adapters.adapter.adapter_up.bias": (16,),
    },
}
GOLDEN_CONFIGS = {
    "some blocks with norms": {
        "layers": "1",
        "places": ("attention",),
        "style": "houlsby",
        "norm_before": True,
        "norm_after": True,
        "scale": "learned",
    },
    "cross attention": {"places": ("cross_attention",), "style": "houlsby", "exclude": ("decoder.block.1",)},
}


@pytest.mark.parametrize(("name", "preset"), GOLDEN)
def test_golden_keys(name, preset, tmp_path):
    model = trained(build(name), BottleneckConfig(**{**PRESETS, **GOLDEN_CONFIGS}[preset]))
    export_adapterhub(model, tmp_path / "hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    tensors = load_file(tmp_path / "hub/adapter.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == GOLDEN[name, preset]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_golden_configuration(tmp_path):
    """As AdapterHub writes seq_bn for this model, key by key, but for the reduction factor."""
    model = trained(build("bert"), BottleneckConfig(**PRESETS["seq_bn"]))
    export_adapterhub(model, tmp_path / "hub")
    written = json.loads((tmp_path / "hub/adapter_config.json").read_text())
    assert written == {
        "config": {
            "adapter_residual_before_ln": False,
            "cross_adapter": False,
            "dropout": 0.0,
            "factorized_phm_W": True,
            "factorized_phm_rule": False,
            "hypercomplex_nonlinearity": "glorot-uniform",
            "init_weights": "mam_adapter",
            "init_weights_seed": None,
            "inv_adapter": None,
            "inv_adapter_reduction_factor": None,
            "is_parallel": False,
            "learn_phm": True,
            "leave_out": [],
            "ln_after": False,
            "ln_before": False,
            "mh_adapter": False,
            "non_linearity": "relu",
            "original_ln_after": True,
            "original_ln_before": True,
            "output_adapter": True,
            "phm_bias": True,
            "phm_c_init": "normal",
            "phm_dim": 4,
            "phm_init_range": 0.0001,
            "phm_layer": False,
            "phm_rank": 1,
            "reduction_factor": 4.0,
            "residual_before_ln": True,
            "scaling": 1.0,
            "shared_W_phm": False,
            "shared_phm_rule": True,
            "stochastic_depth": 0.0,
            "use_gating": False,
        },
        "hidden_size": 16,
        "model_class": "BertForMaskedLM",
        "model_name": None,
        "model_type": "bert",
        "name": "adapter",
        "version": "adapters.1.2.0",
    }


@pytest.fixture
def folder(tmp_path):
    model = trained(build("bert"), BottleneckConfig(style="houlsby", reduction_factor=4.0, layers="1"))
    return export_adapterhub(model, tmp_path / "hub")


def changed(folder, **flags):
    """The folder with other flags; a flag of None is taken out."""
    stored = json.loads((folder / "adapter_config.json").read_text())
    stored["config"] = {k: v for k, v in {**stored["config"], **flags}.items() if v is not None}
    (folder / "adapter_config.json").write_text(json.dumps(stored))


def renamed(folder, rename):
    tensors = load_file(folder / "adapter.safetensors")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / "adapter.safetensors")


def expected_logits():
    return run(trained(build("bert"), BottleneckConfig(style="houlsby", reduction_factor=4.0, layers="1")))


def test_pickled_weights_of_a_bare_model_from_the_first_versions_are_read(folder):
    """They name places otherwise, have no prefix, and no flags that came later; the file is read without pickle."""
    tensors = load_file(folder / "adapter.safetensors")
    old = {
        key.removeprefix("bert.").replace(
            ".adapters.", ".attention_text_task_adapters." if ".attention." in key else ".layer_text_task_adapters."
        ): tensor
        for key, tensor in tensors.items()
    }
    torch.save(old, folder / "pytorch_adapter.bin")
    (folder / "adapter.safetensors").unlink()
    changed(
        folder, scaling=None, is_parallel=None, init_weights=None, dropout=None, use_gating=None, cross_adapter=True
    )
    model = build("bert")
    load_adapterhub_(model, folder)
    assert torch.equal(run(model), expected_logits())


def test_a_model_without_a_head_takes_the_file_of_one_with(folder):
    model = build("bert").bert
    layers = load_adapterhub_(model, folder)
    assert [layer.name for layer in layers] == [
        "encoder.layer.1.attention.output.dropout",
        "encoder.layer.1.output.dropout",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"use_gating": True}, "sets use_gating=True, which is not supported here"),
        ({"phm_layer": True}, "sets phm_layer=True"),
        ({"inv_adapter": "nice"}, "sets inv_adapter='nice'"),
        ({"stochastic_depth": 0.1}, "sets stochastic_depth=0.1"),
        ({"original_ln_after": False}, "original_ln_after=false, which moves the residual connection or the norm"),
        ({"original_ln_before": True, "residual_before_ln": False}, "residual_before_ln=false"),
        ({"residual_before_ln": "post_add"}, "post_add"),
        ({"ln_after": True, "adapter_residual_before_ln": True}, "adapter_residual_before_ln=true"),
        ({"architecture": "lora"}, "holds AdapterHub's lora, not a bottleneck adapter"),
        ({"non_linearity": "mish"}, "non_linearity must be one of"),
        ({"mh_adapter": False, "output_adapter": False}, "puts an adapter nowhere"),
        ({"mh_adapter": False}, "does not fit this model: missing none; not expected encoder.layer.1.attention"),
        ({"leave_out": []}, "does not fit this model: missing encoder.layer.0"),
        ({"leave_out": [7]}, "leaves out block 7, but this model has blocks 0 to 1"),
        ({"reduction_factor": 2}, r"trained on another base: .* is \(4,\) in the file and \(8,\) in this model"),
        ({"reduction_factor": "x"}, "is damaged or incomplete"),
    ],
)
def test_what_would_compute_something_else_is_refused_and_leaves_the_model_alone(folder, flags, words):
    changed(folder, **flags)
    model = build("bert").requires_grad_(True)
    with pytest.raises(Refusal, match=words):
        load_adapterhub_(model, folder)
    assert not injected_layers(model) and all(p.requires_grad for p in model.parameters())


def test_damaged_folders_are_refused(folder):
    renamed(folder, lambda key: key.replace("adapter_up", "adapter_upp"))
    with pytest.raises(Refusal, match="does not fit this model: missing"):
        load_adapterhub_(build("bert"), folder)
    (folder / "adapter.safetensors").write_bytes(b"junk")
    with pytest.raises(Refusal, match=r"adapter.safetensors is damaged or incomplete \(SafetensorError\)"):
        load_adapterhub_(build("bert"), folder)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(Refusal, match="holds neither adapter.safetensors nor pytorch_adapter.bin"):
        load_adapterhub_(build("bert"), folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"cannot be read as the configuration of an AdapterHub adapter \(KeyError"):
        load_adapterhub_(build("bert"), folder)


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    named = trained(build("llama"), BottleneckConfig(target=("mlp",)))
    with pytest.raises(Refusal, match="not at modules named by target"):
        export_adapterhub(named, tmp_path / "hub")
    uneven = trained(build("bert"), BottleneckConfig(style="houlsby", exclude=("encoder.layer.1.output",)))
    with pytest.raises(
        Refusal, match=r"leaves out whole blocks only, and of '.*layer.1' only the feed_forward has none"
    ):
        export_adapterhub(uneven, tmp_path / "hub")
    with pytest.raises(Refusal, match="carries no bottleneck adapter called 'x'; it carries: adapter"):
        export_adapterhub(uneven, tmp_path / "hub", adapter_name="x")
    torch.manual_seed(0)
    other = hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZE, num_key_value_heads=2)).eval()
    with pytest.raises(Refusal, match="AdapterHub's format is known here for bert, distilbert"):
        export_adapterhub(trained(other, BottleneckConfig()), tmp_path / "hub")
    beside = trained(build("bert"), BottleneckConfig())
    beside.bert.embeddings.LayerNorm.bias.requires_grad_(True)
    with pytest.raises(Refusal, match="bert.embeddings.LayerNorm.bias trained beside the adapter"):
        export_adapterhub(beside, tmp_path / "hub")
    classifier = hf.BertForSequenceClassification(hf.BertConfig(**SIZE))
    classifier.requires_grad_(False)
    trained(classifier, BottleneckConfig())
    classifier.classifier.requires_grad_(True)
    with pytest.raises(Refusal, match="has a head that was trained with the adapter"):
        export_adapterhub(classifier, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    assert export_adapterhub(classifier, tmp_path / "hub", without_head=True).is_dir()
