"""Text from a causal model: batched, KV-cached, in eval mode, with every mode put back afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ft.functional.errors import Refusal

Prompt = str | list[dict[str, Any]]
"""A plain string (continued as it is) or a list of chat messages (rendered by the tokenizer's template)."""


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of one prompt; a chat gets its generation prompt."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[str]:
    """Answers of a causal model to each prompt, without the prompt and without special tokens.

    Args:
        model: a transformers causal model; injected layers act as they are.
        tokenizer: the model's own.
        prompts: strings or chats; padded on the left into one batch, padding masked by position.
        max_new_tokens: at most so many tokens an answer; a row that has ended stops counting.
        temperature: 0 takes the most likely token; above, samples.
        top_p: sample only among the most likely tokens that together reach this probability.
        seed: of the sampling; None draws from the global generator.

    Raises:
        Refusal: when there is no prompt, or a prompt leaves no room in the model's context.
    """
    if not prompts:
        raise Refusal("There is nothing to generate from: give at least one prompt.")
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if any(not row for row in rows):
        raise Refusal("An empty prompt gives the model nothing to continue; write at least one character.")
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, rows))
    if limit and longest + max_new_tokens > limit:
        raise Refusal(
            f"The longest prompt has {longest} tokens and {max_new_tokens} new ones do not fit into {limit}; shorten it."
        )
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(rows), longest), pad or 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            out: Tensor = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **sampling,
            )
    finally:
        for module, training in modes.items():
            module.training = training
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)) for row in out]
