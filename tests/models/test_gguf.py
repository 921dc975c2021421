"""A GGUF file becomes a folder with the very weights that were put into the file, in bf16, ready to train."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.gguf import convert_gguf
from tests.tolerances import TOL

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Llama's rotary halves as GGUF stores them: pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(code) for code in range(ord("a"), ord("a") + config.vocab_size - 4)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab"])
    writer.add_token_types([3, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = interleaved(weight, heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.1)
    return model


def test_weights_tokenizer_and_template_survive(tiny, tmp_path):
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    write_gguf(file, tiny)
    folder.mkdir()
    convert_gguf(file, folder)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = {name: weight.bfloat16() for name, weight in tiny.state_dict().items()}
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name]), name
    ids = torch.randint(3, 30, (1, 12))
    tiny.load_state_dict(expected)
    torch.testing.assert_close(model.float()(ids).logits, tiny(ids).logits, rtol=0, atol=TOL[torch.float32])

    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abc")["input_ids"] == [29, 5]
    assert tokenizer.chat_template == TEMPLATE and tokenizer.model_max_length == 64
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "<s>abc</s>"


def test_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("lightning_ft.models.gguf.find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"needs gguf and accelerate, .* pip install 'lightning-ft\[starter\]'"):
        convert_gguf(tmp_path / "x.gguf", tmp_path)
