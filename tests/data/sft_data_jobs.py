"""What the two ranks run in test_sft_data.py."""

import warnings

import torch


def fit(path, cache, folder, **options):
    """Fits on two ranks; the rows that this rank saw, and the weights."""
    from tests.data.test_sft_data import Recorder, data_of, trainer_of

    torch.set_num_threads(1)
    module = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(folder, devices=2, strategy="ddp", max_epochs=2, **options.pop("trainer"))
        trainer.fit(module, data_of(path, cache, **options))
    return module.seen, module.validated, module.table.weight.detach().clone()
