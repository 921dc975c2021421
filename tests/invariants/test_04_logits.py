"""Invariant 4: no tensor with a vocabulary axis is larger than one chunk of scored tokens, forward or backward."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.random_model import write_model
from lightning_ft import DPO, PreferenceData
from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.lora import LoRA
from tests.invariants import ground

V, CHUNK = 1031, 256  # a prime, so that no other axis has this length


class Widest(TorchDispatchMode):
    """The most rows that any tensor with an axis of length V had, the head's own weight aside."""

    def __init__(self, weight):
        super().__init__()
        self.weights = {tuple(weight.shape), tuple(weight.shape[::-1])}
        self.rows, self.seen = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and V in value.shape and tuple(value.shape) not in self.weights:
                self.rows = max(self.rows, value.numel() // V)
                self.seen += 1
        return result


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wide") / "base", vocab_size=V)


def batch_of(wide, tmp_path, question, answer, rows, packing):
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "q" * question}, {"role": "assistant", "content": "a" * answer}]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(rows)))
    data = ground.data(file, tmp_path, tokenizer=str(wide), batch_size=rows, packing=packing)
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize(
    "question, answer, rows", [(300, 9, 4), (20, 300, 4)], ids=["few of many are scored", "more than a chunk is scored"]
)
def test_training_and_validation(wide, tmp_path, question, answer, rows, packing, head):
    batch = batch_of(wide, tmp_path, question, answer, rows, packing)
    scored = int(batch.counts["token"])
    assert scored == rows * (answer + 1) and batch.tokens > 1200
    techniques = [LoRA(r=2), Freeze(train=["embed_tokens"])] if head == "trained" else [LoRA(r=2)]
    module = ground.built(wide, *techniques)
    assert module.view.head.weight.requires_grad == (head == "trained")
    most = min(scored, CHUNK)
    with Widest(module.view.head.weight) as train:
        module.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    with Widest(module.view.head.weight) as validate, torch.no_grad():
        module.validation_step(batch, 0)
    for mode in (train, validate):
        assert mode.seen and mode.rows == most, (mode.rows, most)  # equal: the mode does see the logits


@pytest.mark.parametrize(("question", "answer"), [(300, 9), (20, 90)], ids=["few of many", "more than a chunk"])
def test_pairs_of_answers_and_their_reference(wide, tmp_path, question, answer):
    """A whole fit of DPO, its reference's passes and its validation with it: of prompts no logits are made at all."""
    pair = {"prompt": "q" * question, "chosen": "a" * answer, "rejected": "b" * answer}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for _ in range(4)))
    rows = str(tmp_path / "pairs.jsonl")
    data = PreferenceData(rows, val_path=str(tmp_path / "pairs.jsonl"), batch_size=4, cache_dir=str(tmp_path))
    module = DPO(str(wide), base_dtype="float32", lr=1e-2)
    made = ground.trainer(tmp_path, LoRA(r=2), limit_val_batches=None, num_sanity_val_steps=0)
    with Widest(torch.empty(V, 32)) as mode:
        made.fit(module, data)
    assert tuple(module.view.head.weight.shape) == (V, 32) and made.global_step == 1
    scored = 8 * (answer + 1)  # four pairs, each answer with its end
    assert mode.seen and mode.rows == min(scored, CHUNK) and (scored > CHUNK) == (answer == 90)


def test_the_mode_sees_the_logits_of_a_plain_forward(wide, tmp_path):
    batch = batch_of(wide, tmp_path, 300, 9, 4, False)
    module = ground.built(wide, LoRA(r=2))
    with Widest(module.view.head.weight) as mode, torch.no_grad():
        module.model(batch.ids)
    assert mode.rows == batch.ids.numel() > CHUNK
