"""Synaptic intelligence: importances gathered along the path of training, with no pass over the data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.gradients import like
from lightning_ft.engine.importance import trained_names
from lightning_ft.engine.quadratic import CANNOT, QuadraticPenalty
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.path_integral import add_step_, path_importance


class SynapticIntelligence(QuadraticPenalty):
    """Keeps what a model has learned before: each trained number is held to its old value, by how much it helped to learn.

    Minimises ``L + lam / 2 sum_i (sum_k W_ki) (theta_i - theta*_i)^2`` over earlier tasks k, with theta* what was trained at the
    end of the last one, ``W_ki = omega_ki / ((theta_end,i - theta_start,i)^2 + xi)`` and
    ``omega_ki = - sum_t g_ti (theta_{t+1,i} - theta_ti)`` over the steps t of task k. g is the gradient of the loss alone: without
    any penalty, before clipping. The penalty's gradient is added once a step, before clipping. Without a TaskStream a fit is a
    task.

    Args:
        lam: strength; twice the paper's c, which stands without the 1/2. Try 0.2, 2, 20.
        xi: what keeps W finite for numbers that hardly moved; 0.1 in the paper. With adapters at small rates take less, 1e-4.
        clamp: whether a negative W_k counts as 0. It would push a number away from its old value.
        load_from: checkpoint of an earlier fit with it, which this fit is held to; None: what this callback has measured itself.
        name: tells two of them apart, and names what is logged.

    Logs:
        ``train/si``, the penalty; at a task's end ``si/trace``, the sum of W_k, and ``si/path``, that of omega_k, which comes
        near the fall of the loss.

    Cost: six float32 copies of what is trained in memory, four in checkpoints; three additions a step.

    Raises:
        Refusal: at setup for a file without its state; when a fit starts that trains other parts than were measured.

    Differs from: the paper, whose formula has no clamp (take False).

    Example:
        >>> SynapticIntelligence(2.0)
        SynapticIntelligence(lam=2.0)

    References:
        Zenke et al., 2017, equations 3 to 5. Proven against a written-out loop in tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(slot="si", edits=frozenset({"gradients"}), continual=True, cannot=CANNOT)

    def __init__(
        self,
        lam: Annotated[float, Ge(0)] = 1.0,
        *,
        xi: Annotated[float, Gt(0)] = 0.1,
        clamp: bool = True,
        load_from: str | None = None,
        name: str = "si",
    ) -> None:
        self.lam = lam
        self.xi = xi
        self.clamp = clamp
        self.load_from = load_from
        self.name = name
        self._reset()
        self.check()

    def _reset(self) -> None:
        super()._reset()
        self.forget_task()
        self._grads: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    @property
    def asks(self) -> bool:
        """No: it watches the steps themselves."""
        return False

    def forget_task(self) -> None:
        """The path of the next task begins where this one ended."""
        self._path: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}

    def register(self, attachment: Attachment) -> None:
        """With the penalty, an edit before all others that only reads."""
        super().register(attachment)
        attachment.gradient_edit(_Reader(self.name, self._read_gradients), first=True)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, resumed: bool) -> None:
        """Looks at the weights right before and after every step."""
        for optimizer in trainer.optimizers:
            handle = optimizer.register_step_post_hook(lambda *_: self._add_step(module))
            Attachment.of(module).on_leave(handle.remove)

    def _read_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        named = {name.replace("_orig_mod.", ""): p for name, p in parameters.items()}
        self._grads = {n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None}
        self._before = {n: p.detach().clone() for n, p in named.items()}

    @torch.no_grad()
    def _add_step(self, module: pl.LightningModule) -> None:
        for name, parameter in trained_names(module).items():
            if name not in self._before:
                continue
            before = self._before[name]
            if name not in self._path:
                self._path[name] = torch.zeros_like(before, dtype=torch.promote_types(before.dtype, torch.float32))
                self._start[name] = before
            if name in self._grads:
                add_step_(self._path[name], self._grads[name], before, parameter.detach())
        self._grads, self._before = {}, {}

    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], task: int
    ) -> dict[str, Tensor]:
        """What was gathered on the way."""
        found = {}
        for name, parameter in trained_names(module).items():
            omega = self._path.get(name)
            if omega is None:
                found[name] = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                found[name] = path_importance(omega, self._start[name], parameter.detach(), self.xi, clamp=self.clamp)
        self.report(trainer, trace=_total(found), path=_total(self._path))
        return found

    def own_state(self) -> dict[str, Any]:
        """The path so far, and where it began."""
        return {"path": dict(self._path), "start": dict(self._start)} if self._path else {}

    def load_own_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Goes on along the path."""
        self._path = {name: like(value, parameters[name]).clone() for name, value in state["path"].items()}
        self._start = {name: like(value, parameters[name]) for name, value in state["start"].items()}


class _Reader:
    """An edit that changes nothing."""

    name: str

    def __init__(self, name: str, read: Callable[[dict[str, nn.Parameter]], None]) -> None:
        self.name = f"{name}:reads"
        self.edit_ = read


def _total(tensors: Mapping[str, Tensor]) -> float:
    sums = (value.sum() for value in tensors.values())
    return sum(float(one.full_tensor() if isinstance(one, DTensor) else one) for one in sums)
