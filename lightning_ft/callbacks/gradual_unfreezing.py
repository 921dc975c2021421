"""Train the head first and thaw the model below it block by block."""

from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
from annotated_types import Ge, Gt, Le
from torch import nn

from lightning_ft.engine import freezing
from lightning_ft.engine.arguments import arguments_of, signature_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.model_parts import pristine_parameters
from lightning_ft.engine.reducer import rebuild_reducer
from lightning_ft.engine.root import model_root
from lightning_ft.engine.summary import trained_counts
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.thawing import Thawing, check_held, show_late_to_optimizers
from lightning_ft.engine.traits import Traits
from lightning_ft.engine.unfreezing_schedule import Phase, depth_factors, entries_of, gradual_phases, read_schedule
from lightning_ft.functional.errors import Refusal


class GradualUnfreezing(Technique):
    """Trains the head alone at first, then thaws one block after another from the top, the embeddings last.

    Part k trains from ``k * every`` on: the head is part 0, the last block (with a final norm or pooler) part 1, the block
    below part 2, what lies before the first block the last part. What trains is a function of the epoch or optimizer step
    alone, and a part thaws between two optimizer steps, never within an accumulation window.

    Args:
        every: how many epochs (or steps, see ``unit``) each part waits after the one above it; 1, one part an epoch, as in the
            paper's section 3.3.
        unit: what ``every`` counts: ``epoch``, or ``step`` for optimizer steps, which short runs need.
        groups: blocks that thaw together; the paper's 1 takes as many epochs as there are blocks, so deep models want more.
        start: names that train from the beginning beside the head, as `Freeze.train` takes them; None adds none.
        layers: only these blocks ever thaw: ``"0-3,7"``, ``"-4:"`` (the last four) or indices; None is all of them.
        embeddings: whether the embeddings, and whatever else lies before the first block, thaw at the end.
        schedule: a file (or its content) that says by name what trains from when, instead of the arguments above; write one to
            edit with ``lightning-ft schedule``. None goes by the arguments above.
        layer_decay: factor of the learning rate from each block to the one below it: 1 for the head, this for the last block,
            its square for the next. Howard and Ruder take 1 / 2.6; None keeps one rate. Modules of this library only.
        name: tells two of them apart; what either has thawed trains.

    Beside LoRA, whose base is frozen, factors train from the start and the base thaws as said. What `Freeze` freezes by name
    never thaws, nor what the module itself has frozen, unless ``start`` or a schedule names it.
    Cost: a frozen part costs no gradient and no optimizer state before it thaws, and nothing below the lowest thawed block
    is differentiated; a checkpoint holds all parts that will ever train from the beginning.

    Raises:
        Refusal: for a schedule that cannot be read here; at setup for names that match nothing and models without numbered
            blocks; when training starts, for an optimizer that lacks what thaws later.

    Example:
        >>> GradualUnfreezing(100, unit="step", groups=4)
        GradualUnfreezing(every=100, unit='step', groups=4)

    References:
        Howard et al., 2018 (ULMFiT), sections 3.2 and 3.3.
    """

    traits: ClassVar[Traits] = Traits(
        slot="unfreezing", edits=frozenset({"model"}), keeps="the trained parameters in their place"
    )

    def __init__(
        self,
        every: Annotated[int, Ge(1)] = 1,
        *,
        unit: Literal["epoch", "step"] = "epoch",
        groups: Annotated[int, Ge(1)] = 1,
        start: list[str] | None = None,
        layers: str | list[int] | None = None,
        embeddings: bool = True,
        schedule: str | list[dict[str, int | str | list[str]]] | None = None,
        layer_decay: Annotated[float, Gt(0), Le(1)] | None = None,
        name: str = "unfreezing",
    ) -> None:
        self.every = every
        self.unit = unit
        self.groups = groups
        self.start = start
        self.layers = layers
        self.embeddings = embeddings
        self.schedule = schedule
        self.layer_decay = layer_decay
        self.name = name
        self.check()
        self._written = read_schedule(schedule, unit=unit) if schedule is not None else None
        if self._written is not None:
            self._refuse_two_plans()
        self._thawing = Thawing(self.phases, spare_frozen=schedule is None)  # a schedule names, and so means, each part
        self._open: int | None = None

    def _refuse_two_plans(self) -> None:
        defaults = {name: parameter.default for name, parameter in signature_of(type(self)).items()}
        for name in ("every", "groups", "start", "layers", "embeddings"):
            if getattr(self, name) != defaults[name]:
                raise Refusal(
                    f"GradualUnfreezing.schedule says what trains when, so {name}={getattr(self, name)!r} would mean nothing; "
                    "leave one of the two out."
                )

    def resolved_arguments(self) -> dict[str, Any]:
        """With the content of the schedule's file, which may be gone when the checkpoint is loaded."""
        arguments = arguments_of(self)
        return arguments if self._written is None else {**arguments, "schedule": entries_of(self._written)}

    def phases(self, root: nn.Module) -> list[Phase]:
        """What starts to train when.

        Args:
            root: the model that names are relative to.

        Raises:
            Refusal: when the model repeats no blocks.
        """
        if self._written is not None:
            return self._written
        return gradual_phases(
            root,
            every=self.every,
            unit=self.unit,
            start=self.start or [],
            groups=self.groups,
            layers=self.layers,
            embeddings=self.embeddings,
        )

    # -- before training --------------------------------------------------------------------------------------------

    def register(self, attachment: Attachment) -> None:
        """Freezes all but what trains at once, and tells the attachment what will be thawed."""
        if self.layer_decay is not None and not hasattr(attachment.module, "lightning_ft_module"):
            raise Refusal(
                "GradualUnfreezing.layer_decay sets rates in the optimizers of this library's modules; in your own module give "
                "configure_optimizers parameter groups with rates of their own."
            )
        self._thawing.register(attachment, self.instance_name)
        if self.layer_decay is not None:
            attachment.edit("inject", f"unfreezing:{self.instance_name}:rates", self._set_rates, order=9)

    def _set_rates(self, module: pl.LightningModule) -> None:
        assert self.layer_decay is not None
        root = model_root(module)[1]
        factors = depth_factors(root, self.layer_decay)
        rates: dict[int, float] = {}
        for name, p in pristine_parameters(root).items():  # a tied one goes by its place nearest to the head
            rates[id(p)] = max(factors[name], rates.get(id(p), 0.0))
        named = module.named_parameters()
        Attachment.of(module).rate({name: rates[id(p)] for name, p in named if id(p) in rates})

    # -- while training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets a user's own ``configure_optimizers`` see all that will ever train, also where it asks for requires_grad."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not hasattr(pl_module, "lightning_ft_module"):
            show_late_to_optimizers(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After everything is restored: what the step and epoch say trains, before the first forward pass."""
        check_held(self._thawing.begin(pl_module), trainer.optimizers)
        self._thaw(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Thaws what the step and epoch have reached: they only move between an optimizer step and the next forward pass."""
        self._thaw(trainer, pl_module)
        pl_module.log("train/trainable_parameters", float(trained_counts(pl_module)[0]))

    def _thaw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch
        reached = self._thawing.open_phases(step, epoch)
        if len(reached) == self._open:
            return
        self._open = len(reached)
        all_of_us = [t._thawing for t in Attachment.of(module).techniques if isinstance(t, GradualUnfreezing)]
        if not self._thawing.set(module, set().union(*(one.open_parameters(step, epoch) for one in all_of_us))):
            return
        freezing.set_training(module)
        rebuild_reducer(trainer.strategy)
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            names, count = ", ".join(reached[-1].train if reached else ()), trained_counts(module)[0]
            line = f"epoch {epoch}, step {step}: {names} joins what is trained, now {count:,} parameters."
            trainer.progress_bar_callback.print(line)

    def _leave(self, module: pl.LightningModule) -> None:
        self._thawing.end()  # a callback that is kept keeps no model
        self._open = None
        super()._leave(module)
