"""What is seen of a pass, beside transformers' own records."""

from __future__ import annotations

import pytest
import torch

from lightning_ft.models.observed import Observer
from lightning_ft.models.seq2seq import Seq2SeqLM
from tests.models.architectures import build_for, task_config

UNEVEN = {
    "bart": {"encoder_layers": 1, "decoder_layers": 3},
    "mbart": {"encoder_layers": 3, "decoder_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 3},
}


@pytest.mark.parametrize("kind", UNEVEN)
def test_the_decoder_s_blocks_are_counted(kind: str) -> None:
    """Where the encoder has another number of them; the last state is what the head reads."""
    config = task_config(kind, "seq2seq_lm")
    for name, value in UNEVEN[kind].items():
        setattr(config, name, value)
    view = Seq2SeqLM(build_for(kind, "seq2seq_lm", None, config=config).eval())
    observer = Observer(view, states=True)
    observer.attach()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad(), observer.seeing() as seen:
        hidden = view.hidden(ids, None, ids, None)
    assert observer.layers == list(UNEVEN[kind].values())[1] == len(seen.states) - 1
    assert torch.equal(seen.states[observer.layers], hidden)
