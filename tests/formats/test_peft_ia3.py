"""Oracle: PEFT itself, with trained vectors, both ways; and its table of default targets."""

import json

import peft
import pytest
import torch
import transformers as hf
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as INNER,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
)
from torch import nn

from lightning_ft.formats.peft import export_peft, load_peft_
from lightning_ft.formats.peft_ia3 import load_ia3_, read_ia3
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.ia3 import IA3Config, inject_ia3
from lightning_ft.nn.ia3_targets import KNOWN, auto_targets
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.registry import disabled, injected_layers
from tests.tolerances import TOL

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
SIZE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    vocab_size=64,
    initializer_range=0.1,
)


class Net(nn.Module):
    """Convolutions, one grouped, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, input_ids):
        return self.fc(self.grouped(self.conv(self.embed(input_ids)[:, None])).mean((2, 3)))


def seeded(make):
    def made():
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():  # biases of a fresh model are zero, and would not show how they are scaled
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.uniform_(-0.5, 0.5)
        return model

    return made


llama = seeded(
    lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, num_key_value_heads=2, mlp_bias=True, attention_bias=True))
)
gpt2 = seeded(
    lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            n_positions=32,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
)
bert = seeded(lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZE, num_labels=3)))
t5 = seeded(lambda: hf.T5ForConditionalGeneration(
    hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)))  # fmt: skip
net = seeded(Net)
CONV = dict(target_modules=["conv", "grouped", "fc"], feedforward_modules=["grouped"])
CASES = {
    "llama": (llama, IA3Config(), {}),
    "gpt2": (gpt2, IA3Config(), dict(fan_in_fan_out=True)),
    "bert": (bert, IA3Config(modules_to_save=("classifier",)), dict(task_type="SEQ_CLS")),
    "t5": (t5, IA3Config(), dict(task_type="SEQ_2_SEQ_LM")),
    "all_linear": (llama, IA3Config(target="all-linear"),
                   dict(target_modules="all-linear", feedforward_modules=["down_proj"])),
    "no_feedforward": (llama, IA3Config(target=("k_proj", "down_proj"), feedforward=()),
                       dict(target_modules=["k_proj", "down_proj"], feedforward_modules=[])),
    "one_layer": (llama, IA3Config(target=("v_proj", "down_proj"), feedforward=("layers.1.mlp.down_proj",)),
                  dict(target_modules=["v_proj", "down_proj", "model.layers.1.mlp.down_proj"],
                       feedforward_modules=["model.layers.1.mlp.down_proj"])),
    "regex": (llama, IA3Config(target=r"re:.*layers\.1\..*(k|down)_proj"),
              dict(target_modules=r".*layers\.1\..*(k|down)_proj", feedforward_modules=r".*down_proj")),
    "conv": (net, IA3Config(target=("conv", "grouped", "fc"), feedforward=("grouped",)), CONV),
}  # fmt: skip
case = pytest.mark.parametrize("make, ours, theirs", CASES.values(), ids=CASES)


def output(model):
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids.flip(1)} if model.config_class_name == "T5Config" else {}
    out = model(input_ids=ids, **more)
    return out if isinstance(out, torch.Tensor) else out.logits


def named(make):
    model = make()
    model.config_class_name = type(getattr(model, "config", None)).__name__
    return model


def theirs_of(model, options):
    made = peft.get_peft_model(model, peft.IA3Config(**options)).eval()
    made.config_class_name = model.config_class_name
    return made


@torch.no_grad()
def train(model):
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.3)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOL[torch.float32], atol=TOL[torch.float32])


@case
def test_export_gives_the_same_logits_in_peft(make, ours, theirs, tmp_path):
    model = named(make)
    model.requires_grad_(False)  # attention takes another kernel when a bias of it trains
    before = output(model)
    inject_ia3(model, ours)
    torch.testing.assert_close(output(model), before, rtol=0, atol=0)
    train(model)
    expected = output(model)
    assert (expected - before).abs().max() > 1e-2
    export_peft(model, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(named(make), tmp_path / "a").eval()
    loaded.config_class_name = model.config_class_name
    close(output(loaded), expected)
    if not ours.modules_to_save:
        close(output(merged_copy(model)), expected)
        with disabled(model):
            close(output(model), before)


@case
def test_import_gives_the_logits_and_gradients_of_peft(make, ours, theirs, tmp_path):
    theirs_model = theirs_of(named(make), theirs)
    train(theirs_model)
    theirs_model.save_pretrained(tmp_path / "a")
    model = named(make)
    layers = load_ia3_(model, tmp_path / "a")
    close(output(model), output(theirs_model))
    wanted = inject_ia3(named(make), ours)
    assert {n: x.feedforward for n, x in layers.items()} == {n: x.feedforward for n, x in wanted.items()}
    assert not any(layer.starts_as_identity for layer in layers.values())
    output(model).square().sum().backward()
    output(theirs_model).square().sum().backward()
    gradients = {n: p.grad for n, p in theirs_model.named_parameters() if p.grad is not None and "ia3_l" in n}
    assert len(gradients) == len(layers)
    for name, layer in layers.items():
        other = gradients[f"base_model.model.{name}.ia3_l.default"].flatten()
        scale = other.abs().max().clamp(min=1)
        close(layer.ia3_scale.grad / scale, other / scale)


def test_default_targets_are_those_of_peft():
    for kind, targets in TARGETS.items():
        if kind.startswith("RefinedWeb"):  # the remote code of falcon's first release
            continue
        outputs, inner = KNOWN[kind]
        assert set(outputs) | set(inner) == set(targets) and list(inner) == INNER[kind], kind


def test_an_unknown_architecture_is_read_by_names_and_shapes():
    phi3 = hf.Phi3ForCausalLM(hf.Phi3Config(**SIZE, pad_token_id=0))
    assert auto_targets(phi3) == (("qkv_proj", "down_proj"), ("down_proj",))
    modern = hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZE, pad_token_id=0, global_attn_every_n_layers=1))
    outputs, inner = auto_targets(modern)
    assert outputs[0] == "Wqkv" and all(name.endswith("mlp.Wo") for name in inner) and len(inner) == 2
    bert_like = hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=64)
    )
    assert auto_targets(bert_like) == (("k_lin", "v_lin", "lin2"), ("lin2",))


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZE, num_local_experts=2)), {}, "experts of a mixture are tensors"),
        (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZE, num_local_experts=2)), {"target": ("experts",)},
         "IA3 cannot wrap 'model.layers.0.mlp.experts.gate_up_proj': .* holds all experts"),
        (Net, {}, "'auto' finds no layers that make keys and values"),
        (Net, {"target": ("embed",)}, "IA3 cannot wrap 'embed', a Embedding: it wraps Linear, Conv1D and Conv2d"),
        (Net, {"target": ("fc",), "feedforward": ("conv",)}, "'conv' matches nothing"),
        (lambda: nn.MultiheadAttention(8, 2), {"target": ("out_proj",)}, "reads its weight without calling it"),
    ],
)  # fmt: skip
def test_what_cannot_be_scaled_is_refused_and_the_model_unchanged(make, options, words):
    model = make()
    with pytest.raises(Refusal, match=words):
        inject_ia3(model, IA3Config(**options))
    assert not injected_layers(model)


def test_foreign_and_unfitting_folders_are_refused(tmp_path):
    model = llama()
    inject_ia3(model)
    folder = export_peft(model, tmp_path / "a")
    with pytest.raises(Refusal, match="type IA3, not LORA"):
        load_peft_(llama(), folder)
    path = folder / "adapter_config.json"
    stored = json.loads(path.read_text())
    assert (stored["target_modules"], stored["feedforward_modules"]) == (
        ["down_proj", "k_proj", "v_proj"],
        ["down_proj"],
    )
    path.write_text(json.dumps({**stored, "target_modules": ["down_proj", "k_proj"]}))
    other = llama()
    with pytest.raises(Refusal, match=r"missing none; not expected model.layers.0.self_attn.v_proj.ia3_scale"):
        load_ia3_(other, folder)
    assert not injected_layers(other) and all(p.requires_grad for p in other.parameters())
    path.write_text(json.dumps({**stored, "some_new_option": 3}))
    with pytest.raises(Refusal, match="sets some_new_option=3, which IA3 here does not have"):
        read_ia3(folder)
    path.write_text(json.dumps({**stored, "peft_type": "LORA"}))
    with pytest.raises(Refusal, match="type LORA, not IA3"):
        read_ia3(folder)


def test_a_bf16_base_keeps_its_bytes_and_vectors_multiply_in_fp32():
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).bfloat16()
    before = model[0].weight.clone()
    layer = inject_ia3(model, IA3Config(target=("0",)))["0"]
    with torch.no_grad():
        layer.ia3_scale.fill_(1.003)  # bf16 has no number between 1 and 1.0078
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, plain = model(x), layer.base(x)
    assert out.dtype == torch.bfloat16 and layer.ia3_scale.dtype == torch.float32
    assert torch.equal(out, (plain.float() * 1.003).bfloat16()) and not torch.equal(out, plain)
    assert torch.equal(layer.base.weight, before)


def test_what_trained_beside_the_vectors_is_named_with_the_argument_that_stores_it(tmp_path):
    model = llama()
    inject_ia3(model)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(Refusal, match="model.norm.weight trained beside the adapter, .* by ia3.modules_to_save"):
        export_peft(model, tmp_path / "a")
