"""The checkpoint rule: a file holds what was trained, what rebuilds the rest, and a list of its own keys.

Frozen base weights are never written; a fingerprint of them is, so that a file meets only the base it was trained on.
Loading compares key sets in both directions and refuses on any difference (a lenient load would train from scratch
without a word). Files are written beside their target, fsynced and renamed, so a full disk costs the new one alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.sharded_files import is_folder, read_whole
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.adapters import active_adapters, set_adapters
from lightning_ft.nn.packed import Sample, packed_layers
from lightning_ft.nn.registry import base_name, injected_layers

if TYPE_CHECKING:
    from lightning_ft.engine.attachment import Attachment

KEY = "lightning_ft"
ATTACHMENT = "_lightning_ft_attachment"
"""Where a LightningModule keeps its attachment."""
FORMAT = 1


def kept_keys(module: nn.Module) -> set[str]:
    """Names that a checkpoint of ``module`` holds: injected parameters, those that train now or later, persistent buffers."""
    injected = injected_names(module)
    attachment = module.__dict__.get(ATTACHMENT)
    late: set[str] = attachment.late if attachment is not None else set()
    keys = {name for name, p in module.named_parameters() if p.requires_grad or name in injected or name in late}
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                keys.add(f"{prefix}.{name}" if prefix else name)
    return keys


def injected_names(module: nn.Module) -> set[str]:
    """Names of the parameters that were injected."""
    return {
        f"{path}.{name}" if path else name
        for path, layer in injected_layers(module).items()
        for name in layer.injected_parameters()
    }


def fingerprint(module: nn.Module) -> str:
    """A digest of the frozen parameters, from at most 4,096 numbers of each, the same for fp32, bf16 and packed copies."""
    digest = hashlib.sha256()
    kept = kept_keys(module)
    packed = {f"{path}.weight": layer.source for path, layer in packed_layers(module).items()}
    named = [(base_name(name, module), name, p) for name, p in module.named_parameters()]
    for pristine, name, parameter in sorted(named, key=lambda triple: triple[0]):
        if name in kept:
            continue
        sample = packed.get(name) or Sample.of(parameter)  # packed weights count as what they were
        digest.update(pristine.encode())
        digest.update(str(sample.shape).encode())
        digest.update(sample.numbers.numpy().tobytes())
    return digest.hexdigest()[:32]


def recipe(obj: object) -> dict[str, Any]:
    """Class path and constructor arguments of a module or technique, plain types only, to build it again.

    Factories (an optimizer) and other objects are left out: what a loaded module computes does not depend on them.
    """
    given = obj.resolved_arguments() if hasattr(obj, "resolved_arguments") else arguments_of(obj)
    arguments = {name: _plain(value) for name, value in given.items()}
    cls = next(kind for kind in type(obj).__mro__ if not issubclass(kind, FSDPModule))  # sharding puts one before it
    return {
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": {name: value for name, value in arguments.items() if value is not _NOT_PLAIN},
    }


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    if isinstance(value, dict):
        entries = {key: _plain(item) for key, item in value.items()}
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in entries.values()) else entries
    return _NOT_PLAIN


def write(attachment: Attachment, checkpoint: dict[str, Any]) -> None:
    """Drops from a Lightning checkpoint what was not trained, and adds what rebuilds it."""
    module = attachment.module
    keys = kept_keys(module)
    if "state_dict" in checkpoint:
        checkpoint["state_dict"] = {n: value for n, value in checkpoint["state_dict"].items() if n in keys}
    trainer = module.trainer
    checkpoint[KEY] = {
        "format": FORMAT,
        "keys": sorted(keys),
        "fingerprint": attachment.fingerprint,
        "seed": attachment.seed,
        "module": recipe(module) if hasattr(module, "lightning_ft_module") else None,
        "techniques": [recipe(technique) for technique in attachment.techniques],
        "references": attachment.references.state(),
        "adapters": active_adapters(module),
        "world_size": trainer.world_size,
        "partial": _partial(attachment, trainer),
    }


def _partial(attachment: Attachment, trainer: pl.Trainer) -> dict[str, Any] | None:
    """Gradients and counts of an accumulation window that is not complete; None on its boundary."""
    if (
        trainer.state.fn != TrainerFn.FITTING
        or not trainer.training
        or not trainer.fit_loop.epoch_loop._should_accumulate()
    ):
        return None
    if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
        return None
    if not attachment.installed:
        return {"ranks": 0}  # after an exception: nobody knows what of the window was done
    if trainer.world_size > 1:
        return {"ranks": trainer.world_size}  # each rank holds its own; `check` refuses to resume from it
    grads = {n: p.grad.clone() for n, p in attachment.module.named_parameters() if p.grad is not None}
    rows = attachment.term_gradients.state() if attachment.term_gradients is not None else None
    return {
        "ranks": 1,
        "grads": grads,
        "rows": rows,
        "counted": attachment.step.window.counted,
        "logged": {name: (float(value), float(count)) for name, (value, count) in attachment.step.logged.items()},
    }


def restore_partial_gradients(attachment: Attachment, partial: dict[str, Any] | None) -> None:
    """Puts the gradients and counts of an unfinished window back before its next micro-batch."""
    if not partial:
        return
    parameters = dict(attachment.module.named_parameters())
    for name, grad in partial["grads"].items():
        parameters[name].grad = grad.to(parameters[name].device)
    if partial["rows"] is not None and attachment.term_gradients is not None:
        attachment.term_gradients.load(partial["rows"], attachment.module.device)
    attachment.step.window.count(partial["counted"])
    for name, (value, count) in partial["logged"].items():
        attachment.step.logged[name] = (torch.tensor(value, device=attachment.module.device), count)


def check(attachment: Attachment, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Refuses a checkpoint that does not fit the module, before anything of it is used; returns our record in it.

    Raises:
        Refusal: foreign or newer files, other techniques, other shapes, another base, or nothing to resume from.
    """
    record = record_of(checkpoint)
    trainer, module = attachment.trainer, attachment.module
    expected = kept_keys(module)
    listed = set(record["keys"])
    refuse_earlier(listed, expected)
    if listed != expected:
        raise Refusal(
            f"The checkpoint does not fit this model: {difference(listed, expected)}. It was written with "
            f"{_names(record) or 'no techniques'}, this run has {_present(attachment) or 'none'}; use the same techniques "
            "and targets."
        )
    parameters = dict(module.state_dict(keep_vars=True))
    for name, value in checkpoint.get("state_dict", {}).items():
        if name not in listed:
            raise Refusal(f"The checkpoint holds {name}, which its own key list does not name; the file was changed.")
        if isinstance(value, Tensor) and value.shape != parameters[name].shape:
            raise Refusal(
                f"The checkpoint's {name} has shape {tuple(value.shape)}, this model's {tuple(parameters[name].shape)}; "
                "use the rank and the base it was trained with."
            )
    if "state_dict" in checkpoint and not set(checkpoint["state_dict"]) >= {k for k in listed if k in parameters}:
        missing = sorted(listed - set(checkpoint["state_dict"]))
        raise Refusal(
            f"The checkpoint lacks {missing[0]} and {len(missing) - 1} more of the keys that it lists; the file is damaged."
        )
    if record["fingerprint"] != attachment.fingerprint:
        raise Refusal(
            "The frozen weights are not those the checkpoint was trained on (their fingerprints differ); load the same base "
            "model and revision."
        )
    if trainer.state.fn == TrainerFn.FITTING:
        if "optimizer_states" not in checkpoint:
            slots = [technique.traits.slot for technique in attachment.techniques if hasattr(technique, "init_from")]
            raise Refusal(
                "The checkpoint was saved with save_weights_only=True: it can be validated and exported, but fit cannot resume "
                f"from it; {anew(slots)}, or resume from a full checkpoint."
            )
        kinds = {technique["class_path"].rpartition(".")[2] for technique in record["techniques"]}
        present = {technique.state_key for technique in attachment.techniques}
        for key, state in checkpoint.get("callbacks", {}).items():
            if state and key.partition("[")[0] in kinds and key not in present:
                raise Refusal(
                    f"The checkpoint holds the state of {key}, which this run does not have and would lose; add the technique "
                    "again, or start a new fit from the weights."
                )
        partial = record.get("partial")
        if partial and partial["ranks"] == 0:
            raise Refusal(
                "The checkpoint was saved after an error within an accumulation window, whose gradients are lost; resume from "
                "one saved on a window's end, or start anew from its weights."
            )
        if partial and (partial["ranks"] > 1 or trainer.world_size > 1):
            raise Refusal(
                "The checkpoint was saved within an accumulation window on several ranks, whose partial gradients it cannot "
                "hold; resume from one saved on a window's end (every_n_train_steps, or at the end of an epoch)."
            )
    return dict(record)


