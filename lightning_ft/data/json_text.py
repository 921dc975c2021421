"""JSON as people write it: a line or a list at a time, read strictly, each fault named with its place."""

from __future__ import annotations

import json
from typing import Any

from lightning_ft.functional.errors import Refusal


def read_line(path: str, number: int, raw: bytes, offset: int) -> tuple[str, dict[str, Any]] | None:
    """The text and the row of one line of a file of JSON lines; None for white space.

    Args:
        path: of the file, for messages.
        number: of the line, from 1.
        raw: the line.
        offset: bytes before it.

    Raises:
        Refusal: not UTF-8, not JSON, not an object.
    """
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}, line {number}", offset + error.start, raw[error.start]) from error
    line = line.removeprefix("\ufeff")  # files with a byte-order mark, joined
    if not line.strip():
        return None
    try:
        value = parse(line.rstrip())
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}, line {number} is not valid JSON: {_json_problem(error, line)}.") from error
    if not isinstance(value, dict):
        raise Refusal(f"{path}, line {number} is not an object with columns, found {line.strip()[:40]!r}.")
    return line.strip(), value


def read_list(path: str, raw: bytes, end: int) -> tuple[list[str], list[int]]:
    """The objects of a JSON list, each as a line of its own, and their numbers from 1.

    Args:
        path: to say where a fault is.
        raw: the list, from its bracket on.
        end: place of the file's end, from which the place of a wrong byte is counted.

    Raises:
        Refusal: it is no UTF-8, no JSON, empty, or holds something else than objects.
    """
    try:
        values = parse(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, end - len(raw) + error.start, raw[error.start]) from error
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Refusal(f"{path}{line} is not valid JSON: {_json_problem(error)}.") from error
    if not values:
        raise Refusal(f"{path} is an empty list.")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise Refusal(f"{path}, row {number} is not an object with columns, found {json.dumps(value)[:40]}.")
    return [json.dumps(value) for value in values], list(range(1, len(values) + 1))


def parse(text: str) -> Any:
    """JSON, where a key that an object has twice is an error: Python would take the last one in silence.

    Raises:
        ValueError: text that is not JSON (``json.JSONDecodeError``), or a key given twice.
        RecursionError: lists and objects within one another, thousands deep.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return found


def _json_problem(error: Exception, line: str = "") -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "a number is too long" if "int_max_str_digits" in str(error) else str(error)
    hint = ""
    if error.msg == "Extra data":
        hint = ", several rows on one line"
    elif line.lstrip().startswith("{") and not line.rstrip().endswith("}"):
        hint = ", a row that goes on or was cut short; each line holds one whole object"
    elif line.lstrip().startswith("{'"):
        hint = ", single quotes, which JSON does not have"
    return f"{error.msg} at column {error.colno}{hint}"


def _not_utf8(where: str, offset: int, byte: int) -> Refusal:
    return Refusal(f"{where} is not UTF-8: byte 0x{byte:02x} at offset {offset}; save the file as UTF-8.")
