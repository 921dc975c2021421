"""Scores of tokens from hidden states, through any output head, without ever holding a batch of logits.

A language model's head turns N hidden states of width D into N x V logits, V being 50,000 to 250,000: for a batch of
4,096 tokens that is gigabytes, of which a loss needs one number a token. Here the head runs on a chunk of tokens at a
time and only the numbers survive:

* **frozen head** (LoRA and the like): d value / d hidden is pulled back in the forward pass while the chunk's logits
  are at hand, and one (N, D) tensor per output is kept; backward only scales it. Two matrix products a chunk in all,
  where recomputation would take three.
* **trained head**, or more than two outputs with a gradient: nothing is kept; backward runs the head on each chunk
  again (activation checkpointing), and gradients reach the head's parameters in the ordinary way, sharded or not.
  Plain sums over tokens need no second run: `lightning_ft.nn.head_sums`.

The head is an opaque callable, so a bias, LoRA factors, logit scaling, soft-capping and the hooks of FSDP2 all act.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ft.functional import token_scores
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.token_scores import Distribution, TopK

#: Outputs with a gradient, and those without; "topk" becomes the keys topk_logprob, topk_index and rest_logprob.
NEEDS_OTHER = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_kl",
    "skewed_reverse_kl",
    "total_variation",
    "topk_kl",
)
DIFFERENTIABLE = ("logprob", "entropy", *NEEDS_OTHER)
PLAIN = ("correct", "argmax", "entropy_value", "topk")

Other = Callable[[slice], Tensor | TopK]
"""Of a slice of the rows the logits (n, V) of a second model, or what was kept of them."""


@dataclass(frozen=True)
class Asked:
    """What is asked of each row of logits."""

    outputs: tuple[str, ...]
    temperature: float
    top_k: int
    beta: float

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Those of ``outputs`` that have a gradient."""
        return tuple(name for name in self.outputs if name in DIFFERENTIABLE)

    def value(
        self, name: str, p: Distribution, q: Distribution | TopK | None, labels: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One differentiable output and its gradient with respect to the logits before the temperature."""
        if name == "logprob":
            value, slope = token_scores.log_prob(p, labels, gradient=gradient)
        elif name == "entropy":
            value, slope = token_scores.entropy(p, gradient=gradient)
        elif name == "topk_kl":
            assert isinstance(q, TopK)
            value, slope = token_scores.top_k_kl(p, q, gradient=gradient)
        else:
            assert isinstance(q, Distribution)  # checked on entry
            if name == "forward_kl":
                value, slope = token_scores.forward_kl(p, q, gradient=gradient)
            elif name == "reverse_kl":
                value, slope = token_scores.reverse_kl(p, q, gradient=gradient)
            elif name == "total_variation":
                value, slope = token_scores.total_variation(p, q, gradient=gradient)
            else:
                of = {
                    "jensen_shannon": token_scores.jensen_shannon,
                    "skewed_kl": token_scores.skewed_kl,
                    "skewed_reverse_kl": token_scores.skewed_reverse_kl,
                }[name]
                value, slope = of(p, q, self.beta, gradient=gradient)
        if slope is not None and self.temperature != 1.0:
            slope.div_(self.temperature)
        return value, slope

    def plain(self, p: Distribution, labels: Tensor) -> dict[str, Tensor]:
        """The outputs that have no gradient."""
        found: dict[str, Tensor] = {}
        if "correct" in self.outputs:
            found["correct"] = token_scores.is_top(p, labels)
        if "argmax" in self.outputs:
            found["argmax"] = p.logits.argmax(-1)
        if "entropy_value" in self.outputs:
            found["entropy_value"] = token_scores.entropy(p, gradient=False)[0]
        if "topk" in self.outputs:
            found["topk_logprob"], found["topk_index"], found["rest_logprob"] = token_scores.top_k(p, self.top_k)
        return found


def score_tokens(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    parameters: Sequence[nn.Parameter] = (),
    outputs: Sequence[str] = ("logprob",),
    chunk_size: int | None = None,
    temperature: float = 1.0,
    other: Other | None = None,
    top_k: int = 64,
    beta: float = 0.5,
    recompute: bool | None = None,
) -> dict[str, Tensor]:
    """Scores of one token per hidden state, in float32, differentiable in the hidden states and in the head.

    First order only: for second derivatives (MAML of order 2) apply the head and ``log_softmax`` directly.

    Args:
        hidden: (N, D) hidden states of the scored positions only; N may be 0.
        labels: (N,) int64, the token whose log-probability is asked for at each of them, in [0, V).
        head: maps (n, D) to logits (n, V). It is called once a chunk, in order, and for no rows at all once with a row
            of zeros, so that a rank without tokens still has gradients (zero) for the head.
        parameters: the head's parameters. Only a hint that saves one wasted chunk: trained parameters that are not
            listed are found in the graph of the first chunk.
        outputs: any of "logprob" (log p(label)), "entropy", "forward_kl" (KL(other || p)), "reverse_kl"
            (KL(p || other)), "jensen_shannon", "skewed_kl", "skewed_reverse_kl", "total_variation", "topk_kl" (forward, over
            the tokens kept of ``other`` and the rest), all (N,) with a gradient; "correct" (N,) bool, "argmax" (N,) int64,
            "entropy_value" (N,), which is "entropy" for those who only look at it, and "topk" (the keys "topk_logprob" (N, k),
            "topk_index" (N, k) and "rest_logprob" (N,)), without.
        chunk_size: tokens whose logits exist at one time. None is 256 on a CPU and 1,024 elsewhere, as measured in bfloat16 with a
            frozen head of V = 49,152, forward and backward. One core with AVX512-BF16, D = 576, 1,024 tokens: 872, 745, 685, 725
            and 745 ms with 64, 128, 256, 512 and 1,024. An H200, D = 768, 8,192 tokens: 20.5, 12.3, 7.2, 6.9 and 6.7 ms with
            256, 512, 1,024, 2,048 and 4,096, at 0.3, 0.6, 1.2, 2.4 and 4.8 GB beyond what was there.
        temperature: what the logits are divided by, and those of ``other`` too; "correct" does not change.
        other: gives the logits (n, V) of a second model for a slice of the N rows, or for "topk_kl" a `TopK`, kept at
            ``temperature``; called without gradients.
        top_k: how many tokens "topk" keeps.
        beta: the weight of ``other`` in "jensen_shannon"; in the skewed ones that of the first distribution in the mixture.
        recompute: whether backward runs the head again instead of keeping (N, D) slopes. None decides: yes when
            something in the head is trained or there are more than two outputs with a gradient. Set it for a head that
            FSDP2 shards as a unit of its own (its hooks expect backward to run in the backward pass).

    Returns:
        One tensor per output, by name; values in float32 (float64 if the logits are).

    Raises:
        Refusal: an unknown output, a missing ``other``, shapes that do not fit, or a label outside the vocabulary.

    Note:
        In that measurement the two matrix products alone took 616 of the 685 ms. On a CPU the passes over the logits
        run on 16 rows at a time, which its cache holds; on 256 rows at once they cost as much as a matrix product.
    """
    ask = Asked(tuple(outputs), float(temperature), top_k, float(beta))
    chunk_size = chunk_on(hidden.device) if chunk_size is None else chunk_size
    check(hidden, labels, ask, chunk_size, other)
    grad = torch.is_grad_enabled()
    slopes = ask.differentiable if grad else ()
    trained = grad and any(p.requires_grad for p in parameters)

    if hidden.shape[0] == 0:
        return _no_rows(hidden, head, ask)
    if slopes and (recompute or (recompute is None and (trained or (hidden.requires_grad and len(slopes) > 2)))):
        return _recomputed(hidden, labels, head, ask, chunk_size, other)
    return _kept(hidden, labels, head, ask, chunk_size, other, slopes, recompute)


def check(hidden: Tensor, labels: Tensor, ask: Asked, chunk_size: int, other: object) -> None:
    """Refuses what `score_tokens` says that it refuses."""
    unknown = [name for name in ask.outputs if name not in DIFFERENTIABLE + PLAIN]
    if unknown or not ask.outputs:
        known = ", ".join(DIFFERENTIABLE + PLAIN)
        raise Refusal(f"score_tokens: no output is called {unknown}; ask for one or more of {known}.")
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise Refusal(
            f"score_tokens: hidden states must be (N, D) and labels (N,), but they are {tuple(hidden.shape)} and "
            f"{tuple(labels.shape)}; select the scored positions first."
        )
    if chunk_size < 1 or ask.temperature <= 0:
        raise Refusal(f"score_tokens: chunk_size {chunk_size} and temperature {ask.temperature} must be above zero.")
    if other is None and any(name in NEEDS_OTHER for name in ask.outputs):
        raise Refusal("score_tokens: a divergence needs a second distribution; pass its logits as `other`.")


def chunk_on(device: torch.device) -> int:
    """How many tokens' logits exist at one time: few keep a CPU's memory small, many keep a GPU busy."""
    return 256 if device.type == "cpu" else 1024


def row_blocks(n: int, device: torch.device) -> list[slice]:
    """Rows to go through at once: few enough for a CPU's cache (16 x 49,152 x 4 bytes = 3 MB), all on a GPU."""
    step = 16 if device.type == "cpu" else n
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def second_of(q: Tensor | TopK | None, block: slice, temperature: float) -> Distribution | TopK | None:
    """The second distribution of a block of rows."""
    if isinstance(q, TopK):
        return q.block(block)
    return token_scores.distribution(q[block], temperature) if q is not None else None


def check_logits(logits: Tensor, rows: int, q: Tensor | TopK | None) -> None:
    """Refuses logits that are not one for each row and token of one vocabulary."""
    if logits.dim() != 2 or logits.shape[0] != rows:
        raise Refusal(f"score_tokens: the head must turn ({rows}, D) into ({rows}, V), it gave {tuple(logits.shape)}.")
    if isinstance(q, Tensor) and q.shape != logits.shape:
        raise Refusal(
            f"score_tokens: the second model's logits are {tuple(q.shape)} where the first one's are "
            f"{tuple(logits.shape)}; a divergence needs one vocabulary."
        )


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Refuses labels that are no tokens."""
    # On a GPU the gather itself reports a bad index; asking here would wait for the device.
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise Refusal(
            f"score_tokens: labels run from {int(labels.min())} to {int(labels.max())} but the head has {vocabulary} "
            "tokens; leave positions that are not scored out instead of marking them."
        )


def _kept(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    ask: Asked,
    chunk_size: int,
    other: Other | None,
    slopes: tuple[str, ...],
    recompute: bool | None,
) -> dict[str, Tensor]:
    """Values now; slopes d value / d hidden kept for backward."""
    n = hidden.shape[0]
    watch = hidden.requires_grad and bool(slopes)
    parts: dict[str, list[Tensor]] = {}
    kept = {name: torch.empty_like(hidden, requires_grad=False) for name in slopes} if watch else {}
    for start in range(0, n, chunk_size):
        rows = slice(start, min(start + chunk_size, n))
        chunk = hidden[rows].detach().requires_grad_(watch)
        with torch.set_grad_enabled(bool(slopes)):
            logits = head(chunk)
        if start == 0:
            if recompute is None and logits.requires_grad and other_leaves(logits, chunk):
                return _recomputed(hidden, labels, head, ask, chunk_size, other)
            check_labels(labels, logits.shape[-1])
        with torch.no_grad():
            q_logits = other(rows) if other is not None else None
            check_logits(logits, chunk.shape[0], q_logits)
            pulled = {name: torch.empty_like(logits) for name in kept}
            for block in row_blocks(chunk.shape[0], logits.device):
                p = token_scores.distribution(logits.detach()[block], ask.temperature)
                q = second_of(q_logits, block, ask.temperature)
                block_labels = labels[rows][block]
                for name in ask.differentiable:
                    value, slope = ask.value(name, p, q, block_labels, name in kept)
                    parts.setdefault(name, []).append(value)
                    if slope is not None:
                        pulled[name][block] = slope
                for name, value in ask.plain(p, block_labels).items():
                    parts.setdefault(name, []).append(value)
        for i, name in enumerate(kept):
            (kept[name][rows],) = torch.autograd.grad(logits, chunk, pulled[name], retain_graph=i + 1 < len(kept))
    scores = {name: torch.cat(values) for name, values in parts.items()}
    for name, slope in kept.items():
        scores[name] = WithSlope.apply(hidden, scores[name], slope)
    return scores


def other_leaves(logits: Tensor, chunk: Tensor) -> list[Tensor]:
    """What the head's graph ends in beside the chunk: what is trained in the head."""
    found: list[Tensor] = []
    seen, stack = set(), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only the node that accumulates into a leaf has one
        if variable is not None and variable is not chunk:
            found.append(variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


class WithSlope(torch.autograd.Function):
    """Gives a value (N,) the gradient ``slope`` (N, D) with respect to ``hidden`` (N, D)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """The value, as it is."""
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Each row's slope times its gradient."""
        (slope,) = ctx.saved_tensors
        return (slope * grad.unsqueeze(-1)).to(slope.dtype), None, None


class _FromLogits(torch.autograd.Function):
    """Scores of one chunk of logits. Lives inside a checkpointed region: what it saves is dropped and made again."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, q_logits: Tensor | TopK | None, labels: Tensor, ask: Asked, names: list[str]
    ) -> tuple[Tensor, ...]:
        parts: dict[str, list[Tensor]] = {}
        for block in row_blocks(logits.shape[0], logits.device):
            p = token_scores.distribution(logits[block], ask.temperature)
            q = second_of(q_logits, block, ask.temperature)
            for name in ask.differentiable:
                parts.setdefault(name, []).append(ask.value(name, p, q, labels[block], False)[0])
            for name, value in ask.plain(p, labels[block]).items():
                parts.setdefault(name, []).append(value)
        names.extend(name for name in parts if name not in names)
        scores = {name: torch.cat(values) for name, values in parts.items()}
        ctx.kept = q_logits if isinstance(q_logits, TopK) else None
        ctx.save_for_backward(logits, None if isinstance(q_logits, TopK) else q_logits, labels)
        ctx.ask = ask
        ctx.names = list(parts)
        ctx.mark_non_differentiable(*(value for name, value in scores.items() if name not in ask.differentiable))
        return tuple(scores.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, q_logits, labels = ctx.saved_tensors
        q_logits = ctx.kept if ctx.kept is not None else q_logits
        ask: Asked = ctx.ask
        pulled = torch.empty_like(logits)
        for block in row_blocks(logits.shape[0], logits.device):
            p = token_scores.distribution(logits[block], ask.temperature)
            q = second_of(q_logits, block, ask.temperature)
            slopes: list[Tensor] = []
            for name, grad in zip(ctx.names, grads, strict=True):
                if name not in ask.differentiable:
                    continue
                _, slope = ask.value(name, p, q, labels[block], True)
                assert slope is not None
                slopes.append(slope.mul_(grad[block].unsqueeze(-1)))
            pulled[block] = sum(slopes[1:], slopes[0])
        return pulled, None, None, None, None


def _recomputed(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    ask: Asked,
    chunk_size: int,
    other: Other | None,
) -> dict[str, Tensor]:
    """Values now; backward runs the head on each chunk again, in the chunk's own dtype and autocast state."""
    names: list[str] = []

    def scores(chunk: Tensor, rows: slice) -> tuple[Tensor, ...]:
        with torch.no_grad():
            q_logits = other(rows) if other is not None else None
        logits = head(chunk)
        check_logits(logits, chunk.shape[0], q_logits)
        if rows.start == 0:
            check_labels(labels, logits.shape[-1])
        return _FromLogits.apply(logits, q_logits, labels[rows], ask, names)

    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, hidden.shape[0], chunk_size):
        rows = slice(start, min(start + chunk_size, hidden.shape[0]))
        parts.append(checkpoint(scores, hidden[rows], rows, use_reentrant=False))
    return {name: torch.cat(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def _no_rows(hidden: Tensor, head: Callable[[Tensor], Tensor], ask: Asked) -> dict[str, Tensor]:
    """Empty scores that are still connected to the hidden states and to the head (DDP waits for every gradient)."""
    logits = head(hidden.new_zeros(1, hidden.shape[1]))
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    empty = hidden.sum(-1).to(dtype) + 0.0 * logits.sum().to(dtype)
    scores = {name: empty.clone() for name in ask.differentiable}
    if "correct" in ask.outputs:
        scores["correct"] = torch.zeros(0, dtype=torch.bool, device=hidden.device)
    if "argmax" in ask.outputs:
        scores["argmax"] = torch.zeros(0, dtype=torch.long, device=hidden.device)
    if "entropy_value" in ask.outputs:
        scores["entropy_value"] = torch.zeros(0, dtype=dtype, device=hidden.device)
    if "topk" in ask.outputs:
        scores["topk_logprob"] = torch.zeros(0, ask.top_k, dtype=dtype, device=hidden.device)
        scores["topk_index"] = torch.zeros(0, ask.top_k, dtype=torch.long, device=hidden.device)
        scores["rest_logprob"] = torch.zeros(0, dtype=dtype, device=hidden.device)
    return scores
