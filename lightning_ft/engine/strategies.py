"""FSDP2 whose checkpoints hold what was trained.

Lightning's own model-parallel strategy writes every parameter, and resumes only from a file with every parameter. This
one writes those that are trained, with the optimizer's state, each rank its own rows; a frozen base costs nothing per
save. The folder's ``meta.pt`` lists the keys, and loading compares them before anything is read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_ft.engine.gradients import like
from lightning_ft.engine.root import model_root
from lightning_ft.engine.sharded_files import (
    GROUPS,
    KEYS,
    META,
    PlainPlanner,
    Reader,
    gathered,
    is_folder,
    numbered,
    put_in_place,
    read_meta,
)
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.sharding import block_modules, held_whole, modules_named, shard_

LARGE = 1 << 28
"""Bytes of weights in a process's own memory before sharding that are worth a word; adapters never are."""


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 (``fully_shard``) that saves and resumes trained parameters only.

    The module must be sharded in ``configure_model``: this library's callbacks and modules do that, a module of your
    own calls :func:`lightning_ft.models.sharding.shard_` there.

    A checkpoint is a folder with one file per rank, unless ``save_distributed_checkpoint`` is False. It is written
    beside its target, fsynced and renamed. Any number of ranks resumes from it, also one process or DDP, and
    `lightning_ft.load` and the export commands read it; of its index, a pickle, nothing but an index is accepted.

    Args:
        data_parallel_size: ranks that share one copy of the parameters; ``"auto"`` is all ranks divided by
            ``tensor_parallel_size``.
        tensor_parallel_size: ranks that compute one layer together; more than 1 asks for a module that parallelises
            itself.
        save_distributed_checkpoint: whether every rank writes its shard; False gathers all on rank 0 into one file.
        process_group_backend: ``"nccl"``, ``"gloo"`` ...; by default what fits the device.
        timeout: for the collectives of the process group.
        units: names of the modules that are gathered one at a time, see `lightning_ft.nn.select`: ``["mlp", "self_attn"]``,
            ``["model.layers.*"]``. None: each repeated block of the model is a unit, which suits transformers. What lies
            in no unit (embeddings, head) is gathered for the whole step.
        reshard_after_forward: release a unit's weights after its forward pass and gather them again for its backward
            pass: the least memory. False keeps them in between, which saves a third of the traffic.
    """

    trained: Callable[[], Iterable[str]] | None = None
    """Names that checkpoints hold, where ``requires_grad`` does not say it (parts thawed later); buffers always are."""

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        units: list[str] | None = None,
        reshard_after_forward: bool = True,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if units is not None and not units:
            raise Refusal("FSDP2Strategy.units is empty; name modules, or leave it out for one unit a block.")
        self.units = units
        self.reshard_after_forward = reshard_after_forward

    def unit_modules(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name, module) of what is gathered at once, named within the one Hugging Face model of ``module`` if it has one.

        Raises:
            Refusal: for a pattern that means nothing.
        """
        if self.units is None:
            return block_modules(module)
        path, root = model_root(module)
        return [(f"{path}.{n}" if path else n, m) for n, m in modules_named(root, self.units)]

    def shard(self, module: pl.LightningModule) -> None:
        """Shards the module by the plan of this strategy; a second call only registers its steps again."""
        held = 0 if isinstance(module, FSDPModule) else held_whole(module)
        if held > LARGE:
            rank_zero_info(
                f"{held / 2**20:.0f} MB of weights are not mapped from a safetensors file, so each process holds them whole until "
                "they are sharded."
            )
        options = {"reshard_after_forward": self.reshard_after_forward}
        shard_(module, self.device_mesh, units=self.unit_modules, **options)

    def setup_environment(self) -> None:
        """Resolves ``data_parallel_size="auto"`` to all ranks (Lightning's own "auto" is the number of nodes)."""
        if self._data_parallel_size == "auto" and self._tensor_parallel_size != "auto":
            world = self.num_nodes * self.num_processes
            if world % self._tensor_parallel_size:
                raise Refusal(
                    f"tensor_parallel_size={self._tensor_parallel_size} does not divide the {world} ranks of this run; "
                    "choose one that does, or 1."
                )
            self._data_parallel_size = world // self._tensor_parallel_size
        super().setup_environment()

    def trained_names(self) -> set[str]:
        """Canonical names of the parameters that a checkpoint of this model holds."""
        named = list(self._net.named_parameters(remove_duplicate=False))
        if self.trained is None:
            return {_canonical(name) for name, parameter in named if parameter.requires_grad}
        wanted = {_canonical(name) for name in self.trained()}
        known = {_canonical(name) for name, _ in named}
        unknown = wanted - known - {_canonical(name) for name, _ in self._net.named_buffers(remove_duplicate=False)}
        if unknown:
            raise Refusal(
                f"{sorted(unknown)[0]} is to be saved, but the model has no parameter or buffer of that name."
            )
        return wanted & known

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Trained parameters and persistent buffers; gathered on rank 0 if ``save_distributed_checkpoint`` is False."""
        options = StateDictOptions(
            full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True, ignore_frozen_params=True
        )
        return self._model_state(self.trained_names(), options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Each rank's rows by name; in one file whole and numbered, as on a single device, so that either goes on with it."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self._net, _plain(optimizer), options=options)
        return numbered(state) if self.global_rank == 0 else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes shards and ``meta.pt`` into a folder beside the target, then renames it.

        Args:
            checkpoint: as Lightning's connector made it; "state_dict" and "optimizer_states" go to the shards. Sharded
                tensors anywhere else (a callback's state) are gathered, so that ``meta.pt`` holds them whole.
            filepath: the folder; rank 0's counts. What was there before is replaced.
            storage_options: not supported, as in the parent class.
        """
        own = ("state_dict", "optimizer_states")
        checkpoint = {key: value if key in own else gathered(value) for key, value in checkpoint.items()}
        if not self._save_distributed_checkpoint:
            self._save_file(checkpoint, Path(self.broadcast(filepath)), storage_options)
            return
        if storage_options is not None:
            raise Refusal("FSDP2Strategy writes checkpoints itself and takes no storage_options; leave them out.")
        shards: dict[str, Any] = {"state_dict": checkpoint.pop("state_dict")}
        checkpoint[KEYS] = {"state_dict": _shapes(shards["state_dict"])}
        states = checkpoint.pop("optimizer_states", [])
        checkpoint[GROUPS] = [state["param_groups"] for state in states]
        for i, state in enumerate(states):
            checkpoint[KEYS][f"optimizer_{i}"] = sorted(state["state"])
            shards[f"optimizer_{i}"] = {"state": {name: value for name, value in state["state"].items() if value}}
        path = Path(self.broadcast(filepath))
        partial = path.with_name(f".{path.name}.partial")
        if self.global_rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.barrier()
        dcp.save(shards, checkpoint_id=partial)  # its writer fsyncs every file
        if self.global_rank == 0:
            with (partial / META).open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(partial, path)
        self.barrier()

    def _save_file(self, checkpoint: dict[str, Any], path: Path, storage_options: Any) -> None:
        """One file, where a sharded checkpoint may lie: rank 0 alone moves that aside, and removes it after the write."""
        old = path.with_name(f".{path.name}.old")
        folder = self.broadcast(path.is_dir())
        if folder and not self.broadcast(is_folder(path)):
            raise Refusal(
                f"{path} is a folder that holds no checkpoint, so none is written over it; name another file."
            )
        if folder and self.global_rank == 0:
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        self.barrier()
        super().save_checkpoint(checkpoint, path, storage_options)
        self.barrier()
        if folder and self.global_rank == 0:
            shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads model and optimizer state, after comparing the keys of the file with those of the model.

        Args:
            checkpoint_path: what :meth:`save_checkpoint` has written, by this strategy on any number of ranks.
            weights_only: ignored: nothing but tensors and plain values is read from ``meta.pt``.

        Returns:
            The rest of the checkpoint: loops, callbacks, schedulers.

        Raises:
            Refusal: when the path is no such checkpoint, or any key differs.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():
            return self._load_file(path)
        if not is_folder(path):
            raise Refusal(f"{path} is no checkpoint: it is neither a file nor a folder with a {META}.")
        meta = read_meta(path)
        keys, groups = meta.pop(KEYS), meta.pop(GROUPS)
        names = self._check_keys(path, keys["state_dict"])
        self._check_optimizers(path, {key for key in keys if key != "state_dict"})
        model = {"state_dict": self._model_state(names, StateDictOptions(ignore_frozen_params=True))}
        dcp.load(model, storage_reader=Reader(path), planner=PlainPlanner())
        set_model_state_dict(self._net, model["state_dict"], options=StateDictOptions(strict=False))
        for i, optimizer in enumerate(self.optimizers):
            self._load_optimizer(path, f"optimizer_{i}", _plain(optimizer), set(keys[f"optimizer_{i}"]), groups[i])
            meta["optimizer_states"] = []  # says to later readers that it was a checkpoint to resume from
        return meta

    @property
    def _net(self) -> nn.Module:
        model = self.model
        assert model is not None
        if isinstance(model, FSDPModule):
            model.reshard()  # after an evaluation the root may still be gathered: temporary copies, not the parameters
        return model

    @property
    def _fitting(self) -> bool:
        module = self.lightning_module
        return module is not None and module.trainer.state.fn == TrainerFn.FITTING

    def _model_state(self, names: set[str], options: StateDictOptions) -> dict[str, Any]:
        with _only_trained(self._net, names):
            state: dict[str, Any] = get_model_state_dict(self._net, options=options)
        # torch drops a frozen parameter under its first name only; tied ones stay under their second.
        frozen = {_canonical(name) for name, _ in self._net.named_parameters(remove_duplicate=False)} - names
        return {key: value for key, value in state.items() if key not in frozen}

    def _check_keys(self, path: Path, shapes: dict[str, list[int]]) -> set[str]:
        """The parameters to be loaded: in ``fit`` exactly the trained ones, else all that the file holds."""
        parameters = {_canonical(name) for name, _ in self._net.named_parameters(remove_duplicate=False)}
        here = _shapes(get_model_state_dict(self._net))
        trained, found, buffers = self.trained_names(), set(shapes), set(here) - parameters
        known = (trained if self._fitting else parameters) | buffers
        unexpected, missing = found - known, (trained | buffers) - found
        differ = {f"{key} of shape {tuple(shapes[key])}" for key in found & known if shapes[key] != here[key]}
        if unexpected or missing or differ:
            parts = [f"it lacks {_some(missing)}"] if missing else []
            parts += [f"it holds {_some(unexpected)}, not trained here"] if unexpected else []
            parts += [f"it holds {_some(differ)}, another than the model's"] if differ else []
            raise Refusal(
                f"{path} does not fit the model: {'; '.join(parts)}. Resume with the techniques and the base it was "
                "written with."
            )
        return found & parameters

    def _check_optimizers(self, path: Path, found: set[str]) -> None:
        if not self._fitting:
            return
        if not found:
            raise Refusal(
                f"{path} holds weights only, without optimizer state: fit cannot resume from it. Start a new fit from "
                "the weights, or resume from a checkpoint saved with save_weights_only=False."
            )
        if len(found) != len(self.optimizers):
            raise Refusal(f"{path} holds the state of {len(found)} optimizers, this run has {len(self.optimizers)}.")

    def _load_optimizer(
        self, path: Path, key: str, optimizer: Optimizer, found: set[str], groups: list[dict[str, Any]]
    ) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = {_canonical(name) for name, p in self._net.named_parameters(remove_duplicate=False) if id(p) in held}
        if found - names:
            raise Refusal(
                f"{path} does not fit {key}: it holds the state of {_some(found - names)}, which this optimizer does "
                "not have. Resume with the techniques it was written with."
            )
        # torch makes empty state for what requires gradients; a part that was not yet thawed has none in the file.
        with _only_trained(self._net, found):
            state: dict[str, Any] = get_optimizer_state_dict(self._net, optimizer)
            shards = {key: {"state": {name: value for name, value in state["state"].items() if value}}}
            if shards[key]["state"]:
                dcp.load(shards, storage_reader=Reader(path), planner=PlainPlanner())
            state["state"] |= shards[key]["state"]
            state["param_groups"] = groups
            set_optimizer_state_dict(self._net, optimizer, state, options=StateDictOptions(strict=False))

    def _load_file(self, path: Path) -> dict[str, Any]:
        """One file, of this strategy or of a single device or DDP: every rank maps it and takes its rows."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        self._check_keys(path, _shapes(checkpoint["state_dict"]))
        states = checkpoint.get("optimizer_states", [])
        self._check_optimizers(path, {f"optimizer_{i}" for i, _ in enumerate(states)})
        own: dict[str, torch.Tensor] = {}
        own |= {_canonical(name): p for name, p in self._net.named_parameters(remove_duplicate=False)}
        own |= {_canonical(name): b for name, b in self._net.named_buffers(remove_duplicate=False)}
        with torch.no_grad():
            for name, value in checkpoint.pop("state_dict").items():
                own[name].copy_(like(value, own[name]))
        for optimizer, state in zip(self.optimizers, states, strict=False):
            _restore(path, _plain(optimizer), state)
        return checkpoint


def _plain(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside Lightning's."""
    inner: Optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return inner


def _restore(path: Path, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimizer over sharded parameters a state of whole tensors, parameters matched by their place."""
    own, saved = optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in saved]:
        raise Refusal(
            f"{path} does not fit the optimizer: its groups hold {[len(g['params']) for g in saved]} parameters, this run's "
            f"{[len(g['params']) for g in own]}. Resume with the techniques and the optimizer it was written with."
        )
    parameters = [p for group in own for p in group["params"]]
    numbers = [number for group in saved for number in group["params"]]
    laid_out = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state["state"]:
            laid_out[number] = {
                key: like(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
                for key, value in state["state"][number].items()
            }
    optimizer.load_state_dict({"state": laid_out, "param_groups": saved})


@contextmanager
def _only_trained(model: nn.Module, names: set[str]) -> Iterator[None]:
    """``requires_grad`` is True for exactly ``names``: torch's state dict functions go by it."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if _canonical(name) in names}
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, value in before:
            parameter.requires_grad_(value)


def _canonical(name: str) -> str:
    """The name as it stands in state dicts: without what compiling and checkpointing wrappers add."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    """Key to shape, as plain types that a weights-only load accepts."""
    return {key: list(getattr(value, "shape", ())) for key, value in sorted(state.items())}


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
