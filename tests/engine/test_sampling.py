"""Drawing answers: against transformers' own generation, against the formula, and what a batch must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from lightning_ft.engine.sampling import Answer, allowed, choose, sample
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import CausalLM
from lightning_ft.nn.growing_cache import GrowingLayer
from tests.models.architectures import PACKABLE, V, build

PROMPTS = [[5, 9, 13], [7], [11, 3, 8, 2, 60, 41, 30], [50, 50]]


def ids(answers: list[list[Answer]]) -> list[list[list[int]]]:
    return [[answer.ids for answer in row] for row in answers]


def greedy(view: CausalLM, prompts: list[list[int]], new: int, **more: Any) -> list[list[Answer]]:
    return sample(view, prompts, seeds=[[0]] * len(prompts), max_new_tokens=new, temperature=0, **more)


@pytest.mark.parametrize("kind", PACKABLE)
def test_the_most_likely_tokens_are_those_of_transformers(kind: str) -> None:
    """Prompts of unequal length in one batch give what ``generate`` gives for each alone, windows and caches included."""
    model = build(kind).eval()
    found = ids(greedy(CausalLM(model), PROMPTS, 12))
    for prompt, (answer,) in zip(PROMPTS, found, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert answer == theirs[0, len(prompt) :].tolist()


def test_an_answer_does_not_depend_on_its_batch() -> None:
    """One prompt read for all its answers, beside others or alone, in float64: the same tokens."""
    view = CausalLM(build("llama").double().eval())
    seeds = [[10 * row + i for i in range(3)] for row in range(len(PROMPTS))]
    together = sample(view, PROMPTS, seeds=seeds, max_new_tokens=10, temperature=0.7, end_ids={1, 2, 3, 4, 5, 6})
    assert len({tuple(answer.ids) for row in together for answer in row}) > 8, "the draws must differ"
    assert {answer.ended for row in together for answer in row} == {True, False}
    for prompt, row, own in zip(PROMPTS, together, seeds, strict=True):
        for answer, seed in zip(row, own, strict=True):
            alone = sample(
                view, [prompt], seeds=[[seed]], max_new_tokens=10, temperature=0.7, end_ids={1, 2, 3, 4, 5, 6}
            )
            assert alone == [[answer]]


def test_where_an_answer_ends() -> None:
    view = CausalLM(build("llama").eval())
    whole = [row[0] for row in ids(greedy(view, PROMPTS, 12))]
    end = whole[0][3]
    for row, (answer,) in zip(whole, greedy(view, PROMPTS, 12, end_ids={end}), strict=True):
        length = row.index(end) + 1 if end in row else 12
        assert answer == Answer(row[:length], end in row)
    third = greedy(view, PROMPTS, 12, stops=lambda so_far: len(so_far) == 3)
    assert [row[0] for row in third] == [Answer(row[:3], True) for row in whole]


def test_an_end_as_the_last_token_that_is_allowed_is_an_end() -> None:
    """One token fewer, and the answer was cut; one more changes nothing."""
    view = CausalLM(build("llama").eval())
    (whole,) = ids(greedy(view, PROMPTS[:1], 12))[0]
    place = next(place for place in range(1, 12) if whole[place] not in whole[:place])
    end = whole[place]
    for limit in (place, place + 1, place + 2):
        expected = [[Answer(whole[: min(limit, place + 1)], limit > place)]]
        assert greedy(view, PROMPTS[:1], limit, end_ids={end}) == expected
        assert greedy(view, PROMPTS[:1], limit, stops=lambda so_far: so_far[-1] == end) == expected


def test_rows_that_have_ended_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward passes get shorter, and stop with the last row."""
    view = CausalLM(build("llama").eval())
    sizes: list[int] = []
    hook = view.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lengths = {5: 1, 7: 2, 11: 3, 50: 4}
    firsts = {tuple(greedy(view, [p], 6)[0][0].ids[: lengths[p[0]]]) for p in PROMPTS}
    sizes.clear()
    greedy(view, PROMPTS, 6, stops=lambda so_far: tuple(so_far) in firsts)
    hook.remove()
    assert sizes == [4, 3, 2, 1]


def test_ranks_compute_along() -> None:
    """While another rank still writes, this one runs forwards, and its answers stay as they are."""
    view = CausalLM(build("llama").eval())
    calls: list[bool] = []
    found = greedy(view, PROMPTS, 8, stops=lambda so_far: True, go_on=lambda own: calls.append(own) or True)  # type: ignore[func-returns-value]
    assert calls == [False] * 7 and all(len(row[0].ids) == 1 and row[0].ended for row in found)


def test_drawn_by_their_probability() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 12)
    n = 4000
    chances = torch.rand(n, dtype=torch.float64)
    drawn = choose(logits.expand(n, -1), chances, temperature=0.5)
    expected = (logits[0] / 0.5).double().softmax(-1) * n
    assert chisquare(torch.bincount(drawn, minlength=12).numpy(), expected.numpy()).pvalue > 0.001
    few = choose(logits.expand(n, -1), chances, top_k=3)
    assert set(few.tolist()) == set(logits[0].topk(3).indices.tolist())


def test_what_may_be_drawn_is_what_transformers_allows() -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(5, V) * 3
    for p in (0.1, 0.5, 0.9, 0.999):
        torch.testing.assert_close(allowed(logits, top_p=p), TopPLogitsWarper(p)(None, logits))
    for k in (1, 3, 50):
        torch.testing.assert_close(allowed(logits, top_k=k), TopKLogitsWarper(k)(None, logits))
    assert allowed(logits) is logits


def test_rare_tokens_can_be_drawn_and_impossible_ones_not() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -30.0, -torch.inf]])
    chances = torch.tensor([0.0, 0.5, 1 - 1e-16, 1 - 1e-14], dtype=torch.float64)
    assert choose(logits.expand(4, -1), chances).tolist() == [0, 0, 2, 2]


def test_space_is_taken_once() -> None:
    """A step writes its own keys and copies none that are there, so that time grows with the tokens and not with their square."""
    view = CausalLM(build("llama").eval())
    places: set[int] = set()
    original = GrowingLayer.update

    def update(self: GrowingLayer, *args: Any, **kwargs: Any) -> Any:
        keys, values = original(self, *args, **kwargs)
        places.add(keys.data_ptr())
        return keys, values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingLayer, "update", update)
        greedy(view, PROMPTS, 20)
    assert len(places) == 2  # one for each layer


@pytest.mark.parametrize(
    ("prompts", "new", "said"), [([[1], []], 4, "An empty prompt"), ([[1] * 60], 8, "do not fit into the model's 64")]
)
def test_refusals(prompts: list[list[int]], new: int, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        greedy(CausalLM(build("gpt2").eval()), prompts, new)
