"""WeightEMA: the contract, the closed form, Lightning's own, and what a checkpoint means."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import lightning_ft
from lightning_ft import Attachment, LoRA, Refusal
from lightning_ft.callbacks.ema import WeightEMA
from lightning_ft.engine import compatibility
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.functional.moving_average import decay_at
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, chat_job, fit, loader, state, trainer

CASE = Case(WeightEMA, small={"decay": 0.5}, idle={"decay": 0.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


class Record(pl.Callback):
    """The weights in training after each step, and those that a validation sees."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(state(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.append((trainer.global_step, state(pl_module)))


def closed_form(steps, decays):
    """``sum_k w_k prod_{j > k} d_j`` with weights ``1 - d_k``, in float64."""
    total = {}
    for k, weights in enumerate(steps):
        factor = 1.0 - decays[k]
        for later in decays[k + 1 :]:
            factor *= later
        for name, value in weights.items():
            total[name] = total.get(name, 0) + factor * value.double()
    return {name: value.float() for name, value in total.items()}


def close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_the_closed_form(warmup, tmp_path):
    net, record = PlainNet(), Record()
    fit(tmp_path, net, WeightEMA(0.6, warmup=warmup), record, max_steps=6, max_epochs=4)
    ramp = [min(0.6, (1 + n) / (10 + n)) for n in range(1, 6)] if warmup else [0.6] * 5
    close(state(net), closed_form(record.steps, [0.0, *ramp]))
    assert record.validated[0][0] == 4
    close(record.validated[0][1], closed_form(record.steps[:4], [0.0, *ramp[:3]]))
    plain = Record()
    fit(tmp_path, PlainNet(), plain, max_steps=6, max_epochs=4)
    assert all(torch.equal(one[n], other[n]) for one, other in zip(record.steps, plain.steps, strict=True) for n in one)


def test_every_and_start(tmp_path):
    net, record = PlainNet(), Record()
    fit(tmp_path, net, WeightEMA(0.6, warmup=False, every=2, start=1), record, max_steps=5, max_epochs=4)
    close(state(net), closed_form([record.steps[1], record.steps[3]], [0.0, 0.6]))
    late, record = PlainNet(), Record()
    fit(tmp_path, late, WeightEMA(start=7), record, max_steps=5, max_epochs=4)
    close(state(late), record.steps[-1])  # no average yet: the model is what was trained


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_it_is_lightning_s_average(tmp_path):
    ours, theirs = PlainNet(), PlainNet()
    fit(tmp_path, ours, WeightEMA(0.7, warmup=False, every=2), max_steps=6, max_epochs=4)
    fit(tmp_path, theirs, EMAWeightAveraging(decay=0.7, update_every_n_steps=2), max_steps=6, max_epochs=4)
    close(state(ours), state(theirs))


def test_the_ramp_is_that_of_the_formula():
    assert [decay_at(n, 0.9, warmup=True) for n in (0, 1, 8, 1000)] == [0.0, 2 / 11, 9 / 18, 0.9]
    assert [decay_at(n, 0.9, warmup=False) for n in (0, 1, 8)] == [0.0, 0.9, 0.9]


