"""What the two ranks run in test_stream.py."""

import warnings

import torch


def fit(path, folder, trainer, **options):
    """Fits on two ranks; the rows that this rank saw, and the weights."""
    from tests.data.test_sft_data import Recorder, trainer_of
    from tests.data.test_stream import data_of

    torch.set_num_threads(1)
    module = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_of(folder, devices=2, strategy="ddp", **trainer).fit(module, data_of(path, **options))
    return module.seen, module.table.weight.detach().clone()
