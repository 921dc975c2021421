"""The layers of prefix tuning: attention with learned keys and values, the network they may come out of, moved positions.

Axes: P tokens of the prefix, K key heads, d width of a head, D width of the model, m of the network, N numbers a token needs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.prefix_keys import LearnedPrefix, Recorder
from lightning_ft.nn.registry import InjectedLayer, innermost
from lightning_ft.nn.seeding import seeded_generator


class PrefixNetwork(InjectedLayer):
    """The paper's network, kept at the input embedding: one vector a token of the prefix, tanh, then all layers' numbers.

    ``W2 tanh(W1 e + b1) + b2``: e (P, D), W1 (m, D), W2 (N, m). The embedding itself computes as ever.

    Args:
        base: The input embedding.
        length: P.
        width: m.
        numbers: N.
        adapter_name: Prefix that the layer belongs to.
    """

    kind = "prefix"
    decays = False

    def __init__(self, base: nn.Module, length: int, width: int, numbers: int, *, adapter_name: str = "prefix") -> None:
        super().__init__(base, adapter_name)
        table = cast(Tensor, innermost(base).weight)
        dim = table.shape[1]
        options: Any = {"dtype": torch.promote_types(_floating(table), torch.float32), "device": table.device}
        self.prefix_embedding = nn.Parameter(torch.empty(length, dim, **options))
        self.prefix_in = nn.Parameter(torch.empty(width, dim, **options))
        self.prefix_in_bias = nn.Parameter(torch.empty(width, **options))
        self.prefix_out = nn.Parameter(torch.empty(numbers, width, **options))
        self.prefix_out_bias = nn.Parameter(torch.empty(numbers, **options))
        self.training = base.training

    @torch.no_grad()
    def reset_parameters(self, seed: int, name: str) -> None:
        """Normal vectors, and the two linear layers as torch draws them."""
        dim, width = self.prefix_embedding.shape[1], self.prefix_in.shape[0]
        bounds = {"prefix_in": dim, "prefix_in_bias": dim, "prefix_out": width, "prefix_out_bias": width}
        for own, parameter in self.injected_parameters().items():
            generator = seeded_generator(seed, f"{name}.{own}.{self.adapter_name}")
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            if own in bounds:
                drawn.uniform_(-(bounds[own] ** -0.5), bounds[own] ** -0.5, generator=generator)
            else:
                drawn.normal_(generator=generator)
            parameter.copy_(drawn)

    @torch.no_grad()
    def start_at(self, table: Tensor) -> None:
        """Set the last layer so that the network gives ``table`` (P, N): the smallest such weights, without a bias."""
        hidden = self.hidden().double()  # (P, m); its rows are independent, m being at least P
        self.prefix_out.copy_((torch.linalg.pinv(hidden) @ table.double()).T)
        self.prefix_out_bias.zero_()

    def hidden(self) -> Tensor:
        """(P, m), what the last layer reads; each attention layer computes it for itself, which checkpointing needs."""
        return torch.tanh(F.linear(self.prefix_embedding, self.prefix_in, self.prefix_in_bias))

    def rows(self, begin: int, end: int) -> Tensor:
        """(P, end - begin), some of the N numbers of each token."""
        with torch.autocast(self.prefix_out.device.type, enabled=False):
            return F.linear(self.hidden(), self.prefix_out[begin:end], self.prefix_out_bias[begin:end])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the embedding gives."""
        return self.base(*args, **kwargs)


