"""The methods that are compared: what each trains, and the three learning rates it is tried at on either starter model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class Setting:
    """What a method's arguments may depend on.

    Attributes:
        blocks: how many the model repeats.
        steps: of the optimizer.
        prenorm: whether the stream between blocks is not normalised, so that an adapter had better do it.
    """

    blocks: int
    steps: int
    prenorm: bool


def setting(model: str, steps: int) -> Setting:
    """That of a starter model."""
    return Setting({ENCODER: 6, DECODER: 30}[model], steps, prenorm=model == DECODER)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        callbacks: made anew for each run.
        rates: model -> learning rates; around the suggested one for the decoder, higher for the encoder, whose head is new.
        about: what it is, in the table's words.
        model: arguments of `SFT`.
    """

    callbacks: Callable[[Setting], list[Any]]
    rates: dict[str, tuple[float, float, float]]
    about: str
    model: dict[str, Any] = field(default_factory=dict)


def grids(
    encoder: tuple[float, float, float], decoder: tuple[float, float, float]
) -> dict[str, tuple[float, float, float]]:
    """Model -> rates."""
    return {ENCODER: encoder, DECODER: decoder}


def gradual(at: Setting) -> list[Any]:
    """The head, the blocks from the top and the embeddings, thawed over about the first half of the run."""
    from lightning_ft import GradualUnfreezing

    groups = -(-at.blocks // max(1, at.steps // 2 - 2))
    parts = -(-at.blocks // groups) + 2
    return [GradualUnfreezing(max(1, round(at.steps / (2 * parts))), unit="step", groups=groups)]


def methods() -> dict[str, Method]:
    """Name -> method, full training first; LoRA's settings are those of ``nf4 + LoRA`` too."""
    from lightning_ft import IA3, BottleneckAdapter, Freeze, LoRA, PrefixTuning, PromptTuning

    lora = grids((5e-4, 2e-3, 5e-3), (5e-4, 1.5e-3, 5e-3))
    bottleneck = grids((1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3))
    return {
        "full": Method(lambda at: [], grids((1e-4, 2e-4, 4e-4), (2e-5, 6e-5, 2e-4)), "all parameters"),
        "LoRA": Method(lambda at: [LoRA(8)], lora, "r = 8 beside every linear layer"),
        "frozen body": Method(
            lambda at: [Freeze(["head"])],
            grids((3e-3, 1e-2, 3e-2), (2e-4, 6e-4, 2e-3)),
            "the head alone; the decoder's is its embedding",
        ),
        "top third": Method(
            lambda at: [Freeze(top=1 / 3)],
            grids((2e-4, 6e-4, 2e-3), (6e-5, 2e-4, 6e-4)),
            "the last third of the blocks, and a new head",
        ),
        "gradual": Method(gradual, grids((1e-4, 2e-4, 4e-4), (2e-5, 6e-5, 2e-4)), "all, thawed from the top"),
        "DoRA": Method(lambda at: [LoRA(8, dora=True)], lora, "LoRA and the length of each output's weight"),
        "Houlsby": Method(
            lambda at: [BottleneckAdapter("houlsby")],
            bottleneck,
            "two bottlenecks a block, a sixteenth wide",
        ),
        "Pfeiffer": Method(
            lambda at: [BottleneckAdapter("pfeiffer", norm_before=at.prenorm)],
            bottleneck,
            "one bottleneck a block; on the decoder with norm_before",
        ),
        "parallel": Method(
            lambda at: [BottleneckAdapter("parallel", norm_before=at.prenorm)],
            bottleneck,
            "the same, beside the feed-forward",
        ),
        "prefix": Method(
            lambda at: [PrefixTuning(20)],
            grids((1e-2, 3e-2, 1e-1), (3e-3, 1e-2, 3e-2)),
            "20 keys and values in each layer, of random tokens at first",
        ),
        "prompt": Method(
            lambda at: [PromptTuning(20)],
            grids((3e-2, 1e-1, 3e-1), (1e-2, 3e-2, 1e-1)),
            "20 vectors before each row, of random tokens at first",
        ),
        "IA3": Method(
            lambda at: [IA3()],
            grids((1e-2, 3e-2, 1e-1), (3e-3, 1e-2, 3e-2)),
            "factors of keys, values and inner features",
        ),
        "nf4 + LoRA": Method(lambda at: [LoRA(8)], lora, "LoRA over a base of four bits a weight", {"quantize": "nf4"}),
    }
