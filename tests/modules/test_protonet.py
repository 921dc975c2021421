"""ProtoNet and the linear probe: one step and one validation against loops, over nets and over a base."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_ft import EpisodeData, Freeze, LinearProbe, ProtoNet, Refusal
from lightning_ft.functional.prototypes import prototype_logits, prototypes
from tests.contract.subjects import trainer
from tests.modules.episodes import fit, sines, words, write_words
from tests.modules.tasks import write_base

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Six classes of five points each."""
    folder = tmp_path_factory.mktemp("points")
    draw = np.random.default_rng(0)
    for k in range(6):
        (folder / f"c{k}").mkdir()
        for n in range(5):
            np.save(folder / f"c{k}/{n}.npy", draw.normal(k, 1.0, 3).astype(np.float32))
    return folder


def data(points, **options):
    given = {"way": 2, "shot": 2, "query": 3, "val_classes": 2, "episodes": 4, "batch_size": 4, "val_episodes": 5}
    return EpisodeData(str(points), **{**given, "seed": 2, **options})


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 4)


def loss_of(net, episode):
    """Equations 1 and 2 with loops; (loss, share of right rows)."""
    z, q = net(episode.support.inputs), net(episode.query.inputs)
    total, right = 0.0, 0
    for row, target in zip(q, episode.query.targets.tolist(), strict=True):
        logits = []
        for k in range(2):
            centre = sum(z[i] for i in range(4) if int(episode.support.targets[i]) == k) / 2
            logits.append(-((row - centre) ** 2).sum())
        right += int(logits[1] > logits[0]) == target
        total = total - (logits[target] - torch.logsumexp(torch.stack(logits), 0)) / 6
    return total, right / 6


@pytest.mark.parametrize("split", [{}, {"batch_size": 1}], ids=["whole", "accumulated"])
def test_a_step(points, tmp_path, split):
    made = ProtoNet(net=net(), lr=0.01, optimizer=torch.optim.SGD)
    options = {"accumulate_grad_batches": 4} if split else {}
    steps, runner = fit(tmp_path, made, data(points, **split), max_steps=1, **options)
    reference = net()
    found = [loss_of(reference, e) for batch in data(points).train_dataloader() for e in batch.episodes()]
    total = sum(loss for loss, _ in found) / 4
    total.backward()
    assert steps.losses == pytest.approx([float(total.detach())], rel=1e-5)
    assert float(runner.callback_metrics["train/accuracy"]) == pytest.approx(sum(hit for _, hit in found) / 4)
    for name, p in reference.named_parameters():
        # A shift of all embeddings changes no distance: the bias gets a gradient, and it is zero.
        torch.testing.assert_close(steps.gradients[0][f"model.{name}"], p.grad, rtol=1e-4, atol=1e-5)


