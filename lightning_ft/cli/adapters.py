"""``lightning-ft adapters``: which adapters a checkpoint carries, and several of them combined into one."""

from __future__ import annotations

from typing import Any

from lightning_ft.cli.checkpoint_parser import required
from lightning_ft.cli.export import loaded, parser
from lightning_ft.functional.errors import Refusal


def adapters_command(argv: list[str]) -> None:
    """Prints a table of a checkpoint's adapters; with ``--weights`` writes their weighted sum as one PEFT adapter.

    Raises:
        Refusal: no such checkpoint, one without adapters, a weight for an adapter that is not there or cannot have one, or a
            folder that holds something.
    """
    flags = parser("adapters", "Lists a checkpoint's adapters, or writes LoRA adapters combined into one.")
    flags.add_argument(
        "--weights",
        type=dict[str, float] | None,
        default=None,
        help="Name -> what multiplies that adapter's update, as in '{tone: 0.3, facts: 0.7}'; what is not named is left out.",
    )
    config = flags.parse_args(argv)
    required(config, "ckpt_path", *(["output"] if config.weights is not None else []))
    if config.weights is None and config.output is not None:
        raise Refusal("--output is where a combination is written: say of what with --weights, as in '{tone: 0.3}'.")
    module, output = loaded(config)
    found = described(module.model)
    if not found:
        raise Refusal(f"{config.ckpt_path} carries no adapter: what was trained are the model's own weights.")
    if config.weights is None:
        _print(found)
        return
    from lightning_ft.formats.peft_combined import export_combined
    from lightning_ft.nn.adapters import set_adapters

    set_adapters(module.model, config.weights)  # refuses unknown names and weights that a kind cannot have
    export_combined(module.model, output, config.weights, base_model_name=module.base)
    said = " + ".join(f"{weight:g} {name}" for name, weight in config.weights.items())
    print(f"{output}: {said} as one PEFT adapter; its rank in a layer is the sum of theirs there.")


def described(model: Any) -> list[tuple[str, str, int, int, float]]:
    """(name, kind, layers, parameters, weight that the model computes with) of each adapter that a model carries."""
    from lightning_ft.nn.adapters import active_adapters
    from lightning_ft.nn.registry import injected_layers

    weights = active_adapters(model)
    groups: dict[tuple[str, str], list[Any]] = {}
    for layer in injected_layers(model).values():
        groups.setdefault((layer.adapter_name, layer.kind), []).append(layer)
    return [
        (
            name,
            kind,
            len(layers),
            sum(p.numel() for layer in layers for p in layer.injected_parameters().values()),
            weights[name],
        )
        for (name, kind), layers in sorted(groups.items())
    ]


def _print(found: list[tuple[str, str, int, int, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("adapter", "kind", "layers", "parameters", "weight")
    for name, kind, layers, parameters, weight in found:
        table.add_row(name, kind, str(layers), f"{parameters:,}", f"{weight:g}")
    Console().print(table)
