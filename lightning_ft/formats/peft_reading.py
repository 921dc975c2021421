"""Read a PEFT adapter's folder into our configuration and our names, and refuse what would compute something else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig
from lightning_ft.nn.select import ALL_LINEAR, matches

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

SUFFIXES = {  # our parameter -> PEFT's, on linear layers and convolutions; magnitudes have no ".weight" there
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
EMBEDDING_SUFFIXES = {**SUFFIXES, "lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
ROWS_SUFFIXES = {"token_rows": "token_adapter.trainable_tokens_delta"}  # the rows themselves, whatever the name says
WRAPPED_BIAS = "base_layer.bias"  # the base's own, where a layer is wrapped
_TABLES = (SUFFIXES, EMBEDDING_SUFFIXES, ROWS_SUFFIXES, {"bias": WRAPPED_BIAS})
_FROM_PEFT = {theirs: ours for table in _TABLES for ours, theirs in table.items()}
_FROM_PEFT["lora_magnitude_vector.weight"] = "lora_magnitude"
# With bias="all" PEFT also stores the biases of modules to save under the names that its wrappers give to their parts.
_AGAIN = re.compile(r".*\.(original_module|modules_to_save)\.(.*\.)?bias")

# What read_peft understands, and what may stand in a file without changing what the adapter computes.
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "bias", "trainable_token_indices",
}  # fmt: skip
HARMLESS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "fan_in_fan_out", "megatron_core", "ephemeral_gpu_offload", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip


def read_peft(folder: str | Path, *, adapter_name: str = "default") -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Read an adapter's folder: its configuration, and its tensors under our names (``<module>.lora_A``).

    ``target`` and ``exclude`` are as in the file; `load_peft_` resolves them against a model.

    Args:
        folder: A folder as PEFT or `export_peft` writes it.
        adapter_name: Name to give the adapter; files carry none.

    Raises:
        Refusal: If the folder holds no LoRA adapter, a damaged one, or one that uses what LoRA here does not have.
    """
    folder = Path(folder)
    raw = read_json(folder / CONFIG_FILE)
    if raw.get("peft_type") != "LORA":
        raise Refusal(
            f"{folder} holds an adapter of type {raw.get('peft_type')}, not LORA; load it with that technique."
        )
    for key, value in raw.items():
        if key not in _READ and key not in HARMLESS and value not in (None, False, {}, [], "none"):
            raise Refusal(
                f"{folder / CONFIG_FILE} sets {key}={value!r}, which LoRA here does not have; retrain without it."
            )
    if raw.get("init_lora_weights", True) not in (True, False, "gaussian", "eva"):
        raise Refusal(
            f"{folder} was initialised with {raw['init_lora_weights']!r}, which changes the base weights; save it "
            "from PEFT with path_initial_model_for_weight_conversion, which makes it a plain adapter."
        )
    try:
        config = LoRAConfig(
            r=raw["r"],
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            target=patterns(raw["target_modules"]),
            exclude=several(raw.get("exclude_modules")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            rslora=bool(raw.get("use_rslora")),
            dora=bool(raw.get("use_dora")),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            bias=raw.get("bias") or "none",
            trainable_tokens=raw.get("trainable_token_indices") or (),
            adapter_name=adapter_name,
        )
        config = _with_layers(config, raw.get("layers_to_transform"), raw.get("layers_pattern"))
    except (KeyError, TypeError) as error:
        raise Refusal(f"{folder / CONFIG_FILE} is damaged or incomplete: {type(error).__name__} {error}.") from error
    tensors: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder).items():
        if config.bias == "all" and _AGAIN.fullmatch(key):
            continue
        name = _our_name(key.removeprefix(PREFIX))
        if name.endswith(".token_rows"):
            tensor = _ascending(name, tensor, raw["trainable_token_indices"])
        tensors[name] = tensor.reshape(-1) if name.endswith(".lora_magnitude") else tensor
    return config, tensors


def _our_name(key: str) -> str:
    """Turn ``q_proj.lora_A.weight`` into ``q_proj.lora_A``; names of modules to save stay."""
    for theirs, ours in _FROM_PEFT.items():
        if key.endswith(f".{theirs}"):
            return f"{key.removesuffix(theirs)}{ours}"
    return key


def _ascending(name: str, rows: Tensor, indices: list[int] | dict[str, list[int]]) -> Tensor:
    """Return trained rows in ascending order of their token ids; PEFT keeps them in the order in which it was given them."""
    if isinstance(indices, dict):
        table = name.removesuffix(".token_rows")
        indices = next((ids for end, ids in indices.items() if matches(table, end)), [])
    return rows[sorted(range(len(indices)), key=indices.__getitem__)] if len(indices) == len(rows) else rows


def patterns(value: str | list[str] | tuple[str, ...]) -> tuple[str, ...] | str:
    """Turn PEFT's list of name ends, or its regular expression, into ours."""
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR else (f"re:{value}",)
    return tuple(value)


def _with_layers(config: LoRAConfig, layers: int | list[int] | None, pattern: str | list[str] | None) -> LoRAConfig:
    """Add PEFT's ``layers_to_transform`` to a configuration; with ``layers_pattern`` as regular expressions."""
    if layers is None or layers == []:
        return config
    indices = [layers] if isinstance(layers, int) else list(layers)
    if not pattern:
        return replace(config, layers=tuple(indices))
    lists = "|".join([pattern] if isinstance(pattern, str) else pattern)
    ends = "|".join(re.escape(end) for end in config.target)
    one_of = "|".join(str(index) for index in indices)
    return replace(config, target=(rf"re:(?:.*\.)?(?:{lists})\.(?:{one_of})\.(?:.*\.)?(?:{ends})",))


def read_json(path: Path) -> dict:
    """Read the configuration, or say what is wrong with it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Refusal(
            f"{path} cannot be read as an adapter's configuration ({error}); name a folder that holds one."
        ) from error
    if not isinstance(raw, dict):
        raise Refusal(f"{path} is not an adapter's configuration: it holds a {type(raw).__name__}.")
    return raw


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the weights, or say what is wrong with them."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise Refusal(
            f"{folder} holds no {WEIGHTS_FILE}; pickled weights are not read, save the adapter as safetensors."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{path} is damaged or incomplete ({error}); copy or export the adapter again.") from error


def several(value: str | list[str] | None) -> tuple[str, ...]:
    """Return patterns as a tuple, also a single one."""
    found = patterns(value or ())
    return (found,) if isinstance(found, str) else found
