"""``lightning-ft schedule``: what gradual unfreezing would thaw when, as a file to edit and to train by."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from lightning_ft.cli.configured import ConfiguredCLI
from lightning_ft.functional.errors import Refusal

SLOT = "unfreezing"


class ScheduleCLI(ConfiguredCLI):
    """The configuration of a fit, of which the model alone is built."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where to write."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str | None, default=None, help="The YAML file to write; it must be new.")

    def _set_seed(self) -> None:
        """Nothing here is random."""

    def instantiate_classes(self) -> None:
        """Without reading the schedule, which is the file that is about to be written, as a rule."""
        if self.config.get(SLOT) is not None:
            slot = self.config[SLOT]
            slot.get("init_args", slot)["schedule"] = None
        super().instantiate_classes()


def schedule_command(argv: list[str]) -> None:
    """Writes the phases that ``--unfreezing`` of the configuration (or its defaults) means for the configured model.

    Raises:
        Refusal: no --output, a file that is there already, or a model that has no blocks to thaw.
    """
    from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
    from lightning_ft.engine.root import model_root
    from lightning_ft.engine.unfreezing_schedule import write_schedule

    cli = ScheduleCLI("schedule", argv)
    if cli.config["output"] is None:
        raise Refusal("output is missing: give it as --output schedule.yaml.")
    output = Path(cli.config["output"]).expanduser()
    if output.exists():
        raise Refusal(f"--output {output} is there already, and nothing is overwritten; give a new name.")
    technique = cli.config_init.get(SLOT) or GradualUnfreezing()
    cli.model.configure_model()
    phases = technique.phases(model_root(cli.model)[1])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(write_schedule(phases), encoding="utf-8")
    last = phases[-1]
    print(
        f"{output}: {len(phases)} phases, the last at {last.unit} {last.at}; train by it with --{SLOT}.schedule {output}"
    )
