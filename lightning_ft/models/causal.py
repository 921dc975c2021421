"""A causal language model as its parts: a backbone that gives hidden states and a head that gives logits.

Objectives need hidden states of the scored tokens and a head to run on them in chunks; transformers' own forward gives
logits of everything. This view of a transformers model takes it apart without changing it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn import attention
from lightning_ft.nn.head import score_tokens

#: What some architectures do to the logits after the head, by the name of the setting in their configuration.
_MULTIPLIED_BY = ("logit_scale", "lm_head_multiplier")
_DIVIDED_BY = ("logits_scaling",)
_CAPPED_AT = ("final_logit_softcapping",)


class CausalLM:
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
        backbone = getattr(model, "base_model", None)
        if backbone is model:  # some name their backbone otherwise than they declare
            backbone = getattr(model, "model", None)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            raise Refusal(f"{type(model).__name__} has no language-model head; load a causal language model.")
        if not isinstance(backbone, nn.Module) or backbone is model:
            raise Refusal(
                f"{type(model).__name__} does not keep its backbone apart from its head; it cannot be trained."
            )
        self.model: Any = model
        self.backbone: nn.Module = backbone
        self.head: nn.Module = head

    @property
    def config(self) -> Any:
        """The configuration of the text part of the model."""
        config = self.model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def supports_packing(self) -> bool:
        """Whether the attention that was asked for knows segments; ``admit`` proves that every layer obeys it."""
        return getattr(self.config, "_attn_implementation", None) == attention.NAME

    @cached_property
    def _accepted(self) -> set[str]:
        """Argument names that the backbone's forward takes; "**" when it takes any."""
        # Not `self.backbone.forward`: something may have wrapped that one and hidden its signature.
        found = inspect.signature(type(self.backbone).forward).parameters
        any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())
        return {*found, "**"} if any_name else set(found)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        *,
        bounds: tuple[int, ...] | None = None,
        mask: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            ids: (1, T) packed or (B, T) padded on the right, int64.
            positions: like ``ids``, restarting at 0 in each segment.
            bounds: packed: cumulative segment bounds (0, ..., T).
            mask: padded: (B, T), True on real tokens.
            **extra: further arguments of the backbone.

        Returns:
            (B, T, D), D the model's width.

        Raises:
            Refusal: bounds for a model that was not loaded with attention that knows them.
        """
        if positions is not None and self._accepted & {"position_ids", "**"}:
            extra["position_ids"] = positions
        if "use_cache" in self._accepted or "**" in self._accepted:
            extra["use_cache"] = False
        if bounds is not None:
            if not self.supports_packing:
                raise Refusal(
                    f"Packed rows need attention='{attention.NAME}', but this {type(self.model).__name__} runs "
                    f"'{getattr(self.config, '_attn_implementation', None)}'; load it with that attention or turn "
                    "packing off."
                )
            # A mask of four axes is passed through untouched: no T x T mask is built, and no guess is made from the
            # positions. Its content is not looked at.
            extra["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
            extra["segment_bounds"] = bounds
        elif mask is not None:
            extra["attention_mask"] = mask
        return self.backbone(input_ids=ids, **extra).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): the head, then the architecture's scaling and soft-capping."""
        z = self.head(hidden)
        config = self.config
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

    def head_parameters(self) -> list[nn.Parameter]:
        """All parameters of the head, those of injected layers and tied ones included."""
        return list(self.head.parameters())

    def score(
        self, hidden: Tensor, labels: Tensor, *, outputs: Sequence[str] = ("logprob",), **settings: Any
    ) -> dict[str, Tensor]:
        """Scores of ``labels`` (N,) given hidden states (N, D); see :func:`lightning_ft.nn.head.score_tokens`."""
        if "recompute" not in settings and _sharded_by_itself(self.head):
            settings["recompute"] = True
        return score_tokens(hidden, labels, self.logits, parameters=self.head_parameters(), outputs=outputs, **settings)


def _sharded_by_itself(module: nn.Module) -> bool:
    """Whether FSDP2 made this module a unit: then its hooks expect its backward in the backward pass only."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
