"""The arithmetic of distillation against loops in float64, its theorems, and its derivatives."""

import math

import pytest
import torch

from lightning_ft.functional import distillation as d
from lightning_ft.functional import token_scores
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.token_scores import distribution
from tests.tolerances import TOL

torch.manual_seed(0)


def logits(*shape, scale=2.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def softmax(row, t):
    top = max(row)
    weights = [math.exp((z - top) / t) for z in row]
    return [w / sum(weights) for w in weights]


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def by_loops(student, teacher, kind, t, beta, scale):
    """The definitions, one row and one class at a time."""
    found = []
    for s, z in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(s, t), softmax(z, t)
        if kind == "forward_kl":
            value = kl(q, p)
        elif kind == "reverse_kl":
            value = kl(p, q)
        elif kind == "skewed_kl":
            value = kl(q, [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)])
        elif kind == "skewed_reverse_kl":
            value = kl(p, [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)])
        elif kind == "total_variation":
            value = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
        else:
            m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
            value = (beta * kl(q, m) + (1 - beta) * kl(p, m)) / (beta * (1 - beta))
        factor = t if kind == "total_variation" else t * t
        found.append(value * (factor if scale else 1))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("kind", d.DIVERGENCES)
@pytest.mark.parametrize(("t", "beta", "scale"), [(1.0, 0.5, True), (3.0, 0.1, True), (0.5, 0.9, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergences_equal_loops(kind, t, beta, scale, dtype):
    student, teacher = logits(7, 5).to(dtype), logits(7, 5, seed=1).to(dtype)
    found = d.soft_targets(student, teacher, kind, temperature=t, beta=beta, scale_t2=scale)
    expected = by_loops(student.double(), teacher.double(), kind, t, beta, scale)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOL[found.dtype]  # logits in bfloat16 are raised first
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_by_hand():
    """Teacher (1/2, 1/2), student (3/4, 1/4): KL(q || p) = ln 2 / sqrt 3 ... = 1/2 ln(4/3)."""
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert d.soft_targets(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-7)
    reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert d.soft_targets(student, teacher, "reverse_kl").item() == pytest.approx(reverse, abs=1e-7)


@pytest.mark.parametrize("kind", d.DIVERGENCES)
def test_zero_and_flat_where_they_agree(kind):
    student = logits(4, 6).requires_grad_()
    value = d.soft_targets(student, student.detach(), kind, temperature=2.0).sum()
    value.backward()
    assert abs(value.item()) < 1e-12 and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", d.DIVERGENCES)
def test_gradcheck(kind):
    teacher = logits(3, 4, seed=1)
    student = logits(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: d.soft_targets(s, teacher, kind, temperature=1.5, beta=0.3), student)


def test_hot_temperatures_approach_half_the_variance():
    """T^2 KL -> 1/2 Var over classes of z_s - z_t (Hinton et al., 2015, section 2.1)."""
    student, teacher = logits(5, 9), logits(5, 9, seed=1)
    limit = (student - teacher).var(-1, correction=0) / 2
    for kind in ("forward_kl", "reverse_kl"):
        found = d.soft_targets(student, teacher, kind, temperature=3e3)
        torch.testing.assert_close(found, limit, rtol=1e-2, atol=0)
    apart = [(d.soft_targets(student, teacher, temperature=t) - limit).abs().sum() for t in (10.0, 100.0, 1000.0)]
    assert apart[0] > apart[1] > apart[2]
    assert torch.equal(
        d.soft_targets(student, teacher, temperature=3.0),
        d.soft_targets(student, teacher, temperature=3.0, scale_t2=False) * 9.0,
    )


@pytest.mark.parametrize("kind", d.DIVERGENCES)
def test_temperatures_change_neither_value_nor_gradient_much(kind):
    """From T = 8 to 64 both have come near their limits."""
    teacher, found = logits(5, 9, seed=1), []
    for t in (8.0, 64.0):
        student = logits(5, 9).requires_grad_()
        value = d.soft_targets(student, teacher, kind, temperature=t, beta=0.3).sum()
        (slope,) = torch.autograd.grad(value, student)
        found.append(torch.stack([value.detach(), slope.norm()]))
    torch.testing.assert_close(found[0], found[1], rtol=0.3, atol=0)


def test_ends_of_jensen_shannon_meet_the_kls():
    student, teacher = logits(6, 8), logits(6, 8, seed=1)
    for beta, kind in ((1e-8, "forward_kl"), (0.0, "forward_kl"), (1 - 1e-8, "reverse_kl"), (1.0, "reverse_kl")):
        end = d.soft_targets(student, teacher, kind)
        near = d.soft_targets(student, teacher, "jensen_shannon", beta=beta)
        torch.testing.assert_close(near, end, rtol=1e-4, atol=1e-6)
    both = [d.soft_targets(a, b, "jensen_shannon") for a, b in ((student, teacher), (teacher, student))]
    torch.testing.assert_close(*both)  # symmetric in the middle
    assert (both[0] / 4 <= math.log(2)).all()  # without the factor it is bounded by ln 2


@pytest.mark.parametrize("beta", [1e-8, 1e-6, 1e-5, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-5, 1 - 1e-6, 1 - 1e-8])
def test_jensen_shannon_in_float32_is_right_near_its_ends(beta):
    """Value and gradient, of both implementations, against the definition in float64, 17 digits of which bear these betas.

    Rows of usual logits, of two models that almost agree, and of two that have little in common.
    """
    student = torch.cat([logits(4, 50), logits(4, 50, seed=1), logits(4, 50, scale=20.0)])
    teacher = torch.cat(
        [logits(4, 50, seed=2), logits(4, 50, seed=1) + 1e-2 * logits(4, 50), logits(4, 50, seed=4, scale=20.0)]
    )

    def exact(z):
        p, q = z.softmax(-1), teacher.softmax(-1)
        m = beta * q + (1 - beta) * p
        both = beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
        return both / (beta * (1 - beta))

    z = student.clone().requires_grad_()
    expected = exact(z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    factor, tolerance = d.in_chunks("jensen_shannon", beta)[1], TOL[torch.float32]

    narrow = student.float().requires_grad_()
    value = d.soft_targets(narrow, teacher.float(), "jensen_shannon", beta=beta)
    (found,) = torch.autograd.grad(value.sum(), narrow)
    p, q = (distribution(x.detach().float()) for x in (student, teacher))
    closed, gradient = token_scores.jensen_shannon(p, q, beta)
    for one, other in ((value, found), (closed * factor, gradient * factor)):
        assert (one > 0).all()
        torch.testing.assert_close(one.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(other.double(), slope, rtol=tolerance, atol=tolerance)


def test_skewed_kls_and_total_variation_are_bounded():
    """By -log beta and 1 also where the two have nothing in common; at beta 0 the skewed are the KLs; Pinsker's inequality."""
    student, teacher = logits(6, 8), logits(6, 8, seed=1)
    apart = torch.tensor([[900.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 900.0]], dtype=torch.float64)
    for skewed, plain in (("skewed_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")):
        torch.testing.assert_close(
            d.soft_targets(student, teacher, skewed, beta=0.0), d.soft_targets(student, teacher, plain)
        )
        assert d.soft_targets(*apart, skewed, beta=0.1).item() == pytest.approx(-math.log(0.1))
    assert d.soft_targets(*apart, "total_variation").item() == pytest.approx(1.0)
    distance, divergence = (d.soft_targets(student, teacher, kind) for kind in ("total_variation", "forward_kl"))
    assert (distance <= (divergence / 2).sqrt()).all() and distance.min() > 0.05


def test_the_chunked_output_has_the_same_factor():
    assert d.in_chunks("forward_kl", 0.3) == ("forward_kl", 1.0)
    assert (
        d.in_chunks("jensen_shannon", 0.0)[0] == "forward_kl" and d.in_chunks("jensen_shannon", 1.0)[0] == "reverse_kl"
    )
    assert d.in_chunks("jensen_shannon", 0.25) == ("jensen_shannon", pytest.approx(16 / 3))


def test_decisions_are_sigmoids():
    student, teacher = logits(5, 3), logits(5, 3, seed=1)
    expected = torch.zeros(5, dtype=torch.float64)
    for row in range(5):
        for c in range(3):
            p, q = (1 / (1 + math.exp(-z[row, c].item() / 2)) for z in (student, teacher))
            expected[row] += 4 * kl([q, 1 - q], [p, 1 - p]) / 3
    torch.testing.assert_close(d.soft_decisions(student, teacher, temperature=2.0), expected)


def test_hidden_states():
    s, t = logits(4, 6), logits(4, 6, seed=1)
    torch.testing.assert_close(d.hidden_mse(s, t), ((s - t) ** 2).sum(-1) / 6)
    cosine = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    torch.testing.assert_close(d.hidden_cosine(s, t), 1 - cosine)
    assert d.hidden_cosine(s, 3 * s).abs().max() < 1e-12
    torch.testing.assert_close(d.soft_values(s[:, :1], t[:, :1]), (s[:, 0] - t[:, 0]) ** 2)


MASK = torch.tensor([[True] * 4, [True, True, False, False]])


def maps(seed, causal=False):
    scores = logits(2, 3, 4, 4, seed=seed).masked_fill(~MASK[:, None, None], float("-inf"))
    if causal:
        scores = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1)


@pytest.mark.parametrize("causal", [False, True])
def test_maps_equal_loops(causal):
    student, teacher = maps(0, causal), maps(1, causal)
    expected = []
    for b in range(2):
        values = [
            kl(teacher[b, a, t].tolist(), student[b, a, t].clamp_min(1e-300).tolist())
            for a in range(3)
            for t in range(4)
            if MASK[b, t]
        ]
        expected.append(sum(values) / len(values))
    found = d.map_kl(student, teacher, MASK)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert d.map_kl(teacher, teacher, MASK).abs().max() < 1e-12


def test_padding_of_maps_and_relations_counts_nothing():
    student, teacher = maps(0), maps(1)
    changed = student.clone()
    changed[1, :, 2:] = 0.25
    assert torch.equal(d.map_kl(student, teacher, MASK), d.map_kl(changed, teacher, MASK))
    values = logits(2, 4, 6)
    other = values.clone()
    other[1, 2:] = 99.0
    pair = [d.relation_log_probs(v, 3, MASK) for v in (values, other)]
    target = d.relation_log_probs(logits(2, 4, 12, seed=1), 3, MASK)  # other widths, as many heads
    torch.testing.assert_close(d.relation_kl(pair[0], target, MASK), d.relation_kl(pair[1], target, MASK))


def test_relations_equal_loops():
    s, t = logits(2, 4, 6, scale=1.0), logits(2, 4, 12, scale=1.0, seed=1)
    expected = []
    for b in range(2):
        n, values = int(MASK[b].sum()), []
        for a in range(3):
            rows = []
            for v in (s, t):
                width = v.shape[-1] // 3
                part = v[b, :n, a * width : (a + 1) * width]
                rows.append([softmax([float(x @ y) / math.sqrt(width) for y in part], 1.0) for x in part])
            values += [kl(q, p) for p, q in zip(*rows, strict=True)]
        expected.append(sum(values) / len(values))
    found = d.relation_kl(d.relation_log_probs(s, 3, MASK), d.relation_log_probs(t, 3, MASK), MASK)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(Refusal, match="Values of width 6 cannot be split into 4 relation heads"):
        d.relation_log_probs(s, 4, MASK)


def test_gradcheck_of_what_is_computed_on_the_way():
    teacher = maps(1)
    scores = logits(2, 3, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: d.map_kl(x.softmax(-1), teacher, MASK.new_ones(2, 4)), scores)
    values, target = logits(2, 4, 6).requires_grad_(), d.relation_log_probs(logits(2, 4, 6, seed=1), 2, MASK)
    assert torch.autograd.gradcheck(lambda v: d.relation_kl(d.relation_log_probs(v, 2, MASK), target, MASK), values)


def test_layers():
    assert d.layer_map("last", 3, 12) == {3: 12}
    assert d.layer_map("uniform", 6, 12) == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}
    assert d.layer_map({0: 0, 2: 5}, 2, 5) == {0: 0, 2: 5}
    with pytest.raises(Refusal, match="layers maps 3 to 1, but the student has 2 blocks and the teacher 5"):
        d.layer_map({3: 1}, 2, 5)
    assert d.uniform_layers(6, 12) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    assert d.uniform_layers(1, 12) == [0] and d.uniform_layers(4, 4) == [0, 1, 2, 3]
