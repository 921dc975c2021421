"""A trained cell as what others read: adapters in PEFT's and AdapterHub's format, plain Hugging Face folders."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from lightning_ft.formats.adapter_folder import adapter_files, check_adapter
from lightning_ft.formats.adapterhub import load_adapterhub_
from lightning_ft.formats.heads import auto_class, trained_head
from lightning_ft.formats.merged import export_merged
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.quantize import dequantize_
from lightning_ft.nn.registry import base_name, disabled, injected_layers
from tests.contract.case import require
from tests.matrix.cells import Cell
from tests.matrix.parts import PARTS
from tests.matrix.placements import PLACEMENTS
from tests.matrix.subjects import SUBJECTS

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IDS = torch.tensor([[45, 51, 44, 48, 47, 52], [50, 49, 53, 46, 55, 54]])


def exported(cell: Cell, module: Any, ground: Path, folder: Path) -> str:
    """Writes each adapter, or the whole model, and reads it with what others use; all logits are equal.

    A packed base is unpacked first: others read an adapter onto the weights that the packed ones stand for.

    Returns:
        The formats, e.g. ``PEFT``, ``AdapterHub+PEFT``, ``merged``; ``checkpoint`` where none of them has a place for it.
    """
    part, subject, model = PARTS[cell.part], SUBJECTS[cell.subject], module.model.eval()
    if PLACEMENTS[cell.placement].quantised:
        dequantize_(model)
    names = sorted({layer.adapter_name for layer in injected_layers(model).values()})
    if not names or part.own is not None:
        return _merged(model, names, folder / "merged")
    formats = []
    for name in names:
        others = [other for other in names if other != name]
        if name == part.unwritten_name and subject.base in part.unwritten:
            with pytest.raises(Refusal, match=re.escape(part.unwritten[subject.base])):
                adapter_files(model, name)
            continue
        if subject.unused is not None and name in ("prefix", "prompt"):
            continue  # PEFT reads one of a classifier only beside a trained head
        files = adapter_files(model, name)
        check_adapter(model, name, without_head=True)
        there, read = _bare(model, ground / subject.base, subject.unused is not None), folder / f"export-{name}"
        files.write(read)
        with disabled(model, others) if others else nullcontext():
            if files.format == "PEFT":
                _near(_in_peft(there, read), model, "PEFT")
            else:  # the library adapters is not installed; tests/formats reads folders by its definition
                _near(_with_head(there, model, read, name), model, "AdapterHub's format")
        formats.append(files.format)
    return "+".join(sorted(formats)) or "checkpoint"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of fixed rows, those of the last six positions where there is one a token."""
    found = [
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **_start(model, ids)) for ids in IDS.split(1)
    ]
    logits = torch.cat([one.logits for one in found])
    return logits if logits.ndim == 2 else logits[:, -len(_start(model, IDS).get("decoder_input_ids", IDS)[0]) :]


def _start(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}


def _bare(model: Any, folder: Path, idle_head: bool) -> Any:
    """The base as others load it, with the frozen weights of this model, which differ where they were packed."""
    labels = {"num_labels": model.config.num_labels} if trained_head(model) or idle_head else {}
    bare = getattr(hf, auto_class(model)).from_pretrained(folder, dtype=torch.float32, **labels)
    frozen = {base_name(name, model): p for name, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if name in frozen:
                parameter.copy_(frozen[name])
    return bare.eval()


def _in_peft(there: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(there, str(folder)).eval()


def _with_head(there: Any, model: Any, folder: Path, name: str) -> Any:
    """The format has no place for a head: it comes from the model."""
    head = {f"{part}.{key}" for part in trained_head(model) for key, _ in there.get_submodule(part).named_parameters()}
    trained = {base_name(key, model): value for key, value in model.named_parameters()}
    with torch.no_grad():
        for key in head:
            there.get_parameter(key).copy_(trained[key])
    load_adapterhub_(there, folder, adapter_name=name)
    return there


def _merged(model: Any, names: list[str], folder: Path) -> str:
    for name in names:  # an adapter's folder would leave out what trained beside it
        try:
            check_adapter(model, name, without_head=True)
        except Refusal as refusal:
            require("write the whole model with merge" in str(refusal), f"The export of {name} says: {refusal}")
        else:
            raise AssertionError(f"The folder of {name} would be written without what trained beside it.")
    export_merged(model, None, folder)
    _near(getattr(hf, auto_class(model)).from_pretrained(folder, dtype=torch.float32), model, "transformers")
    return "merged"


def _near(there: Any, here: Any, who: str) -> None:
    torch.testing.assert_close(
        logits(there), logits(here), **CLOSE, msg=lambda text: f"In {who} the logits are others: {text}"
    )


__all__ = ["exported", "logits"]
