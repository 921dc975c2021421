"""Whose code a checkpoint may run when it is loaded: ours, what the user has imported, and what the user hands over."""

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

import lightning_ft
import tests
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal
from tests.contract.subjects import QUIET, PlainNet, loader


class Warmer(Technique):
    """A user's own: freezes all and trains the output layer alone, from where it likes to start."""

    traits: ClassVar[Traits] = Traits(slot="warmer", edits=frozenset({"model"}))

    def __init__(self, start: float = 0.25) -> None:
        self.start = start
        self.check()

    def register(self, attachment: Attachment) -> None:
        attachment.edit("freeze", "warm", self.warm)

    def warm(self, module: Any) -> None:
        module.requires_grad_(False)
        module.net[3].requires_grad_(True)
        nn.init.constant_(module.net[3].bias, self.start)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PlainNet]:
    """Two steps of a user's own technique on a user's own module."""
    module, file = PlainNet(), tmp_path_factory.mktemp("run") / "last.ckpt"
    trainer = Trainer(max_steps=2, callbacks=[Warmer(start=0.5)], **QUIET)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(file)
    return file, module


def test_a_technique_that_is_imported_is_found(checkpoint: tuple[Path, PlainNet]) -> None:
    file, trained = checkpoint
    loaded = lightning_ft.load(file, module=PlainNet())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(x), trained.eval()(x)) and not torch.equal(loaded(x), PlainNet()(x))
    assert not loaded.training


def test_a_technique_that_is_not_is_handed_over(
    checkpoint: tuple[Path, PlainNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, trained = checkpoint
    monkeypatch.delitem(sys.modules, __name__)
    monkeypatch.delattr(tests, "test_load")
    with pytest.raises(
        Refusal, match=r"asks for .*Warmer, which is not part of .*import Warmer first, or pass techniques=\[Warmer\]"
    ):
        lightning_ft.load(file, module=PlainNet())
    assert __name__ not in sys.modules  # nothing was imported for the asking
    loaded = lightning_ft.load(file, module=PlainNet(), techniques=[Warmer])
    assert torch.equal(loaded.net[3].bias, trained.net[3].bias)


def changed(file: Path, folder: Path, **recipe: Any) -> Path:
    content = torch.load(file, weights_only=True)
    content["lightning_ft"]["techniques"][0].update(recipe)
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ({"class_path": "os.system"}, "asks for os.system, which is not part of lightning_ft"),
        ({"class_path": "subprocess.Popen"}, "Popen"),
        ({"class_path": "pathlib.Path"}, "asks for pathlib.Path, which is not part"),
        ({"class_path": "lightning_ft.modules.sft.SFT"}, "SFT, which is no Technique"),
        ({"class_path": "lightning_ft.callbacks.lora.LoRB"}, "LoRB, which this version lacks"),
        ({"class_path": "lightning_ft.callbacks.lorb.LoRA"}, "which this version lacks"),
        ({"class_path": "lightning_ft"}, "asks for lightning_ft, which is not part"),
        ({"init_args": {"start": 0.5, "end": 1}}, "Warmer cannot be built as the checkpoint says: .*'end'"),
        ({"init_args": {"start": "hot"}}, "Warmer.start must be a number, got 'hot'"),
    ],
)
def test_what_a_file_may_not_ask_for(
    checkpoint: tuple[Path, PlainNet], tmp_path: Path, recipe: dict[str, Any], match: str
) -> None:
    with pytest.raises(Refusal, match=match):
        lightning_ft.load(changed(checkpoint[0], tmp_path, **recipe), module=PlainNet())
