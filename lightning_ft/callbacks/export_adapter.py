"""The adapter as a folder that other tools load, written while a run goes on."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.formats.adapter_folder import adapter_files, check_adapter
from lightning_ft.formats.peft_folder import meant_adapter
from lightning_ft.formats.peft_reading import CONFIG_FILE
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import injected_layers


class ExportAdapter(Technique):
    """Writes the adapter as a folder that PEFT loads, at the end of the fit or after validations, so that no export is forgotten.

    A bottleneck adapter, which PEFT lacks, becomes a folder that AdapterHub loads.

    Args:
        every: when to write: at the end of the ``fit``, or after each ``validation``.
        monitor: a logged metric such as ``val/loss``: after a validation, write only if it is the best so far. None writes the
            latest.
        mode: whether the best value of ``monitor`` is the smallest (min) or the largest (max).
        output: the folder; an earlier adapter in it is replaced, anything else refused. None is a folder in the run's own, called
            as ``name``.
        adapter: which adapter, where a run trains several.
        without_head: leave a trained head out where the format has no place for it, which AdapterHub's has not.
        name: tells two of them apart.

    It is what ``lightning-ft export`` writes from a checkpoint: complete or not there at all, also after a crash. With a weight
    average (slot ema) it holds the averaged factors.

    Cost: one file of the factors' size at each writing.

    Raises:
        Refusal: for ``monitor`` at the end of a fit here; at setup for a model without that adapter, an adapter that the format
            cannot express, parts that train beside it and have no place there, or a folder that holds something else.

    Example:
        >>> ExportAdapter("validation", monitor="val/loss")
        ExportAdapter(every='validation', monitor='val/loss')
    """

    traits: ClassVar[Traits] = Traits(
        slot="export_adapter", edits=frozenset({"nothing"}), needs=frozenset({"adapter"}), keeps="a folder on disk"
    )

    def __init__(
        self,
        every: Literal["fit", "validation"] = "fit",
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        output: str | None = None,
        adapter: str = "default",
        without_head: bool = False,
        name: str = "adapter",
    ) -> None:
        self.every = every
        self.monitor = monitor
        self.mode = mode
        self.output = output
        self.adapter = adapter
        self.without_head = without_head
        self.name = name
        self._best: float | None = None
        self.check()
        if monitor is not None and every == "fit":
            raise Refusal(
                f"ExportAdapter.monitor is {monitor!r}, but at the end of a fit there is nothing to choose from; set every to "
                "validation, or leave monitor out."
            )

    def register(self, attachment: Attachment) -> None:
        """Edits nothing; looks at the model as soon as it is built, so that no fit ends without a file."""
        self._best = None

        def look(module: pl.LightningModule) -> None:
            if attachment.installed:
                self._refuse(attachment.trainer, module)

        attachment.edit("hooks", f"export_adapter:{self.name}", look, again=True)

    def _refuse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        path, root = model_root(module)
        names = sorted({layer.adapter_name for layer in injected_layers(root).values()})
        if meant_adapter(root, self.adapter) not in names:
            raise Refusal(
                f"ExportAdapter found no adapter named {self.adapter!r} (there are {names or 'none'}); train one, with --lora.r 8 "
                "say, or leave the callback out."
            )
        late = {name.removeprefix(f"{path}." if path else "") for name in Attachment.of(module).late}
        check_adapter(root, self.adapter, without_head=self.without_head, late=late)
        folder = self._folder(trainer)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file()):
            raise Refusal(
                f"ExportAdapter.output {folder} already holds something that is no adapter; give a new folder."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a validation within training, unless another was better."""
        if self.every == "validation" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            if self.monitor is not None and not self._improved(trainer, self.monitor):
                return
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the end of the fit."""
        if self.every == "fit":
            self._write(trainer, pl_module)

    def _improved(self, trainer: pl.Trainer, monitor: str) -> bool:
        if monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise Refusal(f"ExportAdapter.monitor names {monitor!r}, which was not logged; there are {logged}.")
        value = float(trainer.callback_metrics[monitor])
        better = self._best is None or (value < self._best if self.mode == "min" else value > self._best)
        if better:
            self._best = value
        return better

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        root, folder = model_root(module)[1], self._folder(trainer)
        exported = getattr(module, "exported", nullcontext)
        with Attachment.of(module).evaluated(), exported() as said:
            # Gathers what is sharded, on every rank.
            files = adapter_files(root, self.adapter, base_model_name=getattr(module, "base", None))
            if trainer.is_global_zero:
                files.write(folder)
                if said and trainer.progress_bar_callback is not None:
                    trainer.progress_bar_callback.print(f"{folder}: {said}")

    def _folder(self, trainer: pl.Trainer) -> Path:
        run = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank: Lightning broadcasts it
        return Path(self.output).expanduser() if self.output is not None else run / self.name

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {} if self._best is None else {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on comparing with it."""
        self._best = state_dict["best"]
