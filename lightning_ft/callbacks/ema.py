"""An exponential moving average of the trained weights, which is the model that is validated, saved and left."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.checkpoints import kept_keys
from lightning_ft.engine.gradients import like
from lightning_ft.engine.reference import swap
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.moving_average import decay_at, move_


class WeightEMA(Technique):
    """Averages the trained weights over the last steps; the average is what is validated, saved, exported and left at the end.

    After an optimizer step with weights ``w``: ``m <- d m + (1 - d) w``, and ``m = w`` at the first. Training goes on with ``w``,
    unaware of ``m``. Only what is trained is averaged: with LoRA its factors, not the base.

    Args:
        decay: d, the share that an old average keeps: it reaches back over about 1 / (1 - d) updates, 1000 at the default, which is
            Lightning's. Take less for short runs: 0.99 for some hundred steps.
        warmup: keep at most (1 + n) / (10 + n) at update n, so that a young average forgets its first weights; false starts with
            the full decay, as Lightning's EMAWeightAveraging does.
        every: optimizer steps between two updates; 1 is the smoothest, more costs less.
        start: optimizer steps before the first update; until then the model is ``w`` itself.

    Checkpoints hold the average as the model, so ``load``, ``generate``, ``export`` and ``merge`` see what was validated, and keep
    ``w`` beside it: a fit that resumes goes on from there, bit for bit.

    Cost: a float32 copy of what is trained in memory, another in checkpoints, and one addition a step.

    Raises:
        Refusal: for values out of bounds here; at setup beside a second average.

    Example:
        >>> WeightEMA(0.99)
        WeightEMA(decay=0.99)

    References:
        Polyak and Juditsky, 1992. Proven against the closed form and Lightning's EMAWeightAveraging in tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(
        slot="ema",
        edits=frozenset({"weights"}),
        keeps="the average in the place of the last weights; those are in the checkpoint, for resuming",
        alone=True,
    )

    def __init__(
        self,
        decay: Annotated[float, Ge(0), Lt(1)] = 0.999,
        *,
        warmup: bool = True,
        every: Annotated[int, Ge(1)] = 1,
        start: Annotated[int, Ge(0)] = 0,
    ) -> None:
        self.decay = decay
        self.warmup = warmup
        self.every = every
        self.start = start
        self._forget()
        self.check()

    def _forget(self) -> None:
        self._module: nn.Module | None = None
        self._names: set[str] = set()
        self._average: dict[str, Tensor] = {}
        self._updates = 0
        self._step = 0
        self._raw: dict[str, Tensor] | None = None  # the weights in training, while the average stands in their place
        self._stored: dict[str, Any] = {}
        self._validation = ExitStack()

    def register(self, attachment: Attachment) -> None:
        """Edits nothing; `setup` says from when on there is an average."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From here on, what looks at this run's weights may find an average in their place."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._forget()
        attachment, strategy = Attachment.of(pl_module), trainer.strategy
        attachment.evaluate_with(self._in_place)
        object.__setattr__(strategy, "lightning_module_state_dict", self._saved(strategy.lightning_module_state_dict))
        attachment.on_leave(lambda: strategy.__dict__.pop("lightning_module_state_dict", None))
        attachment.on_leave(self._settle)

    # -- training -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume the model is the average: training gets its own weights back."""
        super().on_train_start(trainer, pl_module)
        self._module, self._names = pl_module, kept_keys(pl_module)
        self._step = trainer.global_step
        if not self._stored:
            return
        parameters = self._parameters()
        self._updates = self._stored["updates"]
        self._average = {
            name: like(self._stored["average"].get(name, parameter.detach()), parameter).to(torch.float32, copy=True)
            for name, parameter in parameters.items()
            if name in self._stored["raw"]
        }
        with torch.no_grad():
            for name, tensor in self._stored["raw"].items():
                parameters[name].copy_(like(tensor, parameters[name]))
        self._stored = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An update after each optimizer step that counts."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        since = self._step - 1 - self.start
        if since < 0 or since % self.every:
            return
        move_(self._average, self._parameters(), decay_at(self._updates, self.decay, warmup=self.warmup))
        self._updates += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The average is the model from here on."""
        self._settle()

    # -- the average in the weights' place ------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation within training measures the average."""
        self._validation.enter_context(self._in_place())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on with its own weights."""
        self._validation.close()

    def _parameters(self) -> dict[str, nn.Parameter]:
        """What is trained now or will be in this run, by name."""
        assert self._module is not None
        self._reshard()
        return {name: parameter for name, parameter in self._module.named_parameters() if name in self._names}

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Inside, the model is the average, if there is one yet."""
        if not self._updates or self._raw is not None or self._module is None:
            yield
            return
        undo = self._swap_in()
        try:
            yield
        finally:
            self._reshard()
            for put_back in undo:
                put_back()
            self._raw = None

    def _swap_in(self) -> list[Callable[[], None]]:
        parameters = {name: p for name, p in self._parameters().items() if name in self._average}
        # A sharded parameter is overwritten in place, any other points elsewhere for a while.
        self._raw = {n: p.detach().clone() if isinstance(p, DTensor) else p.detach() for n, p in parameters.items()}
        return [swap(parameter, self._average[name]) for name, parameter in parameters.items()]

    def _reshard(self) -> None:
        """FSDP2 may still hold gathered copies after a forward without a backward."""
        assert self._module is not None
        for part in self._module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _settle(self) -> None:
        """However a fit ends, the average is the model then, so that no file that is written later can mean anything else."""
        self._validation.close()
        if self._module is not None and self._updates and self._raw is None:
            self._swap_in()
        self._module = None

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def _saved(self, original: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def lightning_module_state_dict() -> dict[str, Any]:
            with self._in_place():
                state = original()
                # What is sharded is overwritten when training gets its weights back; anything else keeps what it points to.
                sharded = self._module is not None and isinstance(self._module, FSDPModule)
                return {n: v.clone() if sharded and isinstance(v, Tensor) else v for n, v in state.items()}

        return lightning_module_state_dict

    def state_dict(self) -> dict[str, Any]:
        """The weights in training, and averages where the model's own dtype is too coarse to hold them."""
        if self._stored or not self._updates:
            return self._stored
        raw = self._raw if self._raw is not None else {n: self._parameters()[n].detach() for n in self._average}
        wide = {name: self._average[name] for name, tensor in raw.items() if tensor.dtype != torch.float32}
        return {"updates": self._updates, "raw": raw, "average": wide}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps them until the model is restored, too."""
        self._stored = state_dict
