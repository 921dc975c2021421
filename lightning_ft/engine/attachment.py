"""The attachment: one per LightningModule, it holds everything that techniques add, in fixed phases.

The first of our callbacks (or modules) to run ``setup`` installs it for all: the techniques register what they edit, and
the module's methods are wrapped (see `lightning_ft.engine.wrappers`). ``teardown`` and ``on_exception`` undo that; only
what was trained remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_ft.engine import checkpoints, compatibility, in_backward
from lightning_ft.engine.edits import Edits
from lightning_ft.engine.freezing import refuse_frozen, set_training
from lightning_ft.engine.gradients import GradientEdit, Surgery, TermGradients
from lightning_ft.engine.randomness import global_seed
from lightning_ft.engine.reference import References
from lightning_ft.engine.step import Balancer, LossTerm, Step
from lightning_ft.engine.tasks import baseline_of
from lightning_ft.engine.terms import Term, Window
from lightning_ft.engine.wrappers import Wrappers
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.sharding import shard_
from lightning_ft.nn.log_variances import LogVariances

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_ft.engine.technique import Technique


class Attachment:
    """Everything that techniques add to one LightningModule."""

    def __init__(self, module: pl.LightningModule) -> None:
        """Args: module: the LightningModule; use `Attachment.of` to get its one attachment."""
        self.module = module
        self.references = References(module)
        self.seed = global_seed()
        self.techniques: list[Technique] = []
        self.edits = Edits(module)
        self.late: set[str] = set()
        self.rates: dict[str, float] = {}
        self.grouped: dict[str, str] = {}
        self._restored_state: dict[str, Any] = {}
        self._installed = False
        self._forget_run()

    def _forget_run(self) -> None:
        self.step = Step(self)
        self.gradient_edits: list[GradientEdit] = []
        self.term_gradients: TermGradients | None = None
        self._snapshots_wanted: set[str] = set()
        self.may_lack_gradient: set[str] = set()
        self._cleanups: list[Callable[[], None]] = []
        self._evaluated: Callable[[], AbstractContextManager[None]] = nullcontext
        self._trainer: pl.Trainer | None = None
        self._begun = False
        self._wrappers = Wrappers(self)

    # -- who there is ---------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, module: pl.LightningModule) -> Attachment:
        """The module's one attachment, made at the first call."""
        attachment = module.__dict__.get(checkpoints.ATTACHMENT)
        if attachment is None or attachment.module is not module:  # a deepcopy keeps a reference to the original
            attachment = cls(module)
            object.__setattr__(module, checkpoints.ATTACHMENT, attachment)
        return attachment

    @property
    def fingerprint(self) -> str | None:
        """Of the frozen parameters, once the model is edited; see `lightning_ft.engine.checkpoints.fingerprint`."""
        return self.edits.fingerprint

    @property
    def installed(self) -> bool:
        """Whether a Trainer is running the module now."""
        return self._installed

    @property
    def trainer(self) -> pl.Trainer:
        """The Trainer of the present run."""
        if self._trainer is None:
            raise Refusal("There is no run: the attachment knows its Trainer only between setup and teardown.")
        return self._trainer

    @property
    def fits(self) -> bool:
        """Whether the present run trains; in `lightning_ft.load` there is no run."""
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    # -- registration: techniques and modules call these from `register` -------------------------------------------

    def edit(
        self, phase: str, name: str, edit: Callable[[pl.LightningModule], None], *, order: int = 0, again: bool = False
    ) -> None:
        """Registers a model edit; it runs once in the module's life, or once a run if ``again``, by (phase, order, name)."""
        self.edits.add(phase, name, edit, order=order, again=again)

    def loss_term(self, name: str, term: LossTerm) -> None:
        """Registers a loss term, computed after the module's own step and logged as ``train/<name>``."""
        if any(existing == name for existing, _ in self.step.extra):
            raise Refusal(f"Two loss terms are named {name!r}; give one of the techniques another name.")
        self.step.extra.append((name, term))

    def before_step(self, listener: Callable[[Any], None]) -> None:
        """Registers what is told the batch before the module's own step runs on it."""
        self.step.before.append(listener)

    def gradient_edit(self, edit: GradientEdit, *, first: bool = False) -> None:
        """Registers a closed-form edit of the gradients; ``first``: one that has to see them before any other has edited them."""
        self.gradient_edits.insert(0 if first else len(self.gradient_edits), edit)

    def surgery(self, surgery: Surgery, *, weighs_own: bool = False) -> None:
        """Registers the one map from the Gram matrix of the terms' gradients to their weights.

        Args:
            surgery: the map.
            weighs_own: whether the weights hold for what one term alone reaches, too.
        """
        if self.term_gradients is not None:
            raise Refusal("Two techniques want to combine the terms' gradients; only one surgery can.")
        self.term_gradients = TermGradients(surgery, weighs_own=weighs_own)

    def balance(self, balancer: Balancer) -> None:
        """Registers what weighs the terms of each step."""
        if self.step.balancer is not None:
            raise Refusal("Two techniques want to weigh the loss terms; only one balancing can.")
        self.step.balancer = balancer

    def watch(self, watcher: Callable[[list[Term], dict[str, Tensor]], None]) -> None:
        """Registers what is told the terms and their exact means, over window and ranks, when a window is complete."""
        self.step.watchers.append(watcher)

    def want_reference(self, name: str = "start") -> None:
        """Says that ``reference(name)`` will be used, so that it is taken before anything is trained."""
        self._snapshots_wanted.add(name)

    def conditional(self, names: set[str]) -> None:
        """Declares parameters that may lack a gradient in a window."""
        self.may_lack_gradient |= names

    def evaluate_with(self, weights: Callable[[], AbstractContextManager[None]]) -> None:
        """Registers what puts the weights in place that are validated, sampled from and exported, where they are others."""
        self._evaluated = weights

    def train_later(self, names: Iterable[str]) -> None:
        """Says which frozen parameters will be thawed during the run; called by the last model edit that may rename them.

        They are in checkpoints and in our modules' optimizer from the first step, so that neither changes its shape; they
        are kept in float32, and need no gradient.

        Args:
            names: as in the module's ``named_parameters()`` at the time of the call.
        """
        self.late |= set(names)

    def rate(self, factors: Mapping[str, float]) -> None:
        """Multiplies the learning rate of some parameters in our modules' groups; called by a model edit.

        Args:
            factors: name as in the module's ``named_parameters()`` -> factor.
        """
        for name, factor in factors.items():
            self.rates[name] = self.rates.get(name, 1.0) * factor

    def group(self, group: str, names: Iterable[str]) -> None:
        """Gives some parameters a group of their own in our modules' optimizer; called by a model edit.

        Args:
            group: which parameters are together.
            names: as in the module's ``named_parameters()``.
        """
        self.grouped.update(dict.fromkeys(names, group))

    def on_leave(self, cleanup: Callable[[], None]) -> None:
        """Runs when the attachment leaves the module."""
        self._cleanups.append(cleanup)

    # -- the run: install, uninstall --------------------------------------------------------------------------------

    def install(self, trainer: pl.Trainer, stage: str) -> None:
        """Registers the edits of all techniques in ``trainer`` and wraps the module; later calls do nothing.

        Raises:
            Refusal: when the parts of this run cannot work together.
        """
        if self._installed:
            return
        from lightning_ft.engine.technique import Technique

        self._forget_run()
        self._trainer = trainer
        self.seed = global_seed()
        # Edits of an earlier run stay done; those that were registered then come again from the same callbacks.
        self.edits.registered = []
        self._restored_state = {}
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # A baseline of continual learning is the same run with those techniques sitting out, their loss terms and state too.
        sits_out = baseline_of(trainer) is not None
        ours = [c for c in callbacks if isinstance(c, Technique) and not (sits_out and c.traits.continual)]
        # A module of several tasks knows what a run of fewer has no use for.
        left_out = getattr(self.module, "sits_out", None) if hasattr(self.module, "lightning_ft_module") else None
        self.techniques = [c for c in ours if left_out is None or not left_out(c)]
        compatibility.check(self.techniques, compatibility.situation(trainer, self.module))
        register = getattr(self.module, "register", None)
        if callable(register) and hasattr(self.module, "lightning_ft_module"):
            register(self)
        for technique in sorted(self.techniques, key=lambda t: (t.traits.slot, t.instance_name)):
            technique.register(self)
        if self.term_gradients is not None:
            compatibility.check_surgery(compatibility.situation(trainer, self.module))
        if stage == "fit":
            self.references.snapshots.pop("start", None)  # of an earlier fit
            left = isinstance(getattr(self.module, "balancing", None), LogVariances)
            if left and not any(name == "balancing" for *_, name, _ in self.edits.registered):
                del self.module.balancing  # of an earlier fit, too: this one weighs its terms otherwise, or not at all
        if isinstance(trainer.strategy, ModelParallelStrategy):
            # A user's configure_model may have packed weights by itself, of which nobody knew before.
            self.edit("shard", "packed weights", compatibility.check_packed_for_fsdp2, order=-1, again=True)
            # A second run only registers the steps again, around this run's dispatcher.
            plan = getattr(
                trainer.strategy, "shard", lambda module: shard_(module, cast("DeviceMesh", module.device_mesh))
            )
            self.edit("shard", "fsdp2", plan, again=True)
        self._wrappers.put(stage)
        self._installed = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copied module gets an attachment of its own when it asks; see `of`."""
        return self

    def rebuild(self, techniques: list[Technique], *, seed: int) -> None:
        """Builds the module and runs the model edits of techniques without a Trainer, as `lightning_ft.load` needs it."""
        self.seed = seed
        self.edits.registered = []
        self.techniques = techniques
        register = getattr(self.module, "register", None)
        if callable(register) and hasattr(self.module, "lightning_ft_module"):
            register(self)
        for technique in sorted(techniques, key=lambda t: (t.traits.slot, t.instance_name)):
            technique.register(self)
        self.module.configure_model()
        self.apply_edits()
        self._forget_run()

    def uninstall(self) -> None:
        """Takes every wrapper off; what was trained and injected stays."""
        if not self._installed:
            return
        for cleanup in reversed(self._cleanups):
            cleanup()
        self._installed = False
        self._forget_run()

    # -- model edits --------------------------------------------------------------------------------------------------

    def apply_edits(self) -> None:
        """Runs the edits that were not yet done, in phase order."""
        self.edits.apply()
        if "base" in self._snapshots_wanted and "base" not in self.references.snapshots:
            self.references.take("base")
        if self.fits and (self.late or isinstance(self.trainer.strategy, DDPStrategy)):
            self._refuse_frozen()  # before DDP wraps the module, which says so in words of its own

    # -- the step ---------------------------------------------------------------------------------------------------

    def begin_training(self) -> None:
        """Takes the wanted snapshots and sets what only holds while training; called from ``on_train_start``."""
        if self._begun:
            return
        self._begun = True
        trainer = self.trainer
        in_backward.check(self)
        self._take_snapshots()
        set_training(self.module)
        self.step.window = Window(trainer.accumulate_grad_batches, self.ranks)
        checkpoints.restore_partial_gradients(self, self._restored_state.pop("partial", None))
        model = trainer.strategy.model
        if self.term_gradients is not None and isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_backward_grad_sync = False  # else its reducer waits for a backward that never comes
        self._refuse_frozen()

    def _refuse_frozen(self) -> None:
        if self.late:
            refuse_frozen(
                self.module,
                "what is thawed later has nothing to wait for: name what trains at once (GradualUnfreezing.start).",
            )
        refuse_frozen(self.module)

    def _take_snapshots(self) -> None:
        for name in sorted(self._snapshots_wanted - {"base"}):
            if name in self.references.snapshots:
                continue
            if self._restored_state and self.trainer.global_step > 0:
                raise Refusal(
                    f"The checkpoint holds no reference {name!r}: the run that wrote it needed none, and its start is gone. "
                    "Begin a new fit from its weights (init_from) instead of resuming it."
                )
            self.references.take(name)

    @property
    def edits_gradients(self) -> bool:
        """Whether this run edits gradients between backward and the step."""
        return bool(self.gradient_edits) or self.term_gradients is not None

    @property
    def ranks(self) -> int:
        """How many ranks the gradients are averaged over."""
        return int(self.trainer.world_size)

    @contextmanager
    def reference(self, name: str = "start") -> Iterator[None]:
        """The model at a snapshot, without gradients: ``start`` (when this fit began), ``base``, or a name taken later."""
        if self._installed and name != "base" and name not in self.references.snapshots:
            self._take_snapshots()  # the sanity check comes before on_train_start
        with self.references.active(name):
            yield

    def evaluated(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that this run will leave: an average of them, where a technique keeps one."""
        return self._evaluated()

    def terms(self, terms: list[Term]) -> None:
        """A module of ours hands over the named terms of its own objective, from inside its training_step."""
        self.step.own = terms

    def observe(
        self,
        values: Mapping[str, tuple[Tensor, Tensor | float]],
        finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:
        """A module of ours hands over sums and counts of its step, whose means over window and ranks ``finish`` completes."""
        self.step.observe(values)
        self.step.finish = finish

    def rerun(self, batch: Any, batch_idx: int) -> list[Term]:
        """The module's own step on another batch, without a word in any log: its terms, with their gradients.

        Args:
            batch: as the module's loader would give it, on the module's device.
            batch_idx: of the micro-batch that is trained.
        """
        return self._wrappers.rerun(batch, batch_idx)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters in the module's order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint rule for a file that is saved after the run, when the wrappers are off."""
        if not self._installed and self.fingerprint is not None and checkpoints.KEY not in checkpoint:
            checkpoints.write(self, checkpoint)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint rule for a file that a run goes on from."""
        self._restored_state = checkpoints.check(self, checkpoint)
        self._begun = False  # a tuner trains, then restores what was before
        self.references.load(self._restored_state.get("references", {}))
        checkpoints.restore_adapters(self.module, self._restored_state)
