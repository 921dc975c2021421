"""Where the model is inside a LightningModule: names in patterns and adapter files are relative to it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def model_root(module: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) of the one Hugging Face model inside ``module``, or ("", module) when there is none or several.

    Hugging Face models nest (a backbone is one too), so only the outermost count. One that a module of ours keeps beside the model
    that techniques edit is not seen (see `aside`).
    """
    found: list[tuple[str, nn.Module]] = []
    beside = aside(module)
    for path, child in module.named_modules():
        if path.startswith(beside):
            continue
        if isinstance(child, PreTrainedModel) and not any(path == p or path.startswith(f"{p}.") for p, _ in found):
            found.append((path, child))
    return found[0] if len(found) == 1 else ("", module)


def aside(module: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of what lies in parts that techniques pass by: those that say ``techniques_pass_by``."""
    return tuple(f"{path}." for path, part in module.named_modules() if getattr(part, "techniques_pass_by", False))
