"""What a row of a fine-tuning file is: its kind, told by its columns, and what must hold before it is rendered.

Column names are those of TRL: ``messages`` (with optional ``tools``), ``prompt`` and ``completion``, ``text``.
ShareGPT's ``conversations`` and Alpaca's ``instruction``, ``input``, ``output`` are converted on sight.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning_ft.functional.errors import Refusal

Kind = Literal["messages", "prompt_completion", "text"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_COLUMNS: dict[Kind, set[str]] = {
    "messages": {"messages", "conversations", "instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_WORDS: dict[Kind, str] = {"messages": "messages", "prompt_completion": "prompt + completion", "text": "text"}
EXPECTED = (
    "messages | prompt + completion | text (ShareGPT's conversations and Alpaca's instruction + output are converted)"
)


def kind_of(columns: Iterable[str]) -> Kind | None:
    """The kind that a row with these columns has, or None where nothing can be learned from it."""
    names = set(columns)
    if names & {"messages", "conversations"}:
        return "messages"
    if {"prompt", "completion"} <= names:
        return "prompt_completion"
    if {"instruction", "output"} <= names:
        return "messages"
    return "text" if "text" in names else None


def wrong_columns(where: str, columns: Iterable[str]) -> Refusal:
    """The refusal for columns of no known kind."""
    found = sorted(str(name) for name in columns)
    known = ("messages", "conversations", "prompt", "completion", "text", "instruction", "output")
    near = {n: match for n in found for match in difflib.get_close_matches(n.strip().lower(), known, n=1, cutoff=0.75)}
    near = {name: match for name, match in near.items() if name != match}
    hint = "".join(f"; is {name!r} meant to be {match!r}?" for name, match in near.items())
    return Refusal(f"{where}: found the columns {', '.join(found) or 'none'}, expected {EXPECTED}{hint or '.'}")


def normalise(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The row in its canonical columns, checked; what is wrong with it is said without saying where it stands.

    Returns:
        ``{"messages", "tools"}``, ``{"prompt", "completion", "tools"}`` or ``{"text"}``.

    Raises:
        Refusal: a missing column, no message, an unknown role, content that is not text, nothing to learn.
    """
    try:
        return _normalised(row, kind)
    except RecursionError:
        raise Refusal(
            "the row is nested too deeply: lists and objects within one another, hundreds of levels."
        ) from None


