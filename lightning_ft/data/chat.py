"""A row as text: what the tokenizer's own chat template makes of it, and of each prompt inside it.

The template is used as it is, for any model. What is to be learned is told by rendering prefixes (see spans.py), so no
template needs markers, patches or an entry in a table of known ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.rows import Kind, whole_text
from lightning_ft.functional.errors import Refusal

LossOn = Literal["auto", "assistant", "last_assistant", "completion", "all"]

_DEFAULT: dict[Kind, LossOn] = {"messages": "assistant", "prompt_completion": "completion", "text": "all"}
_MEETS: dict[Kind, tuple[LossOn, ...]] = {
    "messages": ("assistant", "last_assistant", "all"),
    "prompt_completion": ("assistant", "last_assistant", "completion", "all"),
    "text": ("all",),
}


@dataclass(frozen=True)
class Turn:
    """One stretch to be learned.

    Attributes:
        name: how to call it in a sentence.
        prompt: the text before it, as a generation would be prompted.
        until: the rendering that ends with it (its end of turn, perhaps white space after it); None: the end of the
            row.
    """

    name: str
    prompt: str
    until: str | None


@dataclass(frozen=True)
class Draft:
    """A row rendered as text.

    Attributes:
        text: the whole row.
        turns: what is to be learned, in order; None: every token.
        plain: no template was used, so the tokenizer's BOS goes before the row and EOS after it.
    """

    text: str
    turns: tuple[Turn, ...] | None
    plain: bool


def resolve_loss_on(loss_on: LossOn, kind: Kind, *, strings: bool = False) -> LossOn:
    """What is learned from rows of this kind.

    Args:
        loss_on: the user's choice; ``auto`` is the assistant's turns, the completion, or the whole text.
        kind: of the rows.
        strings: whether prompt and completion are plain strings, which have no turns.

    Raises:
        Refusal: if the choice has no meaning for the kind.
    """
    if loss_on == "auto":
        return _DEFAULT[kind]
    meets = ("completion", "all") if strings else _MEETS[kind]
    if loss_on not in meets:
        what = {"messages": "messages", "prompt_completion": "prompt + completion", "text": "text"}[kind]
        what += " strings" if strings else ""
        raise Refusal(f"loss_on {loss_on!r} has no meaning for {what}: choose auto, {' or '.join(meets)}.")
    return loss_on


def draft(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], kind: Kind, loss_on: LossOn) -> Draft:
    """Renders a normalised row (see :func:`~lightning_ft.data.rows.normalise`).

    ``messages``: the template's rendering, nothing added. ``prompt`` and ``completion`` as lists of messages: the same
    of both together, where the assistant turns of the completion are learned. As strings: ``prompt + completion`` and
    EOS.
    ``text``: the text and EOS. Rows without a template get BOS where the tokenizer itself would put one.

    Raises:
        Refusal: if the template refuses the row or it has no turn to learn from.
    """
    if kind == "text":
        resolve_loss_on(loss_on, kind)
        return Draft(text=row["text"], turns=None, plain=True)
    if kind == "prompt_completion" and isinstance(row["prompt"], str):
        what = resolve_loss_on(loss_on, kind, strings=True)
        turns = None if what == "all" else (Turn(name="completion", prompt=row["prompt"], until=None),)
        return Draft(text=row["prompt"] + row["completion"], turns=turns, plain=True)
    what = resolve_loss_on(loss_on, kind)
    before = row["prompt"] if kind == "prompt_completion" else []
    messages = [*before, *row["completion"]] if kind == "prompt_completion" else row["messages"]
    tools = row.get("tools")
    text = whole_text(render_text(tokenizer, messages, tools), "the rendered row")  # tools and names too
    _prove_kept(messages, text)
    if what == "all":
        return Draft(text=text, turns=None, plain=False)
    first = len(before) if what == "completion" else 0
    chosen = [k for k in range(first, len(messages)) if messages[k]["role"] == "assistant"]
    if not chosen:
        raise Refusal(
            "the row has no assistant turn"
            + (" in its completion" if first else "")
            + ", so there is nothing to learn from it."
        )
    if what == "last_assistant":
        chosen = chosen[-1:]
    return Draft(text=text, turns=tuple(_turn(tokenizer, messages, k, tools, text) for k in chosen), plain=False)


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The template's own rendering of these messages.

    Raises:
        Refusal: if there is no template, or it refuses them.
    """
    require_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateSyntaxError as error:
        raise Refusal(f"The chat template is not valid Jinja, line {error.lineno}: {_sentence(error)}.") from error
    except Exception as error:  # templates raise what they like: jinja's errors, TypeError, KeyError ...
        raise Refusal(f"the chat template refuses this row: {_sentence(error)}.") from error
    assert isinstance(text, str)
    return text


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _prove_kept(messages: list[dict[str, Any]], text: str) -> None:
    """Refuses a rendering that left a system or user turn out without a word, as some templates do with ``system``."""
    squeezed: str | None = None
    for number, message in enumerate(messages):
        content = message.get("content")
        if message["role"] not in ("system", "developer", "user") or not content or content.strip() in text:
            continue
        squeezed = squeezed if squeezed is not None else "".join(text.split())
        if "".join(content.split()) not in squeezed:  # a template may change white space
            raise Refusal(
                f"the chat template leaves messages[{number}] ({message['role']}) out, so the model would never see it: "
                "put its text into a turn that the template renders, or use another template."
            )


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises unless the tokenizer can render messages."""
    if not tokenizer.chat_template:
        raise Refusal(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template, so "
            "messages cannot be rendered: use the tokenizer of a chat model, or rows of prompt + completion "
            "strings or text."
        )


def _turn(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], k: int, tools: list[Any] | None, text: str
) -> Turn:
    name = f"messages[{k}] (assistant)"
    if k == 0:
        raise Refusal(
            f"{name} is the first message, so no prompt comes before it: begin the row with a system or user message, "
            "or choose loss_on last_assistant."
        )
    prompt = render_text(tokenizer, messages[:k], tools, add_generation_prompt=True)
    until = text if k == len(messages) - 1 else render_text(tokenizer, messages[: k + 1], tools)
    return Turn(name=name, prompt=prompt, until=until)
