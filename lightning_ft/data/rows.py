"""What a row of a fine-tuning file is: its kind, told by its columns, and what must hold before it is rendered.

Column names are those of TRL: ``messages`` (with optional ``tools``), ``prompt`` and ``completion``, ``text``.
ShareGPT's ``conversations`` and Alpaca's ``instruction``, ``input``, ``output`` are converted on sight.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning_ft.functional.errors import Refusal

Kind = Literal["messages", "prompt_completion", "text"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
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
    near = {name: match for name in found for match in difflib.get_close_matches(name, known, n=1, cutoff=0.75)}
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
    if kind == "text":
        return {"text": _text(row, "text")}
    tools = _tools(row.get("tools"))
    if kind == "messages":
        return {"messages": _messages(_from_other_formats(row), "messages"), "tools": tools}
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise Refusal("completion is empty, so there is nothing to learn from this row.")
        return {"prompt": prompt, "completion": completion, "tools": tools}
    if isinstance(prompt, list) and isinstance(completion, list):
        return {
            "prompt": _messages(prompt, "prompt"),
            "completion": _messages(completion, "completion"),
            "tools": tools,
        }
    raise Refusal(
        "prompt and completion must both be strings or both be lists of messages, found "
        f"{_type(prompt)} and {_type(completion)}."
    )


def _from_other_formats(row: Mapping[str, Any]) -> Any:
    """``messages`` as they are; ShareGPT and Alpaca turned into them."""
    if row.get("messages") is not None:
        return row["messages"]
    if isinstance(turns := row.get("conversations"), list):
        return [_from_sharegpt(turn) for turn in turns]
    if row.get("instruction") is not None:
        instruction, context, answer = row["instruction"], row.get("input") or "", row.get("output")
        if not isinstance(instruction, str) or not isinstance(context, str) or not isinstance(answer, str):
            raise Refusal("instruction, input and output must be strings.")
        question = f"{instruction}\n\n{context}" if context else instruction
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    raise Refusal(f"the column 'messages' is missing; found {', '.join(sorted(map(str, row))) or 'none'}.")


def _from_sharegpt(turn: Any) -> Any:
    if isinstance(turn, Mapping) and "from" in turn:
        return {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return turn


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Refusal(f"{column} must be a list of messages, found {_type(value)}.")
    if not value:
        raise Refusal(f"{column} is empty.")
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Refusal(f"{where} must be an object with role and content, found {_type(message)}.")
    # Typed tables fill absent keys with null; a template must not see them.
    message = _without_nulls(message)
    role = message.get("role")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(ROLES)}."
        raise Refusal(f"{where} has the unknown role {role!r}: {hint}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise Refusal(f"{where}.content must be a string, found {_type(content)}.")
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise Refusal(f"{where} is an assistant turn without content, so there is nothing to learn from it.")
    return message


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):  # typed tables keep JSON schemas as text, since no two are alike
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Refusal(f"tools is a string that is not JSON: {error.msg} at column {error.colno}.") from error
    if value is not None and not isinstance(value, list):
        raise Refusal(f"tools must be a list of JSON schemas, found {_type(value)}.")
    return [_without_nulls(tool) for tool in value] if value else None


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Refusal(f"{column} must be a string, found {_type(value)}.")
    if not value:
        raise Refusal(f"{column} is empty, so there is nothing to learn from this row.")
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _type(value: Any) -> str:
    names = {
        str: "a string",
        list: "a list",
        dict: "an object",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
