"""Places for added tokens, against the same written out with lists."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ft.functional.places import lay, take_out


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), st.booleans())
def test_segments(lengths, tokens, first):
    bounds = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    row = [[10 * s + i for i in range(n)] for s, n in enumerate(lengths)]
    x = torch.tensor([sum(row, [])])
    expected = sum(([-s * 10 - j for j in range(tokens)] + part for s, part in enumerate(row)), [])
    laid = lay(x, lambda part: -part[:, :1] - torch.arange(tokens), bounds)
    assert laid.tolist() == [expected]
    back = take_out(laid[..., None].float(), tokens, bounds, first=first)[..., 0]
    kept = x.clone()
    if first:
        kept[0, list(bounds[:-1])] *= -1
    assert torch.equal(back, kept.float())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 3), st.booleans())
def test_fillers_stay_in_front(pads, tokens, first):
    x = torch.arange(1, 6).expand(len(pads), 5) + 10 * torch.arange(len(pads))[:, None]
    rows = [r[:n] + [-j - 1 for j in range(tokens)] + r[n:] for r, n in zip(x.tolist(), pads, strict=True)]
    front = -torch.arange(1, tokens + 1)
    laid = lay(x, lambda part: front.expand(len(part), -1), None, torch.tensor(pads))
    assert laid.tolist() == rows
    states = laid[..., None].expand(-1, -1, 2).float()
    assert torch.equal(lay(x[..., None].expand(-1, -1, 2).float(), lambda part: states[:, pads[0] : pads[0] + tokens],
                           None, torch.tensor(pads), axis=1), states) or len(set(pads)) > 1  # fmt: skip
    kept = x.float().clone()
    if first:
        kept[torch.arange(len(pads)), torch.tensor(pads)] = -1
    assert torch.equal(take_out(states, tokens, None, torch.tensor(pads), first=first)[..., 0], kept)
