"""Episodes under precisions that convert the whole model: frozen weights are rounded, what learns and what it reads are not."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from lightning_ft import MAML, LinearProbe, LoRA, ProtoNet
from tests.contract.subjects import trainer
from tests.modules.episodes import fit, module, sines, words, write_words
from tests.modules.tasks import write_base


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("episodes")
    return write_base("bert", folder / "bert"), write_words(folder), folder


@pytest.mark.parametrize("kind", ["MAML", "Reptile"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_net(tmp_path, kind, precision):
    """64-true computes in double; the others leave a net, all of which learns, as it is."""
    found = {}
    for name in (precision, "32-true"):
        made = module(kind)
        steps, _ = fit(tmp_path, made, sines(), max_steps=2, limit_val_batches=None, precision=name)
        found[name] = steps, {p.dtype for p in made.parameters()}
    (steps, dtypes), (plain, _) = found.values()
    assert dtypes == {torch.float64 if precision == "64-true" else torch.float32}
    rel = 1e-5 if precision == "64-true" else 0
    assert steps.losses == pytest.approx(plain.losses, rel=rel) and len(steps.losses) == 2
    assert (steps.losses != plain.losses) == (precision == "64-true")


def test_factors_in_a_net(tmp_path):
    """A frozen layer of the net reads the rows in their own dtype."""
    made = module(inner="adapter")
    steps, _ = fit(tmp_path, made, sines(), LoRA(r=2, target="all-linear"), max_steps=1, precision="bf16-true")
    assert {p.dtype for p in made.parameters()} == {torch.float32} and set(made.inner_names) == set(steps.gradients[0])


def test_a_base_in_bfloat16(texts, tmp_path):
    """Frozen weights are bfloat16, factors and head float32; it learns, measures, and is loaded again."""
    base, path, folder = texts
    made = MAML(str(base), inner="adapter_and_head", inner_lr=0.5, steps=2, lr=0.1, eval_steps=[0])
    save = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)
    options = {"max_steps": 2, "limit_val_batches": None, "precision": "bf16-true", "enable_checkpointing": True}
    steps, runner = fit(tmp_path, made, words(path, folder), LoRA(r=2), save, **options)
    learned = {p.dtype for p in made.parameters() if p.requires_grad}
    assert learned == {torch.float32} and torch.bfloat16 in {p.dtype for p in made.parameters()}
    assert all(float(g.abs().max()) > 0 for n, g in steps.gradients[0].items() if "lora_B" in n or "classifier" in n)
    plain = MAML(str(base), inner="adapter_and_head", inner_lr=0.5, steps=2, lr=0.1, eval_steps=[0])
    exact, _ = fit(tmp_path, plain, words(path, folder), LoRA(r=2), max_steps=1)
    assert steps.losses[:1] == pytest.approx(exact.losses, rel=2e-2) and steps.losses[:1] != exact.losses
    assert float(runner.callback_metrics["val/accuracy"]) >= 0
    assert lightning_ft.load(tmp_path / "saved/last.ckpt").way == 3


def test_a_base_in_double(texts, tmp_path):
    base, path, folder = texts
    made = MAML(str(base), inner="adapter_and_head", inner_lr=0.5, lr=0.1, eval_steps=[0])
    fit(tmp_path, made, words(path, folder), LoRA(r=2), max_steps=1, precision="64-true")
    assert {p.dtype for p in made.parameters()} == {torch.float64}


def test_embeddings_in_bfloat16(texts, tmp_path):
    base, path, folder = texts
    steps, _ = fit(tmp_path, ProtoNet(str(base), lr=0.1), words(path, folder), max_steps=1, precision="bf16-true")
    assert len(steps.losses) == 1
    runner = trainer(tmp_path, limit_val_batches=None, precision="bf16-true")
    (found,) = runner.validate(LinearProbe(str(base)), words(path, folder), verbose=False)
    assert 0 <= found["val/accuracy"] <= 1
