"""A model with a head that classifies, as its parts: logits of rows or of chosen tokens, padded or packed.

Transformers finds the place of a decoder's head by comparing ids with the padding token, which is wrong where that is
also the end of the text; here it follows from the rows' lengths. Of an encoder's padded rows the model's own forward is
asked, so that whatever its head does (pooler, mean, first token) is what is trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.formats.heads import kind_of
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.backbone import BackboneView, find_backbone
from lightning_ft.models.load_task import head_names, label_names
from lightning_ft.nn.registry import base_name
from lightning_ft.nn.shared_segments import Shared

CLASSIFIES = ("sequence_classification", "token_classification", "regression")


class Classifier(BackboneView):
    """A view of a transformers model with a classification or regression head; may be made anew at any time.

    Attributes:
        model: the whole model, as transformers loaded it.
        backbone: the part that turns tokens into hidden states.
        encoder: whether the row's first token speaks for it; of a decoder the last one does.
    """

    def __init__(self, model: Any, task: str, new_names: Collection[str] = ()) -> None:
        """Find the parts.

        Args:
            model: a transformers model for sequence or token classification.
            task: sequence_classification, token_classification or regression.
            new_names: parameters that the base's file did not give, as ``load_for_task`` returns them.

        Raises:
            Refusal: it has no head, or no backbone apart from the head.
        """
        self.model = model
        self.task = task
        self.new_names = frozenset(new_names)
        self.backbone = find_backbone(model)
        if task not in CLASSIFIES or not any(True for module in self.head for _ in module.parameters()):
            raise Refusal(
                f"{type(model).__name__} has no head for the task {task}; load it with load_for_task({task!r}, ...)."
            )
        self.encoder = kind_of(model.config) == "encoder"

    @property
    def head(self) -> list[nn.Module]:
        """The modules after the backbone, in the order in which they are declared (a dropout and a layer, mostly)."""
        # Asked anew each time: an adapter may have taken the place of one since.
        return [child for child in self.model.children() if child is not self.backbone]

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return label_names(self.model.config)

    def row_logits(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        *,
        bounds: tuple[int, ...] | None = None,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """Logits of each row.

        Args:
            ids: (1, T) packed or (B, T) padded on the right, int64.
            positions: like ``ids``, restarting at 0 in each segment.
            bounds: packed: cumulative segment bounds (0, ..., T).
            mask: padded: (B, T), True on real tokens; None when all are.
            types: like ``ids``, 1 on the second text of a pair; None where the tokenizer makes no difference.
            shared: packed, of a decoder: what each segment sees of an earlier one before its own tokens, see `Batch`.

        Returns:
            (S, C), S the number of rows, C of classes (1 for regression).

        Raises:
            Refusal: bounds for a model that was not loaded with attention that knows them.
        """
        if self.encoder and bounds is None:
            return self._own(ids, positions, mask, types)
        return self.rows_through_head(
            self.row_hidden(ids, positions, bounds=bounds, mask=mask, types=types, shared=shared)
        )

    def row_hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        *,
        bounds: tuple[int, ...] | None = None,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """The hidden state that speaks for each row, (S, D): its first token's, of a decoder its last; see `row_logits`."""
        hidden = self.hidden(ids, positions, bounds=bounds, shared=shared, mask=mask, **self._typed(types))
        if bounds is not None:
            at = bounds[:-1] if self.encoder else tuple(end - 1 for end in bounds[1:])
            return hidden[0].index_select(0, torch.tensor(at, device=hidden.device))
        if self.encoder:
            return hidden[:, 0]
        if mask is not None:
            return hidden[torch.arange(len(ids), device=ids.device), mask.sum(-1) - 1]
        return hidden[:, -1]

    def rows_through_head(self, rows: Tensor) -> Tensor:
        """Logits (S, C) of rows by what speaks for each, (S, D), where the model's own head looks at nothing else (see `admit`)."""
        x = rows[:, None]  # rows of one token: heads that pick the first or the last one find it
        pooler = getattr(self.backbone, "pooler", None) if self.encoder else None
        if isinstance(pooler, nn.Module):
            x = pooler(x)
        return self._through_head(x).reshape(len(rows), -1)

    def tokens_through_head(self, hidden: Tensor) -> Tensor:
        """Logits (N, C) of tokens by their hidden states (N, D)."""
        return self._through_head(hidden)

    def token_logits(
        self,
        ids: Tensor,
        positions: Tensor | None,
        scored: Tensor,
        *,
        bounds: tuple[int, ...] | None = None,
        mask: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Logits of chosen tokens; the head runs on no others.

        Args:
            ids: (1, T) packed or (B, T) padded on the right, int64.
            positions: like ``ids``, restarting at 0 in each segment.
            scored: (N,) int64, flat indices into ``ids.reshape(-1)``; N may be 0.
            bounds: packed: cumulative segment bounds (0, ..., T).
            mask: padded: (B, T), True on real tokens; None when all are.
            types: like ``ids``, 1 on the second text of a pair; None where the tokenizer makes no difference.

        Returns:
            (N, C), C the number of classes.

        Raises:
            Refusal: bounds for a model that was not loaded with attention that knows them.
        """
        hidden = self.hidden(ids, positions, bounds=bounds, mask=mask, **self._typed(types))
        return self._through_head(hidden.reshape(-1, hidden.shape[-1]).index_select(0, scored))

    def head_parameter_names(self) -> set[str]:
        """Names, within the model as it is now, of what a new task trains in any case: the head and a new pooler."""
        names = head_names(self.model)
        if self.new_names:
            names |= {
                name for name, _ in self.model.named_parameters() if base_name(name, self.model) in self.new_names
            }
        return names

    def output_layer(self) -> tuple[str, nn.Linear]:
        """Pristine name and module of the layer whose outputs are the logits, adapters taken off.

        Raises:
            Refusal: the head has none.
        """
        classes = self.model.config.num_labels
        inside = {id(module) for module in self.backbone.modules()}
        for name, module in reversed(list(self.model.named_modules())):
            if isinstance(module, nn.Linear) and id(module) not in inside and module.out_features == classes:
                return base_name(name, self.model), module
        raise Refusal(f"The head of {type(self.model).__name__} does not end in a linear layer of {classes} outputs.")

    @cached_property
    def _own_arguments(self) -> set[str]:
        return set(inspect.signature(type(self.model).forward).parameters)

    def _typed(self, types: Tensor | None) -> dict[str, Any]:
        """The argument that tells the texts of a pair apart, where the backbone knows it."""
        return {} if types is None or "token_type_ids" not in self._accepted else {"token_type_ids": types}

    def _own(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, types: Tensor | None) -> Tensor:
        """The model's own forward on padded rows."""
        extra: dict[str, Any] = {**self._typed(types)}
        if positions is not None and "position_ids" in self._own_arguments:
            extra["position_ids"] = positions + self.first_position
        if mask is not None:
            extra["attention_mask"] = mask.long()  # heads that take a mean multiply and add it
        logits: Tensor = self.model(input_ids=ids, **extra).logits
        return logits

    def _through_head(self, x: Tensor) -> Tensor:
        for module in self.head:
            x = module(x)
        return x
