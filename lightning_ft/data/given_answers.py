"""The answer that a row of prompts has beside its prompt, as the tokens that a model would have to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ft.data.spans import render_rows
from lightning_ft.engine.rollouts.round import Prompt
from lightning_ft.functional.errors import Refusal


def given_answers(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], column: str) -> list[list[int]]:
    """Token ids of the answers in the data, each with the token that ends it.

    Args:
        tokenizer: of the model.
        prompts: with their columns.
        column: in which the answer stands: a string, or a list with one message of the assistant.

    Raises:
        Refusal: a row has no fit answer, or its prompt is not the beginning of prompt and answer together.
    """
    rows = [{"prompt": one.given, "completion": _completion(one, column)} for one in prompts]
    found: list[list[int]] = []
    for one, made in zip(prompts, render_rows(tokenizer, rows, "prompt_completion", "completion"), strict=True):
        if isinstance(made, Refusal):
            raise Refusal(f"Row {one.row + 1} of the prompts cannot be learned from: {made}") from made
        if len(made.spans) != 1:
            raise Refusal(f"Row {one.row + 1} of the prompts has an answer of several turns in {column}; leave one.")
        ((begin, end),) = made.spans
        # A prompt that was cut has lost its beginning, and what the tokenizer puts first may stand before the rest.
        kept = min(len(one.ids) - 1, begin)
        if kept < 1 and len(one.ids) != begin or made.ids[begin - kept : begin] != one.ids[len(one.ids) - kept :]:
            raise Refusal(
                f"Row {one.row + 1} of the prompts: its prompt with the answer behind it does not begin with the tokens of the "
                "prompt alone (it has tools, or a token that joins both); leave it out."
            )
        found.append(made.ids[begin:end])
    return found


def _completion(one: Prompt, column: str) -> Any:
    given = one.columns.get(column)
    if not given:
        raise Refusal(f"Row {one.row + 1} of the prompts has no answer in {column}; give one, or leave it out.")
    if isinstance(one.given, str) and not isinstance(given, str):
        raise Refusal(f"Row {one.row + 1} of the prompts: prompt is a string and {column} is not; give it as a string.")
    if isinstance(one.given, list) and isinstance(given, str):
        return [{"role": "assistant", "content": given}]
    return given


__all__ = ["given_answers"]
