"""Invariant 5: a checkpoint holds what was trained and what rebuilds the rest; one that does not fit is refused."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from benchmarks.random_model import write_model
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.cli.export import export_command
from lightning_ft.formats.peft import read_peft
from lightning_ft.functional.errors import Refusal
from tests.invariants import ground

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
IDS = torch.arange(3, 60)[None]
FEW = {"max_steps": 2, "limit_val_batches": 1.0, "num_sanity_val_steps": 0}


def adam(base, **options):
    return ground.sft(base, optimizer=None, **options)


@torch.no_grad()
def logits(module):
    was = module.training
    module.eval()
    found = module.model(IDS).logits
    module.train(was)
    return found


@pytest.fixture(scope="module")
def run(base, rows, cache, tmp_path_factory):
    """Two steps of LoRA; its module, and every kind of file."""
    folder = tmp_path_factory.mktemp("run")
    full = ModelCheckpoint(folder / "full", save_last=True, every_n_train_steps=1)
    light = ModelCheckpoint(folder / "light", save_last=True, every_n_train_steps=2, save_weights_only=True)
    module = adam(base)
    trainer = ground.trainer(folder, LoRA(r=4), full, light, **FEW)
    trainer.fit(module, ground.data(rows, cache, val_fraction=0.2))
    trainer.save_checkpoint(folder / "after.ckpt")
    trainer.save_checkpoint(folder / "after_light.ckpt", weights_only=True)
    files = {"full": folder / "full/last.ckpt", "light": folder / "light/last.ckpt"}
    files |= {name: folder / f"{name}.ckpt" for name in ("after", "after_light")}
    return SimpleNamespace(module=module, files=files)


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from tensors(item)


@pytest.mark.parametrize("kind", ["full", "light", "after", "after_light"])
def test_keys_are_what_was_trained(run, kind):
    checkpoint = torch.load(run.files[kind], weights_only=True)
    trained = {n: p for n, p in run.module.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == set(trained) and len(trained) == 2 * 14
    assert all(".lora_A" in name or ".lora_B" in name for name in trained)
    record = checkpoint["lightning_ft"]
    assert record["format"] == 1 and record["keys"] == sorted(trained)
    for name, value in trained.items():
        assert torch.equal(checkpoint["state_dict"][name], value)
    # In bytes: the factors, AdamW's two moments of them, its step counters; no frozen weight under any name.
    numbers = sum(p.numel() for p in trained.values())
    copies = 1 if "light" in kind else 3
    held = sum(t.numel() * t.element_size() for t in tensors(checkpoint))
    assert 4 * copies * numbers <= held <= 4 * copies * numbers + 64 * len(trained)
    assert run.files[kind].stat().st_size <= held + 2000 * len(trained)


@pytest.mark.parametrize("kind", ["full", "light", "after", "after_light"])
def test_load_gives_the_logits_of_the_module_in_memory(run, base, kind):
    loaded = lightning_ft.load(run.files[kind])
    assert torch.equal(logits(loaded), logits(run.module))
    plain = adam(base)
    plain.configure_model()
    assert (logits(plain) - logits(run.module)).abs().max() > 1e-4  # two steps do show


@pytest.mark.parametrize("kind", ["full", "light"])
def test_any_file_validates_and_exports(run, base, rows, cache, tmp_path, kind):
    trainer = ground.trainer(tmp_path, LoRA(r=4), **FEW)
    data = ground.data(rows, cache, val_fraction=0.2)
    (before,) = trainer.validate(run.module, data)
    (after,) = ground.trainer(tmp_path, LoRA(r=4), **FEW).validate(adam(base), data, ckpt_path=run.files[kind])
    assert after == before
    export_command([f"--ckpt_path={run.files[kind]}", f"--output={tmp_path / 'adapter'}"])
    _, exported = read_peft(tmp_path / "adapter")
    assert len(exported) == 2 * 14 and all(bool(t.any()) for t in exported.values())


# -- refusals -----------------------------------------------------------------------------------------------------------


def damaged(source, tmp_path, change):
    checkpoint = torch.load(source, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def drop_record(checkpoint):
    del checkpoint["lightning_ft"]


def newer(checkpoint):
    checkpoint["lightning_ft"]["format"] = 99


def drop_key(checkpoint):
    checkpoint["state_dict"].popitem()


def add_key(checkpoint):
    checkpoint["state_dict"]["model.more"] = torch.zeros(2)


def other_shape(checkpoint):
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = torch.zeros(3, 5)


CHANGES = {
    "foreign": (drop_record, "not written by lightning_ft"),
    "newer": (newer, "has format 99, this version reads 1"),
    "key dropped": (drop_key, "lacks .*lora_.*damaged"),
    "shape": (other_shape, "has shape"),
}


def refuse(file, techniques, base, rows, cache, folder, words, stage="fit"):
    module = adam(base)
    run = ground.trainer(folder, *techniques, **FEW)
    with pytest.raises(Refusal, match=words) as refused:
        getattr(run, stage)(module, ground.data(rows, cache, val_fraction=0.2), ckpt_path=file)
    assert str(refused.value).count("\n") == 0
    assert all(not bool(p.any()) for n, p in module.named_parameters() if "lora_B" in n)  # nothing of it was used


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("change", [*CHANGES, "key added"])
def test_a_changed_file(run, base, rows, cache, tmp_path, change, stage):
    edit, words = (add_key, "its own key list does not name") if change == "key added" else CHANGES[change]
    file = damaged(run.files["full"], tmp_path, edit)
    refuse(file, [LoRA(r=4)], base, rows, cache, tmp_path, words, stage)


@pytest.mark.parametrize("change", CHANGES)
def test_load_refuses_a_changed_file(run, tmp_path, change):
    edit, words = CHANGES[change]
    with pytest.raises(Refusal, match=words):
        lightning_ft.load(damaged(run.files["full"], tmp_path, edit))


@pytest.mark.parametrize(
    "technique, words",
    [
        (LoRA(r=4, target=["q_proj"]), r"does not fit this model: it holds .*down_proj.* and \d+ more"),
        (LoRA(r=4, modules_to_save=["norm"]), "does not fit this model.*it lacks"),
        (LoRA(r=2), "has shape .*4.*this model's .*2.*the rank"),
        (None, "does not fit this model.*this run has none"),
    ],
    ids=["targets", "one more module", "rank", "no technique"],
)
def test_another_run(run, base, rows, cache, tmp_path, technique, words):
    refuse(run.files["full"], [technique] if technique else [], base, rows, cache, tmp_path, words)


def test_another_base(run, rows, cache, tmp_path):
    other = write_model(tmp_path / "other", seed=1, initializer_range=0.05)
    refuse(run.files["full"], [LoRA(r=4)], other, rows, cache, tmp_path, "fingerprints differ.*same base")
    with pytest.raises(Refusal, match="fingerprints differ.*same base"):
        lightning_ft.load(run.files["full"], base=str(other))


@pytest.mark.parametrize("kind", ["light", "after_light"])
def test_fit_does_not_resume_from_weights_alone_and_says_what_to_do(run, base, rows, cache, tmp_path, kind):
    words = "can be validated and exported, but fit cannot resume from it.*init_from"
    refuse(run.files[kind], [LoRA(r=4)], base, rows, cache, tmp_path, words)
    module = adam(base)  # and what it says works
    one = {**FEW, "max_steps": 1}
    ground.trainer(tmp_path, LoRA(init_from=str(run.files[kind])), **one).fit(
        module, ground.data(rows, cache, val_fraction=0.2)
    )


# -- a full disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_costs_the_new_file_alone(base, rows, cache, tmp_path, monkeypatch, call):
    saves = []
    original = getattr(os, call)

    def full(*arguments):
        saves.append(call)
        if len(saves) > (2 if call == "replace" else 4):  # two files: each is fsynced, and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(f"lightning_ft.engine.checkpoints.os.{call}", full)
    folder = tmp_path / "files"
    saver = ModelCheckpoint(folder, filename="only", every_n_train_steps=1, enable_version_counter=False)
    module = adam(base)
    with pytest.raises(Refusal, match="could not be written.*No space left.*untouched. Make room and resume") as why:
        ground.trainer(tmp_path, LoRA(r=4), saver).fit(module, ground.data(rows, cache))
    assert str(folder / "only.ckpt") in str(why.value)
    monkeypatch.undo()
    assert [file.name for file in folder.iterdir()] == ["only.ckpt"]
    kept = torch.load(folder / "only.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    again = adam(base)
    run = ground.trainer(tmp_path, LoRA(r=4))
    run.fit(again, ground.data(rows, cache), ckpt_path=folder / "only.ckpt")
    assert run.global_step == 10
