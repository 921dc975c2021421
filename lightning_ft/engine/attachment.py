"""The attachment: one per LightningModule, it holds everything that techniques add, in fixed phases.

Lightning offers callbacks no hook to edit a model before the optimizer is built, no way to add a loss term, and none to
edit gradients that survives a tuner. So five methods are wrapped on the module's *instance* while a Trainer runs it:

    configure_model          the user's, then the model edits in phase order, each once
    training_step            the user's, then the loss terms; one dispatcher, since Lightning unwraps a single level
    backward                 per-term gradients, only where surgery asks for them
    on_before_optimizer_step surgery, then closed-form penalties, then the user's
    on_save/load_checkpoint  the checkpoint rule

The first of our callbacks (or modules) to run ``setup`` installs them for all; ``teardown`` and ``on_exception`` undo
them. Only what was trained remains.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_ft.engine import checkpoints, compatibility
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.gradients import GradientEdit, Surgery, TermGradients, audit, scale_
from lightning_ft.engine.randomness import GlobalState, global_seed, seed_batch
from lightning_ft.engine.reference import References
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.engine.terms import Term, Window
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.sharding import shard_
from lightning_ft.nn.registry import injected_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_ft.engine.technique import Technique

PHASES = ("quantise", "freeze", "inject", "dtype", "hooks", "checkpointing", "shard", "compile")
"""Model edits run in this order, after the module's own ``configure_model`` has loaded the base."""

LossTerm = Callable[[pl.LightningModule, Any, Any], Term | list[Term]]
"""(module, batch, what the module's own training_step returned) -> one or more terms."""

_KEY = "_lightning_ft_attachment"


