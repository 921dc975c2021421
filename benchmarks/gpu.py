"""What only a GPU can show, in one offline script with random weights: `make gpu`.

    python -m benchmarks.gpu                        # everything; each part in a process of its own; goes on where it stopped
    python -m benchmarks.gpu --only FSDP2,nf4       # parts whose name contains one of these
    python -m benchmarks.gpu --dry                  # the same on a CPU with a tiny model: is the script itself right?

1. The kernels (`gpu_kernels`): packed attention and the head against the same on a CPU, chunk sizes, the matrix-product peak.
2. Every method (`gpu_fits`) on a random Llama of 1.0 B parameters: tokens/s, peak memory, a falling loss and a checkpoint that
   gives the loss back, in fp32, bf16 and fp16 (by autocast, with a scaler); over bases of 4 and 8 bits; sharded by FSDP2.

A part that fails, or is not through in time, does not hide the others; the exit code is 1 if any did. Figures go to
``--output``, by default ``gpu.json`` below ``$OUT`` where that is set, else below ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_fits, gpu_kernels
from benchmarks.vader_cells import quiet

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

RESULTS = Path(__file__).resolve().parent / "results"
KERNELS = ("machine", "packed_attention", "head")
LONG = ("step_seconds", "step_tokens", "losses")
MODEL = "model"


def names() -> list[str]:
    """All parts, in order."""
    return [*KERNELS, *gpu_fits.jobs()]


def part(name: str, folder: Path, dry: bool, steps: int) -> dict[str, Any]:
    """One part's figures.

    Args:
        name: one of `names`, or ``model``, which writes the inputs of the fits.
        folder: where these lie.
        dry: on the CPU, with a tiny model.
        steps: of each fit.
    """
    device = "cpu" if dry else "cuda"
    if name == MODEL:
        found = gpu_fits.write_inputs(folder, dry)
        (folder / "facts.json").write_text(json.dumps(found), encoding="utf-8")
        return found
    if name in KERNELS:
        return getattr(gpu_kernels, name)(device)
    return gpu_fits.run(name, folder, device, steps)


def launched(name: str, folder: Path, dry: bool, steps: int, limit: float) -> dict[str, Any]:
    """The same in a process of its own, which is ended with all that it started when its time is up."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--folder", str(folder), "--steps", str(steps)]
    log, begun = folder / "part.log", time.perf_counter()
    with open(log, "w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [*command, *(["--dry"] if dry else [])],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            cwd=RESULTS.parents[1],
        )
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"failed": f"no result after {limit:.0f} s"}
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        return {"failed": log.read_text(encoding="utf-8", errors="replace").strip()[-2000:] or "no output"}
    return {**json.loads(lines[-1]), "wall_seconds": time.perf_counter() - begun}


def shown(figures: dict[str, Any]) -> str:
    """One line of a part's figures for people."""
    if "failed" in figures:
        return "FAILED: " + figures["failed"].splitlines()[-1]
    told = [
        f"{precision} {one['tokens_per_second']:,.0f} tokens/s {one['peak_memory_bytes'] / 1e9:.2f} GB"
        for precision, one in figures.items()
        if isinstance(one, dict) and "tokens_per_second" in one
    ]
    return ", ".join(told) or json.dumps({k: v for k, v in figures.items() if k not in LONG})[:400]


def run_all(arguments: argparse.Namespace) -> int:
    """Every part that is not there yet, one after the other."""
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = json.loads(output.read_text()) if output.exists() and not arguments.anew else {}
    wanted = [name for name in names() if any(one in name for one in arguments.only.split(","))]
    waiting = [name for name in wanted if name not in kept or "failed" in kept[name]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        order = [*([MODEL] if set(waiting) - set(KERNELS) else []), *waiting]
        for n, one in enumerate(order, 1):
            print(f"[{n}/{len(order)}] {one}: ", end="", flush=True)
            kept[one] = launched(one, folder, arguments.dry, arguments.steps, arguments.limit)
            output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            print(shown(kept[one]), flush=True)
            if one == MODEL and "failed" in kept[one]:
                break
    failed = [name for name, value in kept.items() if "failed" in value]
    print(f"Written to {output}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What only a GPU can show.")
    parser.add_argument("--output", type=Path, help="by default gpu.json in $OUT, else in benchmarks/results")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each fit, at least 5")
    parser.add_argument("--only", default="", help="parts whose name contains one of these, separated by commas")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a part may take")
    parser.add_argument("--anew", action="store_true", help="measure again what the output holds")
    parser.add_argument("--dry", action="store_true", help="on the CPU with a tiny model: a check of the script alone")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU and a CUDA build of torch; this machine offers none, so nothing was measured.")
        return 0
    if arguments.part is not None:
        quiet()
        print(json.dumps(part(arguments.part, arguments.folder, arguments.dry, arguments.steps)), flush=True)
        return 0
    if arguments.output is None:
        home = Path(os.environ.get("OUT") or RESULTS) if not arguments.dry else Path(tempfile.gettempdir())
        arguments.output = home / ("gpu_dry.json" if arguments.dry else "gpu.json")
    return run_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
