"""What every side of a benchmark measures in the same way: step times, tokens, losses, peak memory, the machine.

A side is one process that trains for a few steps and prints one JSON line (`emit`). The clock runs from the end of
one optimizer step to the end of the next, so that loading, the loop's own overhead and logging are part of a step.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

PACKAGES = ("torch", "lightning", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")


@dataclass
class Spec:
    """One run of one side: what to train on and for how long.

    Attributes:
        model: folder of a Hugging Face causal model with its tokenizer.
        rows: JSONL file of ``prompt`` / ``completion`` messages.
        adapter: folder of the LoRA factors (PEFT's format) that every side starts from.
        batch_size: rows a step.
        steps: optimizer steps, warm-up included.
        warmup: first steps that are trained but not timed.
        lr: constant learning rate of AdamW, no weight decay, no clipping.
        r: LoRA rank, on all linear layers except the head.
        alpha: LoRA scale; the update is multiplied by ``alpha / r``.
        device: ``cpu`` or ``cuda``.
        options: settings of the side itself (TRL's grid).
    """

    model: str
    rows: str
    adapter: str
    batch_size: int = 8
    steps: int = 10
    warmup: int = 2
    lr: float = 2e-4
    r: int = 8
    alpha: int = 16
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_argv(cls, argv: list[str] | None = None) -> Spec:
        """Read the specification from the only argument: a JSON object."""
        arguments = sys.argv[1:] if argv is None else argv
        if len(arguments) != 1:
            raise SystemExit("A side takes one argument, its specification as a JSON object (see measure.Spec).")
        return cls(**json.loads(arguments[0]))


@dataclass
class StepClock:
    """Seconds, real tokens and loss of each optimizer step."""

    warmup: int
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _last: float = 0.0

    def start(self) -> None:
        """Begin the first step."""
        self._last = time.perf_counter()

    def tick(self) -> None:
        """End a step; its tokens and loss may be appended by the caller afterwards."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def step(self, tokens: int, loss: float) -> None:
        """End a step of ``tokens`` real (not padding) tokens."""
        self.tokens.append(int(tokens))
        self.losses.append(float(loss))
        self.tick()

    def summary(self) -> dict[str, Any]:
        """The measured part of a side's JSON line."""
        timed, tokens = self.seconds[self.warmup :], self.tokens[self.warmup :]
        if not timed or len(self.tokens) != len(self.seconds):
            raise RuntimeError(
                f"The clock saw {len(self.seconds)} steps and {len(self.tokens)} token counts; "
                f"it needs one of each per step and more than the {self.warmup} warm-up steps."
            )
        return {
            "tokens_per_second": sum(tokens) / sum(timed),
            "step_seconds": self.seconds,
            "step_tokens": self.tokens,
            "losses": self.losses,
            "warmup": self.warmup,
        }


def peak_memory_bytes(device: str = "cpu") -> int:
    """Largest resident size of this process so far; on ``cuda`` what its tensors took at most since the last reset.

    The kernel's high-water mark of the present address space is preferred to ``getrusage``: on Linux the latter keeps
    the size of the parent across fork and exec.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if platform.system() == "Darwin" else size * 1024


def matmul_peak(dtype_name: str, size: int = 2048, seconds: float = 1.5) -> float:
    """Best rate of a (size, size) matrix product in this process, in GFLOP/s.

    Args:
        dtype_name: ``"bfloat16"`` or ``"float32"``.
        size: edge of the matrices; 2048 is past the point where larger ones are faster on the CPUs tried.
        seconds: stop after this long, at least two products are done.
    """
    import torch

    dtype = getattr(torch, dtype_name)
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    best, begun, done = float("inf"), time.perf_counter(), 0
    while done < 2 or time.perf_counter() - begun < seconds:
        t = time.perf_counter()
        torch.matmul(a, b, out=out)
        best = min(best, time.perf_counter() - t)
        done += 1
    return 2 * size**3 / best / 1e9


def cpu_model() -> str:
    """Name of the processor as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Instruction sets that decide the speed of bf16 products, of those this processor has."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_precision() -> Literal["bf16-mixed", "32-true"]:
    """Of a Trainer: bfloat16 where products in it are fast (newer GPUs, CPUs with AVX512-BF16 or AMX), else float32."""
    import torch

    from lightning_ft.models.dtype import compute_dtype

    return "bf16-mixed" if compute_dtype("auto", device()) is torch.bfloat16 else "32-true"


def device_name() -> str:
    """The GPU's name, or the processor's."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else cpu_model()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here; a missing one is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and versions; imports no heavy package."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu_model(), "cores": cores, "features": cpu_features(), "versions": versions()}


def emit(side: str, clock: StepClock, device: str = "cpu", **extra: Any) -> dict[str, Any]:
    """Print the side's JSON line, its last line on stdout, and return it.

    Memory is read first: the matrix products that measure a CPU's peak come after it.
    """
    import torch

    result = {"side": side, **clock.summary(), "peak_memory_bytes": peak_memory_bytes(device), **extra}
    result["threads"] = torch.get_num_threads()
    if device != "cpu":
        print(json.dumps(result), flush=True)
        return result
    size = int(os.environ.get("BENCHMARK_MATMUL_SIZE", "2048"))
    seconds = 1.5 if size >= 2048 else 0.05
    result["matmul_gflops"] = {name: matmul_peak(name, size, seconds) for name in ("bfloat16", "float32")}
    print(json.dumps(result), flush=True)
    return result
