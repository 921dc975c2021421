"""A memory that another fit has filled: in another mode, with other settings, by the same Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft import LoRA, Refusal, Replay, TaskStream
from tests.contract.subjects import PlainNet, chat_job, fit, loader, trainer
from tests.data.streams import Layer, Points, stream
from tests.data.streams import trainer as run_of


class Told(Layer):
    """Says its logits."""

    def logits(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0])


@pytest.mark.parametrize("mode", ["der", "der++"])
def test_a_memory_filled_in_er_goes_on_in_der_with_what_the_model_says_then(tmp_path, mode):
    first = Told()
    run = run_of(tmp_path, Replay(9))
    run.fit(first, stream())
    run.save_checkpoint(tmp_path / "er.ckpt")
    technique, module, said = Replay(9, mode=mode), Told(), []

    class Look(Callback):
        def on_train_batch_start(self, run, module, batch, batch_idx):
            said.extend(
                [(row["plain"][0], row["logits"][0]) for row in technique._memory.buffer.groups[""]][: 9 - len(said)]
            )

    data = TaskStream({"d": Points(3, 8)}, continue_from=str(tmp_path / "er.ckpt"))
    run = run_of(tmp_path, technique, Look())
    run.fit(module, data)
    assert (
        len(said) == 9 and float(run.callback_metrics["train/replay" if mode == "der" else "train/replay/logits"]) > 0
    )
    for x, logits in said:
        torch.testing.assert_close(logits, first.net(x).detach())


def test_a_memory_of_other_numbers_of_tokens_is_refused(chat, tmp_path):
    module, data = chat_job(chat, tmp_path, data={"batch_size": 4})
    technique = Replay(8, mode="der", top_k=3)
    trainer(tmp_path, technique, LoRA(2), max_steps=1).fit(module, data)
    other = Replay(8, mode="der", top_k=2)
    other.load_state_dict(technique.state_dict())
    module, data = chat_job(chat, tmp_path, data={"batch_size": 4})
    with pytest.raises(Refusal, match=r"Replay.top_k is 2, and of the rows in its memory.* the 3 most .*set top_k 3"):
        trainer(tmp_path, other, LoRA(2), max_steps=1).fit(module, data)


def test_a_second_fit_of_one_trainer_offers_its_rows_too(tmp_path):
    """Its epochs count on; a run that resumes within it offers no row twice."""
    net, technique, rest = PlainNet(), Replay(50), Replay(50)
    run = fit(tmp_path, net, technique, max_steps=-1, max_epochs=2)
    assert technique._memory.buffer.num_seen == 16
    run.fit_loop.max_epochs = 4
    run.fit(net, loader(), loader())
    assert technique._memory.buffer.num_seen == 32
    run.save_checkpoint(tmp_path / "four.ckpt")
    again = trainer(tmp_path, rest, max_steps=-1, max_epochs=5)
    again.fit(PlainNet(), loader(), loader(), ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert rest._memory.buffer.num_seen == 32


def test_the_first_step_of_a_second_fit_draws_anew(tmp_path):
    technique = Replay(6)
    fit(tmp_path, PlainNet(), technique, max_steps=1)
    run = fit(tmp_path, PlainNet(), technique, max_steps=1)
    assert float(run.callback_metrics["train/replay"]) > 0
