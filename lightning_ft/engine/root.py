"""Where the model is inside a LightningModule: names in patterns and adapter files are relative to it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def model_root(module: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) of the one Hugging Face model inside ``module``, or ("", module) when there is none or several.

    Hugging Face models nest (a backbone is one too), so only the outermost count.
    """
    found: list[tuple[str, nn.Module]] = []
    for path, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(path == p or path.startswith(f"{p}.") for p, _ in found):
            found.append((path, child))
    return found[0] if len(found) == 1 else ("", module)
