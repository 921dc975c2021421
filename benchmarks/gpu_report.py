"""The page of what `benchmarks.gpu` has found: `gpu.json` as tables."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

PEERS = "1 B: "


def _is_peer(name: str, figures: Any) -> bool:
    return name.startswith(PEERS) and "side" in figures


def rates(figures: dict[str, Any]) -> list[float]:
    """Tokens/s of each timed step."""
    pairs = list(zip(figures["step_tokens"], figures["step_seconds"], strict=True))
    return [tokens / seconds for tokens, seconds in pairs[figures["warmup"] :]]


def sides(data: dict[str, Any]) -> list[str]:
    """Speed and memory of both sides, each workload's fastest peer as the measure."""
    rows = []
    for workload in ("SFT", "DPO"):
        runs = {n: f for n, f in data.items() if _is_peer(n, f) and n.startswith(f"{PEERS}{workload},")}
        peers = [figures for figures in runs.values() if figures["side"] != "ours"]
        if not peers:
            continue
        best = max(peers, key=lambda figures: figures["tokens_per_second"])
        for name, figures in runs.items():
            steps = rates(figures)
            speed, memory = (figures[key] for key in ("tokens_per_second", "peak_memory_bytes"))
            cells = [
                name.removeprefix(PEERS),
                f"{speed:,.0f}",
                f"{median(steps):,.0f} ({min(steps):,.0f} to {max(steps):,.0f})",
                f"{speed / best['tokens_per_second']:.2f}",
                f"{memory / 1e9:.1f}",
                f"{memory / best['peak_memory_bytes']:.2f}",
                *(f"{figures['losses'][at]:.4f}" for at in (0, -1)),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    head = "| run | tokens/s | median step | of the fastest peer | peak GB | of its memory | first loss | last loss |"
    return [head, "| --- " * 8 + "|", *rows]


def fits(data: dict[str, Any]) -> list[str]:
    """First and last loss of each check, in each precision."""
    rows = []
    for name, figures in data.items():
        if "failed" in figures:
            rows.append(f"| {name} | failed: {figures['failed'].strip().splitlines()[-1][:160]} |")
            continue
        found = {key: one for key, one in figures.items() if isinstance(one, dict) and "losses" in one}
        if "losses" in figures and "side" not in figures:
            found = {"": figures}
        told = ", ".join(
            f"{key} {one['losses'][0]:.3f} to {one['losses'][-1]:.3f}".strip() for key, one in found.items()
        )
        if told:
            rows.append(f"| {name} | {told} |")
        elif "last" in figures or "matrix" in figures or "losses_of_episodes" in figures:
            rows.append(f"| {name} | runs, all numbers finite |" if _finite(figures) else f"| {name} | runs |")
    return ["| part | loss, first to last |", "| --- | --- |", *rows]


def _finite(figures: dict[str, Any]) -> bool:
    return "NaN" not in json.dumps(figures)


def render(data: dict[str, Any]) -> str:
    """The page."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peaks = ", ".join(f"{value:,.0f} in {name}" for name, value in machine["matmul_tflops"].items())
    chunks = {int(size): one["seconds"] * 1e3 for size, one in data["head"]["chunk_sizes"].items()}
    timed = [len(rates(figures)) for name, figures in data.items() if _is_peer(name, figures)]
    return "\n".join(
        [
            "# On a GPU",
            "",
            f"{machine['gpu']}, CUDA {machine['cuda']}, {versions}. Matrix products: {peaks} TFLOP/s. Written by `python -m "
            "benchmarks.gpu_report` from `gpu.json`.",
            "",
            "## Beside TRL + PEFT",
            "",
            f"LoRA on a random Llama of 1.0 B parameters, the same rows; one run a side, {int(median(timed or [0]))} timed steps, "
            "whose spread is shown. TRL's attention is torch's (`sdpa`): FlashAttention's package was not there. Its packed rows "
            "end in steps of a few tokens, which count in the mean and hardly in the median. Four processes kept some of the CPU's "
            "cores busy meanwhile.",
            "",
            *sides(data),
            "",
            "## What runs, and to what loss",
            "",
            "A random Llama of 0.1 B parameters where no size is named, a few steps on the same rows.",
            "",
            *fits(data),
            "",
            "Milliseconds of the head by its chunk of tokens: "
            + ", ".join(f"{size:,}: {value:.1f}" for size, value in chunks.items())
            + ".",
            "",
        ]
    )


def main() -> None:
    """Write the page beside the figures."""
    file = Path(__file__).resolve().parent / "results" / "gpu.json"
    file.with_suffix(".md").write_text(render(json.loads(file.read_text())), encoding="utf-8")
    print(f"Written to {file.with_suffix('.md')}.")


if __name__ == "__main__":
    main()
