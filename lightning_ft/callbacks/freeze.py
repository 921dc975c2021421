"""Train some of a model's own parameters and keep the rest as they are."""

from typing import ClassVar

import lightning.pytorch as pl

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.freezing import freeze_base, parameters_named
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal


class Freeze(Technique):
    """Trains only the parts of the model that you name (or all but those), with no new parameters.

    Args:
        train: names of what trains; everything else of the model is frozen. A name is a module or parameter, exact
            (``lm_head``), the end of one (``norm.weight``), a glob (``*.mlp.*``) or a regular expression (``re:...``). None
            together with ``freeze`` leaves the rest trainable.
        freeze: names of what does not train; what ``train`` names or leaves is thinned by these. None freezes nothing more.
        layers: only inside these repeated blocks: ``"0-3,7"``, ``"-4:"`` (the last four) or indices. It narrows ``train`` when
            given, else ``freeze``; None is all of them.
        name: tells two Freeze callbacks apart.

    Beside LoRA, whose base is frozen anyway, ``train`` thaws parts of it (norms, biases, the head). Of two Freeze callbacks,
    what either trains is trained, unless one of them freezes it.
    Cost: AdamW keeps three numbers for each trained parameter; nothing for a frozen one.

    Raises:
        Refusal: when neither is given, or a pattern matches nothing (with the nearest names).

    Example:
        >>> Freeze(["lm_head", "*.norm.weight"], layers="-2:")
        Freeze(train=['lm_head', '*.norm.weight'], layers='-2:')
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
        name: str = "freeze",
    ) -> None:
        self.train = train
        self.freeze = freeze
        self.layers = layers
        self.name = name
        self.check()
        if not train and not freeze:
            raise Refusal("Freeze.train and Freeze.freeze are both empty; name what trains, or what does not.")

    def register(self, attachment: Attachment) -> None:
        """Freezes all, then thaws, then freezes again, each for all techniques, so that their order is of no effect."""
        if self.train:
            attachment.edit("freeze", f"freeze:{self.instance_name}:rest", self._freeze_rest, order=1)
            attachment.edit("freeze", f"freeze:{self.instance_name}:train", self._thaw, order=2)
        if self.freeze:
            attachment.edit("freeze", f"freeze:{self.instance_name}:freeze", self._freeze, order=3)

    def _freeze_rest(self, module: pl.LightningModule) -> None:
        freeze_base(model_root(module)[1])

    def _thaw(self, module: pl.LightningModule) -> None:
        for parameter in parameters_named(model_root(module)[1], self.train or [], layers=self.layers).values():
            parameter.requires_grad_(True)

    def _freeze(self, module: pl.LightningModule) -> None:
        layers = None if self.train else self.layers
        for parameter in parameters_named(model_root(module)[1], self.freeze or [], layers=layers).values():
            parameter.requires_grad_(False)