def test_validation(points, tmp_path):
    (measured,) = trainer(tmp_path, limit_val_batches=None).validate(ProtoNet(net=net()), data(points), verbose=False)
    found = [loss_of(net(), e) for batch in data(points).val_dataloader() for e in batch.episodes()]
    hits = torch.tensor([hit for _, hit in found], dtype=torch.float64)
    assert measured["val/accuracy"] == pytest.approx(float(hits.mean()))
    # Student, four degrees
    assert measured["val/accuracy_ci95"] == pytest.approx(2.776445 * float(hits.std()) / math.sqrt(5))
    assert measured["val/loss"] == pytest.approx(sum(float(loss.detach()) for loss, _ in found) / 5, rel=1e-5)


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_classes_stay_apart_when_the_seed_is_another(points, tmp_path, monkeypatch, kind):
    """`seed_everything(42)`, a fit; then a test in another process, without it or with another seed."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    given = {"seed": None, "test_classes": 2, "test_episodes": 3}
    if kind == "folder":
        make, module = lambda **options: data(points, **{**given, **options}), ProtoNet(net=net(), lr=0.01)
    else:
        base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
        given |= {"way": 2, "val_classes": 2}
        make, module = lambda **options: words(path, tmp_path, **{**given, **options}), ProtoNet(str(base), lr=0.01)
    rows = make()
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)
    fit(tmp_path, module, rows, saver, max_steps=1, enable_checkpointing=True)
    saved, dealt = tmp_path / "saved/last.ckpt", rows.classes_of()
    assert not dealt["test"] & (dealt["train"] | dealt["val"]) and len(dealt["test"]) == 2
    (whole,) = trainer(tmp_path).test(module, make(), ckpt_path=saved, verbose=False)
    other = next(s for s in range(99) if make(seed=s).classes_of()["test"] & dealt["train"])
    monkeypatch.setenv("PL_GLOBAL_SEED", str(other))
    # The data module that was used keeps its seed,
    assert rows.classes_of() == dealt
    (again,) = trainer(tmp_path).test(module, rows, ckpt_path=saved, verbose=False)
    assert again == pytest.approx(whole)
    # and a new one is refused.
    with pytest.raises(Refusal, match=f"was in train of the run .* which was 42 and is {other}: set data.seed to 42"):
        trainer(tmp_path).test(module, make(), ckpt_path=saved, verbose=False)
    with pytest.raises(Refusal, match="is in train now, and was in (val|test)|with seed 42"):
        trainer(tmp_path, limit_val_batches=0, max_epochs=3, max_steps=2).fit(module, make(), ckpt_path=saved)


def test_an_interrupted_validation_leaves_nothing(points, tmp_path):
    class Stop(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("enough")

    made, rows = ProtoNet(net=net()), data(points)
    (whole,) = trainer(tmp_path, limit_val_batches=None).validate(made, rows, verbose=False)
    with pytest.raises(RuntimeError, match="enough"):
        trainer(tmp_path, Stop(), limit_val_batches=None).validate(made, rows, verbose=False)
    (again,) = trainer(tmp_path, limit_val_batches=None).validate(made, rows, verbose=False)
    assert again == whole


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_mixed_precision_rounds_no_class(distance):
    """Means and cosines under autocast are those of float32."""
    draw = torch.Generator().manual_seed(0)
    z, q = (torch.randn(6, 5, generator=draw) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    expected = prototype_logits(q, prototypes(z, labels, 3), distance=distance, scale=10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        centres = prototypes(z, labels, 3)
        logits = prototype_logits(q, centres, distance=distance, scale=10.0)
    assert centres.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_the_probe_over_the_same_episodes(points, tmp_path):
    linear = pytest.importorskip("sklearn.linear_model")
    probe, three = (
        LinearProbe(net=net(), normalise=False),
        {"way": 3, "val_classes": 3},
    )  # of two, theirs is penalised otherwise
    (measured,) = trainer(tmp_path, limit_val_batches=None).validate(probe, data(points, **three), verbose=False)
    hits = []
    for batch in data(points, **three).val_dataloader():
        for e in batch.episodes():
            with torch.no_grad():
                x, q = (net()(side.inputs).double().numpy() for side in (e.support, e.query))
            theirs = linear.LogisticRegression(tol=1e-8).fit(x, e.support.targets.numpy())
            hits.append(theirs.score(q, e.query.targets.numpy()))
    assert measured["val/accuracy"] == pytest.approx(np.mean(hits))
    with pytest.raises(Refusal, match="run validate or test"):
        trainer(tmp_path).fit(LinearProbe(net=net()), data(points))


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_over_a_base(tmp_path, pooling):
    """The head that nobody asks is not trained; embeddings are the pooled hidden states of transformers' own forward."""
    base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
    made = ProtoNet(str(base), pooling=pooling, lr=0.01)
    steps, runner = fit(tmp_path, made, words(path, tmp_path), Freeze(["norms"]), max_steps=2, limit_val_batches=None)
    assert steps.gradients[0] and all("LayerNorm" in name for name in steps.gradients[0])
    assert {"val/accuracy", "val/accuracy_ci95"} <= set(runner.callback_metrics)
    episode = next(iter(words(path, tmp_path, tokenizer=str(base)).train_dataloader())).episodes()[0]
    batch = episode.support.inputs
    with torch.no_grad():
        ours = made.embed(batch)
        for n, row in enumerate(batch.ids):
            length = int(batch.mask[n].sum()) if batch.mask is not None else len(row)
            hidden = made.model.base_model(row[None, :length]).last_hidden_state[0]
            expected = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
            torch.testing.assert_close(ours[n], expected, rtol=1e-4, atol=1e-5)


def test_full_training_over_a_base(tmp_path):
    base, path = write_base("bert", tmp_path / "bert"), write_words(tmp_path)
    steps, _ = fit(tmp_path, ProtoNet(str(base)), words(path, tmp_path), max_steps=1)
    assert any("word_embeddings" in name for name in steps.gradients[0])
    assert not any("classifier" in name or "pooler" in name for name in steps.gradients[0])


def test_numbers_are_refused(tmp_path):
    with pytest.raises(Refusal, match="targets of these episodes are numbers"):
        fit(tmp_path, ProtoNet(net=nn.Linear(1, 2)), sines())
