"""What a row of preferences is: a prompt with a better and a worse answer, or with one answer and a label.

Column names are TRL's: ``prompt``, ``chosen``, ``rejected`` (and ``margin``), or ``prompt``, ``completion``, ``label``. Texts are
strings, or lists of messages. Without ``prompt`` it is what ``chosen`` and ``rejected`` begin with.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_ft.data.rows import messages_in, text_in, tools_in, type_in_words, whole_text
from lightning_ft.functional.errors import Refusal

Messages = list[dict[str, Any]]

_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")


@dataclass(frozen=True)
class Exchange:
    """A prompt with its answers, checked.

    Attributes:
        prompt: text or messages; None: what the plain answers begin with, to be found among their tokens.
        answers: each as the prompt is; behind a prompt, messages begin with an assistant turn.
        names: of the answers, for sentences.
        tools: JSON schemas for the template, or None.
        value: the margin, or the label as 1 or 0.
    """

    prompt: str | Messages | None
    answers: tuple[str | Messages, ...]
    names: tuple[str, ...]
    tools: list[Any] | None
    value: float = 0.0


def is_paired(columns: Iterable[str]) -> bool:
    """Whether rows with these columns have a better and a worse answer."""
    return {"chosen", "rejected"} <= set(columns)


def wrong_columns(where: str, columns: Iterable[str], needed: tuple[str, ...], expected: str) -> Refusal:
    """The refusal for columns that are not those needed."""
    found = sorted(map(str, columns))
    missing = [name for name in needed if name not in found]
    near = {name: difflib.get_close_matches(name, found, n=1, cutoff=0.6) for name in missing}
    hint = "".join(f"; is {match[0]!r} meant to be {name!r}?" for name, match in near.items() if match)
    return Refusal(f"{where}: found the columns {', '.join(found) or 'none'}, expected {expected}{hint or '.'}")


def pair_of(row: Mapping[str, Any], *, margins: bool) -> Exchange:
    """A row of ``prompt``, ``chosen`` and ``rejected``.

    Args:
        row: with or without ``prompt``.
        margins: whether the rows of its file have a ``margin``.

    Raises:
        Refusal: what is wrong with the row, without saying where it stands.
    """
    names = ("chosen", "rejected")
    tools, value = tools_in(row.get("tools")), _margin(row, margins)
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", *names))
    if isinstance(chosen, list) and isinstance(rejected, list):
        talks = (messages_in(chosen, "chosen"), messages_in(rejected, "rejected"))
        asked, answers = _conversations(prompt, *talks)
        for name, answer in zip(names, answers, strict=True):
            _begins_with_answer(answer, name)
        return Exchange(asked, answers, names, tools, value)
    if isinstance(chosen, list) or isinstance(rejected, list) or isinstance(prompt, list):
        kinds = [type_in_words(one) for one in ([prompt] if prompt is not None else []) + [chosen, rejected]]
        raise Refusal(
            f"{'prompt, chosen and rejected' if prompt is not None else 'chosen and rejected'} must all be strings or all be "
            f"lists of messages, found {', '.join(kinds[:-1])} and {kinds[-1]}."
        )
    texts = (text_in(row, "chosen"), text_in(row, "rejected"))
    return Exchange(_plain_prompt(prompt), texts, names, tools, value)


def labelled_of(row: Mapping[str, Any]) -> Exchange:
    """A row of ``prompt``, ``completion`` and ``label``.

    Raises:
        Refusal: what is wrong with the row, without saying where it stands.
    """
    tools, prompt, answer, value = tools_in(row.get("tools")), row.get("prompt"), row.get("completion"), _label(row)
    if prompt is None:
        raise Refusal("the row has no prompt: give the column prompt, a string or a list of messages.")
    if isinstance(answer, list):
        answer = messages_in(answer, "completion")
        asked = _as_messages(prompt)
        if answer[: len(asked)] == asked:
            answer = answer[len(asked) :]
        _begins_with_answer(answer, "completion")
        return Exchange(asked, (answer,), ("completion",), tools, value)
    if isinstance(prompt, list):
        raise Refusal(
            "prompt and completion must both be strings or both be lists of messages, found a list and "
            f"{type_in_words(answer)}."
        )
    return Exchange(_plain_prompt(prompt), (text_in(row, "completion"),), ("completion",), tools, value)


def _plain_prompt(prompt: Any) -> str | None:
    if prompt is not None and not isinstance(prompt, str):
        raise Refusal(f"prompt must be a string or a list of messages, found {type_in_words(prompt)}.")
    return whole_text(prompt, "prompt") if prompt is not None else None


def _as_messages(prompt: Any) -> Messages:
    if isinstance(prompt, str):
        return [{"role": "user", "content": whole_text(prompt, "prompt")}]
    return messages_in(prompt, "prompt")


def _conversations(prompt: Any, chosen: Messages, rejected: Messages) -> tuple[Messages, tuple[Messages, Messages]]:
    """What was asked, and the answers without it."""
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if prompt is not None:
        asked = _as_messages(prompt)
        if chosen[: len(asked)] == asked == rejected[: len(asked)]:  # whole conversations beside their prompt
            return asked, (chosen[len(asked) :], rejected[len(asked) :])
        if not isinstance(prompt, str) or chosen[0]["role"] == "assistant" == rejected[0]["role"]:
            return asked, (chosen, rejected)
        if not any(message.get("content") == prompt for message in chosen[:common]):
            raise Refusal(
                "chosen and rejected are whole conversations that do not ask what prompt says: leave the column prompt out, or "
                "give the answers alone."
            )
    if common is None:
        common = min(len(chosen), len(rejected)) - (
            len(chosen) == len(rejected)
        )  # the same answers: told later, by policy
    if common == 0:
        raise Refusal(
            "chosen and rejected have no message in common that they begin with, so there is no prompt: give the column prompt."
        )
    for name, talk in (("chosen", chosen), ("rejected", rejected)):
        if len(talk) == common:
            raise Refusal(f"{name} has no answer after the {common} messages that both conversations begin with.")
    return chosen[:common], (chosen[common:], rejected[common:])


def _begins_with_answer(messages: Messages, name: str) -> None:
    if not messages:
        raise Refusal(f"{name} has no message after the prompt, so there is nothing to learn from it.")
    if messages[0]["role"] != "assistant":
        raise Refusal(
            f"{name} goes on after the prompt with a turn of {messages[0]['role']}, but answers to one prompt are compared: let it "
            "begin with an assistant turn."
        )


def _margin(row: Mapping[str, Any], margins: bool) -> float:
    value = row.get("margin")
    if not margins:
        if value is not None:
            raise Refusal("the row has a margin and its file was read without: give all rows one, or none.")
        return 0.0
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Refusal("the row has no margin, as others of the file have: give all rows one, or none.")
    return _number(value, "margin")


def _number(value: Any, name: str) -> float:
    found = value
    if isinstance(value, str):  # CSV knows text alone
        try:
            found = float(value)
        except ValueError:
            raise Refusal(f"{name} must be a number, found the text {value[:40]!r}.") from None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise Refusal(f"{name} must be a number, found {type_in_words(value)}.")
    if not math.isfinite(found) or abs(found) > 3e38:  # what float32 holds
        raise Refusal(f"{name} must be a finite number, found {value!r}.")
    return float(found)


def _label(row: Mapping[str, Any]) -> float:
    value = row.get("label")
    said = str(value).strip().lower() if isinstance(value, (bool, int, float, str)) else ""
    if said in _TRUE or said in _FALSE:
        return float(said in _TRUE)
    found = repr(value)[:40] if said else type_in_words(value)
    raise Refusal(f"label must be true or false (or 1 or 0): whether the completion is a good one; found {found}.")
