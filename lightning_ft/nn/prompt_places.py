"""Where a soft prompt goes in a model: its embedding, who calls that, and what a model says of a row's first place."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import innermost, pristine_modules
from lightning_ft.nn.trainable_tokens import input_embedding


def prompt_place(model: nn.Module, target: str | None) -> tuple[str, nn.Module | None, nn.Module | None]:
    """Find where a prompt goes: (path of the embedding, the Hugging Face model that calls it, the decoder behind that one).

    Args:
        model: As for `inject_prompt`.
        target: As for `inject_prompt`.

    Raises:
        Refusal: If there is no embedding, or several.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return _own_place(model, target, PreTrainedModel), None, None
    name = type(model).__name__
    if target is not None:
        raise Refusal(f"{name} says itself which embedding reads its ids; leave the prompt's target {target!r} out.")
    whole: Any = model
    decoder: Any = None
    if model.config.is_encoder_decoder:
        whole, decoder = model.get_encoder(), model.get_decoder()
        if whole is model or decoder is model:
            raise Refusal(f"{name} does not keep its encoder and its decoder apart; it can have no soft prompt.")
    try:
        embedding = whole.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    inside = next((n for n, module in whole.named_modules() if module is embedding), None)
    if inside is None or not isinstance(innermost(embedding), nn.Embedding):
        raise Refusal(f"{name} has no embedding that reads token ids; it can have no soft prompt.")
    parts = inside.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts))]
    # The innermost one: what stands around it (a head) should not see the prompt.
    caller = [whole.get_submodule(n) for n in above if isinstance(whole.get_submodule(n), PreTrainedModel)][-1]
    return next(n for n, module in model.named_modules() if module is embedding), caller, decoder


def _own_place(model: nn.Module, target: str | None, hugging_face: type) -> str:
    if any(isinstance(module, hugging_face) for module in model.modules()):
        raise Refusal(
            f"{type(model).__name__} holds several Hugging Face models; call inject_prompt on the one that gets the prompt."
        )
    places = pristine_modules(model)
    name = target if target is not None else input_embedding(model)
    if name is None:
        some = [n for n, (_, module) in places.items() if isinstance(innermost(module), nn.Embedding)]
        raise Refusal(
            f"A soft prompt needs one embedding to stand before, and {type(model).__name__} has {len(some)} "
            f"({', '.join(some[:4]) or 'none'}); name one by target."
        )
    if name not in places or not isinstance(innermost(places[name][1]), nn.Embedding):
        raise Refusal(f"The prompt's target names {name!r}, which is no embedding of {type(model).__name__}.")
    return places[name][0]


def reads_the_first(model: nn.Module) -> bool:
    """Whether the head of a Hugging Face classifier looks at a row's first token, as those of encoders do."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config: Any = getattr(model, "config", None)
    return (
        type(model).__name__.endswith("ForSequenceClassification")
        and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not config.is_encoder_decoder
        and not getattr(config, "is_decoder", False)
    )


def first_position(model: nn.Module) -> int:
    """The number of a row's first position: 0, but in RoBERTa's family the one after the padding's own."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.rpartition(".")[2] == "position_embeddings" and padding is not None:
            return int(padding) + 1
    return 0


__all__ = ["first_position", "prompt_place", "reads_the_first"]
