"""score_tokens against dense float64 autograd, its memory, and its number of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.functional import token_scores as ts
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.head import score_tokens
from tests.tolerances import TOL

N, D, V = 21, 8, 53
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl", "total_variation")


class Head(nn.Module):
    """A linear head with everything that architectures add to it."""

    def __init__(self, bias: bool = False, softcap: float | None = None, scale: float = 1.0, rank: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(D, V, bias=bias)
        self.softcap, self.scale = softcap, scale
        self.a = nn.Parameter(torch.randn(rank, D)) if rank else None
        self.b = nn.Parameter(torch.randn(V, rank)) if rank else None

    def forward(self, hidden: Tensor) -> Tensor:
        z = self.linear(hidden)
        if self.a is not None and self.b is not None:
            z = z + hidden @ self.a.T @ self.b.T
        z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


HEADS: dict[str, Callable[[], Head]] = {
    "plain": Head,
    "bias": lambda: Head(bias=True),
    "softcap": lambda: Head(softcap=2.0),
    "scaled": lambda: Head(scale=0.25),
    "lora": lambda: Head(rank=3),
    "everything": lambda: Head(bias=True, softcap=3.0, scale=2.0, rank=2),
}


def dense(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], q: Tensor, t: float) -> dict[str, Tensor]:
    """The oracle: all logits at once, torch's own functions."""
    logp, logq = (head(hidden) / t).log_softmax(-1), (q / t).log_softmax(-1)
    logm = torch.logaddexp(logp, logq) - torch.tensor(2.0, dtype=logp.dtype).log()
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    return {
        "logprob": logp.gather(-1, labels[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "forward_kl": kl(logq, logp),
        "reverse_kl": kl(logp, logq),
        "jensen_shannon": (kl(logq, logm) + kl(logp, logm)) / 2,
        "skewed_kl": kl(logq, logm),
        "skewed_reverse_kl": kl(logp, logm),
        "total_variation": (logp.exp() - logq.exp()).abs().sum(-1) / 2,
    }


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(V, (N,)), torch.randn(N, V, dtype=dtype), torch.randn(8, N, dtype=dtype)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("trained", ["frozen", "listed", "unlisted"])
@pytest.mark.parametrize("outputs", [("logprob",), ("logprob", "entropy"), ("logprob", "entropy", *DIVERGENCES)])
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_equals_dense_autograd(kind: str, trained: str, outputs: tuple[str, ...], chunk_size: int) -> None:
    """Values and gradients, of hidden states and of the head, equal a dense computation in float64."""
    hidden, labels, q, weights = problem(torch.float64)
    head = HEADS[kind]().double().requires_grad_(trained != "frozen")
    expected = dense(hidden, labels, head, q, 0.8)
    loss = sum((weights[i] * expected[name]).sum() for i, name in enumerate(outputs))
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    slopes = torch.autograd.grad(loss, leaves)

    scores = score_tokens(
        hidden,
        labels,
        head,
        parameters=list(head.parameters()) if trained == "listed" else (),
        outputs=outputs,
        chunk_size=chunk_size,
        temperature=0.8,
        other=lambda rows: q[rows],
    )
    found = torch.autograd.grad(sum((weights[i] * scores[name]).sum() for i, name in enumerate(outputs)), leaves)
    for name in outputs:
        torch.testing.assert_close(scores[name], expected[name], atol=TOL[torch.float64], rtol=0)
    for a, b in zip(found, slopes, strict=True):
        torch.testing.assert_close(a, b, atol=TOL[torch.float64], rtol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute: bool) -> None:
    """Numerical differences confirm both paths."""
    hidden, labels, q, _ = problem(torch.float64)
    head = HEADS["everything"]().double().requires_grad_(False)

    def f(h: Tensor) -> tuple[Tensor, ...]:
        scores = score_tokens(
            h, labels, head, outputs=("logprob", "reverse_kl"), chunk_size=8, recompute=recompute, other=lambda r: q[r]
        )
        return scores["logprob"], scores["reverse_kl"]

    assert torch.autograd.gradcheck(f, (hidden,))


def test_tied_head_and_embedding_share_one_gradient() -> None:
    """With tied weights the gradient is the embedding's plus the head's."""
    torch.manual_seed(0)
    ids, labels = torch.randint(V, (N,)), torch.randint(V, (N,))
    table = nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    head = lambda h: h @ table.T  # noqa: E731
    hidden = torch.tanh(table[ids])
    loss = (hidden @ table.T).log_softmax(-1).gather(-1, labels[:, None]).sum()
    (expected,) = torch.autograd.grad(loss, table)
    scores = score_tokens(torch.tanh(table[ids]), labels, head, parameters=[table], chunk_size=4)
    (found,) = torch.autograd.grad(scores["logprob"].sum(), table)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(trained: bool, autocast: bool) -> None:
    """bfloat16 weights, or float32 ones under autocast, agree with float64 to rounding; values are float32."""
    hidden, labels, _, weights = problem(torch.float64)
    head = Head().double().requires_grad_(trained)
    truth = head(hidden).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    (reference,) = torch.autograd.grad((weights[0] * truth).sum(), hidden)
    dtype = torch.float32 if autocast else torch.bfloat16
    low = hidden.detach().to(dtype).requires_grad_()
    head = head.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = score_tokens(low, labels, head, chunk_size=4)
        loss = (weights[0].float() * scores["logprob"]).sum()
    assert scores["logprob"].dtype == torch.float32
    loss.backward()  # outside autocast, as Lightning runs it
    assert low.grad is not None and low.grad.dtype == dtype
    torch.testing.assert_close(low.grad.double(), reference, atol=TOL[torch.bfloat16] * 2, rtol=TOL[torch.bfloat16] * 2)
    assert all((p.grad is not None) == trained for p in head.parameters())


def test_dropout_in_the_head_is_the_same_in_backward() -> None:
    """The recomputed head draws the mask it drew in the forward pass."""
    torch.manual_seed(0)
    linear = nn.Linear(D, V).double()
    drop = nn.Dropout(0.5)
    hidden, labels, _, _ = problem(torch.float64)
    torch.manual_seed(3)
    scores = score_tokens(hidden, labels, lambda h: linear(drop(h)), parameters=list(linear.parameters()))
    scores["logprob"].sum().backward()
    torch.manual_seed(3)
    expected = linear(drop(hidden)).log_softmax(-1).gather(-1, labels[:, None]).sum()
    slopes = torch.autograd.grad(expected, [hidden, linear.weight])
    torch.testing.assert_close(hidden.grad, slopes[0])
    torch.testing.assert_close(linear.weight.grad, slopes[1])


class Watch(TorchDispatchMode):
    """Records the largest tensor whose last axis is the vocabulary, and counts matrix products that involve it."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[-1] == V:
                self.largest = max(self.largest, tensor.numel())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.products += 1
        return out


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 4)])
def test_no_logits_beyond_a_chunk_and_two_products(trained: bool, products: int) -> None:
    """No (N, V) tensor is ever made; a frozen head costs two matrix products a chunk, a trained one four."""
    torch.manual_seed(0)
    rows, chunk = 96, 24
    hidden = torch.randn(rows, D, requires_grad=True)
    head = nn.Linear(D, V, bias=False).requires_grad_(trained)
    with Watch() as watch:
        scores = score_tokens(
            hidden, torch.randint(V, (rows,)), head, parameters=list(head.parameters()), chunk_size=chunk
        )
        scores["logprob"].sum().backward()
    assert 0 < watch.largest <= chunk * V
    assert watch.products == products * rows // chunk


def test_without_gradients_one_product_a_chunk() -> None:
    """Scoring for evaluation, or of hidden states that need no gradient, never runs the head backwards."""
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(8, D), torch.randint(V, (8,))
    for context, h in ((torch.no_grad(), hidden.clone().requires_grad_()), (torch.enable_grad(), hidden)):
        with Watch() as watch, context:
            outputs = ("logprob", "entropy", "forward_kl")
            scores = score_tokens(h, labels, head, chunk_size=4, outputs=outputs, other=lambda r: torch.zeros(4, V))
        assert watch.products == 2 and not scores["logprob"].requires_grad


@pytest.mark.parametrize("trained", [False, True])
def test_outputs_without_gradient(trained: bool) -> None:
    """correct, argmax, topk and entropy_value equal the dense ones and carry no gradient."""
    torch.manual_seed(0)
    head = nn.Linear(D, V).requires_grad_(trained)
    hidden = torch.randn(N, D, requires_grad=True)
    z = head(hidden)
    labels = torch.where(torch.arange(N) % 2 == 0, z.argmax(-1), torch.randint(V, (N,)))
    outputs = ("logprob", "correct", "argmax", "entropy_value", "topk")
    scores = score_tokens(hidden, labels, head, outputs=outputs, chunk_size=5, top_k=4)
    torch.testing.assert_close(scores["entropy_value"], -(z.softmax(-1) * z.log_softmax(-1)).sum(-1))
    assert scores["correct"].equal(z.argmax(-1) == labels) and scores["argmax"].equal(z.argmax(-1))
    torch.testing.assert_close(scores["topk_logprob"], z.log_softmax(-1).topk(4).values)
    total = scores["topk_logprob"].exp().sum(-1) + scores["rest_logprob"].exp()
    torch.testing.assert_close(total, torch.ones(N))
    assert scores["logprob"].requires_grad
    assert not any(
        scores[k].requires_grad for k in ("correct", "argmax", "entropy_value", "topk_logprob", "rest_logprob")
    )


@pytest.mark.parametrize("trained", [False, True])
def test_no_rows_is_a_connected_zero(trained: bool) -> None:
    """A rank without scored tokens gets a zero loss and zero gradients everywhere, not None."""
    head = nn.Linear(D, V).requires_grad_(trained)
    start = torch.randn(3, D, requires_grad=True)
    scores = score_tokens(
        start[:0], torch.zeros(0, dtype=torch.long), head, outputs=("logprob", "correct", "entropy_value", "topk")
    )
    assert scores["logprob"].shape == (0,) == scores["entropy_value"].shape and scores["topk_index"].shape == (0, 64)
    scores["logprob"].sum().backward()
    assert start.grad is not None and (start.grad == 0).all()
    assert not trained or all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_refusals() -> None:
    """Each mistake is one sentence that says what to do."""
    hidden, labels, head = torch.randn(4, D), torch.randint(V, (4,)), nn.Linear(D, V)
    with pytest.raises(Refusal, match="no output is called"):
        score_tokens(hidden, labels, head, outputs=("perplexity",))
    with pytest.raises(Refusal, match=r"\(N, D\)"):
        score_tokens(hidden[None], labels[None], head)
    with pytest.raises(Refusal, match="second distribution"):
        score_tokens(hidden, labels, head, outputs=("forward_kl",))
    with pytest.raises(Refusal, match="one vocabulary"):
        score_tokens(hidden, labels, head, outputs=("forward_kl",), other=lambda r: torch.zeros(4, V + 1))
    with pytest.raises(Refusal, match="leave positions"):
        score_tokens(hidden, torch.tensor([0, 1, -100, 2]), head)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_was_kept_of_a_second_model_stands_for_its_logits(recompute: bool) -> None:
    """With all tokens kept the value is the forward KL; with few, values and gradients equal the closed form on dense logits."""
    hidden, labels, q, weights = problem(torch.float64)
    head = HEADS["everything"]().double().requires_grad_(recompute)
    for k in (V, 3):
        kept = ts.TopK(*ts.top_k(ts.distribution(q, 0.8), k))
        settings = {"chunk_size": 4, "temperature": 0.8, "other": kept.block}
        found = score_tokens(hidden, labels, head, outputs=("topk_kl",), recompute=recompute, **settings)["topk_kl"]
        logits = head(hidden)
        value, slope = ts.top_k_kl(ts.distribution(logits.detach(), 0.8), kept)
        torch.testing.assert_close(found, value, atol=TOL[torch.float64], rtol=0)
        leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
        expected = torch.autograd.grad(logits, leaves, slope / 0.8 * weights[0][:, None])
        for a, b in zip(torch.autograd.grad((weights[0] * found).sum(), leaves), expected, strict=True):
            torch.testing.assert_close(a, b, atol=TOL[torch.float64], rtol=1e-10)
    whole = score_tokens(hidden, labels, head, outputs=("forward_kl",), temperature=0.8, other=lambda rows: q[rows])
    kept = ts.TopK(*ts.top_k(ts.distribution(q, 0.8), V))
    same = score_tokens(hidden, labels, head, outputs=("topk_kl",), temperature=0.8, other=kept.block)
    torch.testing.assert_close(same["topk_kl"], whole["forward_kl"], atol=TOL[torch.float64], rtol=0)
