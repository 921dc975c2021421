"""What only a GPU can show, in one offline script with random weights: `make gpu`.

1. Packed attention on CUDA (the variable-length kernel in bf16, FlexAttention in fp32) against the same on a CPU, and
   against each row alone: outputs and gradients.
2. The head: scores and gradients on CUDA against a CPU; the best chunk size at a real width.
3. A fit of SFT + LoRA on a random Llama of about 160M parameters in bf16: tokens/s, share of the matrix-product peak,
   peak memory, a falling loss; once more with each block compiled.

Each part is reported on its own: one that fails does not hide the others; the exit code is 1 if any did. Figures go to
``--output``, by default ``gpu.json`` below ``$OUT`` where that is set, else below ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

RESULTS = Path(__file__).resolve().parent / "results"
LLAMA_160M = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 49_152,
}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
BOUNDS = (0, 7, 8, 200, 333, 512)


def gap(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest magnitude."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def synchronised(work: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of one call, the least of several, after a warm-up."""
    import torch

    best = float("inf")
    for n in range(repeats + 2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if n >= 2:
            best = min(best, time.perf_counter() - begun)
    return best


def machine() -> dict[str, Any]:
    """The GPU and its matrix-product peak."""
    import torch

    peaks = {}
    for name in ("bfloat16", "float32"):
        a = torch.randn(8192, 8192, device="cuda", dtype=getattr(torch, name))
        peaks[name] = 2 * 8192**3 / synchronised(lambda a=a: a @ a) / 1e12
    about = torch.cuda.get_device_properties(0)
    return {
        "gpu": about.name,
        "memory_bytes": about.total_memory,
        "capability": f"{about.major}.{about.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "matmul_tflops": peaks,
    }


def packed_attention() -> dict[str, Any]:
    """Outputs and gradients of packed rows: CUDA against CPU, packed against alone, in fp32 and bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_ft.models.causal import CausalLM
    from lightning_ft.nn import attention

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=512, attn_implementation=attention.NAME)
    base = LlamaForCausalLM(config)
    ids = torch.randint(0, 512, (1, BOUNDS[-1]))
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)])[None]
    weights = torch.randn(1, BOUNDS[-1], SMALL["hidden_size"])
    embedding = base.get_input_embeddings().weight

    def both(device: str, dtype: Any, apart: bool = False) -> tuple[Any, Any]:
        model = CausalLM(base.to(device, dtype))
        base.zero_grad()
        moved, places = ids.to(device), positions.to(device)
        if apart:
            pieces = [model.hidden(moved[:, a:b], places[:, a:b]) for a, b in pairwise(BOUNDS)]
            hidden = torch.cat(pieces, 1)
        else:
            hidden = model.hidden(moved, places, bounds=BOUNDS)
        (hidden * weights.to(device, dtype)).sum().backward()
        return hidden.detach().cpu(), embedding.grad.detach().cpu().clone()

    expected = both("cpu", torch.float32)
    found: dict[str, Any] = {}
    for name, dtype, bound in (("float32", torch.float32, 1e-4), ("bfloat16", torch.bfloat16, 5e-2)):
        packed, apart = both("cuda", dtype), both("cuda", dtype, apart=True)
        gaps = {
            "output_vs_cpu": gap(packed[0], expected[0]),
            "gradient_vs_cpu": gap(packed[1], expected[1]),
            "output_vs_alone": gap(packed[0], apart[0]),
            "gradient_vs_alone": gap(packed[1], apart[1]),
        }
        found[name] = gaps
        base.float()
        for what, value in gaps.items():
            if not value < bound:
                raise AssertionError(f"{name}: {what} is {value:.2e}, more than {bound:.0e}: {found}")
    return found


def head() -> dict[str, Any]:
    """Scores and gradients on CUDA against a CPU, then seconds and memory by chunk size."""
    import torch
    from torch import nn

    from lightning_ft.nn.head import score_tokens

    torch.manual_seed(0)
    layer = nn.Linear(64, 1000, bias=False)
    hidden, labels = torch.randn(300, 64), torch.randint(0, 1000, (300,))

    def both(device: str, dtype: Any) -> tuple[Any, Any]:
        module = layer.to(device, dtype).requires_grad_(False)
        x = hidden.detach().clone().to(device, dtype).requires_grad_()
        value = score_tokens(x, labels.to(device), module)["logprob"]
        value.sum().backward()
        return value, x.grad

    expected, found = both("cpu", torch.float32), {}
    for name, dtype, bound in (("float32", torch.float32, 1e-4), ("bfloat16", torch.bfloat16, 5e-2)):
        got = both("cuda", dtype)
        found[name] = {"value": gap(got[0], expected[0]), "gradient": gap(got[1], expected[1])}
        layer.float()
        if not max(found[name].values()) < bound:
            raise AssertionError(f"{name}: more than {bound:.0e} apart: {found}")
    wide = nn.Linear(768, 49_152, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(8192, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 49_152, (8192,), device="cuda")
    chunks = {}
    for size in (128, 256, 512, 1024, 2048, 4096, 8192):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

        def work(size: int = size) -> None:
            score_tokens(x, targets, wide, chunk_size=size)["logprob"].sum().backward()
            x.grad = None

        seconds = synchronised(work, 5)
        chunks[size] = {"seconds": seconds, "extra_bytes": torch.cuda.max_memory_allocated() - before}
    found["chunk_sizes_8192_tokens"] = chunks
    return found


def fit(steps: int, compile_blocks: bool) -> dict[str, Any]:
    """SFT + LoRA on a random Llama in bf16 on the GPU, packed rows."""
    import torch
    from lightning import Callback, Trainer, seed_everything

    from benchmarks.measure import StepClock
    from benchmarks.random_model import write_model
    from benchmarks.rows import facts, load, row
    from lightning_ft import SFT, LoRA, SFTData

    clock = StepClock(warmup=min(5, steps - 1))
    losses: list[torch.Tensor] = []

    class Watch(Callback):
        """Times steps with the device at rest; keeps losses on the device until the end."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            torch.cuda.reset_peak_memory_stats()
            if compile_blocks:
                for block in pl_module.model.base_model.layers:
                    block.compile(dynamic=True)
            torch.cuda.synchronize()
            clock.start()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.synchronize()
            losses.append((outputs["loss"] if isinstance(outputs, dict) else outputs).detach())
            clock.tokens.append(batch.tokens)
            clock.tick()

    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", dtype="bfloat16", **LLAMA_160M)
        rows = [
            row(f"Count to {n % 50}." * (1 + n % 5), "one two three four five " * (4 + n % 17)) for n in range(1024)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
        trainer = Trainer(
            accelerator="gpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[LoRA(r=8, alpha=16), Watch()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = SFT(str(folder / "model"), lr=1e-3, warmup_steps=0, schedule="constant")
        data = SFTData(
            path=str(folder / "rows.jsonl"),
            batch_size=32,
            max_length=None,
            shuffle=False,
            cache_dir=str(folder / "cache"),
        )
        trainer.fit(module, datamodule=data)
        work = facts(module.tokenizer, load(folder / "rows.jsonl"), folder / "model")
    clock.losses = [float(loss) for loss in losses]
    told = {**clock.summary(), "peak_memory_bytes": torch.cuda.max_memory_allocated(), "workload": work}
    told["tflops"] = told["tokens_per_second"] * work["useful_gflop_per_token"] / 1e3
    first, last = (sum(part) / len(part) for part in (clock.losses[:3], clock.losses[-3:]))
    if not last < first:
        raise AssertionError(f"the loss did not fall: {first:.3f} -> {last:.3f}")
    return told


def main(argv: list[str] | None = None) -> int:
    """Run all parts and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What only a GPU can show.")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or RESULTS) / "gpu.json")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each fit, at least 6")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU and a CUDA build of torch; this machine offers none, so nothing was measured.")
        return 0
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "machine": machine,
        "packed_attention": packed_attention,
        "head": head,
        "fit": lambda: fit(arguments.steps, compile_blocks=False),
        "fit_compiled": lambda: fit(arguments.steps, compile_blocks=True),
    }
    figures: dict[str, Any] = {}
    for name, part in parts.items():
        print(f"{name}: ...", flush=True)
        try:
            figures[name] = part()
        except Exception as error:  # the other parts must still report
            traceback.print_exc()
            figures[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
        shown = {
            key: value for key, value in figures[name].items() if key not in ("step_seconds", "step_tokens", "losses")
        }
        print(f"{name}: {json.dumps(shown)}", flush=True)
    failed = [name for name, value in figures.items() if "failed" in value]
    print(f"Written to {arguments.output}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
