"""(IA)^3 as a callback: vectors that scale keys, values and the feed-forward's inner activations."""

from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.freezing import freeze_base
from lightning_ft.engine.init_from import agree, check_source, copy_adapter_, is_adapter_folder, stored_adapter
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.formats.peft_ia3 import load_ia3_
from lightning_ft.nn.ia3 import IA3Config, ia3_names, inject_ia3


class IA3(Technique):
    """Freezes the model and trains vectors that scale what some of its layers read or write.

    ``softmax(Q (l_k K)^T) (l_v V)`` and ``(l_ff act(W1 x)) W2``: one number for each key, value and inner feature, one at the
    start, so the first forward is the base's own. Vectors are float32 over a base of any dtype.

    Args:
        target: the layers to scale: ``auto`` (keys, values and the second layer of the feed-forward, by the architecture's
            names, as in PEFT), ``all-linear``, or names: exact, ends (``k_proj``), globs (``*.mlp.*``), regular expressions
            (``re:...``).
        feedforward: which of the named targets have their input scaled, the others' output being scaled; None takes those that
            ``auto`` would, an empty list none.
        exclude: names to leave out; None leaves out none.
        layers: only inside these repeated blocks: ``"0-3,7"``, ``"-4:"`` (the last four) or indices; None is all.
        modules_to_save: names of modules trained in full beside the vectors and stored with them (a new head); None: none.
        init_from: start from an adapter: a PEFT folder, or a checkpoint of this library, sharded or not; its targets hold.
            None starts fresh.
        name: name of the adapter; two IA3 callbacks need different ones.

    Cost: d_k + d_v + d_ff numbers a block and AdamW's two moments of them; one elementwise product a layer.

    Raises:
        Refusal: for an empty target and the like here; at setup for targets that match nothing, with the nearest names.

    Example:
        >>> IA3(target=["k_proj", "v_proj"])
        IA3(target=['k_proj', 'v_proj'])

    References:
        Liu et al., 2022, section 3.3. Proven against PEFT in tests/formats.
    """

    traits: ClassVar[Traits] = Traits(
        slot="ia3",
        edits=frozenset({"model"}),
        keeps="vectors beside the frozen weights; export them, or merge them into a copy",
        suggested_lr=3e-3,
    )

    def __init__(
        self,
        target: str | list[str] = "auto",
        *,
        feedforward: list[str] | None = None,
        exclude: list[str] | None = None,
        layers: str | list[int] | None = None,
        modules_to_save: list[str] | None = None,
        init_from: str | None = None,
        name: str = "ia3",
    ) -> None:
        self.target = target
        self.feedforward = feedforward
        self.exclude = exclude
        self.layers = layers
        self.modules_to_save = modules_to_save
        self.init_from = init_from
        self.name = name
        self._stored: IA3Config | None = None
        self.check()
        self.config()
        check_source(init_from, "IA3")

    def config(self) -> IA3Config:
        """The same as a plain configuration, for `inject_ia3`.

        Raises:
            Refusal: for values that mean nothing.
        """
        return IA3Config(
            target=self.target if isinstance(self.target, str) else tuple(self.target),
            feedforward=None if self.feedforward is None else tuple(self.feedforward),
            exclude=tuple(self.exclude or ()),
            layers=self.layers,
            modules_to_save=tuple(self.modules_to_save or ()),
            adapter_name=self.name,
        )

    def resolved_arguments(self) -> dict[str, Any]:
        """As stored by the adapter that ``init_from`` named, and without that name."""
        arguments = {**arguments_of(self), "init_from": None}
        if self._stored is not None:
            stored = {f.name: getattr(self._stored, f.name) for f in fields(self._stored)}
            stored["name"] = stored.pop("adapter_name")
            arguments |= {key: list(value) if isinstance(value, tuple) else value for key, value in stored.items()}
        return arguments

    def register(self, attachment: Attachment) -> None:
        """Freezes the base (before other techniques thaw parts of it), then injects."""
        attachment.edit("freeze", "freeze the base", lambda module: freeze_base(model_root(module)[1]))
        attachment.edit("inject", f"ia3:{self.name}", self._inject)

    def _inject(self, module: pl.LightningModule) -> None:
        path, root = model_root(module)
        if self.init_from is None:
            inject_ia3(root, self.config(), freeze_base=False)
            return
        source = Path(self.init_from).expanduser()
        if is_adapter_folder(source):
            layers = load_ia3_(root, source, adapter_name=self.name, freeze_base=False)
            self._agree(next(iter(layers.values())).config, source)
            return
        stored = stored_adapter(source, "IA3", self.name)
        config = IA3(**{**stored.arguments, "name": self.name, "init_from": None}).config()
        self._agree(config, source)
        inject_ia3(root, config, freeze_base=False)
        copy_adapter_(
            root, f"{path}." if path else "", stored, self.name, lambda each: ia3_names(root, IA3(**each).config())
        )

    def _agree(self, stored: IA3Config, source: Path) -> None:
        """Keeps what is stored, and refuses what contradicts it."""
        self._stored = stored
        given, default = vars(self.config()), vars(IA3Config())
        agree("IA3", source, asked=given, default=default, stored=vars(stored), free=("adapter_name",))
