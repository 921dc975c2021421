"""The admission check of models that classify or that write one row from another; see ``models/admission.py``.

Four short rows go through the model's own forward, one at a time and with labels, and through ours, padded and packed.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import (
    TOLERANCE,
    Admission,
    admit,
    count_layers,
    evaluating,
    try_packed,
    vocabulary_of,
    why_no_packing,
)
from lightning_ft.models.classifier import Classifier
from lightning_ft.models.seq2seq import Seq2SeqLM

#: Lengths of the rows, and of what is written from each. All but one are padded by much, so that a wrong mask shows.
ROWS = (6, 7, 5, 11)
TARGETS = (4, 3, 8, 4)


@torch.no_grad()
def admit_task(model: nn.Module, task: str, *, packing: bool, tokenizer: Any = None) -> Admission:
    """Prove that our logits, log-probabilities and losses are the model's own, padded and packed.

    Args:
        model: a transformers model with the head of the task, on its device, before or after injection.
        task: causal_lm, seq2seq_lm, sequence_classification, token_classification or regression.
        packing: whether packed rows are wanted; where they fail the result says so and why, and padded rows remain.
        tokenizer: if given, its tokens are the ones tried.

    Returns:
        What was proven.

    Raises:
        Refusal: ours differ from the model's own, or a part that we rely on does not exist.
    """
    if task == "causal_lm":
        return admit(model, tokenizer, packing=packing)
    if task == "seq2seq_lm":
        pair = Seq2SeqLM(model)
        count_layers(pair.decoder, type(model).__name__)
        with evaluating(model):
            return _prove_pair(pair, tokenizer, packing)
    view = Classifier(model, task)
    layers = count_layers(view.backbone, type(model).__name__)
    with evaluating(model):
        return _prove_classifier(view, layers, tokenizer, packing)


def _prove_classifier(view: Classifier, layers: int, tokenizer: Any, packing: bool) -> Admission:
    name = type(view.model).__name__
    ids = _draw(view.model, tokenizer, sum(ROWS), seed=0)
    own, losses = [], []
    by_token = view.task == "token_classification"
    for number, row in enumerate(ids.split(ROWS)):
        target = _target(view, number, len(row))
        found = view.model(input_ids=row[None], labels=target)
        own.append(found.logits.reshape(len(row) if by_token else 1, -1))
        if (loss := getattr(found, "loss", None)) is not None:
            losses.append((loss, _loss(view, own[-1], target)))
    truth = torch.cat(own)
    limit = _limit(truth, spread=float(truth.double().std(0).mean()))

    batch, mask = _pad(ids, ROWS)
    at = torch.arange(batch.shape[1], device=ids.device).expand_as(batch)
    if by_token:
        padded = view.token_logits(batch, at, mask.reshape(-1).nonzero()[:, 0], mask=mask)
    else:
        padded = view.row_logits(batch, at, mask=mask)
    difference = _apart(padded, truth)
    # Only a number that is small may pass: NaN is not.
    if not difference <= limit:
        raise Refusal(
            f"The logits of {name} computed from its hidden states and its head, on padded rows, differ from its own by "
            f"{difference:.3g}: it does something around its head that is not known here, so that training it would "
            "optimise the wrong number."
        )
    _check_losses(name, losses)
    reason = why_no_packing(view) if packing else ""
    if packing and not reason:
        bounds = (0, *accumulate(ROWS))
        positions = torch.cat([torch.arange(length, device=ids.device) for length in ROWS])[None]

        def packed() -> float:
            if by_token:
                everything = torch.arange(len(ids), device=ids.device)
                return _apart(view.token_logits(ids[None], positions, everything, bounds=bounds), truth)
            return _apart(view.row_logits(ids[None], positions, bounds=bounds), truth)

        mixes = "some of its layers mix neighbouring segments"
        if view.encoder and not by_token:
            mixes += ", or its head looks at more than the first token of a row"
        reason, apart = try_packed(packed, name, limit, mixes)
        difference = max(difference, apart)
    return Admission(name, packing and not reason, reason, layers, False, difference)


def _prove_pair(view: Seq2SeqLM, tokenizer: Any, packing: bool) -> Admission:
    name = type(view.model).__name__
    source, target = (
        _draw(view.model, tokenizer, sum(lengths), seed=seed) for seed, lengths in enumerate((ROWS, TARGETS))
    )
    own, losses = [], []
    for row, answer in zip(source.split(ROWS), target.split(TARGETS), strict=True):
        start = view.shift_right(answer[None])
        shift = getattr(view.model, "prepare_decoder_input_ids_from_labels", None)
        theirs = shift(answer[None]) if shift is not None else start
        if not torch.equal(start, theirs):
            raise Refusal(
                f"{name} begins what it writes with token {int(theirs[0, 0])} and not with {view.start_id}, the "
                "decoder_start_token_id of its configuration, so that rows made here would not be those it was trained on."
            )
        one = view.model(input_ids=row[None], decoder_input_ids=start, labels=answer[None], use_cache=False)
        own.append(one.logits[0])
        losses.append((one.loss, F.cross_entropy(own[-1].double(), answer)))
    truth = torch.cat(own)
    limit = _limit(truth, spread=float(truth.double().std(-1).mean()))
    source_batch, source_mask = _pad(source, ROWS)
    answers, mask = _pad(target, TARGETS)
    hidden = view.hidden(source_batch, source_mask, view.shift_right(answers), mask)[mask]
    found = view.score(hidden, target)["logprob"].double()
    difference = _apart(found, truth.double().log_softmax(-1).gather(-1, target[:, None])[:, 0], truth.dtype)
    if not difference <= limit:
        raise Refusal(
            f"The log-probabilities of {name} computed from its decoder and its head differ from its own by "
            f"{difference:.3g} nats: it does something after the head, or between its decoder and the head, that is not "
            "known here, so that training it would optimise the wrong number."
        )
    _check_losses(name, losses)
    embedding = view.model.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is not None and any(p is embedding.weight for p in view.head_parameters())
    reason = f"each row of {name} is two, a source and a target, which are padded" if packing else ""
    return Admission(name, False, reason, count_layers(view.decoder, name), tied, difference)


def _draw(model: Any, tokenizer: Any, count: int, *, seed: int) -> Tensor:
    """Random ids without those that a model's own forward takes for padding or the end: (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = vocabulary_of(model, tokenizer)
    config = model.config
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "decoder_start")}
    usual = [i for i in range(vocabulary) if i not in special]
    drawn = torch.randint(0, len(usual), (count,), generator=generator, device="cpu")
    return torch.tensor(usual, device="cpu")[drawn].to(next(model.parameters()).device)


