"""What is admitted for the tasks beside causal_lm, what is refused, and that the check can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ft.functional.errors import Refusal
from lightning_ft.models import admission_tasks
from lightning_ft.models.admission_tasks import admit_task
from lightning_ft.models.classifier import Classifier
from lightning_ft.models.seq2seq import Seq2SeqLM
from tests.models.architectures import build, build_for, task_config

DTYPES = [torch.float32, torch.bfloat16]
PACKED = ["bert", "roberta", "modernbert", "llama", "gemma2", "gpt2", "mixtral"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "regression"])
def test_admitted_packed(kind: str, task: str, dtype: torch.dtype) -> None:
    """Packed rows are proven in both dtypes; the mode of each module is what it was."""
    model = build_for(kind, task).to(dtype).train()
    admission = admit_task(model, task, packing=True)
    assert admission.packing and admission.packing_reason == "" and admission.layers == 2
    assert admission.difference < (1e-4 if dtype == torch.float32 else 0.1)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "task", "reason"),
    [
        ("distilbert", "sequence_classification", "more than the first token"),
        ("albert", "regression", "more than the first token"),
        ("modernbert_mean", "sequence_classification", "more than the first token"),
        ("deberta_v2", "token_classification", "knows no segments"),
        ("gpt_neo", "sequence_classification", "knows no segments"),
        ("t5", "seq2seq_lm", "a source and a target"),
        ("bart", "seq2seq_lm", "a source and a target"),
    ],
)
def test_padded_only(kind: str, task: str, reason: str) -> None:
    """These run padded; packing is off and the reason is given."""
    own = kind in ("deberta_v2", "gpt_neo", "t5", "bart")
    model = build_for(kind, task, None if own else "lightning_ft")
    admission = admit_task(model, task, packing=True)
    assert not admission.packing and reason in admission.packing_reason
    assert admission.layers == (1 if kind == "albert" else 2)  # one block, used twice
    assert admit_task(model, task, packing=False).packing_reason == ""


def test_several_labels_and_causal_models() -> None:
    """Binary cross-entropy is proven too; the next token is left to the check that was there."""
    config = task_config("bert", "sequence_classification")
    config.problem_type = "multi_label_classification"
    assert admit_task(
        build_for("bert", "sequence_classification", config=config), "sequence_classification", packing=True
    )
    assert admit_task(build("llama_tied"), "causal_lm", packing=True).tied


@pytest.mark.parametrize(
    ("kind", "task", "sentence"),
    [
        ("bert_decoder", "sequence_classification", "around its head"),
        ("mbart", "seq2seq_lm", "begins what it writes with token"),
    ],
)
def test_refused(kind: str, task: str, sentence: str) -> None:
    """A decoder whose head takes the first token; one whose language is written in front."""
    with pytest.raises(Refusal, match=sentence):
        admit_task(build_for(kind, task, None), task, packing=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch, kind: str, task: str, dtype: torch.dtype) -> None:
    """A segment that sees its neighbours, in both dtypes."""
    original = Classifier.hidden

    def merged(self: Classifier, *args: Any, bounds: tuple[int, ...] | None = None, **kwargs: Any) -> Tensor:
        return original(self, *args, bounds=bounds and (0, bounds[-1]), **kwargs)

    model = build_for(kind, task).to(dtype)
    monkeypatch.setattr(Classifier, "hidden", merged)
    assert "mix neighbouring" in admit_task(model, task, packing=True).packing_reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["token before the last", "scaled", "padding seen"])
def test_wrong_rows_are_found(monkeypatch: pytest.MonkeyPatch, fault: str, dtype: torch.dtype) -> None:
    """Another token than the last one, a head with a factor, an encoder without its mask."""
    model = build_for("bert" if fault == "padding seen" else "llama", "sequence_classification").to(dtype)
    if fault == "scaled":
        through = Classifier._through_head
        monkeypatch.setattr(Classifier, "_through_head", lambda self, x: 1.5 * through(self, x))
    elif fault == "padding seen":
        own = Classifier._own
        monkeypatch.setattr(Classifier, "_own", lambda self, ids, at, mask, types: own(self, ids, at, None, types))
    else:
        hidden = Classifier.hidden
        monkeypatch.setattr(Classifier, "hidden", lambda self, *args, **rest: hidden(self, *args, **rest).roll(1, 1))
    with pytest.raises(Refusal, match="around its head"):
        admit_task(model, "sequence_classification", packing=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["unscaled", "unbiased", "source unmasked"])
def test_wrong_pairs_are_found(monkeypatch: pytest.MonkeyPatch, fault: str, dtype: torch.dtype) -> None:
    """T5 without its scale, BART without its bias, padding of the source that is seen."""
    model = build_for("bart" if fault == "unbiased" else "t5", "seq2seq_lm", None).to(dtype)
    if fault == "source unmasked":
        hidden = Seq2SeqLM.hidden
        monkeypatch.setattr(Seq2SeqLM, "hidden", lambda self, s, m, i, n: hidden(self, s, None, i, n))
    else:
        if fault == "unbiased":
            model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(Seq2SeqLM, "logits", lambda self, h: self.head(h))
    with pytest.raises(Refusal, match="after the head"):
        admit_task(model, "seq2seq_lm", packing=False)


def test_another_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that means something else by its labels."""
    monkeypatch.setattr(admission_tasks, "_loss", lambda view, logits, target: logits.double().square().mean())
    with pytest.raises(Refusal, match="loss of BertForSequenceClassification's own head"):
        admit_task(build_for("bert", "regression"), "regression", packing=False)
