"""Answers drawn from a causal language model, in batches: what rollouts are made of.

A prompt is read once, however many answers are drawn from it; a row that has ended leaves the batch; each answer has random
numbers of its own, so that it does not depend on which rows are drawn beside it, or on which rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM
from lightning_ft.nn.growing_cache import growing_cache, keep_rows

#: Rows that have ended are taken out of the cache once they are this share of the batch; taking out copies it.
LEAVE_AT = 0.25


@dataclass
class Answer:
    """What was written after a prompt.

    Attributes:
        ids: the new tokens, with the one that ended it.
        ended: whether it ended by itself; False where the limit of tokens cut it.
    """

    ids: list[int]
    ended: bool


@torch.no_grad()
def sample(
    view: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    size: int | None = None,
    end_ids: Collection[int] = (),
    stops: Callable[[list[int]], bool] | None = None,
    go_on: Callable[[bool], bool] = bool,
) -> list[list[Answer]]:
    """Draws answers by the model as it is, in the mode it is in.

    Args:
        view: of the model; injected layers act as they are.
        prompts: token ids of each; padded on the left, padding masked.
        seeds: for each prompt the seed of each answer that is wanted; equally many for all.
        max_new_tokens: at most so many tokens an answer.
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: draw only among so many most likely tokens; 0 among all.
        top_p: draw only among the most likely tokens that together reach this probability.
        size: draw only among the first so many tokens, where an output layer is padded; None: among all.
        end_ids: tokens that end an answer.
        stops: whether an answer, given its ids so far, is to end here (a stop string); asked once a token.
        go_on: given whether any row is still being written, whether another token is to be computed. Ranks that must run
            equally many forwards (FSDP2) ask one another here; a rank that has ended computes along.

    Returns:
        For each prompt its answers in the order of ``seeds``.

    Raises:
        Refusal: a prompt is empty, or too long for the model's table of positions.
    """
    _check(view, prompts, max_new_tokens)
    samples = len(seeds[0])
    device = next(view.backbone.parameters()).device
    cache = growing_cache(view.model.config, max_new_tokens)
    ids, mask = _left_padded(prompts, device)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    hidden = view.hidden(ids, positions, mask=mask, past_key_values=cache, use_cache=True)[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        hidden, mask, positions = (x.repeat_interleave(samples, 0) for x in (hidden, mask, positions))
    chances = _uniforms([seed for row in seeds for seed in row], max_new_tokens, device) if temperature > 0 else None
    answers = [Answer([], False) for _ in range(len(prompts) * samples)]
    at = positions[:, -1:]
    alive = list(range(len(answers)))  # the answer that each row of the cache belongs to
    writing = [True] * len(answers)
    for step in range(max_new_tokens):
        logits = view.logits(hidden)[:, :size].float()
        drawn = chances[alive, step] if chances is not None else None
        tokens = choose(logits, drawn, temperature=temperature, top_k=top_k, top_p=top_p)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            if writing[row]:
                answer = answers[row]
                answer.ids.append(token)
                answer.ended = token in end_ids or (stops is not None and stops(answer.ids))
                writing[row] = not answer.ended
        if step + 1 == max_new_tokens or not go_on(any(writing)):
            break
        kept = [place for place, row in enumerate(alive) if writing[row]] or [0]
        if len(kept) <= len(alive) * (1 - LEAVE_AT):
            chosen = torch.tensor(kept, device=device)
            keep_rows(cache, chosen)
            tokens, mask, at = tokens[chosen], mask[chosen], at[chosen]
            alive = [alive[place] for place in kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        at = at + 1
        hidden = view.hidden(tokens[:, None], at, mask=mask, past_key_values=cache, use_cache=True)[:, -1]
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def choose(
    logits: Tensor, chances: Tensor | None, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """One token for each row.

    Args:
        logits: (B, V).
        chances: (B,) float64 uniform in [0, 1): where in the cumulative distribution the token lies, tokens in the order
            of the vocabulary; None takes the most likely one.
        temperature: see `sample`.
        top_k: likewise.
        top_p: likewise.

    Returns:
        (B,) int64.
    """
    if chances is None:
        return logits.argmax(-1)
    probabilities = allowed(logits / temperature, top_k=top_k, top_p=top_p).softmax(-1)
    # In float64: in float32 the sum over a large vocabulary would round rare tokens away.
    reached = probabilities.double().cumsum(-1)
    wanted = chances[:, None] * reached[:, -1:]
    # The first token whose cumulative probability lies above; a token of probability zero never is.
    return torch.searchsorted(reached, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def allowed(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) with -inf for what may not be drawn; the most likely token always may."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, places = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # what more likely tokens reach without this one
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def positions_of(view: CausalLM) -> int | None:
    """How many tokens a prompt and its answer may have together; None where the model does not say."""
    return getattr(view.config, "max_position_embeddings", None) or None


def _check(view: CausalLM, prompts: Sequence[Sequence[int]], new: int) -> None:
    if any(not len(prompt) for prompt in prompts):
        raise Refusal("An empty prompt gives the model nothing to continue; write at least one character.")
    limit, longest = positions_of(view), max(map(len, prompts))
    if limit and longest + new > limit:
        raise Refusal(
            f"The longest prompt has {longest} tokens and {new} new ones do not fit into the model's {limit} positions; shorten "
            "the prompts or max_new_tokens."
        )


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids, zeros on the padding, and the mask, True on real tokens; the last column is every row's last token."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    return ids.to(device), mask.to(device)


def _uniforms(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """(answers, count) float64: each row from its own seed, the same on every device."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(s), dtype=torch.float64) for s in seeds]).to(
        device
    )
