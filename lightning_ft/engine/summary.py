"""What a run says once, before it trains: what is trained, what it costs, what the data look like."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.optimizer import moments_of, state_bytes
from lightning_ft.models.quantize import describe
from lightning_ft.nn.packed import is_packed, packed_layers


def trained_counts(module: nn.Module) -> tuple[int, int]:
    """(numbers that are trained, all numbers) of a module; a shared tensor counts once."""
    trained = total = 0
    for parameter in module.parameters():
        total += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    total += sum(
        layer.packed_numbers() - cast(Tensor, layer.weight).numel() for layer in packed_layers(module).values()
    )
    return trained, total


def frozen_bytes(module: nn.Module) -> int:
    """Bytes of what is frozen, packed weights with their scales."""
    plain = sum(p.numel() * p.element_size() for p in module.parameters() if not (p.requires_grad or is_packed(p)))
    return plain + sum(layer.packed_bytes() for layer in packed_layers(module).values())


def announce(module: Any, trainer: pl.Trainer) -> None:
    """Prints the summary; modules without a rate, datamodules without a preview are told of what they have."""
    console = Console()
    trained, total = trained_counts(module)
    techniques = ", ".join(repr(t) for t in Attachment.of(module).techniques) or "none: everything is trained"
    console.print(f"[bold]base[/bold]        {module.base}")
    packed = describe(module)
    if packed is not None:
        console.print(f"[bold]packed[/bold]      {packed}")
    console.print(Text.assemble(("techniques  ", "bold"), techniques))
    if module.new_names:
        console.print(
            Text.assemble(("new         ", "bold"), ", ".join(sorted(module.new_names)), ", drawn by the seed")
        )
    console.print(
        f"[bold]trained[/bold]     {trained:,} of {total:,} parameters ({100 * trained / max(total, 1):.2f} %)"
    )
    late = sum(p.numel() for name, p in module.named_parameters() if name in Attachment.of(module).late)
    if late:
        console.print(f"[bold]later[/bold]       {late:,} more parameters are thawed during the run")
    console.print(f"[bold]memory[/bold]      {memory(module, trained)}")
    source = "as given" if module.lr is not None else "suggested by what is trained (lr: null)"
    console.print(f"[bold]rate[/bold]        {module.resolved_lr():g}, {source}")
    datamodule = getattr(trainer, "datamodule", None)
    reports = getattr(datamodule, "reports", None)
    for split, report in (reports() if callable(reports) else {}).items():
        console.print(Text.assemble((f"{split} data".ljust(11) + " ", "bold"), str(report)))
    preview = getattr(datamodule, "preview", None)
    if callable(preview):
        for row in preview(1):
            console.print(Text.assemble(("a row       ", "bold"), *marked(row.pieces)))


def memory_bytes(module: Any, trained: int) -> tuple[int, int]:
    """Of the trained weights with their gradients and what the optimizer keeps, as far as that is known; and of a checkpoint."""
    moments = moments_of(module._optimizer_factory()) or 0
    return 4 * (2 + moments) * trained, state_bytes(module, moments)


def memory(module: Any, trained: int) -> str:
    """What training takes and a checkpoint of it, in words."""
    factory = module._optimizer_factory()
    name = "AdamW" if factory is None else getattr(factory, "__name__", "its optimizer")
    more = " and more of the optimizer's" if moments_of(factory) is None else ""
    taken, written = (f"{size / 1e6:,.0f} MB{more}" for size in memory_bytes(module, trained))
    return f"frozen {frozen_bytes(module) / 1e6:,.0f} MB, trained with {name} {taken}, a checkpoint {written}"


def marked(pieces: Any) -> list[Any]:
    """Decoded pieces of a row with the scored ones in colour (and in brackets where there is no colour)."""
    return [(f"[[{p.text}]]", "bold green") if p.scored else (p.text, "dim") for p in pieces]
