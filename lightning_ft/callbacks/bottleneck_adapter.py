"""Bottleneck adapters as a callback: small networks between frozen sublayers, injected right after the model was built."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
from annotated_types import Ge, Gt, Lt

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.freezing import freeze_base
from lightning_ft.engine.init_from import agree, check_source, copy_adapter_, is_adapter_folder, stored_adapter
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.formats.adapterhub import load_adapterhub_
from lightning_ft.nn.bottleneck import BottleneckConfig, Style, bottleneck_names, inject_bottleneck
from lightning_ft.nn.bottleneck_layers import Init, NonLinearity
from lightning_ft.nn.sublayers import Kind

_AFTER_WEIGHTS = 1  # what changes weights (LoRA) is injected first, so that adapters read the changed layer's output


class BottleneckAdapter(Technique):
    """Freezes the model and trains small two-layer networks between its sublayers.

    ``f(x) = scale up(act(down(x)))`` with down (k, D), up (D, k) and ``k = D / reduction_factor``, added to a sublayer's output
    before the residual connection. The up matrix starts at zero, so the first forward is the base's own. Parameters are float32
    over a base of any dtype.

    Args:
        style: what f reads. ``pfeiffer``: the residual stream behind the feed-forward (Pfeiffer et al., 2021; the cheapest);
            ``houlsby``: the output of each sublayer, two or more a block (Houlsby et al., 2019); ``parallel``: the stream before
            the feed-forward (He et al., 2022, who take reduction_factor 2 and scale 4).
        reduction_factor: width of the model over width of the bottleneck; 16 as in AdapterHub. Smaller learns more and costs more.
        reduction_factors: other factors for some blocks by their number, ``{"0": 8}``; an encoder's count first. None: none.
        non_linearity: between the two matrices; relu as in Pfeiffer et al. and He et al. (AdapterHub's Houlsby takes swish).
        scale: factor of f: a number, ``learned`` (one for each adapter, starting at 1) or ``channel`` (one for each feature).
        dropout: probability of zeroing a number of f's output while training; 0, since short runs gain nothing from it.
        norm_before: a trained LayerNorm on what f reads; of use where that is the unnormalised stream of a pre-norm model.
        norm_after: a trained LayerNorm on what f gives.
        init: ``zero`` starts at the base model; ``houlsby`` (deviation 0.01) and ``bert`` (0.02) near it, as the papers do.
        places: which sublayers: ``attention``, ``cross_attention``, ``feed_forward``; None is all with houlsby, else the last.
        target: names of modules to wrap instead of sublayers, for models whose blocks are not known: their output h becomes
            h + f(h), with parallel h + f(x), x their input. None takes sublayers.
        exclude: names to leave out, with all that lies inside; None leaves out none.
        layers: only inside these repeated blocks: ``"0-3,7"``, ``"-4:"`` (the last four) or indices; None is all.
        init_from: start from an adapter: a folder in AdapterHub's format, or a checkpoint of this library, sharded or not;
            how it is built holds. None starts fresh.
        name: name of the adapter; two of these callbacks need different ones.

    Cost: 2 D k + D + k numbers for each adapter (k the bottleneck), two thin products a token, and at the same size more latency
    than LoRA: it cannot be merged into the weights, since f is not linear.

    Raises:
        Refusal: for values that mean nothing here; at setup for sublayers that are not known, or names that match nothing.

    Example:
        >>> BottleneckAdapter("houlsby", reduction_factor=8)
        BottleneckAdapter(style='houlsby', reduction_factor=8)

    References:
        Houlsby et al., 2019, figure 2; Pfeiffer et al., 2021, section 3; He et al., 2022, table 1. Proven against AdapterHub's
        definition, written down anew, in tests/formats/test_adapterhub.py.
    """

    traits: ClassVar[Traits] = Traits(
        slot="adapter",
        edits=frozenset({"model"}),
        keeps="small networks between frozen sublayers; export them in AdapterHub's format, they cannot be merged",
        suggested_lr=1e-4,
    )

    def __init__(
        self,
        style: Style = "pfeiffer",
        *,
        reduction_factor: Annotated[float, Gt(0)] = 16.0,
        reduction_factors: dict[str, float] | None = None,
        non_linearity: NonLinearity = "relu",
        scale: float | Literal["learned", "channel"] = 1.0,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        norm_before: bool = False,
        norm_after: bool = False,
        init: Init = "zero",
        places: list[Kind] | None = None,
        target: str | list[str] | None = None,
        exclude: list[str] | None = None,
        layers: str | list[int] | None = None,
        init_from: str | None = None,
        name: str = "adapter",
    ) -> None:
        self.style = style
        self.reduction_factor = reduction_factor
        self.reduction_factors = reduction_factors
        self.non_linearity = non_linearity
        self.scale = scale
        self.dropout = dropout
        self.norm_before = norm_before
        self.norm_after = norm_after
        self.init = init
        self.places = places
        self.target = target
        self.exclude = exclude
        self.layers = layers
        self.init_from = init_from
        self.name = name
        self._stored: BottleneckConfig | None = None
        self.check()
        self.config()
        check_source(init_from, "BottleneckAdapter")

    def config(self) -> BottleneckConfig:
        """The same as a plain configuration, for `inject_bottleneck`.

        Raises:
            Refusal: for values that mean nothing.
        """
        return BottleneckConfig(
            style=self.style,
            reduction_factor=self.reduction_factor,
            reduction_factors=self.reduction_factors or {},
            non_linearity=self.non_linearity,
            scale=self.scale,
            dropout=self.dropout,
            norm_before=self.norm_before,
            norm_after=self.norm_after,
            init=self.init,
            places=tuple(self.places or ()),
            target=self.target if isinstance(self.target, str) else tuple(self.target or ()),
            exclude=tuple(self.exclude or ()),
            layers=self.layers,
            adapter_name=self.name,
        )

    def resolved_arguments(self) -> dict[str, Any]:
        """As stored by the adapter that ``init_from`` named, and without that name."""
        arguments = {**arguments_of(self), "init_from": None}
        if self._stored is not None:
            stored = {f.name: getattr(self._stored, f.name) for f in fields(self._stored)}
            stored["name"] = stored.pop("adapter_name")
            arguments |= {k: _plain(v) for k, v in stored.items()}
        return arguments

    def register(self, attachment: Attachment) -> None:
        """Freezes the base (before other techniques thaw parts of it), then injects."""
        attachment.edit("freeze", "freeze the base", lambda module: freeze_base(model_root(module)[1]))
        attachment.edit(
            "inject",
            f"adapter:{self.name}",
            lambda module: self._inject(module, attachment.seed),
            order=_AFTER_WEIGHTS,
        )

    def _inject(self, module: pl.LightningModule, seed: int) -> None:
        path, root = model_root(module)
        if self.init_from is None:
            inject_bottleneck(root, self.config(), seed=seed, freeze_base=False)
            return
        source = Path(self.init_from).expanduser()
        if is_adapter_folder(source):
            layers = load_adapterhub_(root, source, adapter_name=self.name, dropout=self.dropout, freeze_base=False)
            self._agree(layers[0].recipe, source)
            return
        stored = stored_adapter(source, "BottleneckAdapter", self.name)
        more = {"name": self.name, "dropout": self.dropout, "init_from": None}
        config = BottleneckAdapter(**{**stored.arguments, **more}).config()
        self._agree(config, source)
        inject_bottleneck(root, config, freeze_base=False)
        copy_adapter_(
            root,
            f"{path}." if path else "",
            stored,
            self.name,
            lambda each: bottleneck_names(root, BottleneckAdapter(**each).config()),
        )

    def _agree(self, stored: BottleneckConfig, source: Path) -> None:
        """Keeps what is stored, and refuses what contradicts it."""
        self._stored = stored
        given, default = vars(self.config()), vars(BottleneckConfig())
        free = ("adapter_name", "dropout", "init")
        agree("BottleneckAdapter", source, asked=given, default=default, stored=vars(stored), free=free)


def _plain(value: Any) -> Any:
    """A value of a configuration as an argument: lists and dictionaries, None for empty ones."""
    if isinstance(value, Mapping):
        return dict(value) or None
    return (list(value) or None) if isinstance(value, tuple) else value
