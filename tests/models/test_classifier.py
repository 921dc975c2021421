"""Oracle: transformers' own forward, logits and loss, on each row alone; ours on padded and on packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as hf
from torch import Tensor

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.classifier import Classifier
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from tests.models.architectures import ENCODERS, V, build, build_for, task_config
from tests.models.task_rows import BOUNDS, LENGTHS, POSITIONS, TOKENS, packed_ids, padded

PACKED_ROWS = ["bert", "roberta", "electra", "modernbert", "llama", "qwen3", "gemma2", "mistral", "gpt2", "mixtral"]
PADDED_ROWS = [*PACKED_ROWS, "xlm_roberta", "distilbert", "albert", "deberta_v2", "modernbert_mean", "gpt_neo"]
OWN_ATTENTION = ("deberta_v2", "gpt_neo")  # their layers do not go through the attention interface


def built(kind: str, task: str, **changes: Any) -> Any:
    config = task_config(kind, task)
    for name, value in changes.items():
        setattr(config, name, value)
    return build_for(kind, task, None if kind in OWN_ATTENTION else "lightning_ft", config=config)


def gradients_agree(model: Any, found: Tensor, truth: Tensor) -> None:
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
    parameters = dict(model.named_parameters())
    ours, theirs = (
        torch.autograd.grad((x * weight).sum(), list(parameters.values()), allow_unused=True) for x in (found, truth)
    )
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max().clamp(min=1)), rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", PADDED_ROWS)
@pytest.mark.parametrize("task", ["sequence_classification", "regression"])
def test_rows(kind: str, task: str) -> None:
    """Logits, loss and gradients of every weight."""
    model = built(kind, task)
    view = Classifier(model, task)
    ids = packed_ids()
    labels = torch.tensor([0.5, -1.0, 2.0, 0.0]) if task == "regression" else torch.tensor([0, 2, 1, 1])
    own = [model(input_ids=row[None], labels=y[None]) for row, y in zip(ids[0].split(LENGTHS), labels, strict=True)]
    truth, loss = torch.cat([x.logits for x in own]), torch.stack([x.loss for x in own]).mean()
    batch, mask = padded(ids[0])
    found = view.row_logits(batch, torch.arange(max(LENGTHS)).expand_as(batch), mask=mask)
    assert found.shape == (4, 1 if task == "regression" else 3)
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)
    ours = F.mse_loss(found[:, 0], labels) if task == "regression" else F.cross_entropy(found, labels)
    torch.testing.assert_close(ours, loss, atol=1e-4, rtol=1e-4)
    gradients_agree(model, found, truth)
    if kind in PACKED_ROWS:
        packed = view.row_logits(ids, POSITIONS, bounds=BOUNDS)
        torch.testing.assert_close(packed, truth, atol=1e-4, rtol=1e-4)
        gradients_agree(model, packed, torch.cat([model(input_ids=r[None]).logits for r in ids[0].split(LENGTHS)]))


@pytest.mark.parametrize("kind", PADDED_ROWS)
def test_tokens(kind: str) -> None:
    """Chosen tokens only, in the order asked for; the loss of transformers ignores the others by -100."""
    model = built(kind, "token_classification")
    view = Classifier(model, "token_classification")
    ids, scored = packed_ids(), torch.tensor([1, 4, 5, 12, 20, 21])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    everywhere = torch.full((TOKENS,), -100).index_copy(0, scored, labels)
    truth = torch.cat([model(input_ids=row[None]).logits[0] for row in ids[0].split(LENGTHS)])[scored]
    batch, mask = padded(ids[0])
    spread, _ = padded(everywhere, fill=-100)
    at = mask.reshape(-1).nonzero()[:, 0][scored]
    found = view.token_logits(batch, torch.arange(max(LENGTHS)).expand_as(batch), at, mask=mask)
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)
    loss = model(input_ids=batch, attention_mask=mask.long(), labels=spread).loss
    torch.testing.assert_close(F.cross_entropy(found, labels), loss, atol=1e-4, rtol=1e-4)
    gradients_agree(model, found, truth)
    if kind not in OWN_ATTENTION:
        packed = view.token_logits(ids, POSITIONS, scored, bounds=BOUNDS)
        torch.testing.assert_close(packed, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pad", [None, 7])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_last_token_is_found_by_length(kind: str, pad: int | None) -> None:
    """Rows that end in, or hold, the token that the configuration calls padding; transformers' own batch gets them wrong."""
    model = built(kind, "sequence_classification", pad_token_id=None, eos_token_id=7)
    ids = packed_ids()
    ids[0, [2, BOUNDS[1] - 1, BOUNDS[2] - 1, BOUNDS[2] - 2]] = 7
    truth = torch.cat([model(input_ids=row[None]).logits for row in ids[0].split(LENGTHS)])
    model.config.pad_token_id = pad
    view = Classifier(model, "sequence_classification")
    batch, mask = padded(ids[0], fill=7)
    torch.testing.assert_close(view.row_logits(batch, None, mask=mask), truth, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(view.row_logits(ids, POSITIONS, bounds=BOUNDS), truth, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(view.row_logits(ids[:, : LENGTHS[0]]), truth[:1], atol=1e-4, rtol=1e-4)
    if pad is not None:
        wrong = model(input_ids=batch, attention_mask=mask.long()).logits
        assert (wrong[0] - truth[0]).abs().max() > 0.1


def test_positions_of_encoders_do_not_look_at_ids() -> None:
    """RoBERTa counts positions from ids that differ from its padding; here a row may hold that id, or be long when packed."""
    model = built("roberta", "token_classification")
    ids = packed_ids()
    ids[0, [1, 9]] = model.config.pad_token_id
    rows = [(row[None], torch.arange(len(row))[None] + 2) for row in ids[0].split(LENGTHS)]
    truth = torch.cat([model(input_ids=row, position_ids=at).logits[0] for row, at in rows])
    view = Classifier(model, "token_classification")
    assert view.first_position == 2
    batch, mask = padded(ids[0], fill=1)
    at = torch.arange(max(LENGTHS)).expand_as(batch)
    found = view.token_logits(batch, at, mask.reshape(-1).nonzero()[:, 0], mask=mask)
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)

    short = built("bert", "sequence_classification", max_position_embeddings=8)
    packed = Classifier(short, "sequence_classification").row_logits(packed_ids(), POSITIONS, bounds=BOUNDS)
    own = torch.cat([short(input_ids=row[None]).logits for row in packed_ids()[0].split(LENGTHS)])
    torch.testing.assert_close(packed, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "electra", "distilbert", "llama"])
