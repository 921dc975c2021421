"""Rows that cannot be learned from, in one table: each is refused by file and line, or handled as it deserves.

A case is the second row of a file, whose first one is good, and what must be said after ``FILE, line 2`` (a regular
expression), or the list of texts that are learned from it.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from lightning_ft.data.sources import open_source
from lightning_ft.data.spans import render
from lightning_ft.data.tokenise import tokenise
from lightning_ft.functional.errors import Refusal
from tests.data.test_broken_inputs import PAIR, TEXT, said, turns, written
from tests.data.tiny_tokenizers import CHATML, LLAMA3, MISTRAL, THINKING, UNCLOSED, tiny_tokenizer

CHAT = turns("hello", "yes")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


def calling(calls: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": calls}]}


def message(**keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}, keys]}


# id, first row of the file, the row, what must be said of it or the texts learned from it; another template than ChatML
ROWS: list[tuple[Any, ...]] = [
    # kinds
    ("text among chats", CHAT, TEXT, "the row is one of text in a file whose first row is one of messages"),
    (
        "a chat among pairs",
        PAIR,
        CHAT,
        "the row is one of messages in a file whose first row is one of prompt . completion",
    ),
    ("a pair among texts", TEXT, PAIR, "one of prompt . completion in a file whose first row is one of text"),
    ("a row without columns", CHAT, {}, "the column 'messages' is missing; found none"),
    ("more columns than the first row", CHAT, {**CHAT, "id": 7, "text": "hello"}, ["yes<|im_end|>"]),
    # nulls, numbers, other types
    ("messages null", CHAT, {"messages": None}, "messages is null"),
    ("messages empty", CHAT, {"messages": []}, "messages is empty"),
    (
        "messages as text",
        CHAT,
        {"messages": json.dumps(CHAT["messages"])},
        "must be a list of messages, found a string: CSV cannot",
    ),
    ("messages as one object", CHAT, {"messages": CHAT["messages"][0]}, "must be a list of messages, found an object"),
    (
        "messages of strings",
        CHAT,
        {"messages": ["hello", "yes"]},
        r"messages\[0\] must be an object with role and content, found a string",
    ),
    (
        "messages with a hole",
        CHAT,
        {"messages": [*CHAT["messages"], None]},
        r"messages\[2\] must be an object .*found nothing",
    ),
    ("text null", TEXT, {"text": None}, "text must be a string, found nothing"),
    ("text a number", TEXT, {"text": 7}, "text must be a string, found a number"),
    ("text not a number", TEXT, {"text": math.nan}, "text must be a string, found NaN, a missing value"),
    ("text a list", TEXT, {"text": ["a"]}, "text must be a string, found a list"),
    (
        "content null",
        CHAT,
        message(role="assistant", content=None),
        r"messages\[1\].content must be a string, found nothing; its keys are role",
    ),
    (
        "content a number",
        CHAT,
        message(role="assistant", content=7),
        r"messages\[1\].content must be a string, found a number",
    ),
    (
        "content in parts",
        CHAT,
        message(role="assistant", content=[{"type": "text", "text": "yes"}]),
        r"content must be a string, found a list",
    ),
    (
        "content under another name",
        CHAT,
        message(role="assistant", text="yes"),
        "found nothing; its keys are role, text",
    ),
    (
        "completion null",
        PAIR,
        {"prompt": "a", "completion": None},
        "must both be strings or both be lists .*a string and nothing",
    ),
    ("completion a number", PAIR, {"prompt": "a", "completion": 1}, "both be strings .*a string and a number"),
    ("half a character", TEXT, {"text": "no \ud83d"}, r"text holds half of a character, .ud83d at position 3"),
    ("half a character in a turn", CHAT, turns("a\ude00", "b"), r"messages\[0\].content holds half of a character"),
    (
        "half a character in a call",
        CHAT,
        calling([{"function": {"name": "\ud83d"}}]),
        "the rendered row holds half of a character",
        CALLS,
    ),
    ("a zero in the text", TEXT, {"text": "hello\0world"}, ["hello\0world</s>"]),
    # nothing to learn
    ("text empty", TEXT, {"text": ""}, "text is empty, so there is nothing to learn"),
    ("text white", TEXT, {"text": " \n\t"}, "text is only white space"),
    ("completion empty", PAIR, {"prompt": "a", "completion": ""}, "completion is empty"),
    ("completion white", PAIR, {"prompt": "a", "completion": " \n"}, "completion is only white space"),
    (
        "completion of special tokens",
        PAIR,
        {"prompt": "hello", "completion": "</s>"},
        "completion has no text but special tokens",
    ),
    (
        "answer of special tokens",
        CHAT,
        turns("hello", "<|im_end|>"),
        r"messages\[1\] .assistant. has no text but special tokens",
    ),
    ("answer empty", CHAT, turns("hello", ""), r"messages\[1\] is an assistant turn without content"),
    ("answer white", CHAT, turns("hello", "\n "), r"messages\[1\] is an assistant turn without content"),
    ("question empty", CHAT, turns("", "yes"), ["yes<|im_end|>"]),
    ("question white", CHAT, turns("  ", "yes"), ["yes<|im_end|>"]),
    ("prompt empty", PAIR, {"prompt": "", "completion": "yes"}, ["yes</s>"]),
    ("completion of no messages", PAIR, {"prompt": CHAT["messages"], "completion": []}, "completion is empty"),
    (
        "completion of a user",
        PAIR,
        {"prompt": CHAT["messages"], "completion": turns("a", roles="u")["messages"]},
        "no assistant turn in its completion",
    ),
    (
        "prompt text, completion messages",
        PAIR,
        {"prompt": "a", "completion": CHAT["messages"]},
        "both be strings or both be lists of messages, found a string and a list",
    ),
    # roles
    (
        "a near role",
        CHAT,
        message(role="assistent", content="yes"),
        "unknown role 'assistent': did you mean 'assistant'",
    ),
    (
        "a role in capitals",
        CHAT,
        message(role="Assistant", content="yes"),
        "unknown role 'Assistant': did you mean 'assistant'",
    ),
    ("a role of ShareGPT", CHAT, message(role="gpt", content="yes"), "unknown role 'gpt': did you mean 'assistant'"),
    ("a far role", CHAT, message(role="q", content="yes"), "unknown role 'q': expected one of system"),
    ("no role", CHAT, message(content="yes"), r"messages\[1\] has no role; its keys are content"),
    ("a role that is a list", CHAT, message(role=["assistant"], content="yes"), "unknown role"),
    ("no assistant", CHAT, turns("hello", roles="u"), "no assistant turn"),
    ("assistant first", CHAT, turns("hello", "yes", roles="au"), r"messages\[0\] .assistant. is the first message"),
    ("two systems", CHAT, turns("no", "is", "hello", "yes", roles="ssua"), ["yes<|im_end|>"]),
    ("ends with a question", CHAT, turns("hello", "yes", "no", roles="uau"), ["yes<|im_end|>"]),
    # tools
    (
        "calls as text",
        CHAT,
        calling("add(1)"),
        r"messages\[1\].tool_calls must be a list of calls, found a string",
        CALLS,
    ),
    ("a call as text", CHAT, calling(["add(1)"]), r"tool_calls\[0\] must be an object with the function's name", CALLS),
    (
        "a call without a name",
        CHAT,
        calling([{"function": {"arguments": {}}}]),
        r"tool_calls\[0\] must be an object with",
        CALLS,
    ),
    ("no call and no content", CHAT, calling([]), r"messages\[1\].content must be a string, found nothing", CALLS),
    ("a call", CHAT, calling([CALL]), ["add<|im_end|>"], CALLS),
    ("tools that are not JSON", CHAT, {**CHAT, "tools": "[{]"}, "tools is a string that is not JSON"),
    (
        "tools that are an object",
        CHAT,
        {**CHAT, "tools": {"name": "add"}},
        "tools must be a list of JSON schemas, found an object",
    ),
    ("a tool that is a name", CHAT, {**CHAT, "tools": ["add"]}, r"tools\[0\] must be an object, the JSON schema"),
    (
        "deep tools",
        CHAT,
        {**CHAT, "tools": json.loads("[" + '{"a": ' * 600 + "1" + "}" * 600 + "]")},
        "nested too deeply|yes",
    ),
    # ShareGPT and Alpaca
    ("conversations null", CHAT, {"conversations": None}, "conversations is null"),
    (
        "conversations as text",
        CHAT,
        {"conversations": "hello"},
        "conversations must be a list of messages, found a string",
    ),
    (
        "conversations of an unknown role",
        CHAT,
        {"conversations": [{"from": "bot", "value": "a"}]},
        r"conversations\[0\] has the unknown role 'bot'",
    ),
    (
        "conversations of an impossible role",
        CHAT,
        {"conversations": [{"from": {}, "value": "a"}]},
        r"conversations\[0\] has the unknown role",
    ),
    (
        "conversations without values",
        CHAT,
        {"conversations": [{"from": "human", "text": "a"}]},
        r"conversations\[0\].value must be a string, found nothing; its keys are from, text",
    ),
    (
        "conversations",
        CHAT,
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "yes"}]},
        ["yes<|im_end|>"],
    ),
    ("output null", CHAT, {"instruction": "a", "output": None}, "output must be a string, found nothing"),
    ("output empty", CHAT, {"instruction": "a", "output": ""}, "output is empty"),
    ("input a list", CHAT, {"instruction": "a", "input": ["b"], "output": "c"}, "input must be a string, found a list"),
    ("input null", CHAT, {"instruction": "a", "input": None, "output": "yes"}, ["yes<|im_end|>"]),
    # templates
    (
        "a template that refuses",
        turns("a", "b"),
        turns("no", "hello", "yes", roles="sua"),
        "the chat template refuses this row: only user and assistant",
        MISTRAL,
    ),
    (
        "a template that fails",
        CHAT,
        turns("a", "b", roles="ta"),
        "the chat template refuses this row: 'dict object' has no attribute 'x'",
        CHATML.replace("m.content", "(m.content if m.role != 'tool' else m.x.y)"),
    ),
    (
        "a template that rewrites earlier turns",
        CHAT,
        turns("a", "b", "c", "d", roles="uaua"),
        "is not prefix-stable here: after",
        THINKING,
    ),
    (
        "a template that drops the system",
        CHAT,
        turns("no", "hello", "yes", roles="sua"),
        r"the chat template leaves messages\[0\] .system. out",
        NO_SYSTEM,
    ),
    ("a template that trims", CHAT, turns(" is  this \n", "yes"), ["yes<|eot_id|>"], LLAMA3),
]


@pytest.mark.parametrize(
    "first, row, wanted, template", [(*case[1:], CHATML)[:4] for case in ROWS], ids=[case[0] for case in ROWS]
)
def test_rows(
    tmp_path: Path, first: dict[str, Any], row: dict[str, Any], wanted: str | list[str], template: str
) -> None:
    file = written(tmp_path, "rows.jsonl", f"{json.dumps(first)}\n{json.dumps(row)}\n".encode())
    tokenizer = tiny_tokenizer(template)
    if isinstance(wanted, list):
        kept = tokenise(open_source(file), tokenizer, cache_dir=tmp_path / "cache")[1]
        spans = np.array(kept["spans"]).reshape(-1, 2)
        assert [tokenizer.decode(kept["ids"][a:b]) for a, b in spans] == wanted
        return
    with pytest.raises(Refusal, match=wanted) as caught:
        tokenise(open_source(file), tokenizer, cache_dir=tmp_path / "cache")
    assert said(caught).startswith(f"{file}, line 2: ")


# tokenizers -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_eos() -> None:
    assert len(render(tiny_tokenizer(CHATML, eos=None), CHAT).spans) == 1  # the template's own end of turn is enough
    for row in (TEXT, PAIR):
        with pytest.raises(Refusal, match="no EOS token to end the row with"):
            render(tiny_tokenizer(CHATML, eos=None), row)


def test_a_tokenizer_whose_padding_is_its_eos_learns_the_eos() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == render(tokenizer, PAIR).ids[-1]
    assert render(tokenizer, PAIR).spans[-1][1] == len(render(tokenizer, PAIR).ids)


def test_a_tokenizer_that_puts_bos_and_eos_itself_gets_one_of_each() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    ids = render(tokenizer, PAIR).ids
    assert tokenizer.decode(ids) == "<s>hello yes</s>" and (ids.count(0), ids.count(1)) == (1, 1)
    chat = render(tokenizer, CHAT)
    assert chat == render(tiny_tokenizer(CHATML), CHAT)  # the template says all


@pytest.mark.parametrize(
    ("template", "row", "match"),
    [
        (LLAMA3, {"prompt": "<s>hello", "completion": " yes"}, "begins with two BOS tokens"),
        ("{{ bos_token }}" + LLAMA3, CHAT, "begins with two BOS tokens"),
        (UNCLOSED, CHAT, "has no end of turn"),
        (None, CHAT, "has no chat template"),
        ("{% for m in messages %}{{ m.role }", CHAT, "The chat template is not valid Jinja, line 1"),
        ("{{ raise_exception('never\nthis') }}", CHAT, "the chat template refuses this row: never this"),
        ("<|im_start|>{{ messages[-1].content }}<|im_end|>", CHAT, r"leaves messages\[0\] .user. out"),
    ],
)
def test_templates_and_tokenizers_that_do_not_fit(template: str | None, row: dict[str, Any], match: str) -> None:
    with pytest.raises(Refusal, match=match) as caught:
        render(tiny_tokenizer(template, puts_bos=True), row)
    said(caught)
