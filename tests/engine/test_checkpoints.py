"""The checkpoint rule: what a file holds, when it is written, what is refused when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.engine import checkpoints
from lightning_ft.engine.checkpoints import KEY, AtomicCheckpointIO, fingerprint, kept_keys
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from tests.seams import toy
from tests.seams.toy import Data, Module, Net, Shape

TRAINED = {"net.first.lora_A", "net.first.lora_B", "net.norm.weight"}


def parts(r: int = 2, target: str = "first") -> list[Callback]:
    return [LoRA(r, target=[target]), Freeze(["norm"])]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    toy.fit(Module(), Data(8), Shape(8), str(folder), parts(), save=[2])
    return folder / "2.ckpt"


def changed(file: Path, folder: Path, **changes: Any) -> str:
    checkpoint = torch.load(file, weights_only=True)
    for name, change in changes.items():
        checkpoint[name] = change(checkpoint.get(name))
    torch.save({k: v for k, v in checkpoint.items() if v is not None}, folder / "changed.ckpt")
    return str(folder / "changed.ckpt")


def resume(file: Path | str, callbacks: list[Callback] | None = None, module: Module | None = None) -> toy.Run:
    callbacks = parts() if callbacks is None else callbacks
    return toy.fit(module or Module(), Data(8), Shape(8), str(Path(file).parent), callbacks, resume=str(file))


def test_a_file_holds_what_was_trained_and_lists_it(file: Path) -> None:
    checkpoint = torch.load(file, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(checkpoint[KEY]["keys"]) == TRAINED
    assert [t["class_path"].rsplit(".")[-1] for t in checkpoint[KEY]["techniques"]] == ["LoRA", "Freeze"]
    assert not [p for p in file.parent.iterdir() if p.suffix == ".part"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({KEY: lambda _: None}, "was not written by lightning_ft"),
        ({KEY: lambda r: {**r, "format": 99}}, "has format 99"),
        ({KEY: lambda r: {**r, "fingerprint": "0" * 32}}, "frozen weights are not those"),
        ({KEY: lambda r: {**r, "keys": [*r["keys"], "net.more"]}}, "does not fit this model: it holds net.more"),
        ({"state_dict": lambda s: {**s, "net.more": torch.zeros(1)}}, "holds net.more, which its own key list"),
        ({"state_dict": lambda s: {"net.norm.weight": s["net.norm.weight"]}}, "lacks net.first.lora_A and 1 more"),
        ({"state_dict": lambda s: {**s, "net.norm.weight": torch.zeros(3)}}, r"net.norm.weight has shape \(3,\)"),
        ({"optimizer_states": lambda _: None}, "save_weights_only=True"),
        ({KEY: lambda r: {**r, "partial": {"ranks": 0}}}, "after an error within an accumulation window"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(changes: dict[str, Any], words: str, file: Path, tmp_path) -> None:
    with pytest.raises(Refusal, match=words):
        resume(changed(file, tmp_path, **changes))


def test_other_techniques_or_another_base_are_refused(file: Path) -> None:
    with pytest.raises(Refusal, match="it holds net.first.lora_A and 1 more, it lacks net.second.lora_A"):
        resume(file, parts(target="second"))
    with pytest.raises(Refusal, match=r"net.first.lora_A has shape \(2, 6\), this model's \(3, 6\)"):
        resume(file, parts(3))
    other = Module()
    nn.init.zeros_(other.net.head.weight)
    with pytest.raises(Refusal, match="frozen weights are not those"):
        resume(file, module=other)


def test_a_file_saved_after_the_fit_follows_the_rule_too(tmp_path) -> None:
    trainer = toy.trainer_of(Shape(8), parts())
    module = Module()
    trainer.fit(module, datamodule=Data(8))
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    checkpoint = torch.load(tmp_path / "late.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == TRAINED == set(checkpoint[KEY]["keys"])
    assert checkpoint[KEY]["partial"] is None
    longer = toy.fit(Module(), Data(8), Shape(8), str(tmp_path), parts(), resume=str(tmp_path / "late.ckpt"))
    toy.assert_same(longer.weights, toy.weights_of(module))  # it was trained to the end already


class Breaks(Callback):
    """Saves when an error comes, as ModelCheckpoint can, after ours have left."""

    def __init__(self, file: Path, at: int) -> None:
        self.file, self.at = file, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.at:
            raise RuntimeError("trouble")

    def on_exception(self, trainer, pl_module, exception) -> None:
        trainer.save_checkpoint(self.file)


def test_a_file_saved_after_an_error_resumes_only_from_a_window_s_end(tmp_path) -> None:
    for at, name in ((3, "end"), (4, "middle")):
        with pytest.raises(RuntimeError, match="trouble"):
            callbacks = [*parts(), Breaks(tmp_path / f"{name}.ckpt", at)]
            toy.fit(Module(), Data(2), Shape(2, 4), str(tmp_path), callbacks)
    whole = toy.fit(Module(), Data(2), Shape(2, 4), str(tmp_path), parts())
    resumed = toy.fit(Module(), Data(2), Shape(2, 4), str(tmp_path), parts(), resume=str(tmp_path / "end.ckpt"))
    toy.assert_same(resumed.weights, whole.weights)
    with pytest.raises(Refusal, match="after an error within an accumulation window"):
        toy.fit(Module(), Data(2), Shape(2, 4), str(tmp_path), parts(), resume=str(tmp_path / "middle.ckpt"))


def test_the_fingerprint_is_that_of_the_frozen_base_alone() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Net(torch.float32)  # a submodule of the user's own that is called as our wrappers' child is
            self.norm = nn.LayerNorm(6)

    def digest(target: str, **changes: float) -> str:
        torch.manual_seed(0)
        net = Nested()
        inject_lora(net, LoRAConfig(r=2, target=(target,)))
        with torch.no_grad():
            for name, value in changes.items():
                net.get_parameter(name.replace("__", ".")).view(-1)[0] += value
        return fingerprint(net)

    assert digest("base.first") == digest("base.second") == digest("base.first", base__first__lora_B=1.0)
    assert digest("base.first") != digest("base.first", base__head__weight=1.0)
    assert digest("base.first") != digest("base.first", base__first__base__weight=1.0)
    net = Nested().requires_grad_(False)
    assert digest("base.first") == fingerprint(net) == fingerprint(net.to(torch.bfloat16).float())


def test_buffers_that_persist_are_kept_and_others_not() -> None:
    module = Module()
    module.net.register_buffer("count", torch.zeros(2))
    module.net.register_buffer("cache", torch.zeros(2), persistent=False)
    module.net.requires_grad_(False).norm.weight.requires_grad_(True)
    assert kept_keys(module) == {"net.norm.weight", "net.count"}


def test_a_full_disk_costs_the_new_file_alone(tmp_path, monkeypatch) -> None:
    plugin, target = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    plugin.save_checkpoint({"step": 1}, target)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(Refusal, match="could not be written .*is untouched"):
        plugin.save_checkpoint({"step": 2}, target)
    assert torch.load(target, weights_only=True) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