def test_the_second_text_of_a_pair(kind: str) -> None:
    """Types reach encoders that know them, padded and packed, and are left out of models that do not."""
    ids = packed_ids()
    types = torch.cat([torch.arange(n) >= n // 2 for n in LENGTHS]).long()
    batch, mask = padded(ids[0])
    knows = kind in ("bert", "electra")
    for task in ("sequence_classification", "token_classification"):
        model = built(kind, task)
        pairs = zip(ids[0].split(LENGTHS), types.split(LENGTHS), strict=True)
        truth = torch.cat(
            [
                model(input_ids=row[None], **({"token_type_ids": kind_of_text[None]} if knows else {})).logits.reshape(
                    -1, 3
                )
                for row, kind_of_text in pairs
            ]
        )
        view = Classifier(model, task)
        if task == "token_classification":
            every = torch.arange(TOKENS)
            at = mask.reshape(-1).nonzero()[:, 0]
            found = [view.token_logits(batch, None, at, mask=mask, types=padded(types)[0])]
            found += [view.token_logits(ids, POSITIONS, every, bounds=BOUNDS, types=types[None])]
        else:
            found = [view.row_logits(batch, None, mask=mask, types=padded(types)[0])]
            if kind != "distilbert":
                found += [view.row_logits(ids, POSITIONS, bounds=BOUNDS, types=types[None])]
        for each in found:
            torch.testing.assert_close(each, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_no_scored_token(kind: str) -> None:
    """A batch without any still gives the head a gradient, which is zero."""
    model = built(kind, "token_classification")
    view = Classifier(model, "token_classification")
    logits = view.token_logits(packed_ids(), POSITIONS, torch.zeros(0, dtype=torch.long), bounds=BOUNDS)
    assert logits.shape == (0, 3)
    logits.sum().backward()
    head = dict(model.named_parameters())
    assert all(head[name].grad is not None and not head[name].grad.any() for name in view.head_parameter_names())


def test_dropout_of_the_head_runs_while_training() -> None:
    """Two passes in training mode differ by the head's own dropout alone."""
    config = hf.BertConfig(**{**ENCODERS["bert"]().to_dict(), "classifier_dropout": 0.5, "num_labels": 3})
    model = build_for("bert", "token_classification", config=config).train()
    view = Classifier(model, "token_classification")
    first, second = (view.token_logits(packed_ids(), POSITIONS, torch.arange(4), bounds=BOUNDS) for _ in range(2))
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "new", "names"),
    [
        ("llama", (), {"score.weight"}),
        ("distilbert", (), {f"{a}.{b}" for a in ("pre_classifier", "classifier") for b in ("weight", "bias")}),
        ("bert", (), {"classifier.weight", "classifier.bias"}),
        ("bert", ("bert.pooler.dense.weight",), {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"}),
    ],
)
def test_names_of_the_head(kind: str, new: tuple[str, ...], names: set[str]) -> None:
    """What is outside the backbone, and a new pooler."""
    assert Classifier(built(kind, "sequence_classification"), "regression", new).head_parameter_names() == names


def test_all_linear_leaves_the_head_alone() -> None:
    """LoRA wraps the body; names of the head stay what they were, also where a pooler was wrapped."""
    model = built("bert", "sequence_classification")
    layers = inject_lora(model, LoRAConfig(r=2))
    assert "bert.pooler.dense" in layers and not any(name.startswith("classifier") for name in layers)
    view = Classifier(model, "sequence_classification", ("bert.pooler.dense.weight",))
    names = {"classifier.weight", "classifier.bias", "bert.pooler.dense.base.weight"}
    assert view.head_parameter_names() == names and view.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_refusals() -> None:
    """No head of that task; packed rows without attention that knows them."""
    with pytest.raises(Refusal, match="no head for the task"):
        Classifier(build("llama"), "causal_lm")
    with pytest.raises(Refusal, match="backbone apart"):
        Classifier(build("llama").model, "regression")
    model = build_for("llama", "regression", "sdpa")
    with pytest.raises(Refusal, match="turn packing off"):
        Classifier(model, "regression").row_logits(torch.randint(V, (1, 5)), bounds=(0, 5))
