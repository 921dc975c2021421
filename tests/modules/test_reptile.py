"""Reptile: the step of a loop over copies of the net with torch's own optimizers, however tasks are dealt."""

from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn

from benchmarks.meta_text import clip_of
from lightning_ft import MAML, GradualUnfreezing, LoRA, Reptile
from lightning_ft.functional import inner_loop
from lightning_ft.modules import reptile
from lightning_ft.modules.reptile import in_turn
from tests.modules.episodes import fit, mlp, module, on_ranks, sines, words, write_words
from tests.modules.tasks import write_base
from tests.modules.test_maml import tasks


def way_back(optimizer, batch=None, steps=5):
    """(mean loss of the rows that the next inner step would take, mean of theta - phi by name)."""
    theta = {name: p.detach().clone() for name, p in mlp().named_parameters()}
    total, sums = 0.0, {name: torch.zeros_like(p) for name, p in theta.items()}
    episodes = tasks(sines())
    for episode in episodes:
        net = mlp()
        if optimizer == "sgd":
            inner = torch.optim.SGD(net.parameters(), lr=0.02)
        else:
            inner = torch.optim.Adam(net.parameters(), lr=0.02, betas=(0.0, 0.999))
        for step in range(steps + 1):
            rows = range(4) if batch is None else range(step % (4 // batch), 4, 4 // batch)
            x, y = (t[list(rows)] for t in (episode.support.inputs, episode.support.targets))
            loss = nn.functional.mse_loss(net(x), y)
            if step < steps:
                inner.zero_grad()
                loss.backward()
                inner.step()
        total += float(loss.detach())
        with torch.no_grad():
            for name, p in net.named_parameters():
                sums[name] += (theta[name] - p) / len(episodes)
    return total / len(episodes), sums


@pytest.mark.parametrize("options", [{}, {"inner_optimizer": "adam"}, {"inner_batch": 2}], ids=str)
def test_the_step_of_a_loop_over_copies(tmp_path, options):
    value, expected = way_back(options.get("inner_optimizer", "sgd"), options.get("inner_batch"))
    for data, trainer in (({}, {}), ({"batch_size": 3}, {"accumulate_grad_batches": 3})):
        made = module("Reptile", steps=5, inner_lr=0.02, optimizer=None, lr=0.3, **options)
        steps, _ = fit(tmp_path, made, sines(**data), max_steps=1, **trainer)
        assert steps.losses == pytest.approx([value], rel=1e-5)
        for name, p in made.model.named_parameters():
            assert float(expected[name].abs().max()) > 1e-5
            torch.testing.assert_close(steps.gradients[0][f"model.{name}"], expected[name], rtol=1e-3, atol=1e-6)
            start = dict(mlp().named_parameters())[name].detach()
            torch.testing.assert_close(p.detach(), start - 0.3 * expected[name], rtol=1e-4, atol=1e-6)


def test_rows_in_turn_mix_classes():
    from lightning_ft.engine.episodes import Rows

    rows = Rows(torch.arange(12.0)[:, None], torch.arange(3).repeat_interleave(4))
    for step in range(4):
        assert sorted(in_turn(rows, step, 3).targets.tolist()) == [0, 1, 2]
    assert in_turn(rows, 0, None) is rows and in_turn(rows, 0, 12) is rows
    met = torch.cat([in_turn(rows, step, 3).inputs for step in range(4)])
    assert sorted(met[:, 0].tolist()) == list(range(12))


def test_two_ranks(tmp_path, two_ranks):
    one, left = on_ranks(str(tmp_path / "one"), "Reptile", 1, {}, episodes=7)
    asked = {"folder": str(tmp_path), "kind": "Reptile", "devices": 2, "model": {}, "episodes": 7}
    for measured, found in two_ranks.run("tests.modules.episodes:on_ranks", **asked):
        assert measured == pytest.approx(one, rel=1e-4)
        for name, value in left.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_over_lora_in_batches_of_texts(tmp_path):
    base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
    made = Reptile(str(base), steps=3, inner_batch=3, inner_lr=0.1, lr=0.5, eval_steps=[0])
    before = {}
    steps, runner = fit(tmp_path, made, words(path, tmp_path), LoRA(r=2), max_steps=2, limit_val_batches=None)
    assert all(".lora_" in n or "classifier" in n or "pooler" in n for n in steps.gradients[0])
    assert all(float(g.abs().max()) > 0 for n, g in steps.gradients[1].items()), before
    assert {"val/loss", "val/accuracy", "val/step_0/accuracy_ci95"} <= set(runner.callback_metrics)


@pytest.mark.parametrize("options", [{}, {"inner_optimizer": "adam", "inner_batch": 2}], ids=str)
def test_rows_that_no_text_of_a_task_holds_cost_nothing(tmp_path, monkeypatch, options):
    """The way back is that of dense gradients of all rows."""
    base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
    made = Reptile(str(base), steps=4, inner_lr=0.01, **options)
    fit(tmp_path, made, words(path, tmp_path), max_steps=1)
    made.double()  # a step of Adam is as long where a gradient is but what rounding leaves
    episode = next(iter(words(path, tmp_path, tokenizer=str(base)).train_dataloader())).episodes()[0]
    kinds = []

    def watched(*given):
        found = inner_loop.by_autograd(*given)
        kinds.append({name for name, slope in found.items() if slope.is_sparse})
        return found

    monkeypatch.setattr(reptile, "by_autograd", watched)
    loss, ways, _ = made._way_back(episode)
    assert len(kinds) == 4 and all(any("word_embeddings" in name for name in found) for found in kinds)
    monkeypatch.setattr(reptile, "sparse_embeddings", lambda module: nullcontext())
    wanted, dense, _ = made._way_back(episode)
    assert not kinds[-1] and float(loss) == pytest.approx(float(wanted), rel=1e-9)
    for way, expected in zip(ways, dense, strict=True):
        torch.testing.assert_close(way, expected, rtol=1e-7, atol=1e-9)
    table = ways[[p is made.view.backbone.get_input_embeddings().weight for p in made.trained()].index(True)]
    assert 0 < int(table.ne(0).any(-1).sum()) < len(table)


@pytest.mark.parametrize("kind", [MAML, Reptile])
def test_blocks_that_are_thawed_adapt_from_then_on(tmp_path, kind):
    base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
    made = kind(str(base), steps=2, inner_lr=0.1, lr=0.1, schedule="constant", optimizer=torch.optim.SGD)
    adapting = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            adapting.append(len(pl_module.start()))

    gradual = GradualUnfreezing(unit="step", groups=2)
    fit(tmp_path, made, words(path, tmp_path), gradual, Count(), max_steps=3)
    assert adapting == sorted(set(adapting)) and len(adapting) == 3, "more of them at each step"
    assert adapting[-1] == len(made.inner_names) == len(dict(made.named_parameters()))
    assert any(".layer.0." in name for name in made.start())


def test_the_way_is_longer_than_gradients_are_clipped_at(tmp_path):
    """So the recipe and the benchmark of Reptile clip nothing: the usual 1.0 would cut every step."""
    made = module("Reptile", steps=8, inner_lr=0.3, inner_optimizer="adam", optimizer=None, lr=0.5)
    steps, _ = fit(tmp_path, made, sines(), max_steps=1)
    assert float(torch.stack([g.norm() for g in steps.gradients[0].values()]).norm()) > 1
    recipe = yaml.safe_load((Path(__file__).parents[2] / "configs/reptile_text.yaml").read_text())
    assert "gradient_clip_val" not in recipe["trainer"]
    assert clip_of(Reptile) is None and clip_of(MAML) == 1.0
