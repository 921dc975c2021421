"""LoRA as a callback: small factors beside frozen weights, injected right after the model was built."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Gt, Lt

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.freezing import freeze_base
from lightning_ft.engine.init_from import agree, check_source, copy_adapter_, is_adapter_folder, stored_adapter
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.formats.peft import load_peft_
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import Biases, LoRAConfig, inject_lora, target_names
from lightning_ft.nn.lora_init import Init
from lightning_ft.nn.lora_layers import LoRAEmbedding, LoRALayer
from lightning_ft.nn.registry import injected_layers


class LoRA(Technique):
    """Freezes the model and trains two small matrices beside each linear layer.

    ``h = W0 x + s B A x``: W0 (out, in) the frozen weight, A (r, in) uniform, B (out, r) zero, ``s = alpha / r``, so the first
    forward is the base's own. Factors are float32 over a base of any dtype.

    Args:
        r: rank of the update; 8 recovers full training on most tasks (Hu et al., table 6), more helps with much data.
        alpha: numerator of the scale; twice the default r, the ratio most recipes use. Keep it when you change r.
        dropout: probability of zeroing an input of A while training; 0, since short runs gain nothing from it.
        target: what gets factors: ``all-linear`` (all linear layers but the head, as in QLoRA, section 4), or names: exact,
            ends (``q_proj``), globs (``*.mlp.*``), regular expressions (``re:...``).
        exclude: names to leave out; None leaves out none.
        layers: only inside these repeated blocks: ``"0-3,7"``, ``"-4:"`` (the last four) or indices; None is all.
        rank_pattern: other ranks for some modules, by a regular expression for the end of their name; None: none.
        alpha_pattern: other alphas, likewise.
        modules_to_save: names of modules trained in full beside the factors and stored with them (a new head); None: none.
        bias: which of the model's own biases train too: ``none`` (most models have few), ``all``, or ``lora_only``, those of the
            modules with factors.
        trainable_tokens: tokens whose rows of the input embedding, and of a head tied to it, train and are stored, the rest of
            the table staying frozen: ids, or texts that are one token each, or ids by the name of an embedding or head
            (``{lm_head: [1, 2]}``). For markers of a chat format that the base never saw. None trains no row.
        rslora: scale by ``alpha / sqrt(r)``, which keeps the update's size when r grows (Kalajdzievski, 2023).
        dora: also train the length of each output's weight (Liu et al., 2024): better at small r, slower: norms each step.
        init: where the factors start. ``default``: A uniform, B zero. ``gaussian``: A normal with deviation 1/r, B zero. ``pissa``
            (Meng et al., 2024): at the weight's r principal singular triplets, ``olora``: at the first r columns of its QR factors.
            These two learn faster at first, for one decomposition a layer at the start; linear layers only.
        lr_ratio_b: LoRA+ (Hayou et al., 2024): the learning rate of B is this many times that of A; 16 in the paper, with a
            somewhat lower rate. Embeddings' factors keep one rate. Only with a module of this library, which builds the optimizer.
            None is one rate for both.
        init_from: start from an adapter: a PEFT folder, or a checkpoint of this library, sharded or not; how it is built
            holds. None starts fresh.
        name: name of the adapter; two LoRA callbacks need different ones.

    Cost: r (in + out) numbers a layer, AdamW's two moments of them and six thin products a layer beside the base's two.

    Raises:
        Refusal: for r below 1 and the like here; at setup for targets that match nothing, with the nearest names.

    Example:
        >>> LoRA(4, target=["q_proj", "v_proj"])
        LoRA(r=4, target=['q_proj', 'v_proj'])

    References:
        Hu et al., 2022, equation 3. Proven against PEFT in tests/nn and tests/formats.
    """

    traits: ClassVar[Traits] = Traits(
        slot="lora",
        edits=frozenset({"model"}),
        keeps="factors beside the frozen weights; export them, or merge them into a copy",
        suggested_lr=2e-4,
    )

    def __init__(
        self,
        r: Annotated[int, Ge(1)] = 8,
        *,
        alpha: Annotated[float, Gt(0)] = 16.0,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        target: str | list[str] = "all-linear",
        exclude: list[str] | None = None,
        layers: str | list[int] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        modules_to_save: list[str] | None = None,
        bias: Biases = "none",
        trainable_tokens: list[int] | list[str] | dict[str, list[int]] | None = None,
        rslora: bool = False,
        dora: bool = False,
        init: Init = "default",
        lr_ratio_b: Annotated[float, Gt(0)] | None = None,
        init_from: str | None = None,
        name: str = "default",
    ) -> None:
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.target = target
        self.exclude = exclude
        self.layers = layers
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.modules_to_save = modules_to_save
        self.bias = bias
        self.trainable_tokens = trainable_tokens
        self.rslora = rslora
        self.dora = dora
        self.init = init
        self.lr_ratio_b = lr_ratio_b
        self.init_from = init_from
        self.name = name
        self._stored: LoRAConfig | None = None
        self._token_ids: list[int] | None = None
        self.check()
        self.config()
        check_source(init_from, "LoRA")

    def config(self) -> LoRAConfig:
        """The same as a plain configuration, for `inject_lora`; tokens given as texts are there once their ids are known.

        Raises:
            Refusal: for values that mean nothing.
        """
        tokens: Any = self.trainable_tokens if self._token_ids is None else self._token_ids
        if isinstance(tokens, list) and any(isinstance(token, str) for token in tokens):
            tokens = ()
        return LoRAConfig(
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target=self.target if isinstance(self.target, str) else tuple(self.target),
            exclude=tuple(self.exclude or ()),
            layers=self.layers,
            rank_pattern=self.rank_pattern or {},
            alpha_pattern=self.alpha_pattern or {},
            rslora=self.rslora,
            dora=self.dora,
            init=self.init,
            modules_to_save=tuple(self.modules_to_save or ()),
            bias=self.bias,
            trainable_tokens=tokens or (),
            adapter_name=self.name,
        )

    def resolved_arguments(self) -> dict[str, Any]:
        """As stored by the adapter that ``init_from`` named, and without that name; tokens as ids."""
        arguments = {**arguments_of(self), "init_from": None}
        if self._token_ids is not None:
            arguments["trainable_tokens"] = self._token_ids
        if self._stored is not None:
            stored = {f.name: getattr(self._stored, f.name) for f in fields(self._stored)}
            stored["name"] = stored.pop("adapter_name")
            arguments |= {
                k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v
                for k, v in stored.items()
            }
        return arguments

    def register(self, attachment: Attachment) -> None:
        """Freezes the base (before other techniques thaw parts of it), then injects."""
        attachment.edit("freeze", "freeze the base", lambda module: freeze_base(model_root(module)[1]))
        attachment.edit("inject", f"lora:{self.name}", lambda module: self._inject(module, attachment.seed))
        if self.lr_ratio_b is not None:
            if not hasattr(attachment.module, "lightning_ft_module"):
                raise Refusal(
                    f"LoRA.lr_ratio_b sets rates in the optimizer that this library builds, and {type(attachment.module).__name__} "
                    "builds its own; make the groups there with lightning_ft.engine.optimizer.parameter_groups(rates=...)."
                )
            # Among the last edits, since another adapter around this one changes the names.
            attachment.edit("hooks", f"lora+:{self.name}", lambda module: self._rate(module, attachment))

    def _rate(self, module: pl.LightningModule, attachment: Attachment) -> None:
        layers = injected_layers(module, self.name).items()
        names = [f"{p}.lora_B" for p, x in layers if isinstance(x, LoRALayer) and not isinstance(x, LoRAEmbedding)]
        attachment.rate(dict.fromkeys(names, float(self.lr_ratio_b or 1.0)))

    def _inject(self, module: pl.LightningModule, seed: int) -> None:
        path, root = model_root(module)
        self._look_up_tokens(module)
        if self.init_from is None:
            inject_lora(root, self.config(), seed=seed, freeze_base=False)
            return
        source = Path(self.init_from).expanduser()
        if is_adapter_folder(source):
            layers = load_peft_(root, source, adapter_name=self.name, dropout=self.dropout, freeze_base=False)
            self._agree(next(iter(layers.values())).config, source)
        else:
            self._inject_from_checkpoint(root, f"{path}." if path else "", source, seed)

    def _look_up_tokens(self, module: pl.LightningModule) -> None:
        texts = [t for t in self.trainable_tokens or () if isinstance(t, str)]
        if not texts or isinstance(self.trainable_tokens, dict):
            return
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise Refusal(
                f"LoRA.trainable_tokens gives tokens as texts, but {type(module).__name__} has no tokenizer; give their ids."
            )
        vocabulary = tokenizer.get_vocab()
        unknown = [text for text in texts if text not in vocabulary]
        if unknown:
            raise Refusal(
                f"LoRA.trainable_tokens names {unknown[0]!r}, which is no token of this model's vocabulary; name tokens as the "
                "vocabulary spells them, or by their ids."
            )
        self._token_ids = [int(vocabulary[text]) for text in texts]

    def _inject_from_checkpoint(self, root: torch.nn.Module, prefix: str, source: Path, seed: int) -> None:
        stored = stored_adapter(source, "LoRA", self.name)
        given = {"name": self.name, "dropout": self.dropout, "init_from": None}
        config = LoRA(**{**stored.arguments, **given}).config()
        self._agree(config, source)
        inject_lora(root, config, seed=seed, freeze_base=False)
        copy_adapter_(root, prefix, stored, self.name, lambda each: target_names(root, LoRA(**each).config()))

    def _agree(self, stored: LoRAConfig, source: Path) -> None:
        """Keeps what is stored, and refuses what contradicts it."""
        self._stored = stored
        given, default = vars(self.config()), vars(LoRAConfig())
        agree("LoRA", source, asked=given, default=default, stored=vars(stored), free=("adapter_name", "dropout"))
