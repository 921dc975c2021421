"""A causal language model as its parts: a backbone that gives hidden states and a head that gives logits.

Objectives need hidden states of the scored tokens and a head to run on them in chunks; transformers' own forward gives
logits of everything. This view of a transformers model takes it apart without changing it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.backbone import BackboneView, find_backbone
from lightning_ft.nn.head import score_tokens
from lightning_ft.nn.head_sums import AddingLinear, Summed, is_bare, sum_each, sum_scores

#: What some architectures do to the logits after the head, by the name of the setting in their configuration.
_MULTIPLIED_BY = ("logit_scale", "lm_head_multiplier")
_DIVIDED_BY = ("logits_scaling",)
_CAPPED_AT = ("final_logit_softcapping",)


def finish_logits(z: Tensor, config: Any) -> Tensor:
    """What an architecture does to the logits (..., V) that its head gives: scaling, then soft-capping."""
    for name in _MULTIPLIED_BY:
        if (factor := getattr(config, name, None)) is not None:
            z = z * factor
    for name in _DIVIDED_BY:
        if (factor := getattr(config, name, None)) is not None:
            z = z / factor
    for name in _CAPPED_AT:
        if (cap := getattr(config, name, None)) is not None:
            z = torch.tanh(z / cap) * cap
    return z


class LanguageHead:
    """The head of a language model: logits of hidden states, and scores of tokens without a batch of logits.

    Attributes:
        head: the module that turns hidden states into logits, before scaling and soft-capping.
    """

    head: nn.Module

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        raise NotImplementedError

    def head_parameters(self) -> list[nn.Parameter]:
        """All parameters of the head, those of injected layers and tied ones included."""
        return list(self.head.parameters())

    def must_recompute(self) -> bool:
        """Whether backward has to run the head again: something in it is trained, or it is sharded by itself."""
        return any(p.requires_grad for p in self.head_parameters()) or _sharded_by_itself(self.head)

    def score(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        outputs: Sequence[str] = ("logprob",),
        size: int | None = None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """Scores of ``labels`` (N,) given hidden states (N, D); see :func:`lightning_ft.nn.head.score_tokens`.

        Of a vocabulary that is padded only the first ``size`` tokens count, if that is given.
        """
        if "recompute" not in settings and _sharded_by_itself(self.head):
            settings["recompute"] = True
        head = self.logits if size is None else lambda rows: self.logits(rows)[..., :size]
        return score_tokens(hidden, labels, head, parameters=self.head_parameters(), outputs=outputs, **settings)

    def sum_scores(self, hidden: Tensor, labels: Tensor, losses: Sequence[Summed]) -> None:
        """Leaves in each loss its sum over ``labels`` (N,) given hidden states (N, D); see `lightning_ft.nn.head_sums`.

        All in one pass over the head; each in a pass of its own, with the gradient taken in backward, where FSDP2 shards the
        head by itself, whose hooks wait for it there, where float16 needs the scale that gradients have there, and of no tokens.
        """
        half = torch.is_autocast_enabled(kind := hidden.device.type) and torch.get_autocast_dtype(kind) == torch.float16
        if half or not len(hidden) or _sharded_by_itself(self.head):
            sum_each(hidden, labels, losses, self.score)
        elif is_bare(self.head):
            view = copy.copy(self)
            layer = view.__dict__["head"] = AddingLinear(self.head)
            sum_scores(hidden, labels, view.logits, losses, added=layer.added)
        else:
            sum_scores(hidden, labels, self.logits, losses)


class CausalLM(BackboneView, LanguageHead):
    """A view of a transformers causal model; holds no weights of its own and may be made anew at any time.

    Attributes:
        model: the whole model, as transformers loaded it.
        backbone: the part that turns tokens into hidden states (its last norm included).
        head: the module that turns hidden states into logits, before scaling and soft-capping.
    """

    def __init__(self, model: Any) -> None:
        """Find the parts.

        Args:
            model: a transformers model with a language-model head.

        Raises:
            Refusal: it has no head, or no backbone apart from the head.
        """
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            raise Refusal(f"{type(model).__name__} has no language-model head; load a causal language model.")
        self.model: Any = model
        self.backbone = find_backbone(model)
        self.head: nn.Module = head

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): the head, then the architecture's scaling and soft-capping."""
        return finish_logits(self.head(hidden), self.config)


def _sharded_by_itself(module: nn.Module) -> bool:
    """Whether FSDP2 made this module a unit: then its hooks expect its backward in the backward pass only."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
