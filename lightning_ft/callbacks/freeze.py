"""Train some of a model's own parameters and keep the rest as they are."""

from typing import Annotated, ClassVar

import lightning.pytorch as pl
from annotated_types import Gt, Le

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.freezing import FREEZE_NAMED, FREEZE_REST, THAW, freeze_base, parameters_named, thaw
from lightning_ft.engine.model_parts import pristine_parameters, top_blocks
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal


class Freeze(Technique):
    """Trains only the parts of the model that you name (or all but those), with no new parameters.

    Args:
        train: names of what trains; everything else of the model is frozen. A name is a module or parameter, exact
            (``lm_head``), the end of one (``norm.weight``), a glob (``*.mlp.*``) or a regular expression (``re:...``), or one of
            four words that fit any model: ``biases`` (BitFit), ``norms``, ``embeddings`` (of inputs and positions) and ``head``
            (all outside the backbone, and the output embedding). None together with ``freeze`` leaves the rest trainable.
        freeze: names of what does not train; what ``train`` names or leaves is thinned by these. None freezes nothing more.
        layers: only inside these repeated blocks: ``"0-3,7"``, ``"-4:"`` (the last four) or indices. It narrows ``train`` when
            given, else ``freeze``; None is all of them. ``head`` and ``embeddings`` lie in no block and stay as named.
        top: this share of the blocks, from the output's side and rounded up, trains whole, beside what ``train`` names: 0.25
            of 30 blocks is the last 8. Of an encoder-decoder it is the last ones of each stack. None is no block.
        name: tells two Freeze callbacks apart.

    Beside LoRA, whose base is frozen anyway, ``train`` thaws parts of it (norms, biases, the head). Of two Freeze callbacks,
    what either trains is trained, unless one of them freezes it.
    Cost: AdamW keeps three numbers for each trained parameter; nothing for a frozen one.

    Raises:
        Refusal: when nothing is named, a pattern matches nothing (with the nearest names), or the model lacks what a word
            means: Llama and its relatives have no biases.

    Example:
        >>> Freeze(["lm_head", "*.norm.weight"], layers="-2:")
        Freeze(train=['lm_head', '*.norm.weight'], layers='-2:')

    References:
        Zaken et al., 2022 (BitFit): biases and the head of the task alone.
    """

    traits: ClassVar[Traits] = Traits(
        slot="freeze", edits=frozenset({"model"}), keeps="the trained parameters in their place"
    )

    def __init__(
        self,
        train: list[str] | None = None,
        *,
        freeze: list[str] | None = None,
        layers: str | list[int] | None = None,
        top: Annotated[float, Gt(0), Le(1)] | None = None,
        name: str = "freeze",
    ) -> None:
        self.train = train
        self.freeze = freeze
        self.layers = layers
        self.top = top
        self.name = name
        self.check()
        if not train and not freeze and top is None:
            raise Refusal("Freeze.train and Freeze.freeze are both empty; name what trains, or what does not.")

    def register(self, attachment: Attachment) -> None:
        """Freezes all, then thaws, then freezes again, each for all techniques, so that their order is of no effect."""
        if self.train or self.top is not None:
            attachment.edit("freeze", f"freeze:{self.instance_name}:rest", self._freeze_rest, order=FREEZE_REST)
            attachment.edit("freeze", f"freeze:{self.instance_name}:train", self._thaw, order=THAW)
        if self.freeze:
            attachment.edit("freeze", f"freeze:{self.instance_name}:freeze", self._freeze, order=FREEZE_NAMED)

    def _freeze_rest(self, module: pl.LightningModule) -> None:
        freeze_base(model_root(module)[1])

    def _thaw(self, module: pl.LightningModule) -> None:
        root = model_root(module)[1]
        if self.train:
            thaw(parameters_named(root, self.train, layers=self.layers))
        if self.top is not None:
            parameters = pristine_parameters(root)
            thaw({name: parameters[name] for block in top_blocks(root, self.top) for name in block.parameters})

    def _freeze(self, module: pl.LightningModule) -> None:
        layers = None if self.train or self.top is not None else self.layers
        for parameter in parameters_named(model_root(module)[1], self.freeze or [], layers=layers).values():
            parameter.requires_grad_(False)
