"""Spans against renderings written by hand: a row is a list of (text, learned?) pieces, each tokenised alone."""

import pytest

from lightning_ft.data.spans import Rendered, render, render_rows
from lightning_ft.functional.errors import Refusal
from tests.data.tiny_tokenizers import CHATML, LLAMA3, MISTRAL, THINKING, UNCLOSED, tiny_tokenizer


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def expected(tokenizer, *pieces):
    """Ids and spans of hand-written pieces; a * before the text marks what is learned."""
    ids, spans = [], []
    for piece in pieces:
        new = tokenizer(piece.removeprefix("*"), add_special_tokens=False)["input_ids"]
        if piece.startswith("*"):
            spans.append((len(ids), len(ids) + len(new)))
        ids += new
    return Rendered(ids=ids, spans=spans)


TWO_TURNS = chat(("user", "hello world"), ("assistant", "yes"), ("user", "thank you"), ("assistant", "no no"))


def test_chatml_learns_assistant_turns_and_their_end_without_the_newline():
    tokenizer = tiny_tokenizer(CHATML, eos="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    want = expected(
        tokenizer,
        "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n",
        "*yes<|im_end|>",
        "\n<|im_start|>user\nthank you<|im_end|>\n<|im_start|>assistant\n",
        "*no no<|im_end|>",
        "\n",
    )
    assert render(tokenizer, TWO_TURNS) == want


def test_llama3_style_keeps_one_bos_and_ends_at_eot():
    tokenizer = tiny_tokenizer(
        LLAMA3, puts_bos=True
    )  # its end of turn is not its EOS, and the tokenizer puts a BOS too
    want = expected(
        tokenizer,
        "<s><|start_header_id|>user<|end_header_id|>\n\nhello world<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "*yes<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nthank you<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "*no no<|eot_id|>",
    )
    assert render(tokenizer, TWO_TURNS) == want


def test_mistral_style_has_no_generation_prompt():
    tokenizer = tiny_tokenizer(MISTRAL)
    want = expected(tokenizer, "<s>[INST] hello world [/INST]", "* yes</s>", "[INST] thank you [/INST]", "* no no</s>")
    assert render(tokenizer, TWO_TURNS) == want


def test_last_assistant_learns_one_turn_and_all_learns_every_token():
    tokenizer = tiny_tokenizer(CHATML)
    every = render(tokenizer, TWO_TURNS)
    last = render(tokenizer, TWO_TURNS, "last_assistant")
    whole = render(tokenizer, TWO_TURNS, "all")
    assert last == Rendered(ids=every.ids, spans=every.spans[1:])
    assert whole == Rendered(ids=every.ids, spans=[(0, len(every.ids))])
    assert whole.scored == len(every.ids) - 1


def test_system_and_consecutive_assistant_turns():
    tokenizer = tiny_tokenizer(CHATML)
    row = chat(("system", "positive"), ("user", "hello"), ("assistant", "yes"), ("assistant", "no"))
    want = expected(
        tokenizer,
        "<|im_start|>system\npositive<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
        "*yes<|im_end|>",
        "\n<|im_start|>assistant\n",
        "*no<|im_end|>",
        "\n",
    )
    assert render(tokenizer, row) == want


