"""Tiny random models of many kinds, with weights large enough that a wrong mask, position or scale shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from lightning_ft.nn import attention

V = 97
_SIZE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.4,
}  # fmt: skip
_GROUPED = {**_SIZE, "num_key_value_heads": 2}

#: A window of 4 is shorter than the segments that the tests and the admission check use.
CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "llama_tied": lambda: hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=5.0),
    "mistral": lambda: hf.MistralConfig(**_GROUPED, sliding_window=4),
    "phi": lambda: hf.PhiConfig(**_SIZE),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0,
    ),
    "granite": lambda: hf.GraniteConfig(
        **_GROUPED, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0, attention_multiplier=0.3
    ),
    "cohere": lambda: hf.CohereConfig(**_GROUPED, logit_scale=0.5),
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
    "gpt_oss": lambda: hf.GptOssConfig(**_GROUPED, head_dim=8, num_local_experts=4, sliding_window=4),
    "mamba": lambda: hf.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, initializer_range=0.4),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=4, initializer_range=0.4,
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **_GROUPED, head_dim=8, num_local_experts=2, attention_chunk_size=4, intermediate_size_mlp=48
    ),
    "falcon_h1": lambda: hf.FalconH1Config(
        **_GROUPED, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "bert_decoder": lambda: hf.BertConfig(**_SIZE, is_decoder=True),
}  # fmt: skip


PACKABLE = (
    "llama", "llama_tied", "qwen3", "gemma2", "mistral", "phi", "gpt2", "granite", "cohere", "mixtral", "gpt_oss",
)  # fmt: skip


def build(kind: str, attn: str | None = attention.NAME) -> Any:
    """The model, in eval mode and float32."""
    attention.register()
    config = CAUSAL[kind]()
    config._attn_implementation = attn
    torch.manual_seed(0)
    return hf.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
