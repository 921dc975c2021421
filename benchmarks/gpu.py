"""What only a GPU can show, in one offline script with random weights: `make gpu`; about five minutes on a large one.

    python -m benchmarks.gpu                        # everything; each part in a process of its own; goes on where it stopped
    python -m benchmarks.gpu --only FSDP2,nf4       # parts whose name contains one of these
    python -m benchmarks.gpu --dry                  # the same on a CPU with a tiny model: is the script itself right?

1. The kernels (`gpu_kernels`): packed attention and the head against the same on a CPU, chunk sizes, the matrix-product peak.
2. Every method (`gpu_fits`) on a random Llama of 0.1 B parameters: a falling loss and a checkpoint that gives the loss back, in
   fp32, bf16 and fp16 (by autocast, with a scaler); over bases of 4 and 8 bits; sharded by FSDP2. Several at a time.
3. Other objectives (`gpu_more`): preferences, rollouts, distillation, continual and meta-learning, in the same way.
4. Speed and memory on a Llama of 1.0 B parameters, alone on the GPU: methods, generation, and beside TRL + PEFT (`gpu_peers`).

A part that fails, or is not through in time, does not hide the others; the exit code is 1 if any did. Figures go to
``--output``, by default ``gpu.json`` below ``$OUT`` where that is set, else below ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_fits, gpu_forks, gpu_kernels, gpu_more, gpu_peers
from benchmarks.vader_cells import quiet

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# So that asking whether there is a GPU does not touch it: a fork of a process that has touched it can no longer use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

RESULTS = Path(__file__).resolve().parent / "results"
KERNELS = ("machine", "packed_attention", "head")
LONG = ("step_seconds", "step_tokens", "losses")
MODEL = "model"
USABLE = "usable"
"""Whether a GPU is there and a fork can use it."""
TIMED_ONLY = ("tokens_per_second", "step_seconds", "peak_memory_bytes")
"""Figures that mean nothing where other parts ran at the same time."""


def stages() -> list[tuple[bool, dict[str, Callable[[Path, str, int], dict[str, Any]]]]]:
    """(whether its parts run alone, name -> part), in order."""
    fits = {name: _fit(name) for name in gpu_fits.jobs()}
    large = {name: run for name, run in fits.items() if gpu_fits.jobs()[name].large}
    kernels = {name: _kernel(name) for name in KERNELS}
    checks = {name: run for name, run in fits.items() if name not in large}
    return [(True, kernels), (False, {**checks, **gpu_more.CHECKS}), (True, {**large, **gpu_peers.PARTS})]


def _fit(name: str) -> Callable[[Path, str, int], dict[str, Any]]:
    return lambda folder, device, steps: gpu_fits.run(name, folder, device, steps)


def _kernel(name: str) -> Callable[[Path, str, int], dict[str, Any]]:
    return lambda folder, device, steps: getattr(gpu_kernels, name)(device)


def names() -> list[str]:
    """All parts, in order."""
    return [name for _, parts in stages() for name in parts]


def part(name: str, folder: Path, dry: bool, steps: int) -> dict[str, Any]:
    """One part's figures.

    Args:
        name: one of `names`, or ``model``, which writes the inputs of the fits.
        folder: where these lie.
        dry: on the CPU, with a tiny model.
        steps: of each fit.
    """
    device = "cpu" if dry else "cuda"
    if name == USABLE:
        return usable(device)
    if name == MODEL:
        return gpu_fits.write_inputs(folder, dry)
    found = {name: run for _, parts in stages() for name, run in parts.items()}
    return found[name](folder, device, steps)


def usable(device: str) -> dict[str, Any]:
    """Whether this process can use the device."""
    import torch

    if device == "cpu":
        return {"there": True, "works": True}
    if not torch.cuda.is_available():
        return {"there": False, "works": False}
    try:
        return {"there": True, "works": float(torch.ones(2, device=device).sum()) == 2}
    except RuntimeError as error:
        return {"there": True, "works": False, "reason": str(error)}


def imported() -> None:
    """Imports what parts need, so that forks find it there; nothing that asks the GPU."""
    import datasets  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lightning_ft

    for name in lightning_ft.__all__:  # they are imported where they are first asked for
        getattr(lightning_ft, name)


class Runs:
    """Starts parts and keeps what they find."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.fresh = arguments, folder, bool(arguments.fresh)
        self.output: Path = arguments.output
        self.kept: dict[str, Any] = {}
        if self.output.exists() and not arguments.anew:
            self.kept = json.loads(self.output.read_text())
        self.count, self.all = 0, 0

    def start(self, name: str, lanes: int = 1) -> gpu_forks.Part:
        """A process for a part."""
        given = self.arguments

        def work() -> dict[str, Any]:
            quiet()
            limit_threads(lanes)
            return part(name, self.folder, given.dry, given.steps)

        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--folder", str(self.folder)]
        command += ["--steps", str(given.steps), "--lanes", str(lanes), *(["--dry"] if given.dry else [])]
        return gpu_forks.Part(name, self.folder, command if self.fresh else work, given.limit)

    def done(self, name: str, figures: dict[str, Any], alone: bool) -> None:
        """Writes it down."""
        self.count += 1
        self.kept[name] = figures if alone else untimed(figures)
        part = self.output.with_suffix(".part")
        part.write_text(json.dumps(self.kept, indent=1) + "\n", encoding="utf-8")
        part.replace(self.output)
        print(f"[{self.count}/{self.all}] {name}: {shown(self.kept[name])}", flush=True)

    def one(self, name: str) -> dict[str, Any]:
        """A part that is not kept."""
        found: list[dict[str, Any]] = []
        gpu_forks.run_parts([name], self.start, 1, lambda _, figures: found.append(figures))
        return found[0]