def test_tools_reach_the_template_and_a_tool_call_needs_no_content():
    template = (
        "{% if tools %}{{ '<|im_start|>system\n' + tools[0].function.name + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% for call in m.tool_calls or [] %}{{ 'call ' + call.function.name }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    answer = [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "seven"}]
    row = {"messages": [{"role": "user", "content": "3+4"}, call, *answer], "tools": [{"function": {"name": "add"}}]}
    want = expected(
        tokenizer,
        "<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n3+4<|im_end|>\n<|im_start|>assistant\n",
        "*call add<|im_end|>",
        "\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n",
        "*seven<|im_end|>",
        "\n",
    )
    assert render(tokenizer, row) == want
    assert render(tokenizer, {**row, "tools": '[{"function": {"name": "add", "strict": null}}]'}) == want


def test_prompt_and_completion_messages_learn_the_completion_alone():
    tokenizer = tiny_tokenizer(CHATML)
    messages = TWO_TURNS["messages"]
    split = {"prompt": messages[:3], "completion": messages[3:]}
    assert render(tokenizer, split) == render(tokenizer, TWO_TURNS, "last_assistant")
    assert render(tokenizer, split, "assistant") == render(tokenizer, TWO_TURNS)


@pytest.mark.parametrize("puts_bos", [False, True])
def test_prompt_and_completion_strings_get_the_tokenizers_bos_and_eos(puts_bos):
    tokenizer = tiny_tokenizer(puts_bos=puts_bos)
    bos = "<s>" if puts_bos else ""
    row = {"prompt": "hello world", "completion": " yes"}
    assert render(tokenizer, row) == expected(tokenizer, bos + "hello world", "* yes</s>")
    ended = {"prompt": "hello world", "completion": " yes</s>"}
    assert render(tokenizer, ended) == expected(tokenizer, bos + "hello world", "* yes</s>")


def test_text_is_learned_whole_with_eos():
    tokenizer = tiny_tokenizer(puts_bos=True)
    found = render(tokenizer, {"text": "hello world"})
    assert found == expected(tokenizer, "*<s>hello world</s>")
    assert found.scored == len(found.ids) - 1


def test_sharegpt_and_alpaca_are_converted():
    tokenizer = tiny_tokenizer(CHATML)
    turns = [("system", "no"), ("human", "hello"), ("gpt", "yes")]
    sharegpt = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    assert render(tokenizer, sharegpt) == render(
        tokenizer, chat(("system", "no"), ("user", "hello"), ("assistant", "yes"))
    )
    alpaca = {"instruction": "hello", "input": "world", "output": "yes"}
    assert render(tokenizer, alpaca) == render(tokenizer, chat(("user", "hello\n\nworld"), ("assistant", "yes")))
    assert render(tokenizer, {**alpaca, "input": ""}) == render(
        tokenizer, chat(("user", "hello"), ("assistant", "yes"))
    )


def test_typed_tables_nulls_do_not_reach_the_template():
    tokenizer = tiny_tokenizer(
        CHATML + "{% for m in messages %}{% if 'name' in m %}{{ 'NULL' }}{% endif %}{% endfor %}"
    )
    nulls = {"messages": [{**message, "name": None} for message in TWO_TURNS["messages"][:2]]}
    assert render(tokenizer, nulls) == render(tokenizer, {"messages": TWO_TURNS["messages"][:2]})


def test_rows_rendered_together_equal_rows_rendered_alone_and_keep_their_own_refusals():
    tokenizer = tiny_tokenizer(CHATML)
    rows = [TWO_TURNS, chat(("user", "hello")), chat(("user", "hello"), ("assistant", "no")), TWO_TURNS]
    found = render_rows(tokenizer, rows, "messages")
    assert isinstance(found[1], Refusal)
    assert [found[i] for i in (0, 2, 3)] == [render(tokenizer, rows[i]) for i in (0, 2, 3)]


def refuses(match, tokenizer, row, loss_on="auto"):
    with pytest.raises(Refusal, match=match) as caught:
        render(tokenizer, row, loss_on)
    return str(caught.value)


def test_a_template_that_renders_earlier_turns_differently_is_refused_where_the_renderings_part():
    tokenizer = tiny_tokenizer(THINKING)
    said = refuses("not prefix-stable", tokenizer, TWO_TURNS)
    assert "messages[1] (assistant)" in said
    assert repr("hello world<|im_end|>\n<|im_start|>assistant\n"[-30:]) in said  # the last 30 common characters
    assert "'(think) yes" in said and "'yes<|im_end|>" in said
    last = render(tokenizer, TWO_TURNS, "last_assistant")
    assert tokenizer.decode(last.ids[slice(*last.spans[0])]) == "(think) no no<|im_end|>"


def test_a_turn_without_end_is_refused():
    refuses("no end of turn", tiny_tokenizer(UNCLOSED), TWO_TURNS, "last_assistant")


def test_a_prompt_that_joins_its_completion_in_tokens_is_refused():
    tokenizer = tiny_tokenizer()
    said = refuses("not a prefix of the row in tokens", tokenizer, {"prompt": "hello ", "completion": "world"})
    assert "'hello'" in said
    render(tokenizer, {"prompt": "hello", "completion": " world"})


def test_two_bos_tokens_are_refused():
    refuses("two BOS", tiny_tokenizer(puts_bos=True), {"text": "<s>hello"})
    refuses("two BOS", tiny_tokenizer("{{ bos_token }}" + LLAMA3), TWO_TURNS)


@pytest.mark.parametrize(
    "row, match",
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "must be a list of messages, found a string"),
        (chat(("user", "hello")), "no assistant turn"),
        (chat(("assistant", "yes"), ("user", "no")), "first message"),
        (chat(("user", "hello"), ("assistent", "yes")), "unknown role 'assistent': did you mean 'assistant'"),
        (chat(("user", "hello"), ("assistant", " ")), "without content"),
        (
            chat(("user", [{"type": "text", "text": "hello"}]), ("assistant", "yes")),
            r"messages\[0\].content must be a string",
        ),
        (chat(("user", None), ("assistant", "yes")), "found nothing"),
        ({"prompt": "hello", "completion": ""}, "completion is empty"),
        (
            {"prompt": "hello", "completion": [{"role": "assistant", "content": "yes"}]},
            "both be strings or both be lists",
        ),
        ({"text": ""}, "text is empty"),
        ({"text": 3}, "text must be a string, found a number"),
        ({"texts": "hello"}, "found the columns texts, expected messages"),
        ({**TWO_TURNS, "tools": "add"}, "not JSON"),
    ],
)
def test_unfit_rows_are_refused(row, match):
    refuses(match, tiny_tokenizer(CHATML), row)


def test_what_the_tokenizer_lacks_is_refused():
    refuses("no chat template", tiny_tokenizer(None), TWO_TURNS)
    refuses("no EOS token", tiny_tokenizer(eos=None), {"text": "hello"})
    refuses(
        "only user and assistant", tiny_tokenizer(MISTRAL), chat(("system", "no"), ("user", "a"), ("assistant", "b"))
    )


@pytest.mark.parametrize(
    "row, loss_on",
    [({"text": "hello"}, "assistant"), (TWO_TURNS, "completion"), ({"prompt": "a", "completion": "b"}, "assistant")],
)
def test_a_loss_that_the_columns_cannot_have_is_refused(row, loss_on):
    refuses(f"loss_on '{loss_on}' has no meaning", tiny_tokenizer(CHATML), row, loss_on)
