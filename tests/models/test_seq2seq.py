"""Oracle: transformers' own forward with labels on each pair alone; ours on batches padded on the right."""

from __future__ import annotations

import pytest
import torch

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.seq2seq import Seq2SeqLM, start_id
from tests.models.architectures import SEQ2SEQ, V, build, build_for
from tests.models.task_rows import LENGTHS, packed_ids, padded

TARGETS = (4, 2, 6, 5)


@pytest.mark.parametrize("kind", [kind for kind in SEQ2SEQ if kind != "mbart"])
def test_scores_and_gradients(kind: str) -> None:
    """Log-probabilities, loss and gradients, with a bias on the logits where the architecture has one."""
    model = build_for(kind, "seq2seq_lm", None)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(3))
    view = Seq2SeqLM(model)
    source = packed_ids()[0]
    target = torch.randint(4, V, (sum(TARGETS),), generator=torch.Generator().manual_seed(2))
    pairs = zip(source.split(LENGTHS), target.split(TARGETS), strict=True)
    own = [model(input_ids=row[None], labels=answer[None]) for row, answer in pairs]
    logits = torch.cat([x.logits[0] for x in own])
    truth = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    rows, row_mask = padded(source)
    answers, mask = padded(target, TARGETS)
    hidden = view.hidden(rows, row_mask, view.shift_right(answers), mask)[mask]
    scale = float(logits.detach().std())
    torch.testing.assert_close(view.logits(hidden), logits, atol=1e-4 * scale, rtol=1e-4)
    found = view.score(hidden, target)["logprob"]
    torch.testing.assert_close(found, truth, atol=1e-4 * scale, rtol=1e-4)
    parts = torch.stack([-part.mean() for part in found.split(TARGETS)])
    torch.testing.assert_close(parts, torch.stack([x.loss for x in own]), atol=1e-4 * scale, rtol=1e-4)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}  # Marian's positions are sines
    ours, theirs = (torch.autograd.grad(x.sum(), list(parameters.values())) for x in (found, truth))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max().clamp(min=1)), rtol=2e-3, msg=name)


def test_the_shift_compares_nothing() -> None:
    """The start token comes first, the last one goes, and whatever the target holds stays."""
    view = Seq2SeqLM(build_for("bart", "seq2seq_lm", None))
    target = torch.tensor([[5, view.config.pad_token_id, 6], [2, 2, -100]])
    shifted = view.shift_right(target)
    assert view.start_id == 2 and shifted.tolist() == [[2, 5, view.config.pad_token_id], [2, 2, 2]]
    assert target.tolist()[0][0] == 5


def test_head_parameters() -> None:
    """A tied weight belongs to the head."""
    tied = build_for("t5", "seq2seq_lm", None)
    assert Seq2SeqLM(tied).head_parameters()[0] is tied.get_input_embeddings().weight
    untied = build_for("t5_v1_1", "seq2seq_lm", None)
    assert untied.config.scale_decoder_outputs is False


def test_refusals() -> None:
    """No second part, no head, nothing to begin with."""
    with pytest.raises(Refusal, match="no sequence-to-sequence model"):
        Seq2SeqLM(build("llama"))
    with pytest.raises(Refusal, match="no language-model head"):
        Seq2SeqLM(build_for("bart", "seq2seq_lm", None).model)
    config = SEQ2SEQ["t5"]()
    config.decoder_start_token_id = None
    with pytest.raises(Refusal, match="no decoder_start_token_id"):
        start_id(config)
