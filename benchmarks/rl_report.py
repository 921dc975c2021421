"""Table and plot of `benchmarks.rl_runs`, from what is kept alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pages import machine
from lightning_ft.functional.intervals import mean_interval

PLOT = Path(__file__).resolve().parents[1] / "docs" / "images" / "rl_grpo.png"


def plot(data: dict[str, Any], file: Path) -> None:
    """The verifier's mean score of the answers of each round, and the KL, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for key, run in sorted(data["runs"].items()):
        rounds = [point["round"] + 1 for point in run["points"]]
        for axis, name in zip(axes, ("rewards/right", "kl"), strict=True):
            axis.plot(
                rounds, [point.get(name, float("nan")) for point in run["points"]], label=_named(key), linewidth=1
            )
    for axis, words in zip(
        axes, ("verifier's mean score of sampled answers", "KL from the start, nats an answer"), strict=True
    ):
        axis.set(xlabel="round", ylabel=words)
        axis.grid(alpha=0.3)
    if data["runs"]:
        axes[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def told(data: dict[str, Any]) -> str:
    """How it was measured."""
    settings = data["settings"]
    return (
        f"{settings['base']}, LoRA r=16, peak rate {settings['lr']:g}; a round is {settings['prompts']} tasks with "
        f"{settings['samples']} answers of at most {settings['new_tokens']} tokens, before each task four solved ones. Held-out "
        "tasks are answered greedily; intervals are 95 %, over held-out tasks."
    )


def docs(data: dict[str, Any]) -> list[str]:
    """What the page of GRPO says of it; nothing where nothing was measured."""
    if not data["runs"]:
        return []
    words = f"`python -m benchmarks.rl_runs`: {told(data)} {machine(data)}"
    return ["## Measured", "", words, "", *table(data), "", "![score and KL by round](../images/rl_grpo.png)"]


def render(data: dict[str, Any]) -> str:
    """The page beside the figures."""
    out = [
        "# GRPO on tasks of reasoning-gym: solved before and after",
        "",
        told(data),
        "",
        *table(data),
        "",
    ]
    for key, run in sorted(data["runs"].items()):
        out += [
            f"Answers before and after ({_named(key)}): " + "; ".join(f"`{a}` `{b}`" for a, b in run["answers"][:4]),
            "",
        ]
    out += [machine(data)]
    return "\n".join(out) + "\n"


def table(data: dict[str, Any]) -> list[str]:
    """A row a run, and for each task with several seeds their mean."""
    out = [
        "| task | seed | rounds | steps | minutes | held out | before | after | gain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    gains: dict[str, list[float]] = {}
    for key, run in sorted(data["runs"].items()):
        task, seed = key.split("|")
        gains.setdefault(task, []).append(run["gain"]["mean"])
        shares = " | ".join(_with(run[when]["share"], run[when]["interval"]) for when in ("before", "after"))
        gain = _with(run["gain"]["mean"], run["gain"]["interval"])
        out.append(
            f"| {task} | {seed} | {run['rounds']} | {run['steps']} | {run['seconds_of_last_start'] / 60:.1f} | {run['held_out']} "
            f"| {shares} | {gain} |"
        )
    for task, each in gains.items():
        if len(each) > 1:
            mean = _with(sum(each) / len(each), mean_interval(each))
            out.append(f"| {task} | mean of {len(each)}, interval over seeds | | | | | | | {mean} |")
    return out


def _with(value: float, interval: list[float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _named(key: str) -> str:
    task, seed = key.split("|")
    return f"{task}, seed {seed}"
