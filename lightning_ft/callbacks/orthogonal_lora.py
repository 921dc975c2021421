"""O-LoRA: each task trains LoRA factors of its own, in directions that those of earlier tasks do not use."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_ft.engine import freezing
from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.reducer import rebuild_reducer
from lightning_ft.engine.root import model_root
from lightning_ft.engine.tasks import Task, baseline_of, require_tasks, task_count, task_of, tasks_learned
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.thawing import check_held, release, show_late_to_optimizers
from lightning_ft.engine.traits import Cannot, Traits
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.subspace_overlap import Overlap, overlap
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.lora_layers import LoRALayer
from lightning_ft.nn.registry import base_name, injected_layers


class OrthogonalLoRA(Technique):
    """Freezes the model and trains small factors beside each linear layer, new ones for each task, kept away from the old.

    In task t: ``h = W0 x + s sum_{i <= t} B_i A_i x``, of which ``A_t`` (r, in) and ``B_t`` (out, r) train and all earlier factors
    are frozen, and ``L + lam sum_{i < t} O(A_t, A_i)`` is minimised. O sums over pairs of their rows, which span the inputs
    that a task's update looks at: where all are orthogonal, the new update leaves alone what the old ones see. The gradient of the
    second term is added once a step, before clipping. At the end the model computes with all factors. Without a TaskStream a fit
    is a task where ``tasks`` makes room for several; else all train one adapter.

    Args:
        r: rank of each task's update; 8, as in the paper.
        alpha: numerator of the scale ``s = alpha / r``.
        lam: strength; 0.5 is the paper's lambda_1. Try 0.05, 0.5, 5. 0 leaves only a new adapter for each task.
        overlap: of two rows: ``cosine``: the square of their cosine, which shrinking a factor does not change; ``squared``: the
            square of their product, the paper's equation 8; ``absolute``: its absolute value, the authors' code. With these two
            the right lam depends on the width of the layers, and a large one shrinks A instead of turning it.
        dropout: probability of zeroing an input of A while training.
        target: what gets factors: ``all-linear`` (all linear layers but the head), or names, see `LoRA`.
        exclude: names to leave out; None leaves out none.
        layers: only inside these repeated blocks: ``"0-3,7"``, ``"-4:"`` or indices; None is all.
        rslora: scale by ``alpha / sqrt(r)``.
        tasks: how many tasks there is room for; None: as many as the TaskStream has. Needed where one callback is given to
            several fits in Python, each a task.
        name: factors of task i are the adapter ``name_i``, which `set_adapters` and ``export`` take.

    Logs:
        ``train/orthogonal_lora``, the sum of O without lam, from the second task on.

    Cost: LoRA's for each task: its factors, and from its start on their products in each step. Of the overlap r R in numbers a
    layer and step, with R rows of earlier tasks.

    Raises:
        Refusal: at setup for a stream that does not tell its tasks, and where there is no room for its tasks.

    Differs from: the paper, whose measure is ``squared``, and whose code also has a penalty lambda_2 on the size of the new
        factors; take weight decay.

    Example:
        >>> OrthogonalLoRA(4, lam=1.0)
        OrthogonalLoRA(r=4, lam=1.0)

    References:
        Wang et al., 2023 (O-LoRA), equations 5 to 9. Proven against the formulas in float64, and in each step of a stream, in
        tests/functional and tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(
        slot="orthogonal_lora",
        edits=frozenset({"model", "gradients"}),
        keeps="factors of every task beside the frozen weights; merge them into a copy, or export each",
        suggested_lr=2e-4,
        cannot=(Cannot("fp16", "it adds to gradients that may still be scaled", "use bf16-mixed or 32-true"),),
    )

    def __init__(
        self,
        r: Annotated[int, Ge(1)] = 8,
        *,
        alpha: Annotated[float, Gt(0)] = 16.0,
        lam: Annotated[float, Ge(0)] = 0.5,
        overlap: Overlap = "cosine",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        target: str | list[str] = "all-linear",
        exclude: list[str] | None = None,
        layers: str | list[int] | None = None,
        rslora: bool = False,
        tasks: Annotated[int, Ge(1)] | None = None,
        name: str = "orthogonal_lora",
    ) -> None:
        self.r = r
        self.alpha = alpha
        self.lam = lam
        self.overlap = overlap
        self.dropout = dropout
        self.target = target
        self.exclude = exclude
        self.layers = layers
        self.rslora = rslora
        self.tasks = tasks
        self.name = name
        self._first = 0
        """The adapter of this fit's first task."""
        self._now = 0
        """The one that trains, or trained last."""
        self._over = False
        """Whether its task has ended with its fit."""
        self._room = tasks or 1
        self._attachment: Attachment | None = None
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self.check()
        self._config(0)

    def _config(self, index: int) -> LoRAConfig:
        return LoRAConfig(
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target=self.target if isinstance(self.target, str) else tuple(self.target),
            exclude=tuple(self.exclude or ()),
            layers=self.layers,
            rslora=self.rslora,
            adapter_name=f"{self.name}_{index}",
        )

    def resolved_arguments(self) -> dict[str, Any]:
        """With as many adapters as there are."""
        return {**arguments_of(self), "tasks": self._room}

    # -- the model ----------------------------------------------------------------------------------------------------

    def register(self, attachment: Attachment) -> None:
        """Freezes the base, injects an adapter for each task, and edits gradients."""
        self._attachment = attachment
        trainer = attachment._trainer
        if trainer is not None and trainer.state.fn == "fit":
            self._make_room(trainer)
        attachment.edit("freeze", "freeze the base", lambda module: freezing.freeze_base(model_root(module)[1]))
        attachment.edit("inject", self.name, lambda module: self._inject(module, attachment.seed))
        attachment.edit("inject", f"{self.name}:later", self._tell, order=9)  # names as they are then
        if self.lam:
            attachment.gradient_edit(self)

    def _make_room(self, trainer: pl.Trainer) -> None:
        data = getattr(trainer, "datamodule", None)
        if hasattr(data, "tells_tasks") and baseline_of(trainer) is None:
            require_tasks(trainer, "OrthogonalLoRA")
        wanted = self._first_of(trainer) + (task_count(trainer) if baseline_of(trainer) is None else 1)
        there = {layer.adapter_name for layer in injected_layers(trainer.lightning_module).values()}
        if self.tasks is None and f"{self.name}_0" not in there:
            self._room = wanted
        if wanted > self._room:
            raise Refusal(
                f"OrthogonalLoRA has room for {self._room} tasks, and this fit comes to number {wanted}; give tasks={wanted} "
                "(--orthogonal_lora.tasks) to the first fit."
            )

    def _first_of(self, trainer: pl.Trainer) -> int:
        """The adapter of a new fit's first task."""
        data = getattr(trainer, "datamodule", None)
        if getattr(data, "continue_from", None) is not None:
            return 0  # its tasks are counted from the very first one
        another = self._over and (self.tasks is not None or hasattr(data, "tells_tasks"))
        return self._now + int(another)

    def _inject(self, module: pl.LightningModule, seed: int) -> None:
        root = model_root(module)[1]
        for index in reversed(range(self._room)):  # the first outermost: its name is the same however many follow
            inject_lora(root, self._config(index), seed=seed, freeze_base=False)

    def _tell(self, module: pl.LightningModule) -> None:
        """All but the first adapter begin frozen."""
        for index, layers in self._adapters(module).items():
            _switch(layers, on=index == 0, trains=index == 0, dropout=self.dropout)
        injected = {id(p): p for layers in self._adapters(module).values() for x in layers.values() for p in _own(x)}
        Attachment.of(module).train_later(
            name for name, p in module.named_parameters() if id(p) in injected and not p.requires_grad
        )

    def _adapters(self, module: nn.Module) -> dict[int, dict[str, LoRALayer]]:
        """Number of the task -> pristine name of a module -> its layer."""
        found: dict[int, dict[str, LoRALayer]] = {index: {} for index in range(self._room)}
        for index, layers in found.items():
            for path, layer in injected_layers(module, f"{self.name}_{index}").items():
                assert isinstance(layer, LoRALayer)
                layers[base_name(path, module)] = layer
        return found

    # -- the tasks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets a user's own ``configure_optimizers`` see all that will ever train."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not hasattr(pl_module, "lightning_ft_module"):
            show_late_to_optimizers(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is restored: what the task says trains."""
        if trainer.ckpt_path is None:
            self._first = self._first_of(trainer)
        self._over = False
        task = task_of(trainer) if baseline_of(trainer) is None else None
        late = {n: p for n, p in pl_module.named_parameters() if n in Attachment.of(pl_module).late}
        check_held(late, trainer.optimizers)
        # Before the first task of a stream that goes on from another, what that one has learned is what is measured.
        before = max(0, tasks_learned(trainer) - 1) if baseline_of(trainer) is None else 0
        self._open(trainer, pl_module, self._first + (task.index if task is not None else before))
        super().on_train_start(trainer, pl_module)

    def on_task_start(self, trainer: pl.Trainer, module: pl.LightningModule, task: Task) -> None:
        """The next adapter."""
        if baseline_of(trainer) is None:
            self._open(trainer, module, self._first + task.index)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Another fit is another task, where there is room for several."""
        self._over = True

    def _open(self, trainer: pl.Trainer, module: pl.LightningModule, index: int) -> None:
        """Lets one adapter train, on top of all before it."""
        release(module)
        adapters = self._adapters(module)
        before = [p.requires_grad for p in module.parameters()]
        for number, layers in adapters.items():
            _switch(layers, on=number <= index, trains=number == index, dropout=self.dropout)
        self._now = index
        self._pairs = list(self._pairs_of(adapters, index))
        freezing.set_training(module)
        if before != [p.requires_grad for p in module.parameters()]:
            rebuild_reducer(trainer.strategy)

    def _pairs_of(self, adapters: dict[int, dict[str, LoRALayer]], index: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The trained A of each layer beside the rows of all earlier ones there, (R, in), whole on every rank."""
        for name, layer in adapters[index].items() if index and self.lam else ():
            old = [_rows(adapters[number][name].lora_A.detach()) for number in range(index)]
            yield layer.lora_A, torch.cat(old)

    def edit_(self, parameters: dict[str, nn.Parameter]) -> None:
        """Adds the gradient of the overlap, once a step, the same on every rank."""
        if not self._pairs or self._attachment is None:
            return
        total = 0.0
        for parameter, old in self._pairs:
            new = _rows(parameter.detach()).requires_grad_()
            with torch.enable_grad():
                value = overlap(new, old, self.overlap)
                (grad,) = torch.autograd.grad(value, new)
            total += float(value.detach())
            grad = (self.lam * grad).view(parameter.shape).to(parameter.dtype)
            if isinstance(parameter, DTensor):  # every rank has all of it, and keeps its own rows
                whole = [Replicate() for _ in parameter.placements]
                grad = DTensor.from_local(grad, parameter.device_mesh, whole).redistribute(
                    placements=parameter.placements
                )
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        if self._attachment.trainer._logger_connector.should_update_logs:
            self._attachment.module.log(f"train/{self.name}", total)

    # -- state ------------------------------------------------------------------------------------------------------------

    def _leave(self, module: pl.LightningModule) -> None:
        self._attachment, self._pairs = None, []  # a callback that is kept keeps no model
        super()._leave(module)

    def state_dict(self) -> dict[str, Any]:
        """Which adapter trains."""
        return {"first": self._first, "now": self._now, "over": self._over}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with it."""
        self._first, self._now, self._over = state_dict["first"], state_dict["now"], state_dict["over"]


def _own(layer: LoRALayer) -> list[nn.Parameter]:
    return list(layer.injected_parameters().values())


def _switch(layers: dict[str, LoRALayer], *, on: bool, trains: bool, dropout: float) -> None:
    """An adapter whose task is still to come costs nothing; one whose task is over computes as it did in evaluation."""
    for layer in layers.values():
        layer.enabled = on
        layer.dropout = dropout if trains else 0.0
        for parameter in _own(layer):
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None


def _rows(factor: Tensor) -> Tensor:
    """(r, in) as one tensor, in at least fp32."""
    whole = factor.full_tensor() if isinstance(factor, DTensor) else factor
    return whole.flatten(1).to(torch.promote_types(whole.dtype, torch.float32)).clone()


__all__ = ["OrthogonalLoRA"]
