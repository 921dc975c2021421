"""Task sampling: how often each task of a mixture comes."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import numpy as np
from annotated_types import Ge, Gt
from torch import Tensor

from lightning_ft.engine.arguments import refuse_idle
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.task_sampling import Method, probabilities

_SIZES = ("temperature", "loss_driven")
_USED_BY = {"temperature": _SIZES, "cap": ("proportional", *_SIZES), "strength": ("loss_driven",)}


class TaskSampling(Technique):
    """Decides how often each task of `MultiTaskData` comes, so that small tasks are not drowned and large ones not starved.

    The task of each row (of each batch, where batches hold one task) is drawn with replacement, with the probabilities

        proportional  ~ min(n_k, cap)                          n_k: rows of the task
        temperature   ~ min(n_k, cap)^(1/T)
        uniform       1 / K
        annealed      ~ n_k^a, a = 1 - 0.8 e / (E - 1)         e: epoch, E: epochs of the run
        weighted      ~ weights, as given
        round_robin   tasks in turn, nothing is drawn
        loss_driven   ~ min(n_k, cap)^(1/T) r_k^strength       r_k: the task's mean loss in the last epoch / in its first

    An epoch has ``epoch_rows`` rows (of `MultiTaskData`) whatever the method. Probabilities change between epochs only, so with
    annealed and loss_driven give short epochs to a run that has few.

    Args:
        method: which.
        temperature: of temperature and loss_driven: T; 2 is common between proportional and uniform, multilingual models take 3
            to 5.
        cap: most rows that a task is taken to have, of proportional, temperature and loss_driven; None: no bound.
        weights: of weighted: task -> share, to be divided by their sum; each task needs one.
        strength: of loss_driven: 1 follows the ratios, 0 ignores them.
        name: tells it apart in files.

    Cost: nothing.

    Raises:
        Refusal: for arguments that the method does not read; at setup for data that have no tasks, weights that do not name them
            all, annealed without ``max_epochs`` of at least 2.

    Example:
        >>> TaskSampling("temperature", temperature=3.0)
        TaskSampling(temperature=3.0)

    References:
        Raffel et al., 2020, section 3.5.2 (proportional, cap, temperature); Stickland and Murray, 2019, section 4.1 (annealed).
        Proven by chi-squared tests against the intended distributions in tests/functional.
    """

    traits: ClassVar[Traits] = Traits(
        slot="task_sampling", edits=frozenset({"data"}), needs=frozenset({"tasks"}), alone=True
    )

    def __init__(
        self,
        method: Method = "temperature",
        *,
        temperature: Annotated[float, Gt(0)] = 2.0,
        cap: Annotated[int, Ge(1)] | None = None,
        weights: dict[str, float] | None = None,
        strength: Annotated[float, Ge(0)] = 1.0,
        name: str = "task_sampling",
    ) -> None:
        self.method = method
        self.temperature = temperature
        self.cap = cap
        self.weights = weights
        self.strength = strength
        self.name = name
        self.check()
        if (weights is None) == (method == "weighted"):
            raise Refusal("TaskSampling.weights and the method weighted belong together: give both, or neither.")
        if weights is not None and (min(weights.values(), default=0.0) < 0 or not sum(weights.values()) > 0):
            raise Refusal(f"TaskSampling.weights must be at least 0, and one above, got {weights}.")
        refuse_idle(self, _USED_BY, method)
        self._epochs: int | None = None
        self._asked = 0  # the epoch that the data asked for last
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}
        self._ratios: dict[int, dict[str, float]] = {}  # of the epochs that are dealt now or were dealt before

    # -- what the data ask: `lightning_ft.data.multitask_data.Sampling` ---------------------------------------------------

    @property
    def in_turn(self) -> bool:
        """Whether tasks come in turn."""
        return self.method == "round_robin"

    def chances(self, names: Sequence[str], sizes: Sequence[int], epoch: int) -> np.ndarray:
        """(K,) probability of each task in an epoch."""
        self._asked = epoch
        ratios = self._ratios.get(epoch)
        return probabilities(
            sizes,
            self.method,
            temperature=self.temperature,
            cap=self.cap,
            weights=None if self.weights is None else [self.weights[name] for name in names],
            progress=epoch / max(1, (self._epochs or 1) - 1),
            ratios=None if ratios is None else [ratios.get(name, 1.0) for name in names],
            strength=self.strength,
        )

    # -- the run ------------------------------------------------------------------------------------------------------

    def register(self, attachment: Attachment) -> None:
        """Hands itself to the data before they make a loader."""
        trainer = attachment.module._trainer
        if trainer is None:
            return  # `lightning_ft.load` only rebuilds what was trained
        self._epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
        if self.method == "annealed" and (self._epochs or 1) < 2:
            raise Refusal(
                "TaskSampling annealed goes from the tasks' sizes to nearly equal shares over the epochs of a run, and needs at "
                "least two; set trainer.max_epochs (data.epoch_rows makes epochs shorter)."
            )
        if trainer.state.fn != "fit":
            return
        source: Any = getattr(trainer, "datamodule", None) or trainer.fit_loop._data_source.instance
        use = getattr(source, "use_sampling", None)
        if not callable(use):
            raise Refusal(
                f"TaskSampling decides how often each task of MultiTaskData comes, and {type(source).__name__} has no tasks; use "
                "MultiTaskData, or leave the technique out."
            )
        if self.weights is not None and set(self.weights) != set(source.task_names):
            raise Refusal(
                f"TaskSampling.weights names {', '.join(self.weights)}, and the tasks are {', '.join(source.task_names)}."
            )
        use(self)
        attachment.on_leave(lambda: use(None))
        if self.method == "loss_driven":
            attachment.watch(self._add)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new fit begins without a history."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._first, self._last, self._sums, self._ratios = {}, {}, {}, {}

    def _add(self, terms: list[Term], means: dict[str, Tensor]) -> None:
        for name, mean in means.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            total[0] += float(mean)
            total[1] += 1.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From the mean losses of this epoch follow the probabilities of the next."""
        if self.method != "loss_driven":
            return
        for name, (total, count) in self._sums.items():
            self._last[name] = total / count
            self._first.setdefault(name, self._last[name])
        self._sums = {}
        following = (
            self._asked + 1
        )  # the data's own count: a run that was ended in an epoch and goes on is behind the trainer's
        self._ratios[following] = {name: loss / max(self._first[name], 1e-12) for name, loss in self._last.items()}

    def state_dict(self) -> dict[str, Any]:
        """The losses that the probabilities follow."""
        return {
            "first": dict(self._first),
            "last": dict(self._last),
            "sums": {name: list(total) for name, total in self._sums.items()},
            "ratios": {epoch: dict(ratios) for epoch, ratios in self._ratios.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the losses of the checkpoint."""
        self._first, self._last = dict(state_dict["first"]), dict(state_dict["last"])
        self._sums = {name: list(total) for name, total in state_dict["sums"].items()}
        self._ratios = {int(epoch): dict(ratios) for epoch, ratios in state_dict["ratios"].items()}
