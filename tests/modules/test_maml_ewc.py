"""EWC, MAS and SI beside what learns from episodes: an example is a task, its gradient the one that a step takes of it."""

import pytest
import torch
from torch import nn

from lightning_ft import EWC, MAS, LoRA, PrefixTuning, ProtoNet, Refusal, SynapticIntelligence
from tests.modules.episodes import fit, mlp, module, sines, words, write_words
from tests.modules.tasks import write_base
from tests.modules.test_maml import plain_loop, tasks
from tests.modules.text_episodes import answers, writer


def fisher_of(net, order):
    """The mean over tasks of squared meta-gradients of a task's log-likelihood, - sum of squared errors, by a plain loop."""
    found = {}
    episodes = tasks(sines())
    for episode in episodes:
        _, gradients = plain_loop(net, [episode], order=order, steps=2, alpha=0.1)
        for name, gradient in gradients.items():
            found[name] = found.get(name, 0) + (len(episode.query.targets) * gradient).square() / len(episodes)
    return found


@pytest.mark.parametrize("order", [1, 2])
def test_the_fisher_information_of_tasks_and_the_pull_of_the_next_fit(tmp_path, order):
    """What was measured is the loop's; the next fit's gradient is the loop's plus lam F (theta - theta*)."""
    ewc, made = EWC(3.0, labels="empirical"), module(order=order)
    fit(tmp_path, made, sines(), ewc, max_steps=1)
    star = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    measured = ewc.state_dict()["next"]["importance"]
    expected = fisher_of(made.model, order)
    for name, value in expected.items():
        assert float(value.max()) > 1e-6
        torch.testing.assert_close(measured[f"model.{name}"], value, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.1)
    moved = mlp()
    moved.load_state_dict(made.model.state_dict())
    steps, runner = fit(tmp_path, module(order=order, net=made.model), sines(), ewc, max_steps=1, log_every_n_steps=1)
    _, gradients = plain_loop(moved, tasks(sines()), order=order, steps=2, alpha=0.1)
    for name, gradient in gradients.items():
        pulled = gradient + 3.0 * expected[name] * (dict(moved.named_parameters())[name].detach() - star[name])
        torch.testing.assert_close(steps.gradients[0][f"model.{name}"], pulled, rtol=1e-3, atol=1e-5)
    assert float(runner.callback_metrics["train/ewc"]) > 0


@pytest.mark.parametrize("labels", ["sample", "empirical", "predicted"])
@pytest.mark.parametrize("part", [LoRA, PrefixTuning])
def test_over_texts(tmp_path, part, labels):
    base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
    made = lambda: module("MAML", net=None, base=str(base), inner="adapter_and_head", inner_lr=0.5)  # noqa: E731
    callback = EWC(1.0, labels=labels)
    inject = lambda: LoRA(r=2) if part is LoRA else PrefixTuning(tokens=2)  # noqa: E731
    steps, _ = fit(tmp_path, made(), words(path, tmp_path), inject(), callback, max_steps=2)
    importance = callback.state_dict()["next"]["importance"]
    assert importance.keys() == steps.gradients[0].keys()
    assert all(torch.isfinite(value).all() for value in importance.values())
    assert sum(float(value.sum()) for name, value in importance.items() if "_A" in name or "prefix" in name) > 0
    _, runner = fit(tmp_path, made(), words(path, tmp_path), inject(), callback, max_steps=2, log_every_n_steps=1)
    assert "train/ewc" in runner.callback_metrics


def test_beside_other_modules(tmp_path):
    """A language model, prototypes, MAS and SI; Reptile, which has no likelihood, is refused before its first step."""
    llama = write_base("llama", tmp_path / "llama")
    for callback in (EWC(1.0), MAS(1.0), SynapticIntelligence(1.0)):
        fit(tmp_path, writer(llama), answers(), LoRA(r=2), callback, max_steps=2)
        assert callback.state_dict()["next"]["importance"]
    bert, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
    callback = EWC(1.0)
    fit(tmp_path, ProtoNet(str(bert)), words(path, tmp_path), LoRA(r=2), callback, max_steps=2)
    assert callback.state_dict()["next"]["importance"]
    for callback in (EWC(1.0), MAS(1.0)):
        with pytest.raises(Refusal, match="Reptile takes no gradient of a likelihood"):
            fit(tmp_path, module("Reptile"), sines(), callback, max_steps=1)
    fit(tmp_path, module("Reptile"), sines(), EWC(1.0, importance="uniform"), max_steps=1)
    with pytest.raises(Refusal, match="needs a|goes through every label"):
        fit(tmp_path, writer(llama), answers(), LoRA(r=2), EWC(1.0, labels="all"), max_steps=2)


def test_predictions_of_query_rows(tmp_path):
    """`Trainer.predict` adapts to each episode and speaks of its query rows."""
    from tests.contract.subjects import trainer

    made, data = module(), sines(val_batch_size=2, test_episodes=4)
    batches = trainer(tmp_path).predict(made, data)
    at = 0
    for said, batch in zip(batches, data.test_dataloader(), strict=True):
        for number, episode in enumerate(batch.episodes()):
            net = mlp()
            for _ in range(2):
                loss = nn.functional.mse_loss(net(episode.support.inputs), episode.support.targets)
                slopes = torch.autograd.grad(loss, list(net.parameters()))
                with torch.no_grad():
                    for p, slope in zip(net.parameters(), slopes, strict=True):
                        p.sub_(0.1 * slope)
            rows = said["value"][said["episode"] == number]
            torch.testing.assert_close(rows, net(episode.query.inputs).detach(), rtol=1e-4, atol=1e-5)
            at += 1
    assert at == 4
