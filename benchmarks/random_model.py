"""A Llama with random weights and a byte tokenizer, made on the spot: for tests and machines without assets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ turn_end }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def byte_tokenizer(turn_end: str = "\n") -> Any:
    """A tokenizer of one token a byte with ChatML marks.

    Args:
        turn_end: what the template writes after each end of turn; ChatML's usual newline, or nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    vocabulary = {token: n for n, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=specials[0], eos_token=specials[1], pad_token=specials[2]
    )
    tokenizer.chat_template = "{% set turn_end = " + repr(turn_end) + " %}" + CHATML
    return tokenizer


def write_model(
    folder: Path, *, turn_end: str = "\n", seed: int = 0, dtype: str = "float32", device: str = "cpu", **config: Any
) -> Path:
    """Write a Hugging Face folder of a random Llama and its byte tokenizer.

    Args:
        folder: where; it is made.
        turn_end: as for `byte_tokenizer`.
        seed: of the weights.
        dtype: of the weights on disk.
        device: where they are drawn; each kind draws others.
        config: fields of ``LlamaConfig``; a model of two layers and 32 dimensions without them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(turn_end)
    fields = {**TINY, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 2048, **config}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **ids, **fields))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
