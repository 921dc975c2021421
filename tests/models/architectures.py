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

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_PADDED_AT_1 = {**_SIZE, "pad_token_id": 1, "max_position_embeddings": 40}  # positions begin at 2
_T5 = {
    "vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "initializer_factor": 2.0,
}  # fmt: skip
_BART = {
    "vocab_size": V, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    "init_std": 0.4, "dropout": 0.0,
}  # fmt: skip

#: The window of ModernBERT is 2 tokens to each side.
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertConfig(**_SIZE, **_NO_DROPOUT, max_position_embeddings=40),
    "roberta": lambda: hf.RobertaConfig(**_PADDED_AT_1, **_NO_DROPOUT),
    "xlm_roberta": lambda: hf.XLMRobertaConfig(**_PADDED_AT_1, **_NO_DROPOUT),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=V, dim=32, hidden_dim=48, n_layers=2, n_heads=4, initializer_range=0.4, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0, max_position_embeddings=40,
    ),
    "electra": lambda: hf.ElectraConfig(**_SIZE, **_NO_DROPOUT, embedding_size=16, max_position_embeddings=40),
    "albert": lambda: hf.AlbertConfig(
        **_SIZE, **_NO_DROPOUT, embedding_size=16, classifier_dropout_prob=0.0, max_position_embeddings=40
    ),
    "deberta_v2": lambda: hf.DebertaV2Config(
        **_SIZE, **_NO_DROPOUT, pooler_dropout=0.0, relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_biased_input=False, max_position_embeddings=40,
    ),
    "modernbert": lambda: hf.ModernBertConfig(
        **_SIZE, local_attention=4, pad_token_id=0, eos_token_id=3, bos_token_id=2, cls_token_id=2, sep_token_id=3,
        classifier_pooling="cls", global_attn_every_n_layers=2,
    ),
    "modernbert_mean": lambda: hf.ModernBertConfig(
        **_SIZE, local_attention=4, pad_token_id=0, eos_token_id=3, bos_token_id=2, cls_token_id=2, sep_token_id=3,
        classifier_pooling="mean", global_attn_every_n_layers=2,
    ),
}  # fmt: skip

SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "t5": lambda: hf.T5Config(**_T5),
    "t5_v1_1": lambda: hf.T5Config(**_T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "umt5": lambda: hf.UMT5Config(**_T5),
    "bart": lambda: hf.BartConfig(**_BART),
    "mbart": lambda: hf.MBartConfig(**_BART, decoder_start_token_id=2, scale_embedding=True),
    "marian": lambda: hf.MarianConfig(**_BART, pad_token_id=0, decoder_start_token_id=0, eos_token_id=2),
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


def task_config(kind: str, task: str, labels: int = 3) -> Any:
    """The configuration of any kind above for a task, with numbered classes."""
    config = {**CAUSAL, **ENCODERS, **SEQ2SEQ}[kind]()
    if task == "regression":
        config.num_labels = 1
        config.problem_type = "regression"
    elif task.endswith("classification"):
        config.num_labels = labels
        if task == "sequence_classification":
            config.problem_type = "single_label_classification"
    return config


def build_for(kind: str, task: str, attn: str | None = attention.NAME, *, config: Any = None) -> Any:
    """The model with the head of a task, in eval mode and float32; ``config`` in place of the kind's own."""
    attention.register()
    config = config if config is not None else task_config(kind, task)
    config._attn_implementation = attn
    mapping = {
        "causal_lm": hf.MODEL_FOR_CAUSAL_LM_MAPPING,
        "seq2seq_lm": hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        "token_classification": hf.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    }.get(task, hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    torch.manual_seed(0)
    return mapping[type(config)](config).eval()
