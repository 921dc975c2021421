"""Ids of prefixes against tokenising each of them alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from lightning_ft.data import prefixes
from lightning_ft.data.prefixes import tokenise_prefixes
from tests.data.tiny_tokenizers import SPECIAL, tiny_tokenizer

PIECES = st.lists(
    st.sampled_from([*SPECIAL[:4], "<|im", "_start|>", " hello", "no", "\n", "  ", "ä", "<pad>"]), max_size=12
)
PLAIN, EATING = tiny_tokenizer(), tiny_tokenizer()
EATING.add_tokens([AddedToken("<pad>", special=True, lstrip=True)], special_tokens=True)


@settings(deadline=None, max_examples=100)
@given(PIECES, st.sampled_from([PLAIN, EATING]))
def test_every_prefix_has_the_ids_that_it_has_alone(pieces, tokenizer):
    text = "".join(pieces)
    wanted = [text[:end] for end in range(len(text) + 1)] + ["not a prefix<s>"]
    found = tokenise_prefixes(tokenizer, {text: wanted})[text]
    assert set(found) == {text, *wanted}
    for prefix, ids in found.items():
        assert ids == tokenizer(prefix, add_special_tokens=False)["input_ids"]


def test_a_shared_beginning_is_tokenised_once(monkeypatch):
    seen = []
    honest = prefixes.plain_ids
    monkeypatch.setattr(prefixes, "plain_ids", lambda tokenizer, texts: seen.extend(texts) or honest(tokenizer, seen))
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    prompt = text[: text.index("yes")]
    tokenise_prefixes(PLAIN, {text: [prompt], text + "x": [prompt]})
    assert sorted(seen) == sorted([text, text + "x", "<|im_start|>assistant\n"])


@pytest.mark.parametrize("texts", [{}, {"": [""]}])
def test_nothing_is_nothing(texts):
    assert tokenise_prefixes(PLAIN, texts) == {text: {"": []} for text in texts}