def _pad(ids: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows laid end to end (N,) as a batch padded on the right with token 0, and its mask, both (B, T)."""
    device = ids.device
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    return torch.zeros(mask.shape, dtype=ids.dtype, device=device).masked_scatter(mask, ids), mask


def _target(view: Classifier, number: int, length: int) -> Tensor:
    """What a row is said to be, in the form that transformers' heads take."""
    device, dtype, config = view.model.device, next(view.model.parameters()).dtype, view.model.config
    if view.task == "token_classification":
        return (torch.arange(length, device=device) % config.num_labels)[None]
    if view.task == "regression":
        return torch.tensor([0.5 * number - 1], dtype=dtype, device=device)
    if config.problem_type == "multi_label_classification":
        return ((torch.arange(config.num_labels, device=device) + number) % 2)[None].to(dtype)
    return torch.tensor([number % config.num_labels], device=device)


def _loss(view: Classifier, logits: Tensor, target: Tensor) -> Tensor:
    """The loss that the task means, in float64: squared error, binary or categorical cross-entropy, mean over all."""
    logits = logits.double()
    if view.task == "regression":
        return F.mse_loss(logits[:, 0], target.double())
    if target.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, target.double())
    return F.cross_entropy(logits, target.reshape(-1))


def _check_losses(name: str, losses: list[tuple[Tensor, Tensor]]) -> None:
    for found, meant in losses:
        tolerance = 1e-3 if found.dtype in (torch.float32, torch.float64) else 0.03
        if not abs(float(found) - float(meant)) <= tolerance * max(1.0, abs(float(meant))):
            raise Refusal(
                f"The loss of {name}'s own head on one row is {float(found):.4g} where the task's is {float(meant):.4g}: it "
                "means something else than this task trains."
            )


def _limit(truth: Tensor, *, spread: float) -> float:
    """How far numbers may be apart: a share of how much the model's own vary, and the rounding of the largest."""
    rounding = torch.finfo(truth.dtype).eps * float(truth.double().abs().max())
    return TOLERANCE.get(truth.dtype, 0.1) * spread + 4 * rounding


def _apart(found: Tensor, truth: Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest difference of a row or token; in 16 bit the median one, since rounding may choose another expert."""
    differences = (found.double() - truth.double()).abs().reshape(len(truth), -1).amax(-1)
    if (dtype or truth.dtype) in (torch.bfloat16, torch.float16):
        return float(differences.median()) if bool(differences.isfinite().all()) else float("nan")
    return float(differences.max())