def test_a_checkpoint_is_the_average_and_resumes_with_the_weights_in_training(tmp_path):
    first, record = PlainNet(), Record()
    keep = ModelCheckpoint(tmp_path / "files", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    weights = ModelCheckpoint(
        tmp_path / "weights", every_n_train_steps=1, save_top_k=-1, filename="{step}", save_weights_only=True
    )
    fit(tmp_path, first, keep, weights, WeightEMA(0.5), LoRA(2), record, max_steps=3, enable_checkpointing=True)
    file = torch.load(tmp_path / "files" / "step=3.ckpt", weights_only=True)
    average = {n: v for n, v in state(first).items() if n in file["state_dict"]}
    assert average and all(".lora_" in name for name in average), "only what is trained is kept"
    for folder in ("files", "weights"):
        held = torch.load(tmp_path / folder / "step=3.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(value, held[name]) for name, value in average.items()), folder
    held = file["callbacks"]["WeightEMA[ema]"]
    assert held["updates"] == 3 and held["raw"].keys() == average.keys() and not held["average"]
    assert all(torch.equal(value, record.steps[-1][name]) for name, value in held["raw"].items())
    loaded = lightning_ft.load(tmp_path / "files" / "step=3.ckpt", module=PlainNet())
    assert all(torch.equal(value, state(loaded)[name]) for name, value in state(first).items())


def test_a_resumed_fit_goes_on_with_the_weights_in_training(tmp_path):
    """From a file that was saved after a fit, when the model was the average already."""
    options = {"max_steps": -1}
    whole = PlainNet()
    fit(tmp_path, whole, WeightEMA(0.5), LoRA(2), max_epochs=2, **options)
    fit(tmp_path, PlainNet(), WeightEMA(0.5), LoRA(2), max_epochs=1, **options).save_checkpoint(tmp_path / "one.ckpt")
    second = PlainNet()
    run = trainer(tmp_path, WeightEMA(0.5), LoRA(2), max_epochs=2, **options)
    run.fit(second, loader(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert run.global_step == 8 and all(torch.equal(value, state(second)[name]) for name, value in state(whole).items())
    with pytest.raises(Refusal, match=r"state of WeightEMA\[ema\], which this run does not have"):
        trainer(tmp_path, LoRA(2), max_epochs=2).fit(PlainNet(), loader(), loader(), ckpt_path=tmp_path / "one.ckpt")


def test_bfloat16_weights_are_averaged_in_float32(tmp_path):
    """A bf16 average would not move: its steps are 2^-8 of the value."""
    net, record = PlainNet("bfloat16"), Record()
    technique = WeightEMA(0.9, warmup=False)
    fit(tmp_path, net, technique, record, max_steps=6, max_epochs=4)
    expected = closed_form(record.steps, [0.0] + [0.9] * 5)
    held = technique.state_dict()["average"]
    close(held, expected)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in state(net).items())


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_however_a_fit_ends_the_model_is_the_average(stop, tmp_path):
    class Stopping(Record):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            if len(self.steps) == 3:
                raise stop

    net, record = PlainNet(), Stopping()
    with pytest.raises((stop, SystemExit)):
        fit(tmp_path, net, WeightEMA(0.5), record, max_steps=4)
    # The third step's update may come before or after the callback that failed.
    outcomes = [closed_form(record.steps[:n], [0.0, *(2 / 11, 3 / 12)][:n]) for n in (2, 3)]
    assert any(all(torch.allclose(v, one[n], atol=1e-6) for n, v in state(net).items()) for one in outcomes)
    assert "lightning_module_state_dict" not in vars(Attachment.of(net)) and not Attachment.of(net).installed


def test_what_looks_at_the_weights_sees_the_average(tmp_path):
    """Also at the end, whichever callback comes first."""

    class Looking(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_end(self, trainer, pl_module):
            with Attachment.of(pl_module).evaluated():
                self.seen.append(state(pl_module))

    for before in (True, False):
        net, looking = PlainNet(), Looking()
        order = [looking, WeightEMA(0.5)] if before else [WeightEMA(0.5), looking]
        fit(tmp_path, net, *order)
        assert all(torch.equal(value, looking.seen[0][name]) for name, value in state(net).items())


def test_two_averages_and_lightning_s_own_are_refused(tmp_path):
    with pytest.raises(Refusal, match="A run can hold only one WeightEMA; leave one of them out"):
        compatibility.check([WeightEMA(), LoRA(), WeightEMA(0.9)], compatibility.Situation(frozenset()))
    for order in ([LoRA(2), EMAWeightAveraging()], [EMAWeightAveraging(), LoRA(2)]):
        with pytest.raises(Refusal, match="Lightning's weight averaging, because it copies the whole model.*WeightEMA"):
            fit(tmp_path, PlainNet(), *order)


def distributed(chat, folder, kind, steps, resume=None):
    """A fit on two ranks with checkpoints at step 2 and at the end: what the model and a validation are."""
    from pathlib import Path

    strategy = FSDP2Strategy() if kind == "fsdp2" else "ddp"
    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 4})
    keep = ModelCheckpoint(Path(folder) / "files", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False, "val_check_interval": 1}
    run = trainer(Path(folder), WeightEMA(0.5), LoRA(2), keep, enable_checkpointing=True, max_steps=steps, **options)
    run.fit(module, data, ckpt_path=resume)
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in module.named_parameters()}
    trained = {n: value.detach().clone() for n, value in whole.items() if ".lora_" in n}
    return {"trained": trained, "loss": float(run.callback_metrics["val/loss"])}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_hold_one_average_and_resume(kind, chat, tmp_path, two_ranks):
    job = "tests.callbacks.test_ema:distributed"
    whole = two_ranks.run(job, chat=str(chat), folder=str(tmp_path / "a"), kind=kind, steps=3)
    assert whole[0]["trained"].keys() and whole[0]["loss"] == whole[1]["loss"]
    for name, value in whole[0]["trained"].items():
        assert torch.equal(value, whole[1]["trained"][name]), name
    file = str(tmp_path / "a" / "files" / "step=2.ckpt")
    again = two_ranks.run(job, chat=str(chat), folder=str(tmp_path / "b"), kind=kind, steps=3, resume=file)
    assert again[0]["loss"] == whole[0]["loss"]
    for name, value in whole[0]["trained"].items():
        assert torch.equal(value, again[0]["trained"][name]), name
    module, data = chat_job(chat, tmp_path, data={"batch_size": 8})
    run = trainer(tmp_path, WeightEMA(0.5), LoRA(2), max_steps=3, val_check_interval=1)
    run.fit(module, data)
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(whole[0]["loss"], rel=1e-5)
    one = dict(module.named_parameters())
    for name, value in whole[0]["trained"].items():
        torch.testing.assert_close(value, one[name].detach(), rtol=1e-4, atol=1e-5)
