"""--ckpt_path, checked before any model is loaded: it is there, it is a checkpoint, it serves the command."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.cli.names import near_file
from lightning_ft.cli.run_folder import newest_checkpoint
from lightning_ft.functional.errors import Refusal

if TYPE_CHECKING:
    from lightning.pytorch import Callback

WORDS = ("last", "best", "hpc")  # Lightning's names for files that it looks for itself
SHAPING = ("r", "target", "exclude", "layers", "rank_pattern", "modules_to_save", "dora", "train", "freeze")
"""Arguments of techniques that decide which parameters there are, and of what shape."""
RESUMABLE = ("optimizer_states", "loops")  # what Lightning needs to go on; a weights-only file lacks them


def resolve(given: str, folder: Path) -> Path:
    """The file that ``--ckpt_path`` means: itself, or for ``last`` the newest of this run.

    Lightning starts from scratch, with a warning, when there is no last checkpoint: here that is an error.
    """
    if given == "last":
        newest = newest_checkpoint(folder)
        if newest is None:
            raise Refusal(f"--ckpt_path last: {folder} holds no checkpoint.")
        return newest
    if given == "best":
        raise Refusal("--ckpt_path best is known only while a fit runs; name the file, or say last.")
    return Path(given)


def check(path: Path, *, resume: bool, ours: bool) -> dict[str, Any]:
    """Refuses what is no checkpoint, and for ``resume`` one that holds weights alone.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        resume: whether `fit` is to go on from it.
        ours: whether the module or a callback is ours, so that the file must hold our record of what was trained;
            a run without any is plain Lightning, and so is its file.

    Returns:
        The checkpoint, its tensors memory-mapped and not read; of a sharded one what it holds beside its shards, or nothing if
        it is not ours.

    Raises:
        Refusal: see above.
    """
    if path.is_dir():
        if not (path / ".metadata").is_file():
            raise Refusal(f"{path} is a folder, not a checkpoint; name the .ckpt file in it.")
        return _sharded(path, resume) if ours else {}
    if not path.is_file():
        raise Refusal(f"There is no checkpoint {path}{near_file(path)}.")
    if not zipfile.is_zipfile(path):
        more = "; the folder of an adapter starts a run through the init_from of its technique (--lora.init_from, say)"
        more = more if path.suffix == ".safetensors" else ""
        raise Refusal(f"{path} is not a checkpoint, or was cut short: it is no zip archive{more}.")
    import torch  # late: everything above is answered without it

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever torch raises on a foreign archive
        reason = " ".join(str(error).split(".")[0].split())
        raise Refusal(f"{path} is not a checkpoint of ours: {reason}.") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
        keys = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise Refusal(f"{path} is not a checkpoint of a Lightning run: it holds {keys}.")
    if ours:
        from lightning_ft.engine import checkpoints

        checkpoints.record_of(checkpoint)
    if resume and not all(key in checkpoint for key in RESUMABLE):
        raise Refusal(weights_alone(path, checkpoint))
    return checkpoint


def weights_alone(path: Path, checkpoint: dict[str, Any]) -> str:
    """Why ``fit`` does not resume from a file, and what to do with it."""
    from lightning_ft.cli.slots import techniques
    from lightning_ft.engine.arguments import signature_of
    from lightning_ft.engine.checkpoints import anew

    said = f"{path} holds weights alone, so fit cannot resume from it; "
    record = checkpoint.get("lightning_ft")
    if record is None:
        return said + "resume from a checkpoint that was saved whole."
    written = {one["class_path"] for one in record["techniques"]}
    starts = {slot: cls for slot, cls in techniques().items() if "init_from" in signature_of(cls)}
    slots = [slot for slot, cls in starts.items() if f"{cls.__module__}.{cls.__qualname__}" in written]
    return said + f"load it, export it, or {anew(slots)}."


def _sharded(path: Path, resume: bool) -> dict[str, Any]:
    """What a checkpoint of FSDP2Strategy holds beside its shards."""
    from lightning_ft.engine import checkpoints, sharded_files

    checkpoint = sharded_files.read_meta(path)
    checkpoints.record_of(checkpoint)
    if resume and not checkpoint.get(sharded_files.GROUPS):
        raise Refusal(weights_alone(path, checkpoint))
    return checkpoint


def _telling(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that shape what is trained, where they are not the defaults; the rank always."""
    from lightning_ft.engine.arguments import signature_of

    defaults = {name: parameter.default for name, parameter in signature_of(cls).items()}
    found = {key: arguments[key] for key in SHAPING if key in arguments}
    return {key: value for key, value in found.items() if key == "r" or value != defaults.get(key)}


def compare(
    path: Path, checkpoint: dict[str, Any], config: Any, slots: dict[str, type[Callback]], *, resume: bool
) -> None:
    """Refuses a checkpoint whose trained parts this run would not have, before minutes are spent on loading its base.

    What can be told from names and arguments alone; shapes and the base's weights are compared once they are there.

    Args:
        path: the checkpoint, for the sentence.
        checkpoint: what `check` gave.
        config: of the run, not yet instantiated.
        slots: slot -> technique.
        resume: whether `fit` is to go on from it, which needs a base that is packed in the same way.

    Raises:
        Refusal: another technique, or another value of one of its arguments, or another starter model.
    """
    record = checkpoint.get("lightning_ft")
    if record is None:
        return
    given = (config.get("trainer") or {}).get("callbacks") or []
    others = {
        str(one.get("class_path")) for one in (given if isinstance(given, list) else [given]) if hasattr(one, "get")
    }
    for slot, cls in slots.items():
        class_path = f"{cls.__module__}.{cls.__qualname__}"
        if cls.traits.keeps == "nothing" or class_path in others:  # type: ignore[attr-defined]
            continue
        written = [one["init_args"] for one in record["techniques"] if one["class_path"] == class_path]
        here = config.get(slot)
        if len(written) > 1 or (not written and here is None):
            continue
        if here is None:
            flags = " ".join(f"--{slot}.{key} {value}" for key, value in _telling(cls, written[0]).items())
            raise Refusal(f"{path} was trained with {cls.__name__}, and this run has none: add {flags}, as it had.")
        if not written:
            raise Refusal(
                f"{path} was trained without {cls.__name__}: leave --{slot} out, or start a new run from its weights."
            )
        for key in SHAPING:
            asked = here.get("init_args", {}).get(key)
            if key in written[0] and written[0][key] != asked and here.get("init_args", {}).get("init_from") is None:
                raise Refusal(
                    f"{path} was trained with {slot}.{key} {written[0][key]}, and this run has {asked}; use the same."
                )
    before, now = (
        of.get("init_args", {}).get("quantize") for of in (record["module"] or {}, config.get("model") or {})
    )
    if resume and before != now:
        raise Refusal(
            f"{path} was trained with model.quantize {before or 'null'}, and this run has {now or 'null'}; use the same."
        )
    bases = [
        (record["module"] or {}).get("init_args", {}).get("base"),
        config["model"].get("init_args", {}).get("base"),
    ]
    if bases[0] != bases[1] and all(str(base).startswith("starter:") for base in bases):
        raise Refusal(f"{path} was trained on {bases[0]}, and model.base is {bases[1]}; use the same.")
