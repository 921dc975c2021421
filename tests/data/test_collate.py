"""Batches against a brute-force account of every token; packed = padded."""

import numpy as np
import pytest
import torch

from lightning_ft.data.collate import FILLER, Segment, collate

SEGMENTS = [
    Segment(np.array([5, 0, 7, 8]), np.array([[2, 4]]), 11),
    Segment(np.array([9, 9, 9, 9, 9, 9]), np.array([[0, 2], [4, 6]]), 3),  # a span at position 0, and ids all alike
    Segment(np.array([6, 4]), np.array([[1, 2]]), 0),
]
WANT = [
    (11, 1, 7),
    (11, 2, 8),
    (3, 0, 9),
    (3, 3, 9),
    (3, 4, 9),
    (0, 0, 4),
]  # (row, position that predicts, label), by hand


def account(batch):
    """(row, position of the predictor inside its row, label) of every scored token."""
    rows = batch.rows[batch.segment_of_scored].tolist()
    return list(zip(rows, batch.positions.reshape(-1)[batch.scored].tolist(), batch.labels.tolist(), strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_scored_tokens_labels_and_owners(packed):
    batch = collate(SEGMENTS, packed=packed, window={"token": 9.0, "row": 4.0}, task="a")
    assert account(batch) == WANT
    assert (batch.ids.reshape(-1)[batch.scored + 1] == batch.labels).all()
    assert (
        batch.counts == {"token": 6.0, "row": 3.0} and batch.window == {"token": 9.0, "row": 4.0} and batch.task == "a"
    )
    assert batch.tokens == 12
    for tensor in (batch.ids, batch.positions, batch.scored, batch.labels, batch.segment_of_scored, batch.rows):
        assert tensor.dtype == torch.int64


def test_packed_layout():
    batch = collate(SEGMENTS, packed=True)
    assert batch.bounds == (0, 4, 10, 12) and batch.mask is None
    assert batch.ids.tolist() == [[5, 0, 7, 8, 9, 9, 9, 9, 9, 9, 6, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]]


def test_padded_layout():
    batch = collate(SEGMENTS, packed=False)
    assert batch.bounds is None and batch.mask is not None
    assert batch.ids.shape == (3, 6)
    assert batch.mask.sum(1).tolist() == [4, 6, 2]
    for number, segment in enumerate(SEGMENTS):
        assert batch.ids[number][batch.mask[number]].tolist() == segment.ids.tolist()
        assert batch.positions[number][batch.mask[number]].tolist() == list(range(len(segment.ids)))


@pytest.mark.parametrize("packed", [True, False])
def test_no_rows_give_a_filler_that_counts_zero(packed):
    batch = collate([], packed=packed)
    assert batch.counts == {"token": 0.0, "row": 0.0} and len(batch.scored) == len(batch.labels) == 0
    assert batch.rows.tolist() == [-1] and batch.ids.shape == (1, len(FILLER.ids))
    assert batch.bounds == ((0, 2) if packed else None)
