"""A bandit of three states that a language model plays: prompt = state, one token = arm, with a known best and a known optimum.

The vocabulary has eight tokens, so that the whole policy can be read off the logits and its worth computed exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_ft import PromptData

VOCABULARY = ("<end>", "s0", "s1", "s2", "a", "b", "c", "d")
STATES, ARMS = ("s0", "s1", "s2"), ("a", "b", "c", "d")
#: Reward of each arm in each state; anything else gives 0.
REWARDS = {"s0": {"a": 1.0, "b": 0.2}, "s1": {"b": 0.8, "c": 1.0}, "s2": {"d": 0.9, "a": 0.6}}


def pay(prompts: list[str], completions: list[str]) -> list[float]:
    return [REWARDS[state].get(arm.strip(), 0.0) for state, arm in zip(prompts, completions, strict=True)]


def table() -> Tensor:
    """(3, V) what each token pays in each state."""
    return torch.tensor([[REWARDS[s].get(token, 0.0) for token in VOCABULARY] for s in STATES], dtype=torch.float64)


def write(folder: Path) -> Path:
    """``model`` and ``prompts.jsonl``."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<end>")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **size, vocab_size=8, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0, bos_token_id=None
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": state}) + "\n" for state in STATES * 16))
    return folder


def data(folder: Path, **options: Any) -> PromptData:
    given = {"prompts": 48, "batch_size": 48, "draw_batch": 48, "log_answers": 0, "cache_dir": str(folder / "cache")}
    return PromptData(str(folder / "prompts.jsonl"), **{**given, **options})


@torch.no_grad()
def policy(module: Any) -> Tensor:
    """(3, V) log-probability of each first token in each state."""
    ids = torch.tensor([[VOCABULARY.index(state)] for state in STATES])
    return module.model(ids).logits[:, -1].double().log_softmax(-1)


def worth(logp: Tensor, before: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """(3,) expected reward in each state, less beta times the KL from ``before``."""
    paid = (logp.exp() * table()).sum(-1)
    return paid if before is None else paid - beta * (logp.exp() * (logp - before)).sum(-1)


def optimum(before: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """(3,) the most that any policy can be worth: the best arm, or with a KL ``beta log sum p exp(reward / beta)``."""
    if before is None:
        return table().amax(-1)
    return beta * (before + table() / beta).logsumexp(-1)


def worth_by_forward_kl(logp: Tensor, before: Tensor, beta: float) -> Tensor:
    """(3,) expected reward less beta KL(before || p): what k3 in the loss comes down to, see `optimum_by_forward_kl`."""
    return worth(logp) - beta * (before.exp() * (before - logp)).sum(-1)


def optimum_by_forward_kl(before: Tensor, beta: float) -> Tensor:
    """(3, V) log-probabilities of the best policy by `worth_by_forward_kl`: ``p = beta q / (l - r)``, where l makes the sum 1.

    For tokens drawn from p the gradient of k3 = q/p - 1 - log q/p is ``E (1 - q/p) grad log p = - sum q grad log p``, that of the
    KL the other way round.
    """
    low, high = table().amax(-1, keepdim=True), table().amax(-1, keepdim=True) + 10 * beta
    for _ in range(200):
        middle = (low + high) / 2
        above = (beta * before.exp() / (middle - table())).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (beta * before.exp() / (high - table())).log()
