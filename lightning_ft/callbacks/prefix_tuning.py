"""Prefix tuning as a callback: trained keys and values before each row, in every attention layer of a frozen model."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from annotated_types import Ge

from lightning_ft.engine.arguments import arguments_of, signature_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.freezing import freeze_base
from lightning_ft.engine.init_from import (
    agree,
    check_source,
    copy_adapter_,
    is_adapter_folder,
    one_start,
    stored_adapter,
)
from lightning_ft.engine.root import model_root
from lightning_ft.engine.start_tokens import text_ids, vocabulary_ids
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.formats.peft_prefix import load_peft_prefix_, read_prefix
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.prefix import Part, PrefixConfig, inject_prefix
from lightning_ft.nn.seeding import seeded_generator


class PrefixTuning(Technique):
    """Freezes the model and trains keys and values that every token sees before its own row, in every attention layer.

    ``softmax(Q [P_K; K]^T / sqrt(d)) [P_V; V]``: P_K, P_V of a layer (heads, P, d), float32. Each row sees them, in packed rows
    each segment; no token, mask or cache grows, and real tokens stand P positions further on. With ``network`` all of them come
    out of ``W2 tanh(W1 e + b1) + b2``, as in the paper.

    Args:
        tokens: length P of the prefix; the paper's tasks were best at 10 (tables) to 200 (summaries). 0 is off, and nothing is
            frozen then.
        start: what it begins as: ``vocabulary``, the keys and values of random tokens, special ones left out (the model
            then does what it does behind these tokens), or ``random``, normal numbers, which the paper found far worse with
            little data (figure 5).
        text: begin with the keys and values of this text's tokens instead, repeated or cut to P: best what the task is.
        network: width m of the paper's network (512 there); only its outcome is exported, and it wants a tenth of the rate
            (``--model.lr 1e-3``). None trains keys and values directly, with fewer numbers.
        parts: of a model with an encoder and a decoder, whose attention: ``encoder``, ``decoder`` (each on itself), ``cross``
            (the decoder's on the encoder). None is encoder and decoder; PEFT knows ``[decoder]`` alone.
        init_from: start from a trained prefix: a PEFT folder, or a checkpoint of this library, sharded or not; its form holds.
            None starts fresh.
        name: name of the adapter.

    Cost: 2 P times the width of all keys, for each layer; attention over P more keys, without the fastest kernels for packed
    rows on a GPU. Gradients pass through the whole model.

    Raises:
        Refusal: for fewer than no tokens and the like here; at setup for a model whose attention or positions cannot be reached;
            while it runs for a row that leaves no room in a table of positions.

    Example:
        >>> PrefixTuning(10, text="Is this review good or bad?")
        PrefixTuning(tokens=10, text='Is this review good or bad?')

    References:
        Li et al., 2021. Proven against real tokens in front of the row in tests/nn and against PEFT in tests/formats.
    """

    traits: ClassVar[Traits] = Traits(
        slot="prefix",
        edits=frozenset({"model"}),
        needs=frozenset({"attention"}),
        keeps="keys and values before each row; export them, they are no change of a weight and cannot be merged",
        suggested_lr=1e-2,
        starts_as_identity=False,
        alone=True,
    )

    def __init__(
        self,
        tokens: Annotated[int, Ge(0)] = 20,
        *,
        start: Literal["vocabulary", "random"] = "vocabulary",
        text: str | None = None,
        network: Annotated[int, Ge(1)] | None = None,
        parts: list[Part] | None = None,
        init_from: str | None = None,
        name: str = "prefix",
    ) -> None:
        self.tokens = tokens
        self.start = start
        self.text = text
        self.network = network
        self.parts = parts
        self.init_from = init_from
        self.name = name
        self._stored: PrefixConfig | None = None
        self.check()
        if text is not None and start == "random":
            raise Refusal("PrefixTuning has both a text and start 'random' to begin from; leave one of them out.")
        if text == "":
            raise Refusal("PrefixTuning.text is empty; write what to begin from, or leave it out.")
        if tokens > 0:
            self.config()
        if network is not None and start == "vocabulary" and network < tokens:
            raise Refusal(
                f"PrefixTuning.network must be at least tokens ({tokens}) to begin as real tokens, got {network}."
            )
        check_source(init_from, "PrefixTuning")
        one_start("PrefixTuning", init_from, text=text, start=None if start == "vocabulary" else start)

    def config(self) -> PrefixConfig:
        """The same as a plain configuration, for `inject_prefix`."""
        return PrefixConfig(
            length=self.tokens,
            network=self.network,
            parts=None if self.parts is None else tuple(self.parts),
            adapter_name=self.name,
        )

    def resolved_arguments(self) -> dict[str, Any]:
        """In the form that is stored, and without what the prefix began from, which its trained values replace."""
        arguments = {**arguments_of(self), "start": "random", "text": None, "init_from": None}
        if self._stored is not None:
            parts = None if self._stored.parts is None else list(self._stored.parts)
            arguments |= {"tokens": self._stored.length, "network": self._stored.network, "parts": parts}
        return arguments

    def register(self, attachment: Attachment) -> None:
        """Freezes the base (before other techniques thaw parts of it), then injects."""
        if self.tokens == 0 and self.init_from is None:
            return
        attachment.edit("freeze", "freeze the base", lambda module: freeze_base(model_root(module)[1]))
        attachment.edit("inject", f"prefix:{self.name}", lambda module: self._inject(module, attachment.seed))

    def _inject(self, module: pl.LightningModule, seed: int) -> None:
        path, root = model_root(module)
        if self.init_from is None:
            inject_prefix(root, self.config(), tokens=self._ids(module, root, seed), seed=seed, freeze_base=False)
            return
        source = Path(self.init_from).expanduser()
        if is_adapter_folder(source):
            encodes = bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))
            length = len(read_prefix(source)[0])
            self._agree(PrefixConfig(length=length, parts=("decoder",) if encodes else None), source)
            load_peft_prefix_(root, source, adapter_name=self.name, freeze_base=False)
            return
        stored = stored_adapter(source, "PrefixTuning", self.name)
        config = PrefixTuning(**{**stored.arguments, "name": self.name, "init_from": None}).config()
        self._agree(config, source)
        inject_prefix(root, config, seed=seed, freeze_base=False)
        # Two prefixes are no more than one, so no file holds two and none has to be told from the other.
        copy_adapter_(root, f"{path}." if path else "", stored, self.name, lambda each: ())

    def _ids(self, module: pl.LightningModule, root: Any, seed: int) -> list[int] | None:
        """Tokens whose keys and values the prefix begins with; None for a random one."""
        if self.start == "random":
            return None
        if self.text is None:
            get = getattr(root, "get_input_embeddings", None)
            if get is None:
                return [0] * self.tokens  # refused by `inject_prefix`
            allowed = torch.tensor(vocabulary_ids(module, get()), device="cpu")
            generator = seeded_generator(seed, f"tokens.{self.name}")
            return allowed[torch.randint(len(allowed), (self.tokens,), generator=generator, device="cpu")].tolist()
        ids = text_ids(module, "PrefixTuning", self.text)
        return (ids * (self.tokens // len(ids) + 1))[: self.tokens]

    def _agree(self, stored: PrefixConfig, source: Path) -> None:
        """Keeps what is stored, and refuses what contradicts it."""
        self._stored = stored
        has = {"tokens": stored.length, "network": stored.network, "parts": stored.parts and list(stored.parts)}
        asked = {key: getattr(self, key) for key in has}
        default = {key: parameter.default for key, parameter in signature_of(PrefixTuning).items()}
        agree("PrefixTuning", source, asked=asked, default=default, stored=has, kind="prefix")