class PrefixAttention(InjectedLayer):
    """An attention layer whose tokens also see P learned keys and values.

    Args:
        base: The attention layer, which calls this library's attention function.
        seen: What a forward pass has shown of its keys and values.
        length: P.
        part: Whose attention it is.
        place: Where it begins in the network's N numbers, with the network; None: it has keys and values of its own.
        adapter_name: Prefix that the layer belongs to.
        name: Pristine name of the layer, for messages.
    """

    kind = "prefix"
    decays = False

    def __init__(
        self,
        base: nn.Module,
        seen: Recorder,
        length: int,
        *,
        part: str = "decoder",
        place: tuple[int, PrefixNetwork] | None = None,
        adapter_name: str = "prefix",
        name: str = "",
    ) -> None:
        super().__init__(base, adapter_name)
        assert seen.keys is not None and seen.values is not None
        self.name, self.part, self.length, self.window = name, part, length, seen.window
        self.heads, self.key_width = seen.keys.shape[1], seen.keys.shape[3]
        self.value_heads, self.value_width = seen.values.shape[1], seen.values.shape[3]
        # In a tuple, so that the network is not registered here as well.
        self._place = place
        if place is None:
            for own, like in (("prefix_key", seen.keys), ("prefix_value", seen.values)):
                dtype = torch.promote_types(_floating(next(self.base.parameters())), torch.float32)
                shape = (like.shape[1], length, like.shape[3])
                self.register_parameter(own, nn.Parameter(torch.empty(shape, dtype=dtype, device=like.device)))
        self.training = base.training

    @property
    def numbers(self) -> int:
        """How many numbers a token of the prefix needs here."""
        return self.heads * self.key_width + self.value_heads * self.value_width

    def table(self) -> tuple[Tensor, Tensor]:
        """Keys (K, P, d) and values, as they are trained or as the network gives them."""
        if self._place is None:
            return cast(Tensor, self.prefix_key), cast(Tensor, self.prefix_value)
        begin, network = self._place
        keys, values = network.rows(begin, begin + self.numbers).split(
            [self.heads * self.key_width, self.value_heads * self.value_width], 1
        )
        return (
            keys.reshape(self.length, self.heads, self.key_width).transpose(0, 1),
            values.reshape(self.length, self.value_heads, self.value_width).transpose(0, 1),
        )

    @torch.no_grad()
    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Set keys (K, P, d) and values that are trained directly."""
        if self._place is not None:
            raise Refusal(f"The prefix of {self.name!r} comes out of a network and has no keys and values of its own.")
        cast(Tensor, self.prefix_key).copy_(keys)
        cast(Tensor, self.prefix_value).copy_(values)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention layer gives, its tokens seeing the prefix too."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        prefix = LearnedPrefix(*self.table())
        if self.part != "cross" and hasattr(innermost(self), "compute_bias"):
            out = self._with_bias(prefix, args, kwargs)
        else:
            out = self.base(*args, **kwargs, learned_prefix=prefix)
        if not prefix.used:
            raise Refusal(
                f"The prefix of {self.name!r} did not come to the attention function, because the attention implementation was "
                "changed after the prefix was injected; leave it as it is."
            )
        return out

    def _with_bias(self, prefix: LearnedPrefix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """T5: a first layer makes the bias of all; to those after it, it goes with the prefix's P columns before the others."""
        layer: Any = innermost(self)
        bias = kwargs.get("position_bias")
        if bias is not None:
            prefix.bias = bias[..., : self.length]
            kwargs = {**kwargs, "position_bias": bias[..., self.length :]}
        elif layer.has_relative_attention_bias:
            hidden, cache = args[0] if args else kwargs["hidden_states"], kwargs.get("past_key_values")
            before = cache.get_seq_length(layer.layer_idx) if cache is not None else 0
            # The prefix stands at 0 ... P-1, the row behind it.
            prefix.bias = layer.compute_bias(
                hidden.shape[1], self.length, device=hidden.device, past_seen_tokens=before + self.length
            )
        out = self.base(*args, **kwargs, learned_prefix=prefix)
        if isinstance(out[1], Tensor):
            columns = out[1].new_zeros(()) if prefix.bias is None else prefix.bias
            whole = torch.cat([columns.expand(*out[1].shape[:-1], self.length), out[1]], -1)
            out = (out[0], whole, *out[2:])
        return out

    def extra_repr(self) -> str:
        """Show what distinguishes this layer."""
        return f"adapter={self.adapter_name!r}, length={self.length}"


class PositionsBehindPrefix(InjectedLayer):
    """A module that reads positions, a rotary one or a table, and gets those of the row moved behind the prefix.

    Args:
        base: The module.
        length: P, by how much they are moved.
        argument: Place and keyword of the positions among its arguments.
        adapter_name: Prefix that the layer belongs to.
    """

    kind = "prefix"

    def __init__(
        self, base: nn.Module, length: int, argument: tuple[int, str], *, adapter_name: str = "prefix"
    ) -> None:
        super().__init__(base, adapter_name)
        self.length, self.argument = length, argument
        self.training = base.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for later positions."""
        place, keyword = self.argument
        if self.enabled:
            moved = (args[place] if place < len(args) else kwargs.get(keyword, 0)) + self.length
            self._refuse_beyond(args[0] if isinstance(moved, int) else moved, moved)
            if place < len(args):
                args = (*args[:place], moved, *args[place + 1 :])
            else:
                kwargs = {**kwargs, keyword: moved}
        return self.base(*args, **kwargs)

    def _refuse_beyond(self, row: Any, moved: Tensor | int) -> None:
        """Refuses positions that a table does not have; ``moved`` are those of the row, or where it begins."""
        inner: Any = innermost(self)
        rows = getattr(inner, "num_embeddings", None)
        if rows is None:
            return
        rows -= getattr(inner, "offset", 0)
        if isinstance(moved, int):
            last = moved + (row.shape[1] if isinstance(row, Tensor) else row[1]) - 1
        elif moved.shape[-1] + self.length > rows:  # looked at only where it matters: a look makes a GPU wait
            last = int(moved.max())
        else:
            return
        if last >= rows:
            raise Refusal(
                f"A row of {last + 1 - self.length} tokens behind a prefix of {self.length} does not fit the model's table of "
                f"{rows} positions; shorten the rows or the prefix."
            )


def _floating(tensor: Tensor) -> torch.dtype:
    """Its dtype; of packed weights the narrowest."""
    return tensor.dtype if tensor.is_floating_point() else torch.bfloat16