def limit_threads(lanes: int) -> None:
    """A fair share of the cores."""
    import torch

    if lanes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // lanes))


def untimed(figures: Any) -> Any:
    """The same without what only means something alone on the GPU."""
    if not isinstance(figures, dict):
        return figures
    return {name: untimed(value) for name, value in figures.items() if name not in TIMED_ONLY}


def shown(figures: dict[str, Any]) -> str:
    """One line of a part's figures for people."""
    if "failed" in figures:
        return "FAILED: " + figures["failed"].splitlines()[-1][:300]
    both = {"": figures, **figures}
    told = [
        f"{name} {one['tokens_per_second']:,.0f} tokens/s {one['peak_memory_bytes'] / 1e9:.2f} GB".strip()
        for name, one in both.items()
        if isinstance(one, dict) and "tokens_per_second" in one
    ]
    told = told or [
        f"{name} {one['losses'][0]:.3f} -> {one['losses'][-1]:.3f}"
        for name, one in both.items()
        if isinstance(one, dict) and "losses" in one
    ]
    seconds = f" ({figures['wall_seconds']:.0f} s)" if "wall_seconds" in figures else ""
    return (", ".join(told) or json.dumps({k: v for k, v in figures.items() if k not in LONG})[:400]) + seconds


def run_all(arguments: argparse.Namespace) -> int:
    """Every part that is not there yet, those of a stage in as many lanes as it allows."""
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(arguments, Path(name))
        if not runs.fresh:
            imported()
        can = runs.one(USABLE)
        if not can.get("works") and not runs.fresh:  # this process's CUDA is in use already
            runs.fresh = True
            can = runs.one(USABLE)
        if not can.get("there"):
            print(
                f"make gpu needs a CUDA GPU and a CUDA build of torch; nothing was measured. {can.get('failed', '')}".rstrip()
            )
            return 1 if "failed" in can else 0
        waiting = [
            (alone, [n for n in parts if wanted(n, arguments.only) and "failed" in runs.kept.get(n, {"failed": 1})])
            for alone, parts in stages()
        ]
        runs.all = sum(len(parts) for _, parts in waiting)
        if any(n not in KERNELS for _, parts in waiting for n in parts):
            runs.all += 1
            runs.done(MODEL, runs.one(MODEL), True)
        for alone, parts in waiting if "failed" not in runs.kept.get(MODEL, {}) else waiting[:1]:
            lanes = 1 if alone else arguments.lanes

            def start(one: str, lanes: int = lanes) -> gpu_forks.Part:
                return runs.start(one, lanes)

            def done(one: str, figures: dict[str, Any], lanes: int = lanes) -> None:
                runs.done(one, figures, lanes == 1)

            gpu_forks.run_parts(parts, start, lanes, done)
    failed = [name for name, value in runs.kept.items() if "failed" in value]
    print(f"Written to {arguments.output}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


def stopped(*_: Any) -> None:
    """What SIGTERM does: ends the parts that run, and this process."""
    raise SystemExit(143)


def wanted(name: str, only: str) -> bool:
    """Whether the name contains one of these."""
    return any(one in name for one in only.split(","))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What only a GPU can show.")
    parser.add_argument("--output", type=Path, help="by default gpu.json in $OUT, else in benchmarks/results")
    parser.add_argument(
        "--steps", type=int, default=8, help="optimizer steps of each fit, at least 5; of the timed ones twice"
    )
    parser.add_argument("--only", default="", help="parts whose name contains one of these, separated by commas")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a part may take")
    parser.add_argument(
        "--lanes",
        type=int,
        default=max(1, min(8, (os.cpu_count() or 1) // 2)),
        help="how many parts that are not timed run at once; each takes 3 GB of the GPU at most (default: %(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="start each part afresh, not as a fork: imports cost more")
    parser.add_argument("--anew", action="store_true", help="measure again what the output holds")
    parser.add_argument("--dry", action="store_true", help="on the CPU with a tiny model: a check of the script alone")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part is not None:
        quiet()
        limit_threads(arguments.lanes)
        found = part(arguments.part, arguments.folder, arguments.dry, arguments.steps)
        gpu_forks.write_answer(arguments.answer, found)
        return 0
    if arguments.output is None:
        home = Path(os.environ.get("OUT") or RESULTS) if not arguments.dry else Path(tempfile.gettempdir())
        arguments.output = home / ("gpu_dry.json" if arguments.dry else "gpu.json")
    before = signal.signal(signal.SIGTERM, stopped)
    try:
        return run_all(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
