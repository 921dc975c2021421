"""MAML over an encoder: what adapts, its second order, its checkpoints, two ranks, a packed base, and a second run."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_ft
from lightning_ft import MAML, BottleneckAdapter, Freeze, LoRA, PrefixTuning, PromptTuning, Refusal
from lightning_ft.models.quantize import dequantize_
from tests.contract.subjects import differing, trainer
from tests.modules.episodes import fit, mlp, module, sines, text_on_ranks, words, write_words
from tests.modules.tasks import write_base

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("episodes")
    return write_base("bert", folder / "bert"), write_words(folder), folder


PARTS = {
    "lora": (lambda: [LoRA(r=2)], "adapter", "lora_"),
    "lora and head": (lambda: [LoRA(r=2)], "adapter_and_head", "lora_"),
    "prefix": (lambda: [PrefixTuning(tokens=2)], "adapter_and_head", "prefix_"),
    "prompt": (lambda: [PromptTuning(tokens=2)], "adapter_and_head", "prompt"),
    "bottleneck": (lambda: [BottleneckAdapter(reduction_factor=8.0)], "adapter", "output.LayerNorm."),
    "biases": (lambda: [Freeze(["biases"])], ["biases"], "bias"),
    "head": (lambda: [], "head", "classifier"),
}


@pytest.mark.parametrize("part", PARTS)
def test_over_an_encoder(texts, tmp_path, part):
    """What the callbacks train is trained, what ``inner`` names adapts, to order 2; the rest stays, bit for bit."""
    base, path, folder = texts
    callbacks, inner, mark = PARTS[part]
    made = MAML(str(base), inner=inner, inner_lr=0.5, steps=2, lr=0.1, optimizer=torch.optim.SGD, eval_steps=[0, 4])
    start = {}

    class Keep(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    steps, runner = fit(tmp_path, made, words(path, folder), *callbacks(), Keep(), max_steps=2, limit_val_batches=None)
    named = {name for name in made.inner_names if mark in name}
    assert named and all("classifier" in name or "pooler" in name for name in {*made.inner_names} - named)
    head = {name for name in made.inner_names if "classifier" in name}
    assert bool(head) == (inner in ("head", "adapter_and_head") or part == "biases")
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert set(made.inner_names) <= trained and trained == set(steps.gradients[0])
    assert all(name in trained or torch.equal(p, start[name]) for name, p in made.named_parameters())
    assert {f"val/step_{n}/accuracy" for n in (0, 2, 4)} <= set(runner.callback_metrics)
    # Adapting changes what adapts, and leaves the module as it is.
    episode = next(iter(words(path, folder, tokenizer=str(base)).train_dataloader())).episodes()[0]
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    fast = made.adapt(episode.support, steps=2)
    assert fast.keys() == set(made.inner_names)
    # Each of them moves: but for a key's bias, since a softmax over keys does not change with it.
    moved = {n for n in fast if not torch.equal(fast[n], before[n])}
    assert {n for n in fast if n not in moved} <= {n for n in fast if n.endswith("key.bias")} and named & moved
    assert not differing(before, {n: p.detach() for n, p in made.named_parameters()})


def test_the_second_order_over_lora_is_a_finite_difference(texts, tmp_path):
    """In float64, through attention, norms and factors, with the fused kernel as the default."""
    base, path, folder = texts
    made = MAML(str(base), inner="adapter_and_head", inner_lr=0.5, steps=2, lr=0.1, optimizer=torch.optim.SGD)
    data = words(path, folder)
    steps, _ = fit(tmp_path, made, data, LoRA(r=2), max_steps=1)
    made.double()
    (episode,) = words(path, folder, episodes=1, batch_size=1, tokenizer=str(base)).train_dataloader()
    (episode,) = episode.episodes()
    name = next(n for n in made.inner_names if "lora_A" in n)
    parameter = dict(made.named_parameters())[name]

    def value():
        fast = list(made.adapted(episode.support, steps=2, order=2))[-1]
        return made.measure(made.outputs(fast, episode.query.inputs).double(), episode.query.targets)[0]

    made.forward = lambda inputs: made.view.row_logits(inputs.ids, inputs.positions, mask=inputs.mask).double()
    (gradient,) = torch.autograd.grad(value(), parameter)
    place = int(gradient.abs().argmax())
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[place] += sign * 1e-5
        ends.append(float(value().detach()))
        with torch.no_grad():
            parameter.view(-1)[place] -= sign * 1e-5
    slope = float(gradient.view(-1)[place])
    assert abs(slope) > 1e-6 and slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_a_checkpoint_is_loaded_with_its_rates_and_classes(texts, tmp_path):
    base, path, folder = texts
    save = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)
    made = MAML(str(base), inner="adapter_and_head", rates="per_step", inner_lr=0.5, steps=2, lr=0.1)
    fit(tmp_path, made, words(path, folder), LoRA(r=2), save, max_steps=1, enable_checkpointing=True)
    loaded = lightning_ft.load(tmp_path / "saved/last.ckpt")
    assert (loaded.way, loaded.rates, loaded.steps) == (3, "per_step", 2)
    assert not differing(dict(made.state_dict()), dict(loaded.state_dict()))
    net = module()
    save = ModelCheckpoint(tmp_path / "net", save_last=True, every_n_train_steps=1)
    fit(tmp_path, net, sines(), save, max_steps=1, enable_checkpointing=True)
    with pytest.raises(Refusal, match="module=MAML"):
        lightning_ft.load(tmp_path / "net/last.ckpt")
    loaded = lightning_ft.load(tmp_path / "net/last.ckpt", module=module(net=mlp(7)))
    assert not differing(dict(net.state_dict()), dict(loaded.state_dict()))
    # Loading knows no data, so that classes were expected; these have numbers.
    alone, again = (
        trainer(tmp_path, limit_val_batches=None).validate(one, sines(), verbose=False)[0] for one in (net, loaded)
    )
    assert again == pytest.approx(alone) and "val/step_0/loss" in again and "val/accuracy" not in again


def test_over_a_packed_base(texts, tmp_path):
    """To order 2 the meta-gradient is that of the weights which the packed ones stand for, and not that of order 1."""
    pytest.importorskip("bitsandbytes")
    base, path, folder = texts
    made = MAML(str(base), inner="adapter_and_head", inner_lr=0.5, steps=2, lr=0.1, quantize="nf4")
    steps, _ = fit(tmp_path, made, words(path, folder), LoRA(r=2), max_steps=1)
    (batch,) = words(path, folder, episodes=1, batch_size=1, tokenizer=str(base)).train_dataloader()
    (episode,) = batch.episodes()
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}

    def gradients(order):
        *_, fast = made.adapted(episode.support, steps=2, order=order)
        loss = made.measure(made.outputs(fast, episode.query.inputs), episode.query.targets)[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trained.values()))])

    first, packed = gradients(1), gradients(2)
    assert dequantize_(made.model)
    plain = gradients(2)
    assert steps.gradients[0].keys() == trained.keys() and any(".lora_A" in name for name in trained)
    assert (packed - plain).norm() < 0.01 * plain.norm() < 0.1 * (packed - first).norm()


def test_two_ranks_over_lora(texts, tmp_path, two_ranks):
    base, path, folder = texts
    one, left = text_on_ranks(str(base), str(path), str(folder), 1)
    assert any(".lora_" in name for name in left)
    for measured, found in two_ranks.run(
        "tests.modules.episodes:text_on_ranks", base=str(base), path=str(path), folder=str(folder), devices=2
    ):
        assert measured == pytest.approx(one, rel=1e-3, abs=1e-5)
        for name, value in left.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


# ---- a second run of the same module


@pytest.mark.parametrize("rates", ["fixed", "per_parameter"])
def test_what_adapts_is_found_anew_in_each_run(texts, tmp_path, rates):
    """A run without callbacks, then one that injects factors, then one that freezes: none keeps the names of the last."""
    base, path, folder = texts
    made = MAML(str(base), inner_lr=0.5, lr=0.1, rates=rates, eval_steps=[0])
    trainer(tmp_path, limit_val_batches=1).validate(made, words(path, folder), verbose=False)
    assert not any(".lora_" in name for name in made.inner_names)
    steps, _ = fit(tmp_path, made, words(path, folder), LoRA(r=2), max_steps=1)
    trained = {name for name, p in made.named_parameters() if p.requires_grad and not name.startswith("inner_rates")}
    assert set(made.inner_names) == trained and any(".lora_" in name for name in trained)
    wanted = {name.replace(".", "/") for name in trained} if rates != "fixed" else set()
    assert set(made.inner_rates) == wanted
    assert {f"inner_rates.{key}" for key in wanted} <= set(steps.gradients[0])


def test_what_a_second_run_freezes_adapts_no_more(texts, tmp_path):
    base, path, folder = texts
    made = MAML(str(base), inner_lr=0.5, lr=0.1, rates="per_step", eval_steps=[0])
    fit(tmp_path, made, words(path, folder), max_steps=1)
    everything, kept = set(made.inner_names), {key: id(rate) for key, rate in made.inner_rates.items()}
    fit(tmp_path, made, words(path, folder), Freeze(["norms"]), max_steps=1)
    assert made.inner_names and all("LayerNorm" in name for name in made.inner_names)
    assert set(made.inner_names) < everything
    assert set(made.inner_rates) == {name.replace(".", "/") for name in made.inner_names}
    assert all(id(rate) == kept[key] for key, rate in made.inner_rates.items())  # those that stay go on
