"""One short row that proves what we rely on, for whatever model was loaded.

Architectures differ in what they do after the head, in what their layers look at and in how they number positions, and
transformers ignores what it does not know. So nothing is taken from a list of known names: two short segments are run
through the model's own forward and through ours, and what does not agree is refused, or switched off with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.backbone import BackboneView
from lightning_ft.models.causal import CausalLM

#: Lengths of the two segments. The second is longer than the first, so that in most tokens a wrong mask shows.
LENGTHS = (5, 8)

#: How far log-probabilities may be apart, as a share of the spread of the model's own logits. A wrong mask, position or
#: scale moves them by a tenth of it and mostly far more; rounding of bfloat16 through 30 layers by two hundredths.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


@dataclass(frozen=True)
class Admission:
    """What was proven about a model.

    Attributes:
        architecture: the model's class.
        packing: whether packed rows give what separate rows give, in every layer.
        packing_reason: why not, in one sentence; empty when they do or when nobody asked.
        layers: how many repeated blocks were found.
        tied: whether the head's weight is the embedding's.
        difference: the largest difference of a log-probability that was found, in nats.
    """

    architecture: str
    packing: bool
    packing_reason: str
    layers: int
    tied: bool
    difference: float


@torch.no_grad()
def admit(model: nn.Module, tokenizer: Any = None, *, packing: bool) -> Admission:
    """Prove that our log-probabilities are the model's own, padded and packed.

    Args:
        model: a transformers causal model, on its device, before or after injection. Its training mode is restored.
        tokenizer: if given, its tokens are the ones tried (a vocabulary padded beyond them is left alone).
        packing: whether packed rows are wanted; where they fail the result says so and why, and padded rows remain.

    Returns:
        What was proven.

    Raises:
        Refusal: our log-probabilities differ from the model's own, or a part that we rely on does not exist.
    """
    view = CausalLM(model)
    name = type(model).__name__
    layers = count_layers(view.backbone, name)
    with evaluating(model):
        return _prove(view, name, layers, vocabulary_of(model, tokenizer), packing)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; then each module in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _prove(view: CausalLM, name: str, layers: int, vocabulary: int, packing: bool) -> Admission:
    device = next(view.model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, sum(LENGTHS)), generator=generator, device="cpu").to(device)
    labels = ids[0].roll(-1)
    own = torch.cat([_own_logits(view, part) for part in ids.split(LENGTHS, 1)])
    tolerance = TOLERANCE.get(own.dtype, 0.1)
    spread = float(own.double().std(-1).mean())
    truth = own.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]

    padded = _scores(view, _padded_hidden(view, ids), labels)
    difference = _apart(padded, truth, own.dtype)
    # Only a number that is small may pass: NaN is not.
    if not difference <= tolerance * spread:
        raise Refusal(
            f"The log-probabilities of {name} computed from its hidden states and its head differ from its own by "
            f"{difference:.3g} nats: it does something after the head, or between its backbone and the head, that "
            "is not known here, so that training it would optimise the wrong number."
        )
    reason = why_no_packing(view) if packing else ""
    if packing and not reason:
        reason, apart = try_packed(
            lambda: _packed_difference(view, ids, labels, truth, own.dtype),
            name,
            tolerance * spread,
            "some of its layers mix neighbouring segments",
        )
        difference = max(difference, apart)
    embedding = view.model.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is not None and any(p is embedding.weight for p in view.head_parameters())
    return Admission(name, packing and not reason, reason, layers, tied, difference)


def vocabulary_of(model: Any, tokenizer: Any) -> int:
    """How many tokens may be tried."""
    size = int(model.get_input_embeddings().weight.shape[0])
    return min(size, len(tokenizer)) if tokenizer is not None else size


def count_layers(backbone: nn.Module, name: str) -> int:
    """Length of the longest list of repeated blocks; lists within a block (experts, parts of a layer) do not count.

    Raises:
        Refusal: there is none.
    """
    lists = {path: m for path, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = [len(m) for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise Refusal(f"{name} has no list of repeated blocks, which choosing layers by number relies on.")
    return max(outer)


def _own_logits(view: CausalLM, ids: Tensor) -> Tensor:
    """The model's own logits of one row: (T, V)."""
    return view.model(input_ids=ids, use_cache=False).logits[0]


def _padded_hidden(view: CausalLM, ids: Tensor) -> Tensor:
    """Hidden states of both segments as a batch padded on the right, laid end to end again."""
    device = ids.device
    longest = max(LENGTHS)
    at = torch.arange(longest, device=device).expand(len(LENGTHS), -1)
    mask = at < torch.tensor(LENGTHS, device=device)[:, None]
    batch = torch.zeros_like(at, dtype=ids.dtype).masked_scatter(mask, ids[0])
    return view.hidden(batch, at, mask=mask)[mask]


def _scores(view: CausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    return view.score(hidden, labels)["logprob"].double()


def _apart(found: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The largest difference; in 16 bit the median one, since rounding may send a token to another expert."""
    differences = (found - truth).abs()
    if dtype in (torch.bfloat16, torch.float16):
        # Of the segment that a wrong mask would spoil: the first one sees nothing before it.
        differences = differences[LENGTHS[0] :]
        return float(differences.median()) if bool(differences.isfinite().all()) else float("nan")
    return float(differences.max())


def why_no_packing(view: BackboneView) -> str:
    """What a short row cannot show."""
    name = type(view.model).__name__
    if not view.supports_packing:
        used = getattr(view.config, "_attn_implementation", None)
        return f"{name} runs the attention '{used}', which knows no segments"
    if getattr(view.config, "attention_chunk_size", None):
        return f"{name} attends in chunks of {view.config.attention_chunk_size} tokens, which packed rows would ignore"
    return ""


def try_packed(packed: Callable[[], float], name: str, limit: float, mixes: str) -> tuple[str, float]:
    """Why packed rows are not equal to separate ones (empty if they are), and how far they are apart.

    Args:
        packed: runs a packed row and gives its largest difference from separate rows.
        name: of the model's class.
        limit: how far they may be apart.
        mixes: what to say of rows that run and differ.
    """
    try:
        difference = packed()
    except (Refusal, TypeError, ValueError, RuntimeError) as error:
        return f"{name} cannot run packed rows: {' '.join(str(error).split())[:300]}", 0.0
    if not difference <= limit:
        return f"packed rows of {name} differ from separate ones by {difference:.3g}, so {mixes}", 0.0
    return "", difference


def _packed_difference(view: CausalLM, ids: Tensor, labels: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """How far the log-probabilities of a packed row are from those of separate ones, in nats."""
    bounds = [0]
    for length in LENGTHS:
        bounds.append(bounds[-1] + length)
    positions = torch.cat([torch.arange(length, device=ids.device) for length in LENGTHS])[None]
    hidden = view.hidden(ids, positions, bounds=tuple(bounds))
    return _apart(_scores(view, hidden[0], labels), truth, dtype)
