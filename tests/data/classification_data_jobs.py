"""What the two ranks run in test_classification_data.py."""

from pathlib import Path

import torch


def fit_on_two(folder, rows):
    """Fits on two ranks; the rows that this rank saw, and the weights."""
    from tests.data.test_classification_data import Bag, data_of, fit

    torch.set_num_threads(1)
    data = data_of(Path(folder), str(Path(folder) / "rows.jsonl"), batch_size=2)
    module = fit(folder, Bag(), data, accumulate_grad_batches=2, devices=2, strategy="ddp")
    return module.seen, module.table.weight.detach().clone()
