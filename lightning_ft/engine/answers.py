"""What modules share that compare answers to one prompt: whether the prompt is held once for both, and no dropout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission_sharing import why_no_sharing

ROWS = {
    "pairs": ("pairs of answers", "PreferenceData (chosen, rejected)"),
    "labelled": ("answers that are labelled good or bad", "UnpairedPreferenceData (prompt, completion, label)"),
}
"""Kind of rows, as a module's ``learns_from`` and a data module's ``rows_are`` name it -> in words, and which data have them."""


_DROPS = ("dropout", "layerdrop", "drop_prob", "pdrop", "jitter_noise")
"""What the names of probabilities hold that layers keep as plain numbers; and of the noise of a router of experts."""


def other_rows(module: Any) -> Refusal:
    """The refusal of rows that a module cannot learn from."""
    what, data = ROWS[module.learns_from]
    return Refusal(f"{type(module).__name__} learns from {what}, and these rows are none; use {data}.")


def check_rows(trainer: Any, rows_are: str) -> None:
    """Refuses rows of another kind than the Trainer's module learns from, before they are tokenised or a model is loaded.

    Args:
        trainer: None: nobody says yet who learns.
        rows_are: what the data module calls them.
    """
    module = trainer.lightning_module if trainer is not None else None
    if getattr(module, "learns_from", None) not in (None, rows_are):
        raise other_rows(module)


def prove_sharing(module: Any) -> str:
    """Find out, once the base is loaded, whether two answers may share one copy of their prompt.

    Args:
        module: one of our modules, with ``model``, ``view`` and ``admission``.

    Returns:
        Why they cannot; empty when it is proven that they can.

    Raises:
        Refusal: they cannot, or the base reads prompt and answer apart, and the data insist.
    """
    name = type(module).__name__
    if module.model.config.is_encoder_decoder:
        raise Refusal(
            f"{module.base} is an encoder-decoder, and {name} trains decoders, which read prompt and answer as "
            "one row; take a decoder."
        )
    reason = module.sharing_reason
    if reason is None and getattr(module.view, "encoder", False):
        reason = "it is an encoder, in which the prompt sees the answer"
    elif reason is None:
        reason = (
            why_no_sharing(module.view, module.tokenizer)
            if module.admission.packing
            else (module.admission.packing_reason or "it cannot take packed rows")
        )
    if getattr(module.datamodule, "share_prompts", None) and reason:
        raise Refusal(
            f"{module.base} cannot hold a prompt once for two answers, because {reason}; leave data.share_prompts "
            "out: whole rows give the same numbers, only slower."
        )
    return str(reason)


def refuse_dropout(techniques: Iterable[Any], way_out: str) -> None:
    """Refuses techniques that drop at random in what is compared with a reference, which does not.

    Args:
        techniques: of the run.
        way_out: what ends the sentence: what else may be done.
    """
    for technique in techniques:
        if dropout := getattr(technique, "dropout", None):
            raise Refusal(
                f"{type(technique).__name__}.dropout is {dropout}, which would change the policy at random and not the reference, "
                f"so that rewards are noise; leave it out{way_out}."
            )


def no_dropout(module: nn.Module) -> None:
    """Switches dropout off for good: layers that drop, and the probabilities that others keep as plain numbers."""
    for part in module.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and part is not module and any(mark in name for mark in _DROPS):
                setattr(part, name, 0.0)
