"""Seeing what a model computes in its own forward pass: hidden states, logits, attention maps and values, run once.

A view's methods are listened to where they give what is wanted (its hidden states, its logits); of the layers in between
transformers' own records are asked (``output_hidden_states``), and layers that make values have a hook. Nothing is computed twice,
and nothing is kept while nobody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.classifier import Classifier
from lightning_ft.nn.registry import pristine_modules
from lightning_ft.nn.select import block_lists, layer_index, linear_names, matches

View = Any
"""A `CausalLM`, `Seq2SeqLM` or `Classifier`."""

_VALUES = ("v_proj", "value", "v_lin", "value_proj", "v", "wv", "to_v")
"""How layers that make values alone are called, as the last piece of their names."""
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "to_qkv", "kv_proj")


@dataclass
class Seen:
    """What one forward pass was seen to compute.

    Attributes:
        graded: whether only a pass that builds a graph is looked at.
        result: of the view's own method: hidden states (1|B, T, D) of a language model, logits of a classifier.
        states: (1|B, T, D) each, as transformers numbers them: 0 the embeddings, i after block i, the last after the last norm.
        maps: (B, A, T, T) attention probabilities of each block, None where they were not asked for.
        values: number of a block, from 1 -> (B, T, A d) its values.
    """

    graded: bool = False
    result: Tensor | None = None
    states: tuple[Tensor, ...] = ()
    maps: tuple[Tensor | None, ...] = ()
    values: dict[int, Tensor] = field(default_factory=dict)


def block_count(config: Any, *, decoder: bool) -> int:
    """How many blocks a model has by its configuration, of an encoder-decoder its ``decoder``."""
    # T5 counts num_decoder_layers; BART, Marian and Pegasus decoder_layers, their num_hidden_layers being the encoder's.
    counts = (getattr(config, name, None) for name in (("num_decoder_layers", "decoder_layers") if decoder else ()))
    return int(next((count for count in counts if count), None) or config.num_hidden_layers)


class Observer:
    """Listens to a view of a model.

    Attributes:
        view: whose passes are seen.
        layers: how many blocks it has, in the stack that is listened to (of an encoder-decoder: the decoder's).
    """

    def __init__(
        self, view: View, *, states: bool = False, maps: Collection[int] = (), values: Collection[int] = ()
    ) -> None:
        """Find what is to be listened to.

        Args:
            view: of the model.
            states: whether hidden states of all layers are wanted.
            maps: numbers of the blocks, from 1, whose attention maps are wanted.
            values: numbers of the blocks whose values are wanted.

        Raises:
            Refusal: a block makes its values together with queries and keys, or cannot be found.
        """
        self.view = view
        self.states = states
        self.maps = frozenset(maps)
        self.values = frozenset(values)
        self._now: Seen | None = None
        self._inside = False
        self._undo: list[Callable[[], None]] = []
        self.attention = self._attention()

    @cached_property
    def stack(self) -> nn.Module:
        """The module whose blocks are numbered."""
        found: nn.Module = getattr(self.view, "decoder", None) or self.view.backbone
        return found

    @cached_property
    def layers(self) -> int:
        """How many blocks the stack has."""
        return block_count(self.view.config, decoder=hasattr(self.view, "decoder"))

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return int(self.view.config.hidden_size)

    def attach(self) -> None:
        """Begins to listen; see `detach`."""
        if isinstance(self.view, Classifier):
            self._listen("token_logits" if self.view.task == "token_classification" else "row_logits")
        else:
            self._listen("hidden")
        if self.states or self.maps or self.values:
            self._hold(self.stack.register_forward_pre_hook(self._ask, with_kwargs=True))
            self._hold(self.stack.register_forward_hook(self._record, always_call=True))
        for number, (value, owner) in self.attention.items():
            if number in self.values:
                assert value is not None  # checked when it was looked for
                self._hold(value.register_forward_hook(self._value_of(number)))
            if number in self.maps:
                self._hold(owner.register_forward_pre_hook(self._without_dropout))
                self._hold(owner.register_forward_hook(self._with_dropout, always_call=True))

    def detach(self) -> None:
        """Takes every hook off and forgets what was seen."""
        for undo in reversed(self._undo):
            undo()
        self._undo, self._now = [], None

    def watch(self) -> None:
        """From here on passes that build a graph are seen."""
        self._now = Seen(graded=True)

    def take(self) -> Seen:
        """What was seen of the last pass since `watch` or the last `take`; goes on watching.

        Raises:
            Refusal: nothing was.
        """
        seen, self._now = self._now, Seen(graded=True)
        if seen is None or seen.result is None:
            raise Refusal(
                f"The training step has not run {type(self.view.model).__name__} with a gradient, so there is nothing to compare."
            )
        return seen

    @contextmanager
    def seeing(self) -> Iterator[Seen]:
        """Inside, passes are seen whether they build a graph or not."""
        before, self._now = self._now, Seen()
        try:
            yield self._now
        finally:
            self._now = before

    # -- what is listened to ------------------------------------------------------------------------------------------

    def _looks(self) -> Seen | None:
        seen = self._now
        return None if seen is None or (seen.graded and not torch.is_grad_enabled()) else seen

    def _listen(self, name: str) -> None:
        original = getattr(self.view, name)

        def heard(*args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = original(*args, **kwargs)
            if (seen := self._looks()) is not None:
                seen.result = result
            return result

        self.view.__dict__[name] = heard
        self._undo.append(lambda: self.view.__dict__.pop(name, None))

    def _hold(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._inside = self._looks() is not None
        if not self._inside:
            return None
        more: dict[str, Any] = {"output_hidden_states": True} if self.states else {}
        return args, {**kwargs, **more, **({"output_attentions": True} if self.maps else {})}

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = False  # what runs a block again in backward is not looked at
        if (seen := self._looks()) is not None:
            seen.states = tuple(getattr(output, "hidden_states", None) or ())
            seen.maps = tuple(getattr(output, "attentions", None) or ())

    def _value_of(self, number: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._inside and (seen := self._looks()) is not None:
                seen.values[number] = output

        return record

    def _without_dropout(self, module: nn.Module, args: Any) -> None:
        # transformers gives attention maps after their dropout, which are no distributions.
        module.__dict__["_lightning_ft_mode"] = module.training
        module.training = False

    def _with_dropout(self, module: nn.Module, args: Any, output: Any) -> None:
        module.training = module.__dict__.pop("_lightning_ft_mode", module.training)

    def _attention(self) -> dict[int, tuple[nn.Module | None, nn.Module]]:
        """Number of each wanted block -> (the layer that makes its values, if one does alone; the module that attends)."""
        wanted = self.maps | self.values
        if not wanted:
            return {}
        model = self.view.model
        if hasattr(self.view, "decoder"):
            raise Refusal(
                f"{type(model).__name__} attends in three places in each layer, which have no one map; leave attention and values "
                "out."
            )
        places = pristine_modules(model)
        found: dict[int, tuple[nn.Module | None, nn.Module]] = {}
        names = linear_names(model)
        sizes = block_lists(names)
        for name in names:
            at, last = layer_index(name, sizes), name.rpartition(".")[2]
            if at is None or at[1] + 1 not in wanted or not any(matches(last, end) for end in _VALUES + _FUSED):
                continue
            alone = places[name][1] if last in _VALUES else None
            found.setdefault(at[1] + 1, (alone, places[name.rpartition(".")[0]][1]))
        missing = sorted(wanted - set(found))
        if missing:
            raise Refusal(f"No layer that makes values was found in block {missing[0]} of {type(model).__name__}.")
        fused = [number for number in sorted(self.values) if found[number][0] is None]
        if fused:
            raise Refusal(
                f"{type(model).__name__} makes queries, keys and values in one layer, so that its values cannot be seen alone; "
                "leave values out."
            )
        return found


def check_maps(seen: Seen, numbers: Collection[int], who: str) -> None:
    """Refuses attention maps that are none, or no distributions.

    Args:
        seen: what was seen of a pass.
        numbers: of the blocks, from 1.
        who: ``The student``, for the sentence.

    Raises:
        Refusal: the attention that runs keeps no maps, or drops some of their entries.
    """
    for number in numbers:
        found = seen.maps[number - 1] if len(seen.maps) >= number else None
        if found is None:
            raise Refusal(f"{who} gives no attention maps; set its attention to eager (--model.attention eager).")
        if float((found.detach().float().sum(-1) - 1).abs().max()) > 1e-2:
            raise Refusal(
                f"{who} drops entries of its attention maps while it trains, so that they are no distributions; set its attention "
                "dropout to 0 in config.json."
            )


__all__ = ["Observer", "Seen", "check_maps"]
