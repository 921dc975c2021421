"""Invariant 1: the loss and its gradients do not depend on how a window's rows are laid out.

The oracle computes one window with transformers alone: rows one at a time, plain cross-entropy, one division.
"""

import json

import pytest
import torch

from lightning_ft.callbacks.lora import LoRA
from lightning_ft.data.spans import render
from lightning_ft.models.load import load_tokenizer
from tests.invariants import ground
from tests.tolerances import TOL

FP32 = 1e-6
# 20 rows: windows of 8, 8 and 4. With batches of 4 or 2 the last window also has fewer micro-batches than the others.
LAYOUTS = {
    "one batch of 8": ({"batch_size": 8}, {}),
    "4 x 2": ({"batch_size": 4}, {"accumulate_grad_batches": 2}),
    "2 x 4": ({"batch_size": 2}, {"accumulate_grad_batches": 4}),
    "1 x 8": ({"batch_size": 1}, {"accumulate_grad_batches": 8}),
    "padded": ({"batch_size": 8, "packing": False}, {}),
    "padded, 4 x 2": ({"batch_size": 4, "packing": False}, {"accumulate_grad_batches": 2}),
}
RANKS = {
    "2 ranks x 4": ({"batch_size": 4}, {}),
    "2 ranks x 2 x 2": ({"batch_size": 2}, {"accumulate_grad_batches": 2}),
    "2 ranks x 1 x 4, padded": ({"batch_size": 1, "packing": False}, {"accumulate_grad_batches": 4}),
}


def run(base, rows, folder, layout, **trainer_options):
    data_options, more = layout
    return ground.measure(
        str(base), str(rows), str(folder), data_options=data_options, trainer_options={**more, **trainer_options}
    )


def apart(found, truth):
    """The largest difference between two sets of gradients."""
    assert found.keys() == truth.keys()
    return max(float((found[n] - g).abs().max()) for n, g in truth.items())


def largest(grads):
    return max(float(g.abs().max()) for g in grads.values())


def agree(found, truth, *, same_rows=True):
    """Loss (relative) and gradients (absolute; the largest is about 0.3) of every window."""
    assert found["totals"] == truth["totals"] and (found["rows"] == truth["rows"] or not same_rows)
    assert len(found["losses"]) == len(found["grads"]) == len(truth["losses"])
    for mine, right in zip(found["losses"], truth["losses"], strict=True):
        assert mine == pytest.approx(right, rel=FP32)
    for mine, right in zip(found["grads"], truth["grads"], strict=True):
        assert apart(mine, right) <= FP32


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory):
    return run(base, rows, tmp_path_factory.mktemp("whole"), LAYOUTS["one batch of 8"])


def test_windows_are_uneven_and_their_gradients_are_not_zero(whole):
    assert [len(r) for r in whole["rows"]] == [8, 8, 4] and len(set(whole["totals"])) == 3
    assert all(float(g.abs().max()) > 1e-3 for window in whole["grads"] for g in window.values())


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_one_device(base, rows, tmp_path, whole, layout):
    agree(run(base, rows, tmp_path, LAYOUTS[layout]), whole)


@pytest.mark.parametrize("layout", RANKS)
def test_two_ranks(base, rows, tmp_path, whole, two_ranks, layout):
    data_options, trainer_options = RANKS[layout]
    found = two_ranks.run(
        "tests.invariants.ground:measure",
        base=str(base),
        rows=str(rows),
        folder=str(tmp_path),
        data_options=data_options,
        trainer_options={**trainer_options, "devices": 2, "strategy": "ddp"},
    )
    seen = [sorted(a + b) for a, b in zip(found[0]["rows"], found[1]["rows"], strict=True)]
    for rank in found:
        agree({**rank, "rows": seen}, whole)


def test_a_validation_within_a_window_takes_nothing_from_it(base, rows, tmp_path, whole):
    """Nor does the change to eval mode and back."""
    layout = ({"batch_size": 2, "val_path": str(rows)}, {"accumulate_grad_batches": 4})
    found = run(base, rows, tmp_path, layout, val_check_interval=1, limit_val_batches=1, num_sanity_val_steps=0)
    agree(found, whole)


def test_against_transformers_alone(base, rows, whole):
    module = ground.built(base, LoRA(r=4))
    tokenizer = load_tokenizer(str(base))
    lines = rows.read_text().splitlines()
    losses = []
    for number in whole["rows"][0]:
        row = render(tokenizer, json.loads(lines[number]))
        logits = module.model(torch.tensor([row.ids])).logits[0]
        for start, end in row.spans:
            labels = torch.tensor(row.ids[start:end])
            losses.append(torch.nn.functional.cross_entropy(logits[start - 1 : end - 1], labels, reduction="none"))
    tokens = torch.cat(losses)
    assert len(tokens) == whole["totals"][0]
    tokens.mean().backward()
    truth = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert whole["losses"][0] == pytest.approx(float(tokens.mean().detach()), rel=FP32)
    assert apart(whole["grads"][0], truth) <= FP32


def test_bins_of_max_tokens(base, rows, tmp_path):
    """Bins meet in windows of their own; the truth is the first of those windows as one padded batch of its rows."""
    found = run(base, rows, tmp_path, ({"max_tokens": 200}, {"accumulate_grad_batches": 3}))
    assert sorted(sum(found["rows"], [])) == list(range(ground.ROWS)) and len(found["losses"]) > 1
    lines = rows.read_text().splitlines()
    picked = tmp_path / "first.jsonl"
    picked.write_text("".join(lines[n] + "\n" for n in found["rows"][0]))
    alone = ({"batch_size": len(found["rows"][0]), "packing": False}, {})
    truth = run(base, picked, tmp_path, alone)
    assert len(found["rows"][0]) > 3
    agree({key: value[:1] for key, value in found.items() if key != "final"}, truth, same_rows=False)


@pytest.mark.parametrize("layout", ["4 x 2", "padded"])
def test_bf16_mixed_to_rounding(base, rows, tmp_path, layout):
    """The first window's gradients; later ones start from factors that rounding has already moved."""
    truth = run(base, rows, tmp_path / "whole", LAYOUTS["one batch of 8"], precision="bf16-mixed")
    found = run(base, rows, tmp_path / "other", LAYOUTS[layout], precision="bf16-mixed")
    assert found["losses"] == pytest.approx(truth["losses"], rel=1e-3)
    assert apart(found["grads"][0], truth["grads"][0]) <= TOL[torch.bfloat16] * largest(truth["grads"][0])
