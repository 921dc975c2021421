"""Text from a language model: batched, KV-cached, in eval mode, with every mode put back afterwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.functional.errors import Refusal

Prompt = str | list[dict[str, Any]] | list[int]
"""A plain string (continued as it is), a list of chat messages (rendered by the tokenizer's template), or token ids."""


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of one prompt; a chat gets its generation prompt, ids stay as they are."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if all(isinstance(token, int) for token in prompt):
        return cast("list[int]", list(prompt))
    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def prompts_and_references(batch: Batch, segments: Collection[int] | None = None) -> list[tuple[list[int], list[int]]]:
    """(ids to continue, ids to expect) of each row that has scored tokens, fillers left out.

    The last run of scored tokens is what is expected, and all before it what is continued: of a conversation, the last answer
    after everything said before. With an encoder, what it reads is continued and all scored tokens are expected.

    Args:
        batch: packed or padded rows.
        segments: numbers of those that are wanted, each laid out with its own prompt; None: all.
    """
    ids, width = batch.ids.reshape(-1), batch.ids.shape[-1]
    found = []
    for number, row in enumerate(batch.rows.tolist()):
        own = batch.segment_of_scored == number
        if row < 0 or not own.any() or (segments is not None and number not in segments):
            continue
        positions, labels = batch.scored[own], batch.labels[own]
        if batch.source is not None:
            prompt = batch.source.ids[number][batch.source.mask[number]]
        else:
            jumps = (positions.diff() != 1).nonzero()
            last = int(jumps[-1]) + 1 if len(jumps) else 0
            begin = batch.bounds[number] if batch.bounds is not None else number * width
            # A scored position predicts the token after it, so it still belongs to the prompt.
            prompt, labels = ids[begin : int(positions[last]) + 1], labels[last:]
        found.append((prompt.tolist(), labels.tolist()))
    return found


def fits(model: Any, prompt: int, new: int) -> bool:
    """Whether a prompt of so many tokens leaves room for so many new ones in the model's table of positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    taken = max(prompt, new + 1) if model.config.is_encoder_decoder else prompt + new
    return not limit or taken <= limit


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
    """Answers of a language model to each prompt, without the prompt and without special tokens.

    Args:
        model: a transformers causal or sequence-to-sequence model; injected layers act as they are.
        tokenizer: the model's own.
        prompts: strings, chats or token ids; padded into one batch, padding masked by position.
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
    longest = max(map(len, rows))
    if not fits(model, longest, max_new_tokens):
        limit = model.config.max_position_embeddings
        raise Refusal(
            f"The longest prompt has {longest} tokens and {max_new_tokens} new ones do not fit into {limit}; shorten it."
        )
    encoder = bool(model.config.is_encoder_decoder)
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(rows), longest), pad or 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        # An encoder's positions count from the first column; a decoder's last token must stand in the last one.
        place = slice(0, len(row)) if encoder else slice(longest - len(row), longest)
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
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
    begin = 0 if encoder else longest
    return [str(tokenizer.decode(row[begin:], skip_special_tokens=True)) for row in out]
