"""Write a model with its adapters merged in, as a plain Hugging Face folder that needs nothing of ours to load."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from lightning_ft.formats.atomic import atomic_folder
from lightning_ft.formats.heads import task_type
from lightning_ft.formats.padding import give_padding_
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.merging import merged_copy
from lightning_ft.nn.packed import is_packed


class Saves(Protocol):
    """What can write itself into a folder, as Hugging Face tokenizers and processors do."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the files."""


def export_merged(
    model: nn.Module, tokenizer: Saves | None, folder: str | Path, dtype: torch.dtype | None = None
) -> Path:
    """Write the merged model and its tokenizer, so that ``from_pretrained`` gives the same logits.

    The model itself is not changed: memory for one copy of it is needed.

    Args:
        model: A Hugging Face model, with or without LoRA adapters.
        tokenizer: Written beside the weights; None writes the model alone. Of a decoder that classifies rows both get a
            padding token that no row ends with, by which transformers finds where a row ends.
        folder: Where to write; an earlier model there, known by its ``config.json``, is replaced.
        dtype: Dtype of the stored weights; None keeps the base's. Merging is done in fp32 in any case.

    Returns:
        The folder.

    Raises:
        Refusal: If the model is not a Hugging Face one, is quantised, or cannot be merged; if the disk is too full.
    """
    save = getattr(model, "save_pretrained", None)
    if not callable(save):
        raise Refusal(
            f"A merged folder needs a Hugging Face model, got {type(model).__name__}; use merged_copy instead."
        )
    packed = next((name for name, p in model.named_parameters() if is_packed(p)), None)
    if packed is not None:
        raise Refusal(
            f"{packed!r} is stored quantised, so no plain folder can be written; load the base unquantised, load the "
            "adapter there and export that."
        )
    size = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())
    with atomic_folder(folder, marker="config.json", needed_bytes=size + 2**24) as temporary:
        copy = merged_copy(model)
        if dtype is not None:
            copy = copy.to(dtype)
        if tokenizer is not None and task_type(copy) == "SEQ_CLS":
            tokenizer = give_padding_(copy, tokenizer)
        copy.save_pretrained(str(temporary))  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
    return Path(folder)
