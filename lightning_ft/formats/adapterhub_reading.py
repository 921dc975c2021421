"""Read an AdapterHub folder into our configuration, and refuse what would compute something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.bottleneck import BottleneckConfig

CONFIG_FILE, WEIGHTS_FILE, BIN_FILE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
VERSION = "adapters.1.2.0"  # the version of AdapterHub's library whose format this is

PARTS = {  # our parameter -> theirs, without a norm before
    "down_weight": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up_weight": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
    "norm_after_weight": "adapter_norm_after.weight",
    "norm_after_bias": "adapter_norm_after.bias",
    "adapter_scale": "scaling",
}
LEGACY_PARTS = (
    "attention_text_task_adapters",
    "attention_text_lang_adapters",
    "layer_text_task_adapters",
    "layer_text_lang_adapters",
)
INITS = {"zero": "mam_adapter", "houlsby": "houlsby", "bert": "bert"}
_ACTIVATIONS = {"silu": "swish"}
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # as files without a version mean it

_READ = {
    "mh_adapter", "output_adapter", "cross_adapter", "reduction_factor", "non_linearity", "original_ln_before",
    "original_ln_after", "ln_before", "ln_after", "init_weights", "is_parallel", "scaling", "residual_before_ln",
    "leave_out", "dropout", "adapter_residual_before_ln", "architecture",
}  # fmt: skip
# Parameters of what is off (phm_layer, inv_adapter), and what no longer matters once there are trained values.
_HARMLESS = {
    "init_weights_seed", "inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W", "shared_W_phm",
    "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity",
    "phm_rank", "phm_bias",
}  # fmt: skip


def read_adapterhub(folder: str | Path) -> tuple[BottleneckConfig, str, list[int], dict[str, Tensor]]:
    """Read an adapter's folder: (configuration, its name in the keys, numbers of the blocks left out, tensors by their keys).

    Args:
        folder: A folder as AdapterHub or `export_adapterhub` writes it.

    Raises:
        Refusal: If the folder holds no bottleneck adapter, a damaged one, or one that uses what is not here.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        flags, name = dict(raw["config"]), str(raw["name"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise Refusal(
            f"{path} cannot be read as the configuration of an AdapterHub adapter ({type(error).__name__} {error}); name a "
            "folder that holds one."
        ) from error
    if flags.get("architecture") is not None:
        raise Refusal(
            f"{folder} holds AdapterHub's {flags['architecture']}, not a bottleneck adapter; load it with that technique."
        )
    for key, value in flags.items():
        if key not in _READ and key not in _HARMLESS and value not in (None, False, 0, [], {}):
            raise Refusal(f"{path} sets {key}={value!r}, which is not supported here; retrain without it.")
    non_linearity = str(flags.get("non_linearity", "")).lower()
    if "version" not in raw:
        non_linearity = _OLD_ACTIVATIONS.get(non_linearity, non_linearity)
    factors = flags.get("reduction_factor")
    by_block: dict[str, Any] = dict(factors) if isinstance(factors, dict) else {"default": factors}
    init = {theirs: ours for ours, theirs in INITS.items()}.get(flags.get("init_weights", "bert"), "bert")
    try:
        default = by_block.pop("default", None)
        config = BottleneckConfig(
            style=_style(flags, path),  # type: ignore[arg-type]
            # A mapping without a default names every block that has an adapter.
            reduction_factor=float(next(iter(by_block.values())) if default is None else default),
            reduction_factors={str(block): float(factor) for block, factor in by_block.items()},
            non_linearity=_ACTIVATIONS.get(non_linearity, non_linearity),  # type: ignore[arg-type]
            scale=flags.get("scaling", 1.0),
            dropout=float(flags.get("dropout") or 0.0),
            norm_before=bool(flags.get("ln_before")),
            norm_after=bool(flags.get("ln_after")),
            init=init,  # type: ignore[arg-type]
            places=_places(flags, path),  # type: ignore[arg-type]
        )
        leave_out = [int(number) for number in flags.get("leave_out") or ()]
    except (TypeError, ValueError, StopIteration) as error:
        raise Refusal(f"{path} is damaged or incomplete: {type(error).__name__} {error}.") from error
    return config, name, leave_out, _read_tensors(folder)


def _style(flags: dict[str, Any], path: Path) -> str:
    """Return which style computes what the flags say, or refuse them."""
    wrong = None
    if not flags.get("original_ln_after", True):
        wrong = "original_ln_after=false"
    elif flags.get("ln_after") and flags.get("adapter_residual_before_ln") and not flags.get("is_parallel"):
        wrong = "adapter_residual_before_ln=true with ln_after"
    elif flags.get("is_parallel"):
        return "parallel"
    elif flags.get("residual_before_ln", True) == "post_add":
        wrong = "residual_before_ln='post_add'"
    elif not flags.get("original_ln_before", False):
        return "houlsby"
    elif not flags.get("residual_before_ln", True):
        wrong = "residual_before_ln=false"
    if wrong is None:
        return "pfeiffer"
    raise Refusal(
        f"{path} sets {wrong}, which moves the residual connection or the norm away from where they are here; retrain with "
        "AdapterHub's seq_bn, double_seq_bn or par_bn."
    )


def _places(flags: dict[str, Any], path: Path) -> tuple[str, ...]:
    named = {"attention": "mh_adapter", "cross_attention": "cross_adapter", "feed_forward": "output_adapter"}
    places = tuple(kind for kind, flag in named.items() if flags.get(flag))
    if not places:
        raise Refusal(f"{path} puts an adapter nowhere: mh_adapter, output_adapter and cross_adapter are all off.")
    return places


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the weights, or say what is wrong with them."""
    path = folder / WEIGHTS_FILE
    try:
        if path.is_file():
            return load_file(path)
        path = folder / BIN_FILE
        if path.is_file():
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch and safetensors have many of their own
        raise Refusal(
            f"{path} is damaged or incomplete ({type(error).__name__}); copy or export the adapter again."
        ) from error
    raise Refusal(f"{folder} holds neither {WEIGHTS_FILE} nor {BIN_FILE}; copy or export the adapter again.")
