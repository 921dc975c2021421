"""The table of a benchmark, rendered from its results file alone."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

Run = dict[str, Any]
BARS = {"speed": (2.2, 2.5), "memory": (0.5, 0.45)}


def leaders(data: dict[str, Any], grid: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The fastest setting of each layout on the long rows."""
    best: dict[str, tuple[float, str]] = {}
    for setting, options in grid.items():
        run = data["runs"].get(f"long|grid|trl {setting}", {})
        speed = run.get("tokens_per_second", 0.0)
        if speed > best.get(options["layout"], (0.0, ""))[0]:
            best[options["layout"]] = (speed, setting)
    return {setting: grid[setting] for _, setting in best.values()}


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Median with least and greatest."""
    if len(values) == 1:
        return form.format(values[0]) + " (one pair)"
    return f"{form.format(median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def turns(data: dict[str, Any], workload: str, sides: Iterable[str] = ("trl", "ours", "plain")) -> list[dict[str, Run]]:
    """The runs of each turn that all sides have completed, by side."""
    found: dict[int, dict[str, Run]] = {}
    for key, run in data["runs"].items():
        name, phase, side = key.split("|")
        if name == workload and phase.startswith("turn "):
            side_name, _, setting = side.partition(" ")
            found.setdefault(int(phase.split()[1]), {})[side_name] = {**run, "setting": setting}
    return [found[n] for n in sorted(found) if set(sides) <= found[n].keys()]


def ratios(pairs: list[dict[str, Run]], a: str, b: str, what: str) -> list[float]:
    """``a`` divided by ``b`` in each turn."""
    return [pair[a][what] / pair[b][what] for pair in pairs]


def verdict(kind: str, value: float) -> str:
    """Whether a ratio reaches the bar and the aim."""
    bar, aim = BARS[kind]
    reached = (lambda wanted: value >= wanted) if kind == "speed" else (lambda wanted: value <= wanted)
    word = "reaches the aim" if reached(aim) else "reaches the bar, not the aim" if reached(bar) else "misses the bar"
    return f"{word} (bar {bar}, aim {aim})"


def share(run: Run, gflop_per_token: float) -> float:
    """Part of the matrix-product peak of the same process that the useful work reached, in percent."""
    return 100 * run["tokens_per_second"] * gflop_per_token / max(run["matmul_gflops"].values())


def line(name: str, run: Run, gflop: float) -> str:
    """One run as a table row."""
    if "failed" in run:
        return f"| {name} | could not run | | | | |"
    seconds = median(run["step_seconds"][run["warmup"] :])
    return (
        f"| {name} | {run['tokens_per_second']:.0f} | {run['peak_memory_bytes'] / 1e9:.2f} | {seconds:.2f} "
        f"| {share(run, gflop):.0f} % | {run['losses'][0]:.3f} -> {run['losses'][-1]:.3f} |"
    )


def curves(pairs: list[dict[str, Run]]) -> list[str]:
    """How far the loss curves lie apart, step by step, where the steps hold the same rows."""
    lines = []
    for other, title in (("trl", "TRL"), ("plain", "bare loop")):
        ours, theirs = pairs[0]["ours"], pairs[0][other]
        if ours["step_tokens"] != theirs["step_tokens"]:
            means = [sum(run["losses"]) / len(run["losses"]) for run in (ours, theirs)]
            lines.append(
                f"- ours and {title}: their steps hold different rows (packed or grouped in another order); "
                f"means over the run {means[0]:.4f} and {means[1]:.4f}"
            )
            continue
        gaps = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        lines.append(f"- ours and {title}: same rows in each step; largest difference {max(gaps):.4f} nats")
    return lines


def padded_curve(data: dict[str, Any], workload: str, pairs: list[dict[str, Run]]) -> list[str]:
    """Our curve against TRL's padded settings of the grid, whose steps hold the same rows as ours."""
    lines = []
    ours = pairs[0]["ours"]
    for key, run in data["runs"].items():
        name, phase, side = key.split("|")
        if (name, phase) != (workload, "grid") or "failed" in run or run["step_tokens"] != ours["step_tokens"]:
            continue
        gap = max(abs(a - b) for a, b in zip(ours["losses"], run["losses"], strict=True))
        lines.append(f"- ours and {side}: same rows in each step; largest difference {gap:.4f} nats")
    return lines


