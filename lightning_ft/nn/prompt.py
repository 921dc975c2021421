"""A soft prompt: trained vectors that every row begins with, at the embedding.

Around a Hugging Face model the prompt exists below the head only. A hook on the model that turns ids into hidden states
looks the ids up itself, lays the prompt before each row (before each segment of a packed one) and shifts positions, masks
and bounds; a second hook takes the prompt's places out of the hidden states, so that whoever asked sees one state a token,
as before. With a key-value cache the prompt is laid down by the first call and stays in the cache. An encoder-decoder has it
in the encoder, whose states keep it, since the decoder attends to it; a hook there lengthens the mask.

In a net of one's own the embedding's output grows by the prompt, and what follows must take that (a mean does).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.names import check_name
from lightning_ft.functional.places import Bounds, lay, take_out
from lightning_ft.nn.prompt_network import PromptNetwork
from lightning_ft.nn.prompt_places import first_position, prompt_place, reads_the_first
from lightning_ft.nn.registry import (
    InjectedLayer,
    base_name,
    disabled,
    injected_layers,
    innermost,
    replace_module,
)
from lightning_ft.nn.seeding import seeded_generator
from lightning_ft.nn.shared_segments import Shared
from lightning_ft.nn.targets import freeze_around

Start = Literal["vocabulary", "random"]


class PromptTokens(InjectedLayer):
    """The input embedding of a model, and the prompt that stands before what it looks up.

    Args:
        base: The embedding, or what is injected around it; its weight is (V, D).
        tokens: Length P of the prompt.
        start: ``vocabulary``: the vectors of tokens that are drawn from the table, each once while there are enough;
            ``random``: uniform in [-1/2, 1/2], as in Lester et al.
        ids: Begin with the vectors of these tokens instead, repeated or cut to P.
        among: The tokens of which ``vocabulary`` draws; None: all but the embedding's padding.
        network: Width of a network that changes the vectors before they stand in front of the row, see `PromptNetwork`; None: the
            vectors themselves stand there.
        adapter_name: Adapter that the layer belongs to.
        seed: Seed of the draw.
        name: Pristine name of the embedding, for the draw and messages.
    """

    kind = "prompt"
    decays = False  # its scale is that of the embeddings, not zero
    prompt: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        tokens: int,
        *,
        start: Start = "vocabulary",
        ids: Sequence[int] | None = None,
        among: Sequence[int] | None = None,
        network: int | None = None,
        adapter_name: str = "prompt",
        seed: int = 0,
        name: str = "",
    ) -> None:
        super().__init__(base, adapter_name)
        self.tokens, self.start, self.seed, self.name = tokens, start, seed, name
        self.ids = None if ids is None else [ids[i % len(ids)] for i in range(tokens)]
        self.among = among
        weight = cast(Tensor, innermost(base).weight)
        # At least fp32: steps of a small rate are lost in bf16.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.prompt = nn.Parameter(torch.empty(tokens, weight.shape[1], dtype=dtype, device=weight.device))
        self.network = None if network is None else PromptNetwork(weight.shape[1], network, dtype, weight.device)
        self.training = base.training
        self._inside: str | None = None  # where the model that the hooks are on has this embedding
        self._first_speaks = False
        self._laid: tuple[Bounds, Tensor | None] | None = None  # where the running forward of that model has prompts
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw or look up the first vectors."""
        if self.prompt.is_meta:
            return
        generator = seeded_generator(self.seed, f"{self.adapter_name}:{self.name}.prompt")
        if self.start == "random" and self.ids is None:
            drawn = torch.rand(self.prompt.shape, generator=generator, dtype=torch.float32, device="cpu") - 0.5
        else:
            ids = self.ids if self.ids is not None else self._drawn(generator)
            # Through the module, since some multiply what they look up; but without the prompts that another one lays there.
            inner = {x.adapter_name for x in injected_layers(self.base).values() if isinstance(x, PromptTokens)}
            with disabled(self.base, inner):
                drawn = self.base(torch.tensor(ids, device=self.prompt.device))
        self.prompt.copy_(drawn)
        if self.network is not None:
            self.network.reset_parameters(self.seed, f"{self.adapter_name}:{self.name}")

    def table(self) -> Tensor:
        """The vectors (P, D) that stand before each row: as they are trained, or as the network gives them."""
        return self.prompt if self.network is None else self.network(self.prompt)

    def _drawn(self, generator: torch.Generator) -> list[int]:
        table = innermost(self)
        rows = cast(Tensor, table.weight).shape[0]
        known = self.among or [i for i in range(rows) if i != getattr(table, "padding_idx", None)]
        order = torch.randperm(len(known), generator=generator, device="cpu").tolist()
        return [known[order[i % len(order)]] for i in range(self.tokens)]

    def forward(self, x: Tensor) -> Tensor:
        """Look the ids (..., T) up: (..., T, D), or (..., P + T, D) in a net of one's own."""
        out = cast(Tensor, self.base(x))
        if not self.enabled or self._inside is not None:
            return out
        return torch.cat([self.table().to(out.dtype).expand(*out.shape[:-2], -1, -1), out], -2)

    def extra_repr(self) -> str:
        """Show what distinguishes this layer."""
        return f"adapter={self.adapter_name!r}, tokens={self.tokens}"

    # -- hooks on the Hugging Face model that calls the embedding ----------------------------------------------------

    def hook(
        self, model: nn.Module, inside: str, *, decoder: nn.Module | None = None, first_speaks: bool = False
    ) -> None:
        """Let a Hugging Face model begin its rows with the prompt.

        Args:
            model: What takes ids and gives hidden states.
            inside: Where it has the embedding.
            decoder: What attends to the states of ``model``, which then keep the prompt's.
            first_speaks: Whether the head reads a row's first state: then the prompt's first stands in that place, which is
                where such a head looks in PEFT.
        """
        self._inside, self._first_speaks = inside, first_speaks
        model.register_forward_pre_hook(self._lay, with_kwargs=True)
        if decoder is None:
            # The prompt that was laid last stands first, and is taken out first.
            model.register_forward_hook(self._take_out, prepend=True)
        else:
            decoder.register_forward_pre_hook(self._show, with_kwargs=True)

    def _is_on(self, model: nn.Module) -> bool:
        """Whether the layer is switched on and still in the model."""
        module: nn.Module = model.get_submodule(cast(str, self._inside))
        while module is not self:
            if not isinstance(module, InjectedLayer):
                return False
            module = module.base
        return self.enabled

    def _lay(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook: the arguments with the prompt in them."""
        self._laid = None
        if not self._is_on(model):
            return None
        given = _by_name(model, args, kwargs)
        given.pop("cache_position", None)  # the model counts for itself
        mask, bounds = given.get("attention_mask"), given.get("segment_bounds")
        if isinstance(mask, Mapping) or (mask is not None and mask.dim() != 2 and bounds is None):
            raise Refusal(
                "A soft prompt needs the attention mask as (rows, tokens), but this call brings one that is made already; "
                "generate with the dynamic cache."
            )
        if given.get("cache_params") is not None:
            raise Refusal(
                f"A soft prompt cannot tell whether the recurrent state of {type(model).__name__} has seen it; generate with "
                "use_cache=False."
            )
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        pads = None
        if mask is not None and bounds is None and not bool(mask[:, 0].all()):
            pads = (mask.cumsum(1) == 0).sum(1)  # the prompt stands after them: a layer's window counts places
        if past:  # the prompt is in the cache
            return (), {**given, **self._shifted(given, None, pads, laid=False)}
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = model.get_submodule(cast(str, self._inside))(given["input_ids"])
        longest = embeds.shape[1]
        if bounds is not None:
            shared: Shared = given.get("segment_shared") or (None,) * (len(bounds) - 1)
            longest = max(
                b - a + (seen[1] if seen else 0) for (a, b), seen in zip(pairwise(bounds), shared, strict=True)
            )
            given |= self._moved(bounds, shared)
            # A segment that sees the beginning of an earlier one sees the prompt there, and has none of its own.
            bounds = (*(b for b, seen in zip(bounds, shared, strict=False) if seen is None), bounds[-1])
        self._check_room(model, longest)
        prompt = self.table().to(embeds.dtype)
        given |= self._shifted(given, bounds, pads, laid=True)
        given["input_ids"] = None
        given["inputs_embeds"] = lay(embeds, lambda rows: prompt.expand(len(rows), -1, -1), bounds, pads, axis=1)
        self._laid = (bounds, pads)
        return (), given

    def _moved(self, bounds: tuple[int, ...], shared: Shared) -> dict[str, Any]:
        """The segments of a packed row, and what they share, with prompts in them."""
        prompts = [0, *accumulate(self.tokens * (seen is None) for seen in shared)]
        moved: dict[str, Any] = {"segment_bounds": tuple(b + p for b, p in zip(bounds, prompts, strict=True))}
        if any(shared):
            moved["segment_shared"] = tuple(seen and (seen[0], seen[1] + self.tokens) for seen in shared)
        return moved

    def _shifted(self, given: dict[str, Any], bounds: Bounds, pads: Tensor | None, *, laid: bool) -> dict[str, Any]:
        """What else speaks of tokens; ``laid``: with places for the prompt, else moved by it."""
        found: dict[str, Any] = {}
        mask, positions, types = (given.get(k) for k in ("attention_mask", "position_ids", "token_type_ids"))
        if mask is not None and bounds is None:
            found["attention_mask"] = lay(mask, lambda rows: rows.new_ones(len(rows), self.tokens), None, pads)
        if positions is not None:
            found["position_ids"] = positions = positions + self.tokens
            if laid:
                steps = torch.arange(-self.tokens, 0, device=positions.device)
                # A row's lowest position is not 0 everywhere.
                found["position_ids"] = lay(positions, lambda row: row.amin(-1, True) + steps, bounds, pads)
        if types is not None and laid:
            none = types.new_zeros(*types.shape[:-1], self.tokens)
            found["token_type_ids"] = lay(types, lambda row: none, bounds, pads)
        return found

    def _check_room(self, model: nn.Module, longest: int) -> None:
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit and longest + self.tokens > limit - first_position(model):
            room = limit - first_position(model) - self.tokens
            raise Refusal(
                f"A row of {longest} tokens and the prompt's {self.tokens} do not fit into the positions of "
                f"{type(model).__name__}; shorten rows to {room} tokens, or the prompt."
            )

    def _take_out(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook: the output without the prompt's places."""
        laid, self._laid = self._laid, None
        if laid is None:
            return None

        def out(states: Tensor) -> Tensor:
            return take_out(states, self.tokens, *laid, first=self._first_speaks)

        if isinstance(output, tuple):
            return (out(output[0]), *output[1:])
        output.last_hidden_state = out(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(out(states) for states in output.hidden_states)
        return output

    def _show(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook of a decoder: the encoder's mask, as long as its states."""
        given = _by_name(decoder, args, kwargs)
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None or mask is None or states.shape[1] - mask.shape[1] < self.tokens:
            return None
        return (), {**given, "encoder_attention_mask": torch.cat([mask.new_ones(len(mask), self.tokens), mask], 1)}


def inject_prompt(
    model: nn.Module,
    tokens: int = 20,
    *,
    start: Start = "vocabulary",
    ids: Sequence[int] | None = None,
    among: Sequence[int] | None = None,
    network: int | None = None,
    target: str | None = None,
    adapter_name: str = "prompt",
    seed: int = 0,
    freeze_base: bool = True,
) -> PromptTokens:
    """Let every row of a model begin with a trained prompt, in place, and return the layer that holds it.

    Args:
        model: A Hugging Face model, or any module with an embedding.
        tokens: Length P of the prompt.
        start: See `PromptTokens`.
        ids: Token ids to begin from.
        among: Token ids to draw from; see `PromptTokens`.
        network: Width of a network around the vectors, see `PromptTokens`.
        target: Name of the embedding of a module of one's own; None takes its only one. A Hugging Face model says itself.
        adapter_name: Name of the adapter.
        seed: Seed of what is drawn.
        freeze_base: Let nothing train but injected layers and what their adapters train whole.

    Raises:
        Refusal: If there is no embedding, or several; if the name is taken. The model is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Embedding(10, 4))
        >>> inject_prompt(net, 3).prompt.shape, net(torch.tensor([[1, 2]])).shape
        (torch.Size([3, 4]), torch.Size([1, 5, 4]))
    """
    check_name(adapter_name, "The prompt's adapter_name")
    if injected_layers(model, adapter_name):
        raise Refusal(f"The model already carries an adapter called {adapter_name!r}; give the new one another name.")
    path, hooked, decoder = prompt_place(model, target)
    name = base_name(path, model)
    embedding = model.get_submodule(path)
    options: Any = {"start": start, "ids": ids, "among": among, "network": network}
    layer = PromptTokens(embedding, tokens, **options, adapter_name=adapter_name, seed=seed, name=name)
    replace_module(model, path, layer)
    if hooked is not None:
        inside = next(n for n, module in hooked.named_modules() if module is layer)
        layer.hook(hooked, inside, decoder=decoder, first_speaks=reads_the_first(model))
    if freeze_base:
        freeze_around(model)
    return layer


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


__all__ = ["PromptTokens", "inject_prompt"]