def anew(slots: Iterable[str]) -> str:
    """How a new run starts from what a file holds, as an imperative.

    Args:
        slots: of the techniques that trained it and can start from a file; none where the base itself was trained.
    """
    flags = " ".join(f"--{slot}.init_from" for slot in slots)
    if flags:
        return f"start anew from its weights with {flags}"
    return "start anew from its weights (write them with lightning-ft merge, and name the folder by --model.base)"


def record_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Our record in a checkpoint.

    Raises:
        Refusal: when the file was not written by this library, or by a newer one.
    """
    record = checkpoint.get(KEY)
    if not isinstance(record, dict):
        raise Refusal(
            "The checkpoint was not written by lightning_ft (it has no record of what was trained); give an adapter's folder to "
            "the init_from of its technique (--lora.init_from, say), or a Hugging Face folder to --model.base."
        )
    if record.get("format") != FORMAT:
        raise Refusal(
            f"The checkpoint has format {record.get('format')}, this version reads {FORMAT}; use the version that wrote it."
        )
    return record


def restore_adapters(module: nn.Module, record: dict[str, Any]) -> None:
    """Lets a module compute with the combination of adapters that a file was saved with; older files do not say."""
    if record.get("adapters", active_adapters(module)) != active_adapters(module):
        set_adapters(module, record["adapters"])


def refuse_earlier(listed: set[str], expected: set[str]) -> None:
    """Refuses what an earlier version wrote in another form, before its keys are compared.

    Args:
        listed: what a file lists.
        expected: what the model would write.

    Raises:
        Refusal: the variances of uncertainty balancing are one vector.
    """
    name = "balancing.log_variance"
    if name in listed and f"{name}.0" in expected:
        raise Refusal(
            f"The checkpoint was written by an earlier version, which kept the variances of uncertainty balancing as one vector "
            f"({name}) where this one has a number for each term; use the version that wrote it, or train anew."
        )


def difference(listed: set[str], expected: set[str]) -> str:
    """What a file lists and a model expects, where they differ, in words; empty when they agree."""
    parts = []
    for words, names in (("it holds", listed - expected), ("it lacks", expected - listed)):
        if names:
            some = sorted(names)
            parts.append(f"{words} {some[0]}" + (f" and {len(some) - 1} more" if len(some) > 1 else ""))
    return ", ".join(parts)


def _names(record: dict[str, Any]) -> str:
    shown = []
    for technique in record.get("techniques", []):
        telling = [f"{k}={v!r}" for k, v in technique["init_args"].items() if k in ("r", "target")]
        shown.append(f"{technique['class_path'].rsplit('.', 1)[-1]}({', '.join(telling)})")
    return ", ".join(shown)


def _present(attachment: Attachment) -> str:
    return ", ".join(repr(technique) for technique in attachment.techniques)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's file format, written in the target folder, fsynced and renamed.

    Lightning writes to the temporary folder and moves: not atomic across file systems, and nothing is fsynced.
    """

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if is_folder(Path(path)):  # of a run under FSDP2
            return read_whole(Path(path))
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return loaded

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(temporary, target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(target.parent).free
            if free > 1 << 20 and not isinstance(error, OSError):
                raise
            raise Refusal(
                f"The checkpoint {target} could not be written ({error}; {free / 1e6:.0f} MB free); the last one saved before it "
                "is untouched. Make room and resume from it."
            ) from error


def make_atomic(strategy: Strategy, on_leave: Callable[[Callable[[], None]], None]) -> None:
    """Lets the strategy write its files atomically while the attachment is there; a user's own plugin is left alone."""
    before = strategy.checkpoint_io
    if type(before) is not TorchCheckpointIO:
        return
    strategy.checkpoint_io = AtomicCheckpointIO()
    on_leave(lambda: setattr(strategy, "checkpoint_io", before))
