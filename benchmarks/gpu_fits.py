"""Short fits of every method on a random Llama: what is checked in fp32, bf16 and fp16, and on a larger one speed and memory.

Each name of `jobs` is a part of `benchmarks.gpu`. All steps of a fit train on the same rows, so that the loss must fall. What is
checked: it falls in each precision; the first loss is that of fp32; the checkpoint gives back the same loss.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.method_list import DECODER, Setting, methods
from benchmarks.row_files import written
from benchmarks.silent import silent_trainer

LLAMA_SMALL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
TINY = {"num_hidden_layers": 4}
REPEATS = 16
"""How often the rows of a step stand in the file, which each fit tokenises; one of more steps begins at its top again."""
PRECISIONS = ("fp32", "bf16", "fp16")
NEAR = {"bf16": 2e-2, "fp16": 2e-2}
"""How far the first loss may be from that of fp32, as a share."""


@dataclass(frozen=True)
class Job:
    """A fit.

    Attributes:
        callbacks: made anew for each precision.
        lr: constant rate.
        model: arguments of `SFT`.
        precisions: which are tried; the first is the one that others are compared with.
        fsdp2: sharded by FSDP2, here over a single rank.
        compiled: each block compiled.
        large: on the large model, twice as many steps, without a checkpoint.
    """

    callbacks: Callable[[Setting], list[Any]]
    lr: float
    model: Callable[[], dict[str, Any]] = dict
    precisions: tuple[str, ...] = PRECISIONS
    fsdp2: bool = False
    compiled: bool = False
    large: bool = False

    @property
    def saved(self) -> bool:
        """Whether a checkpoint is written and read."""
        return not (self.fsdp2 or self.compiled or self.large)


def jobs() -> dict[str, Job]:
    """Name -> fit: the methods of the comparison, what it leaves out, packed bases, FSDP2, compiled blocks."""
    import lightning_ft as ft

    found = {
        name: Job(method.callbacks, method.rates[DECODER][1], lambda method=method: dict(method.model))
        for name, method in methods().items()
        if not method.model
    }
    lora, lr = found["LoRA"].callbacks, found["LoRA"].lr

    def eight_bits() -> dict[str, Any]:
        from bitsandbytes.optim import AdamW8bit

        return {"optimizer": AdamW8bit}

    def paged() -> dict[str, Any]:
        import torch
        from bitsandbytes import optim

        # Pages move between a GPU's memory and the CPU's; a dry run on CPUs has none and takes the same steps.
        return {"optimizer": optim.PagedAdamW8bit if torch.cuda.is_available() else optim.AdamW8bit}

    found |= {
        "norms": Job(lambda at: [ft.Freeze(["norms"])], 1e-3),
        "PiSSA": Job(lambda at: [ft.LoRA(8, init="pissa")], 5e-4),
        "LoRA+": Job(lambda at: [ft.LoRA(8, lr_ratio_b=16.0)], 2e-4),
        "prefix network": Job(lambda at: [ft.PrefixTuning(20, network=64)], 1e-3),
        "LoRA, IA3 and prompt": Job(lambda at: [ft.LoRA(8), ft.IA3(), ft.PromptTuning(8)], lr),
        "LoRA and NEFTune": Job(lambda at: [ft.LoRA(8), ft.NEFTune(5.0)], lr, precisions=("fp32", "bf16")),
        "LoRA and EMA": Job(lambda at: [ft.LoRA(8), ft.WeightEMA(decay=0.5)], lr),
        "LoRA checkpointed": Job(lora, lr, lambda: {"gradient_checkpointing": True}),
        "full, pure bf16": Job(lambda at: [], 6e-5, lambda: {"base_dtype": "pure_bfloat16"}, ("bf16",)),
        "full, in backward": Job(lambda at: [], 6e-5, lambda: {"optimizer": ft.InBackward}, ("fp32", "bf16")),
        "full, AdamW in 8 bits": Job(lambda at: [], 6e-5, eight_bits),
        "full, paged AdamW in 8 bits": Job(lambda at: [], 6e-5, paged),
    }
    for mode in ("nf4", "nf4-dq", "fp4", "int8"):
        found[f"{mode} + LoRA"] = Job(lora, lr, lambda mode=mode: {"quantize": mode})
    for name in ("DoRA", "Pfeiffer", "prefix", "prompt", "IA3"):
        found[f"nf4 + {name}"] = Job(found[name].callbacks, found[name].lr, lambda: {"quantize": "nf4"})
    for name in ("full", "LoRA", "DoRA", "Houlsby", "prefix", "prompt", "IA3", "gradual"):
        found[f"FSDP2 + {name}"] = Job(found[name].callbacks, found[name].lr, precisions=("fp32", "bf16"), fsdp2=True)

    def timed(name: str, **changes: Any) -> Job:
        return replace(found[name], **{"precisions": ("bf16",), "large": True, **changes})

    return found | {
        "1 B: LoRA": timed("LoRA", precisions=("fp32", "bf16")),
        "1 B: full": timed("full", precisions=("fp32", "bf16")),
        "1 B: nf4 + LoRA": timed("nf4 + LoRA"),
        "1 B: DoRA": timed("DoRA"),
        "1 B: int8 + LoRA": timed("int8 + LoRA"),
        "1 B: LoRA checkpointed": timed("LoRA checkpointed"),
        "1 B: full, AdamW in 8 bits": timed("full, AdamW in 8 bits"),
        "1 B: FSDP2 + LoRA": timed("FSDP2 + LoRA"),
        "1 B: LoRA compiled": timed("LoRA", compiled=True),
    }


def write_inputs(folder: Path, dry: bool) -> dict[str, Any]:
    """Both random models, and one step's rows many times over; the work that a token of them needs."""
    from benchmarks.random_model import byte_tokenizer, write_model
    from benchmarks.rows import facts, row

    kind: dict[str, Any] = {"dtype": "float32"} if dry else {"dtype": "bfloat16", "device": "cuda"}
    write_model(folder / "model", **kind, **(TINY if dry else LLAMA_SMALL))
    write_model(folder / "large", **kind, **(TINY if dry else LLAMA_1B))
    rows = [row(f"Count to {n % 50}." * (1 + n % 5), "one two three four five " * (1 + n % 5)) for n in range(32)]
    if dry:
        rows = rows[:4]
    written(folder / "rows.jsonl", rows * REPEATS)
    found = {"batch": len(rows), "large": facts(byte_tokenizer(), rows, folder / "large")}
    (folder / "facts.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def run(name: str, folder: Path, device: str, steps: int) -> dict[str, Any]:
    """All precisions of one job, checked.

    Raises:
        AssertionError: when a loss does not fall, is no number, or is not that of the first precision.
    """
    job = jobs()[name]
    found: dict[str, Any] = {}
    for precision in job.precisions:
        found[precision] = one = fit(job, precision, folder, device, steps)
        losses = one["losses"]
        if not all(map(math.isfinite, losses)):
            raise AssertionError(f"{precision}: a loss is no number: {losses}")
        if not losses[-1] < losses[0]:
            raise AssertionError(f"{precision}: the loss did not fall: {losses[0]:.4f} -> {losses[-1]:.4f}")
        first = found[job.precisions[0]]["losses"][0]
        if precision in NEAR and abs(losses[0] / first - 1) > NEAR[precision]:
            raise AssertionError(
                f"{precision}: the first loss is {losses[0]:.4f}, in {job.precisions[0]} it was {first:.4f}"
            )
        before, after = one.get("loss_before_saving"), one.get("loss_after_loading")
        if before is not None and abs(after / before - 1) > (1e-2 if "quantize" in job.model() else 1e-3):
            raise AssertionError(f"{precision}: the checkpoint gives a loss of {after:.5f}, it was {before:.5f}")
    return found


def fit(job: Job, precision: str, folder: Path, device: str, steps: int) -> dict[str, Any]:
    """A few steps in one precision: losses, tokens/s, peak memory, and the loss before saving and after loading."""
    import lightning.pytorch as pl
    import torch

    import lightning_ft
    from benchmarks.measure import peak_memory_bytes
    from benchmarks.step_watch import StepWatch
    from lightning_ft import SFT, SFTData
    from lightning_ft.engine.strategies import FSDP2Strategy

    model = folder / ("large" if job.large else "model")
    steps = 2 * steps if job.large else steps
    config = json.loads((model / "config.json").read_text())

    def before(module: Any) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if job.compiled:
            for block in module.model.base_model.layers:
                block.compile(dynamic=True)

    watch = StepWatch(min(5 if job.large else 3, steps - 1), before)
    batch = json.loads((folder / "facts.json").read_text())["batch"]
    options = {"base_dtype": "bfloat16" if precision == "bf16" else "float32", **job.model()}
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as name:
        trainer = bare_trainer(
            name,
            device,
            [*job.callbacks(Setting(config["num_hidden_layers"], steps, prenorm=True)), watch],
            strategy=FSDP2Strategy(save_distributed_checkpoint=False) if job.fsdp2 else "auto",
            # torch has no scaled fp16 on CPUs, so that a dry run takes bf16 by autocast in its place.
            precision="32-true" if precision != "fp16" else ("16-mixed" if device == "cuda" else "bf16-mixed"),
            max_steps=steps,
        )
        module = SFT(str(model), lr=job.lr, warmup_steps=0, schedule="constant", **options)
        rows = str(folder / "rows.jsonl")
        data = SFTData(rows, batch_size=batch, max_length=None, shuffle=False, cache_dir=str(Path(name) / "cache"))
        trainer.fit(module, data)
        told = {
            **watch.clock.summary(),
            "peak_memory_bytes": peak_memory_bytes(device),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
        if job.saved:
            trainer.save_checkpoint(Path(name) / "last.ckpt")
            told["loss_before_saving"] = loss_of(module, watch.batch, device)
            told["loss_after_loading"] = loss_of(lightning_ft.load(Path(name) / "last.ckpt"), watch.batch, device)
    return told


def bare_trainer(folder: str | Path, device: str, callbacks: list[Any], **options: Any) -> Any:
    """A trainer on one device that shows and keeps nothing."""
    fixed = {"max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    accelerator = "gpu" if device == "cuda" else "cpu"
    return silent_trainer(folder, callbacks, accelerator=accelerator, devices=1, **{**fixed, **options})


def loss_of(module: Any, batch: Any, device: str) -> float:
    """Mean loss of the scored tokens of a batch, in eval mode."""
    import torch

    from lightning_ft.objectives.causal_lm import scores

    module.to(device).eval()
    with torch.no_grad():
        return -float(scores(module.view, batch.to(device))["logprob"].mean())