class Attachment:
    """Everything that techniques add to one LightningModule."""

    def __init__(self, module: pl.LightningModule) -> None:
        """Args: module: the LightningModule; use `Attachment.of` to get its one attachment."""
        self.module = module
        self.references = References(module)
        self.fingerprint: str | None = None
        self.seed = global_seed()
        self.window = Window()
        self.techniques: list[Technique] = []
        self._edits: list[tuple[int, int, str, Callable[[pl.LightningModule], None]]] = []
        self._done: set[tuple[int, str]] = set()
        self._injected: set[str] = set()
        self._restored_state: dict[str, Any] = {}
        self._installed = False
        self._forget_run()

    def _forget_run(self) -> None:
        self._terms: list[tuple[str, LossTerm]] = []
        self._own_terms: list[Term] | None = None
        self._losses: list[Tensor] = []
        self.logged: dict[str, tuple[Tensor, float]] = {}
        self._gradient_edits: list[GradientEdit] = []
        self.term_gradients: TermGradients | None = None
        self._snapshots_wanted: set[str] = set()
        self._conditional: set[str] = set()
        self._cleanups: list[Callable[[], None]] = []
        self._audited = False
        self._trainer: pl.Trainer | None = None
        self._begun = False

    # -- who there is ---------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, module: pl.LightningModule) -> Attachment:
        """The module's one attachment, made at the first call."""
        attachment = module.__dict__.get(_KEY)
        if attachment is None or attachment.module is not module:  # a deepcopy keeps a reference to the original
            attachment = cls(module)
            object.__setattr__(module, _KEY, attachment)
        return attachment

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

    # -- registration: techniques and modules call these from `register` -------------------------------------------

    def edit(
        self, phase: str, name: str, edit: Callable[[pl.LightningModule], None], *, order: int = 0, again: bool = False
    ) -> None:
        """Registers a model edit; it runs once in the module's life, or once a run if ``again``, by (phase, order, name)."""
        self._edits.append((PHASES.index(phase), order, name, edit))
        if again:
            self._done.discard((PHASES.index(phase), name))

    def loss_term(self, name: str, term: LossTerm) -> None:
        """Registers a loss term, computed after the module's own step and logged as ``train/<name>``."""
        if any(existing == name for existing, _ in self._terms):
            raise Refusal(f"Two loss terms are named {name!r}; give one of the techniques another name.")
        self._terms.append((name, term))

    def gradient_edit(self, edit: GradientEdit) -> None:
        """Registers a closed-form edit of the gradients."""
        self._gradient_edits.append(edit)

    def surgery(self, surgery: Surgery) -> None:
        """Registers the one map from the Gram matrix of the terms' gradients to their weights."""
        if self.term_gradients is not None:
            raise Refusal("Two techniques want to combine the terms' gradients; only one surgery can.")
        self.term_gradients = TermGradients(surgery)

    def want_reference(self, name: str = "start") -> None:
        """Says that ``reference(name)`` will be used, so that it is taken before anything is trained."""
        self._snapshots_wanted.add(name)

    def conditional(self, names: set[str]) -> None:
        """Declares parameters that may lack a gradient in a window."""
        self._conditional |= names

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
        from lightning_ft.engine.technique import Attached, Technique

        self._forget_run()
        self._trainer = trainer
        self.seed = global_seed()
        # Edits of an earlier run stay done; those that were registered then come again from the same callbacks.
        self._edits = []
        self._restored_state = {}
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ours = [i for i, c in enumerate(callbacks) if isinstance(c, Attached)]
        edits = any(isinstance(c, Technique) for c in callbacks)
        if edits and any(isinstance(c, WeightAveraging) for c in callbacks[: ours[0]]):
            raise Refusal(
                "WeightAveraging stands before this library's callbacks and would copy the model before it is edited; "
                "put it after them in trainer.callbacks."
            )
        self.techniques = [c for c in callbacks if isinstance(c, Technique)]
        compatibility.check(self.techniques, compatibility.situation(trainer, self.module))
        register = getattr(self.module, "register", None)
        if callable(register) and hasattr(self.module, "lightning_ft_module"):
            register(self)
        for technique in sorted(self.techniques, key=lambda t: (t.traits.slot, t.instance_name)):
            technique.register(self)
        self._check_surgery(trainer)
        if stage == "fit":
            self.references.snapshots.pop("start", None)  # of an earlier fit
        if isinstance(trainer.strategy, ModelParallelStrategy):
            # A second run only registers the steps again, around this run's dispatcher.
            self.edit(
                "shard", "fsdp2", lambda module: shard_(module, cast("DeviceMesh", module.device_mesh)), again=True
            )
        self._wrap(stage)
        self._installed = True

    def _check_surgery(self, trainer: pl.Trainer) -> None:
        if self.term_gradients is None:
            return
        where = compatibility.situation(trainer, self.module).words
        for word, why, fix in (
            ("fsdp2", "it needs each term's whole gradient, and FSDP2 reduces their sum", "use ddp"),
            ("fp16", "its gradients never pass the scaler", "use bf16-mixed or 32-true"),
            ("manual_optimization", "it takes the place of backward", "use automatic optimization"),
        ):
            if word in where:
                raise Refusal(f"Gradient surgery cannot work with {compatibility.WORDS[word]}, because {why}; {fix}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copied module (WeightAveraging makes one) gets an attachment of its own when it asks; see `of`."""
        return self

    def rebuild(self, techniques: list[Technique], *, seed: int) -> None:
        """Builds the module and runs the model edits of techniques without a Trainer, as `lightning_ft.load` needs it."""
        self.seed = seed
        self._edits = []
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

    def _wrap(self, stage: str) -> None:
        module = self.module
        self._global_state = GlobalState.capture()
        self.on_leave(self._global_state.restore)
        strict = module._strict_loading
        module.strict_loading = False  # our own comparison of key sets is stricter; see engine/checkpoints.py
        self.on_leave(lambda: setattr(module, "_strict_loading", strict))
        self._replace("configure_model", self._configure_model(is_overridden("configure_model", module)))
        # Modules of ours always dispatch (they hand over terms); a user's step is only wrapped while training.
        if stage == "fit":
            self._replace("training_step", self._training_step())
            self._replace("on_before_optimizer_step", self._on_before_optimizer_step())
            if self.term_gradients is not None:
                self._replace("backward", self._backward())
        self._replace("on_save_checkpoint", self._on_save_checkpoint())
        self._replace("on_load_checkpoint", self._on_load_checkpoint())
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            strategy, before = self.trainer.strategy, self.trainer.strategy.trained
            strategy.trained = lambda: checkpoints.kept_keys(module)
            self.on_leave(lambda: setattr(strategy, "trained", before))
        checkpoints.make_atomic(self.trainer.strategy, self.on_leave)
        compatibility.keep_factors_in_fp32(self.trainer.strategy, self.on_leave)

    def _replace(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Puts a plain closure on the instance, and remembers to take it off."""
        own = self.module.__dict__.get(name)
        object.__setattr__(self.module, name, wrapper)

        def undo() -> None:
            if own is None:
                self.module.__dict__.pop(name, None)
            else:
                object.__setattr__(self.module, name, own)

        self.on_leave(undo)

    # -- model edits --------------------------------------------------------------------------------------------------

    def _configure_model(self, overridden: bool) -> Callable[[], None]:
        original = self.module.configure_model

        def configure_model() -> None:
            if overridden:
                original()
            self.apply_edits()

        return configure_model

    def apply_edits(self) -> None:
        """Runs the edits that were not yet done, in phase order."""
        lost = self._injected - set(injected_layers(self.module))
        if lost:
            raise Refusal(
                f"configure_model has rebuilt the net and lost injected layers such as {sorted(lost)[0]}; build it once "
                "(`if self.net is None: ...`)."
            )
        sharded = any(isinstance(p, DTensor) for p in self.module.parameters())
        for phase, _, name, edit in sorted(self._edits, key=lambda e: e[:3]):
            if (phase, name) in self._done:
                continue
            if sharded and phase >= PHASES.index("shard"):
                if isinstance(self.module, FSDPModule):
                    edit(self.module)
                continue  # else the user's configure_model has sharded by itself
            if sharded:
                raise Refusal(
                    f"{name} cannot edit a model that configure_model has already sharded; call the plain function "
                    "(inject_lora(...)) in configure_model before fully_shard, or leave the sharding to this library."
                )
            if phase >= PHASES.index("shard") and self.fingerprint is None:
                self.fingerprint = checkpoints.fingerprint(self.module)
            edit(self.module)
            self._done.add((phase, name))
        if self.fingerprint is None:
            self.fingerprint = checkpoints.fingerprint(self.module)
        self._injected = set(injected_layers(self.module))
        if "base" in self._snapshots_wanted and "base" not in self.references.snapshots:
            self.references.take("base")

    # -- the step ---------------------------------------------------------------------------------------------------

    def begin_training(self) -> None:
        """Takes the wanted snapshots and sets what only holds while training; called from ``on_train_start``."""
        if self._begun:
            return
        self._begun = True
        trainer = self.trainer
        self._take_snapshots()
        for part in self.module.modules():
            if any(p is not None and p.requires_grad for p in part._parameters.values()):
                part.training = True  # Hugging Face returns models in eval mode, and Lightning leaves them so
        self.window = Window(trainer.accumulate_grad_batches, self.ranks)
        checkpoints.restore_partial_gradients(self, self._restored_state.pop("partial", None))
        model = trainer.strategy.model
        if self.term_gradients is not None and isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_backward_grad_sync = False  # else its reducer waits for a backward that never comes
        if not any(p.requires_grad for p in self.module.parameters()):
            raise Refusal(
                "Nothing is trainable: every parameter is frozen; add a technique that trains something, or thaw."
            )

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

    def terms(self, terms: list[Term]) -> None:
        """A module of ours hands over the named terms of its own objective, from inside its training_step."""
        self._own_terms = terms

    def _training_step(self) -> Callable[..., Any]:
        original = self.module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            trainer = self.trainer
            self.begin_training()  # a tuner runs batches with the callbacks taken away, ours too
            if self._terms and not self.module.automatic_optimization:
                raise Refusal("Loss terms need automatic optimization; this module steps its optimizers by hand.")
            batch = args[0] if args else next(iter(kwargs.values()), None)
            progress = trainer.fit_loop.epoch_loop
            if (
                progress.batch_progress.current.ready % trainer.accumulate_grad_batches
                == 1 % trainer.accumulate_grad_batches
            ):
                self._begin_window()
            seed_batch(self.seed, progress.total_batch_idx, trainer.global_rank)
            self._own_terms = None
            output = original(*args, **kwargs)
            return self._total(batch, output)

        # Lightning unwraps one level of __wrapped__ to see whether batch_idx is wanted; FSDP2 adds a level of its own.
        # A signature with `self` survives both, whatever is wrapped around it.
        training_step.__signature__ = inspect.signature(getattr(original, "__func__", original))  # type: ignore[attr-defined]
        return training_step

    def _begin_window(self) -> None:
        self.logged = {}
        if self.term_gradients is not None:
            self.term_gradients.forget()
        self.window.begin()

    def _total(self, batch: Any, output: Any) -> Any:
        """The module's own loss plus every registered term, divided by the window's counts."""
        own = self._own_terms
        if own is None and not self._terms and self.term_gradients is None:
            return output
        loss = output["loss"] if isinstance(output, Mapping) else output
        terms = list(own) if own is not None else ([] if loss is None else [Term("loss", loss, 1.0, unit="mean")])
        for _, function in self._terms:
            made = function(self.module, batch, output)
            extra = made if isinstance(made, list) else [made]
            if own is None:  # a user's own step keeps Lightning's mean, and so do the terms beside it
                extra = [Term(t.name, t.sum / max(t.count, 1.0), 1.0, "mean", t.weight) for t in extra]
            terms += extra
        if not terms:
            return output
        totals = batch.window if isinstance(batch, Batch) else None
        losses = [self.window.loss(term, totals) for term in terms]
        if totals is None and terms[0].unit != "mean":
            counts = {term.count for term in terms}
            if len(counts) > 1:
                raise Refusal(
                    "The loader does not count its windows and two loss terms count differently; use one of this "
                    "library's data modules."
                )
            self.window.count(terms[0].count)
        self._losses = losses
        self._log(terms, totals, skip_own=own is None)
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _log(self, terms: list[Term], totals: dict[str, float] | None, *, skip_own: bool) -> None:
        """Logs each term's exact mean over the window once it is complete, and for our modules their weighted sum."""
        for term in terms:
            before, count = self.logged.get(term.name, (0.0, 0.0))
            self.logged[term.name] = (before + term.sum.detach().float(), count + term.count)  # type: ignore[assignment]
        loop = self.trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        if totals is not None and not all(term.unit in totals for term in terms):
            totals = None  # a user's own step: its loss is a mean already
        means: dict[str, Tensor] = {}
        for term in terms:
            value, count = self.logged[term.name]
            means[term.name] = value / max(totals[term.unit] if totals is not None else count, 1.0)
        if skip_own:
            means.pop("loss", None)
        else:
            means["loss"] = torch.stack([term.weight * means[term.name] for term in terms]).sum()
            if len(terms) == 1:
                means.pop(terms[0].name)
        # Sums over ranks divided by counts over ranks: summing the shares is exact; without totals ranks are averaged.
        reduce = "sum" if totals is not None else "mean"
        for name, mean in means.items():
            self.module.log(f"train/{name}", mean, prog_bar=name == "loss", sync_dist=self.ranks > 1, reduce_fx=reduce)

    def _backward(self) -> Callable[..., None]:
        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            assert self.term_gradients is not None
            divisor = self.trainer.accumulate_grad_batches
            self.term_gradients.accumulate([one / divisor for one in self._losses], self.trained())
            self._losses = []

        return backward

    # -- gradients ----------------------------------------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters in the module's order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def _on_before_optimizer_step(self) -> Callable[..., None]:
        original = self.module.on_before_optimizer_step

        def on_before_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
            if self.window.pending:
                self._correct()
            if self.term_gradients is not None:
                self.term_gradients.write_(self.trained())
            if not self._audited:
                audit(self.module, self._conditional)
                self._audited = True
            if self._gradient_edits:
                named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
                for edit in self._gradient_edits:
                    edit.edit_(named)
            original(optimizer)

        return on_before_optimizer_step

    def _correct(self) -> None:
        """Gradients of sums over a nominal number become gradients of the exact mean (loaders without totals)."""
        counted, numerator = self.window.correction()
        if self.ranks > 1:
            total = torch.tensor(counted, dtype=torch.float64, device=self.module.device)
            dist.all_reduce(total)
            counted = float(total)
        scale_(self.module.parameters(), numerator / max(counted, 1.0))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint rule for a file that is saved after the run, when the wrappers are off."""
        if not self._installed and self.fingerprint is not None and checkpoints.KEY not in checkpoint:
            checkpoints.write(self, checkpoint)

    def _on_save_checkpoint(self) -> Callable[[dict[str, Any]], None]:
        original = self.module.on_save_checkpoint

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            original(checkpoint)
            checkpoints.write(self, checkpoint)

        return on_save_checkpoint

    def _on_load_checkpoint(self) -> Callable[[dict[str, Any]], None]:
        original = self.module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._restored_state = checkpoints.check(self, checkpoint)
            self._begun = False  # a tuner trains, then restores what was before
            self.references.load(self._restored_state.get("references", {}))
            original(checkpoint)

        return on_load_checkpoint