def workload_section(data: dict[str, Any], name: str) -> list[str]:
    """Everything about one workload."""
    facts, pairs = data["rows"][name], turns(data, name)
    gflop = facts["useful_gflop_per_token"]
    head = "| run | tokens/s | peak GB | s/step | share of peak | loss, first -> last |\n|---|---|---|---|---|---|"
    out = [
        f"## Workload `{name}`",
        f"{facts['rows']} rows, {facts['mean_tokens']:.0f} tokens on average (longest {facts['longest']}), "
        f"{100 * facts['scored_tokens'] / facts['tokens']:.0f} % of them scored; "
        f"{data['settings']['batch'][name]} rows a step, {data['settings']['steps']} steps, the first "
        f"{data['settings']['warmup']} not timed; "
        f"{gflop:.2f} GFLOP of matrix products a token at least.",
        "",
    ]
    if pairs:
        best = pairs[0]["trl"]["setting"]
        speed, memory = (ratios(pairs, "ours", "trl", what) for what in ("tokens_per_second", "peak_memory_bytes"))
        bare = [100 * (ratio - 1) for ratio in ratios(pairs, "plain", "ours", "tokens_per_second")]
        out += [
            f"**Against TRL + PEFT at its best setting, `{best}`**",
            f"({len(pairs)} turns; median with least and greatest)",
            "",
            f"- speed: {spread(speed)} x; {verdict('speed', median(speed))}",
            f"- peak memory: {spread(memory)} x; {verdict('memory', median(memory))}",
            f"- overhead over a bare PyTorch loop: {spread(bare, '{:.1f}')} % (aim: 5 % at most)",
            "",
            "### In turn",
            head,
        ]
        for number, pair in enumerate(pairs):
            out += [line(f"{number}: TRL {best}", pair["trl"], gflop), line(f"{number}: ours", pair["ours"], gflop)]
            out += [line(f"{number}: bare loop", pair["plain"], gflop)]
        out += ["", "Loss curves:", *curves(pairs), *padded_curve(data, name, pairs), ""]
    runs = {key.split("|")[2]: run for key, run in data["runs"].items() if key.startswith(f"{name}|grid|")}
    out += ["### TRL's grid, one run each", head, *(line(key, run, gflop) for key, run in runs.items()), ""]
    extra = {key.split("|")[2]: run for key, run in data["runs"].items() if key.startswith(f"{name}|checkpointed|")}
    if extra:
        out += ["### With gradient checkpointing", head, *(line(key, run, gflop) for key, run in extra.items()), ""]
    for key, run in runs.items():
        if "failed" in run:
            out += [f"`{key}` could not run: {run['failed']}", ""]
    return out


def render(data: dict[str, Any]) -> str:
    """The whole page."""
    machine = data["machine"]
    peaks = [run["matmul_gflops"] for run in data["runs"].values() if "matmul_gflops" in run]
    threads = sorted({run["threads"] for run in data["runs"].values() if "threads" in run})
    out = [
        "# SFT with LoRA: speed and memory",
        "",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['features'])}), "
        f"{'/'.join(map(str, threads))} threads.",
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + ".",
    ]
    if peaks:
        bf16, fp32 = (spread([peak[name] for peak in peaks], "{:.0f}") for name in ("bfloat16", "float32"))
        out.append(
            f"Matrix-product peak, measured in each of the processes after its run: bf16 {bf16}, fp32 {fp32} "
            "GFLOP/s. The share of peak below is the least work a token needs, at the speed reached, over the higher "
            "of the two."
        )
    out.append("")
    for name in data["rows"]:
        if any(key.startswith(f"{name}|") for key in data["runs"]):
            out += workload_section(data, name)
    return "\n".join(out).rstrip() + "\n"
