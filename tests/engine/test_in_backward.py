"""InBackward: the same weights as stepping after backward, without the memory of the gradients."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import nn

from lightning_ft import InBackward, LoRA, Refusal
from lightning_ft.engine.optimizer import build_optimizer
from tests.contract.subjects import PlainNet, chat_job, differing, loader, state, trainer
from tests.modules.multitask_jobs import fit, job

FACTORIES = {
    "adamw": None,
    "foreach": partial(torch.optim.AdamW, foreach=True),
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adafactor": torch.optim.Adafactor,
}


def net():
    """Two layers, the first of which is used twice."""
    torch.manual_seed(0)
    twice = nn.Linear(4, 4)
    return nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(4, 2))


def groups(model):
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 0.02, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.05, "weight_decay": 0.0},
    ]


def train(model, optimizer, steps, first=0):
    """Steps with a rate that falls, as a scheduler would set it."""
    data = torch.randn(16, 3, 4, generator=torch.Generator().manual_seed(1))
    most = 0
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

        def closure(step=step):
            nonlocal most
            optimizer.zero_grad()
            loss = model(data[step]).square().mean()

            def count(*_):
                nonlocal most
                most = max(most, sum(p.grad is not None for p in model.parameters()))

            handles = [p.register_post_accumulate_grad_hook(count) for p in model.parameters() if p.requires_grad]
            loss.backward()
            [handle.remove() for handle in handles]
            return loss

        assert float(optimizer.step(closure).detach()) > 0
    return most


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_weights_and_state_are_those_of_the_optimizer_itself(factory):
    one, other = net(), net()
    plain = build_optimizer(groups(one), factory)
    within = InBackward(groups(other), optimizer=factory)
    held = train(one, plain, 6), train(other, within, 6)
    assert not differing(state(one), state(other))
    assert held == (4, 0), "gradients that are there at once, and after each of its own updates"
    assert all(p.grad is None for p in other.parameters())
    first, second = plain.state_dict(), within.state_dict()
    assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys()
    for index, entry in first["state"].items():
        for name, value in entry.items():
            same = torch.equal(value, second["state"][index][name]) if torch.is_tensor(value) else True
            assert same, (index, name)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_it_goes_on_from_its_own_state_and_from_the_plain_one_s(factory):
    whole = net()
    train(whole, build_optimizer(groups(whole), factory), 6)
    for start in ("plain", "within"):
        model = net()
        before = (
            build_optimizer(groups(model), factory)
            if start == "plain"
            else InBackward(groups(model), optimizer=factory)
        )
        train(model, before, 3)
        again = InBackward(groups(model), optimizer=factory)
        again.load_state_dict(copy.deepcopy(before.state_dict()))
        del before
        gc.collect()
        train(model, again, 3, first=3)
        assert not differing(state(whole), state(model)), start


def test_gradients_that_were_there_are_stepped_with_too():
    one, other = net(), net()
    plain, within = build_optimizer(groups(one)), InBackward(groups(other))
    for model, optimizer in ((one, plain), (other, within)):
        model(torch.ones(1, 4)).sum().backward()
        assert all(p.grad is not None for p in model.parameters()), "nothing is stepped outside of step"
        optimizer.step()
    assert not differing(state(one), state(other))


def test_what_is_thawed_later_is_stepped_in_backward_too():
    one, other = net(), net()
    for model in (one, other):
        model[3].requires_grad_(False)
    plain, within = build_optimizer(groups(one)), InBackward(groups(other))
    before = state(other)
    train(one, plain, 2), train(other, within, 2)
    assert differing(before, state(other)) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    for model in (one, other):
        model[3].requires_grad_(True)
    assert (train(one, plain, 2, first=2), train(other, within, 2, first=2)) == (4, 0)
    assert not differing(state(one), state(other))


def test_two_backward_passes_in_a_step_are_refused():
    model = net()
    optimizer = InBackward(model.parameters(), lr=0.1)
    assert optimizer.param_groups[0]["lr"] == 0.1

    def twice():
        model(torch.ones(1, 4)).sum().backward()
        model(torch.ones(1, 4)).sum().backward()

    with pytest.raises(Refusal, match="gradients from two backward passes within one step"):
        optimizer.step(twice)


def test_it_leaves_nothing_on_the_parameters_when_it_is_gone():
    model = net()
    optimizer = InBackward(model.parameters())
    gone = weakref.ref(optimizer)
    assert all(p._post_accumulate_grad_hooks for p in model.parameters())
    del optimizer
    gc.collect()
    assert gone() is None and not any(p._post_accumulate_grad_hooks for p in model.parameters())


# In a fit


def saving(folder):
    return ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")


@pytest.mark.parametrize("techniques", [(), (LoRA,)], ids=["full", "lora"])
def test_a_fit_is_bit_equal_and_resumes(techniques, chat, tmp_path):
    outcomes = []
    for optimizer in (None, InBackward):
        module, data = chat_job(chat, tmp_path, model={"optimizer": optimizer, "lr": 1e-2, "schedule": "cosine"})
        run = trainer(tmp_path, *(t(2) for t in techniques), max_steps=4, max_epochs=9)
        run.fit(module, data)
        outcomes.append((state(module), float(run.callback_metrics["train/loss"])))
    assert not differing(outcomes[0][0], outcomes[1][0]) and outcomes[0][1] == outcomes[1][1]
    for resume in (None, tmp_path / "step=2.ckpt"):
        module, data = chat_job(chat, tmp_path, model={"optimizer": InBackward, "lr": 1e-2, "schedule": "cosine"})
        options = {"enable_checkpointing": True, "max_steps": 4, "max_epochs": 9}
        run = trainer(tmp_path, *(t(2) for t in techniques), saving(tmp_path), **options)
        run.fit(module, data, ckpt_path=resume)
    assert not differing(outcomes[0][0], state(module))


def test_a_parameter_without_a_gradient_is_still_named(tmp_path):
    class Spare(PlainNet):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

        def configure_optimizers(self):
            return InBackward(self.parameters(), lr=0.1)

    with pytest.raises(Refusal, match=r"2 trainable parameters got no gradient .*: spare\.weight, spare\.bias;"):
        trainer(tmp_path, Watching()).fit(Spare(), loader(), loader())


class Watching(LoRA):
    """Any technique that edits nothing, so that there is an attachment."""

    def register(self, attachment):
        pass


class Edited(Watching):
    """One that edits gradients."""

    def register(self, attachment):
        attachment.gradient_edit(self)

    def edit_(self, parameters):
        raise AssertionError("an edit of gradients that are gone")


@pytest.mark.parametrize(
    ("techniques", "options", "words"),
    [
        ((), {"accumulate_grad_batches": 2}, "accumulation, because each micro-batch"),
        ((GradientAccumulationScheduler({0: 1, 4: 2}),), {}, "accumulation, because each micro-batch"),
        ((), {"gradient_clip_val": 1.0}, "gradient clipping, because the norm"),
        ((), {"strategy": "ddp"}, "several ranks, because each would step"),
        ((Edited(2),), {}, "techniques that edit gradients"),
    ],
)
def test_what_needs_gradients_after_backward_is_refused(techniques, options, words, chat, tmp_path, monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}.items():
        monkeypatch.setenv(name, value)
    module, data = chat_job(chat, tmp_path, model={"optimizer": InBackward})
    with pytest.raises(Refusal, match=f"InBackward cannot work with {words}"):
        trainer(tmp_path, *techniques, **options).fit(module, data)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_several_tasks_are_refused(tmp_path):
    module, data = job(tmp_path, model={"optimizer": InBackward})
    with pytest.raises(Refusal, match="InBackward cannot work with several tasks, because the head"):
        fit(tmp_path, module, data)
    module, data = job(tmp_path, model={"optimizer": InBackward}, only="numbers")
    assert fit(tmp_path, module, data, max_steps=1, limit_val_batches=0).global_step == 1


def test_a_loader_that_does_not_count_its_windows_is_refused(chat, tmp_path):
    module, data = chat_job(chat, tmp_path, model={"optimizer": InBackward})

    class Uncounted(torch.utils.data.IterableDataset):
        def __iter__(self):
            for batch in source:
                batch.window = None
                yield batch

    counted, data = chat_job(chat, tmp_path)
    run = trainer(tmp_path, max_steps=1)
    run.fit(counted, data)
    source = list(run.train_dataloader)
    with pytest.raises(
        Refusal, match="InBackward cannot work with a loader that does not count its accumulation windows"
    ):
        rows = torch.utils.data.DataLoader(Uncounted(), batch_size=None)
        trainer(tmp_path).fit(module, rows, rows)


def test_bitsandbytes_in_eight_bits_trains_and_resumes(chat, tmp_path):
    """Its step runs on CPUs too."""
    bnb = pytest.importorskip("bitsandbytes")
    factory = partial(bnb.optim.AdamW8bit, min_8bit_size=16)
    whole, data = chat_job(chat, tmp_path, model={"optimizer": factory, "lr": 1e-2})
    run = trainer(tmp_path, saving(tmp_path), enable_checkpointing=True, max_steps=4, max_epochs=9)
    run.fit(whole, data)
    kinds = {str(v.dtype) for entry in run.optimizers[0].state.values() for v in entry.values() if torch.is_tensor(v)}
    assert "torch.uint8" in kinds
    module, data = chat_job(chat, tmp_path, model={"optimizer": factory, "lr": 1e-2})
    run = trainer(tmp_path, saving(tmp_path), enable_checkpointing=True, max_steps=4, max_epochs=9)
    run.fit(module, data, ckpt_path=tmp_path / "step=2.ckpt")
    assert not differing(state(whole), state(module))
