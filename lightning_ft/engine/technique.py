"""The base of every callback: it registers what it edits with the attachment, in fixed phases, and undoes nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch import Callback

from lightning_ft.engine.arguments import arguments_of, check_arguments, describe
from lightning_ft.engine.attachment import Attachment
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.names import check_name

if TYPE_CHECKING:
    from lightning_ft.engine.traits import Traits


class Attached(Callback):
    """Joins the attachment at setup and leaves it at the end; our modules bring one, each technique is one.

    Whichever of them runs ``setup`` first registers the edits of all techniques in the Trainer, so the order of the
    callback list never matters.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Joins; the first to come installs everything."""
        Attachment.of(pl_module).install(trainer, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first hook where everything is restored under every strategy."""
        Attachment.of(pl_module).begin_training()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the checkpoint rule also for ``trainer.save_checkpoint`` after the run."""
        Attachment.of(pl_module).save(checkpoint)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes every wrapper off the module; what was trained stays."""
        self._leave(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        self._leave(pl_module)

    def _leave(self, module: pl.LightningModule) -> None:
        Attachment.of(module).uninstall()
        for name in (
            "log",
            "log_dict",
        ):  # Lightning's for this run: a callback that is kept would keep the whole module
            self.__dict__.pop(name, None)


class Technique(Attached):
    """One fine-tuning technique as a callback: constructor arguments are values, `register` says what it edits.

    Subclasses define ``traits`` and `register`; their constructor stores each argument unchanged under its own name,
    ends with ``self.check()``, and has an argument ``name`` when two of a kind may coexist.
    """

    traits: ClassVar[Traits]

    def check(self) -> None:
        """Refuses arguments that break the bounds and choices in their annotations, and a name that could be none in a file."""
        check_arguments(self)
        if isinstance(name := getattr(self, "name", None), str):
            check_name(name, f"{type(self).__name__}.name")

    @property
    def instance_name(self) -> str:
        """The name that tells two techniques of one kind apart; the slot unless a ``name`` was given."""
        return str(getattr(self, "name", None) or self.traits.slot)

    @property
    def state_key(self) -> str:
        """Distinct for two techniques of one kind with different names."""
        return f"{type(self).__qualname__}[{self.instance_name}]"

    def resolved_arguments(self) -> dict[str, Any]:
        """Constructor arguments that build the same edits again without what this run started from; for checkpoints."""
        return arguments_of(self)

    def register(self, attachment: Attachment) -> None:
        """Adds edits, terms and gradient edits to the attachment; called once a run, before the model is built."""
        raise Refusal(f"{type(self).__name__} does not say what it edits; a technique defines register(attachment).")

    def __repr__(self) -> str:
        return describe(self)
