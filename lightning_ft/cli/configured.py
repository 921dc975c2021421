"""Commands that read the configuration of a fit and build parts of it, without running one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_ft.cli.training import FineTuningCLI


class ConfiguredCLI(FineTuningCLI):
    """The configuration of a fit, parsed as `fit` does; model and data are made, whose constructors load nothing.

    Args:
        command: its name, for messages.
        argv: the words after it.
        more: default classes, as of `FineTuningCLI`.
    """

    def __init__(self, command: str, argv: list[str], **more: Any) -> None:
        super().__init__(command, argv, run=False, **more)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The keys of fit that a saved configuration holds, beside those of every command."""
        super().add_arguments_to_parser(parser)
        for unused in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{unused}", default=None, help="Of fit; not used here.")

    def _parse_ckpt_path(self) -> None:
        """No checkpoint is read: one only brings the configuration of its run."""

    def instantiate_classes(self) -> None:
        """Everything but the trainer."""
        instantiate = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes  # before 4.49
        self.config_init = instantiate(self.config)
        self.model, self.datamodule = self.config_init["model"], self.config_init.get("data")