def _normalised(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    given = {name for name, value in row.items() if value is not None}
    other = kind_of(given)
    if other not in (None, kind) and kind_of(given & _COLUMNS[kind]) != kind:
        raise Refusal(
            f"the row is one of {_WORDS[other]} in a file whose first row is one of {_WORDS[kind]}: all rows of a "
            "file have the same columns, so split the file."
        )
    if kind == "text":
        return {"text": text_in(row, "text")}
    tools = tools_in(row.get("tools"))
    if kind == "messages":
        return {"messages": _conversation(row), "tools": tools}
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": whole_text(prompt, "prompt"), "completion": text_in(row, "completion"), "tools": tools}
    if isinstance(prompt, list) and isinstance(completion, list):
        return {
            "prompt": messages_in(prompt, "prompt"),
            "completion": messages_in(completion, "completion"),
            "tools": tools,
        }
    raise Refusal(
        "prompt and completion must both be strings or both be lists of messages, found "
        f"{type_in_words(prompt)} and {type_in_words(completion)}."
    )


def _conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``messages`` as they are; ShareGPT's and Alpaca's columns turned into them."""
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return messages_in(row[column], column)
    if row.get("instruction") is not None:
        answer = text_in(row, "output")
        instruction, context = (_optional_text(row, column) for column in ("instruction", "input"))
        question = "\n\n".join(part for part in (instruction, context) if part)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    empty = next((column for column in ("messages", "conversations", "instruction") if column in row), None)
    if empty is not None:
        raise Refusal(f"{empty} is null, so there is nothing to learn from this row.")
    raise Refusal(f"the column 'messages' is missing; found {', '.join(sorted(map(str, row))) or 'none'}.")


def _from_sharegpt(turn: Mapping[str, Any]) -> dict[str, Any]:
    who = turn["from"]
    return {"role": _SHAREGPT_ROLES.get(who, who) if isinstance(who, str) else who, "content": turn.get("value")}


def messages_in(value: Any, column: str) -> list[dict[str, Any]]:
    """The messages of a column's value; refused where they are none, or not what a template can render."""
    if isinstance(value, str):
        raise Refusal(
            f"{column} must be a list of messages, found a string: CSV cannot hold lists, so use JSON lines or Parquet."
        )
    if not isinstance(value, list):
        raise Refusal(f"{column} must be a list of messages, found {type_in_words(value)}.")
    if not value:
        raise Refusal(f"{column} is empty.")
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Refusal(f"{where} must be an object with role and content, found {type_in_words(message)}.")
    # Typed tables fill absent keys with null; a template must not see them.
    message = _without_nulls(message)
    text_key, keys = "content", ", ".join(map(str, message)) or "none"
    if "from" in message and "role" not in message:
        text_key, message = "value", _from_sharegpt(message)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _unknown_role(role, where, keys)
    calls = message.get("tool_calls")
    if calls is not None:
        _check_calls(calls, where)
    if content is None and role == "assistant" and calls:
        message.pop("content", None)
        return message
    if not isinstance(content, str):
        found = f"nothing; its keys are {keys}" if content is None else type_in_words(content)
        raise Refusal(f"{where}.{text_key} must be a string, found {found}.")
    whole_text(content, f"{where}.{text_key}")
    if role == "assistant" and not content.strip() and not calls:
        raise Refusal(f"{where} is an assistant turn without content, so there is nothing to learn from it.")
    return message


def _unknown_role(role: Any, where: str, keys: str) -> Refusal:
    if role is None:
        return Refusal(f"{where} has no role; its keys are {keys}, and role and content are expected.")
    plain = str(role).strip().lower()
    near = [_SHAREGPT_ROLES[plain]] if plain in _SHAREGPT_ROLES else difflib.get_close_matches(plain, ROLES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(ROLES)}."
    return Refusal(f"{where} has the unknown role {role!r}: {hint}")


def _check_calls(calls: Any, where: str) -> None:
    """A template would render what is missing from a call as nothing, and the model would learn that."""
    if not isinstance(calls, list):
        raise Refusal(f"{where}.tool_calls must be a list of calls, found {type_in_words(calls)}.")
    for number, call in enumerate(calls):
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise Refusal(
                f"{where}.tool_calls[{number}] must be an object with the function's name and arguments, as in "
                '{"function": {"name": "add", "arguments": {"a": 1}}}.'
            )


def tools_in(value: Any) -> list[Any] | None:
    """The tools of a row as JSON schemas, None where it has none."""
    if isinstance(value, str):  # typed tables keep JSON schemas as text, since no two are alike
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Refusal(f"tools is a string that is not JSON: {error.msg} at column {error.colno}.") from error
    if value is not None and not isinstance(value, list):
        raise Refusal(f"tools must be a list of JSON schemas, found {type_in_words(value)}.")
    for number, tool in enumerate(value or []):
        if not isinstance(tool, Mapping):
            raise Refusal(
                f"tools[{number}] must be an object, the JSON schema of a function, found {type_in_words(tool)}."
            )
    return [_without_nulls(tool) for tool in value] if value else None


def text_in(row: Mapping[str, Any], column: str) -> str:
    """The text of a column; refused where it is missing, no string, empty, or no Unicode."""
    value = row.get(column)
    if not isinstance(value, str):
        raise Refusal(f"{column} must be a string, found {type_in_words(value)}.")
    if not value.strip():
        what = "only white space" if value else "empty"
        raise Refusal(f"{column} is {what}, so there is nothing to learn from this row.")
    return whole_text(value, column)


def _optional_text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise Refusal(f"{column} must be a string, found {type_in_words(value)}.")
    return whole_text(value or "", column)


def whole_text(text: str, where: str) -> str:
    r"""Refuses halves of characters, which JSON can write (``\ud83d`` alone) and no tokenizer can read."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Refusal(
                f"{where} holds half of a character, \\u{ord(text[error.start]):04x} at position {error.start}, which is "
                "not Unicode text: the row was cut in the middle of an emoji or the like."
            ) from None
    return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def type_in_words(value: Any) -> str:
    """What a value is, in the words of a sentence."""
    names = {
        str: "a string",
        list: "a list",
        dict: "an object",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    if isinstance(value, float) and math.isnan(value):
        return "NaN, a missing value"
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
