"""The part of a transformers model that turns tokens into hidden states, whatever head stands on it."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn import attention
from lightning_ft.nn.prompt_places import first_position
from lightning_ft.nn.shared_segments import Shared


def find_backbone(model: Any) -> nn.Module:
    """The part of ``model`` below its head.

    Raises:
        Refusal: the model does not keep it apart.
    """
    backbone = getattr(model, "base_model", None)
    if backbone is model:  # some name their backbone otherwise than they declare
        backbone = getattr(model, "model", None)
    if not isinstance(backbone, nn.Module) or backbone is model:
        raise Refusal(f"{type(model).__name__} does not keep its backbone apart from its head; it cannot be trained.")
    return backbone


class BackboneView:
    """A view of a transformers model; holds no weights of its own and may be made anew at any time.

    Attributes:
        model: the whole model, as transformers loaded it.
        backbone: the part that turns tokens into hidden states (its last norm included).
    """

    model: Any
    backbone: nn.Module

    @property
    def config(self) -> Any:
        """The configuration of the text part of the model."""
        config = self.model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def supports_packing(self) -> bool:
        """Whether the attention that was asked for knows segments; the admission proves that every layer obeys it."""
        return getattr(self.config, "_attn_implementation", None) == attention.NAME

    @cached_property
    def _accepted(self) -> set[str]:
        """Argument names that the backbone's forward takes; "**" when it takes any."""
        # Not `self.backbone.forward`: something may have wrapped that one and hidden its signature.
        found = inspect.signature(type(self.backbone).forward).parameters
        any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())
        return {*found, "**"} if any_name else set(found)

    @cached_property
    def first_position(self) -> int:
        """The number of a row's first position: 0, but in RoBERTa's family the one after the padding's own."""
        return first_position(self.backbone)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        *,
        bounds: tuple[int, ...] | None = None,
        shared: Shared | None = None,
        mask: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            ids: (1, T) packed or (B, T) padded on the right, int64.
            positions: like ``ids``, restarting at 0 in each segment.
            bounds: packed: cumulative segment bounds (0, ..., T).
            shared: packed: what each segment sees of an earlier one before its own tokens, see `Batch`.
            mask: padded: (B, T), True on real tokens.
            **extra: further arguments of the backbone, such as a cache that is to be used.

        Returns:
            (B, T, D), D the model's width.

        Raises:
            Refusal: bounds for a model that was not loaded with attention that knows them.
        """
        if positions is not None and self._accepted & {"position_ids", "**"}:
            extra["position_ids"] = positions + self.first_position if self.first_position else positions
        if "use_cache" in self._accepted or "**" in self._accepted:
            extra.setdefault("use_cache", False)
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
            if shared is not None:
                extra["segment_shared"] = shared
        elif mask is not None:
            extra["attention_mask"] = mask
        return self.backbone(input_ids=ids, **extra).last_hidden_state
