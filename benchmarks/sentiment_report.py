"""Table and plot of `benchmarks.sentiment_rl`, from what is kept alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pages import machine

PLOT = Path(__file__).resolve().parents[1] / "docs" / "images" / "sentiment_rl.png"
JUDGES = {"rater": "rater (the ground truth)", "lexicon": "lexicon (outside)", "model": "reward model (trained on)"}
COLOURS = {"ppo": "tab:blue", "grpo": "tab:orange", "dpo": "tab:green"}


def runs(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs with points, these in order."""
    found = [run for run in data["runs"].values() if "points" in run]
    ordered = sorted(found, key=lambda run: (list(COLOURS).index(run["kind"]), run["beta"]))
    return [{**run, "points": sorted(run["points"], key=lambda point: point["at"])} for run in ordered]


def plot(data: dict[str, Any], file: Path) -> None:
    """Reward against KL from the SFT model, one line a run; the wide panel is what the rater says, the others check it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.5), layout="constrained", width_ratios=[2, 1, 1])
    for run in runs(data):
        higher = run["beta"] == max(data["settings"]["betas"][run["kind"]])
        style = {"color": COLOURS[run["kind"]], "linestyle": "--" if higher else "-", "marker": "o", "markersize": 3}
        for judge, axis in zip(JUDGES, axes, strict=True):
            kl, told = ([point[name] for point in run["points"]] for name in ("kl", judge))
            axis.plot(kl, told, label=f"{run['kind'].upper()}, beta {run['beta']}", **style)
            low, high = ([point[f"{judge}/interval"][side] for point in run["points"]] for side in (0, 1))
            axis.errorbar(
                kl[-1:], told[-1:], [[told[-1] - low[-1]], [high[-1] - told[-1]]], color=style["color"], capsize=3
            )
    for axis, words in zip(axes, JUDGES.values(), strict=True):
        axis.set(xlabel="KL from the SFT model, nats an end", ylabel=words)
        axis.grid(alpha=0.3)
    if runs(data):
        axes[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def told(data: dict[str, Any]) -> list[str]:
    """How it was measured, and what became of the stages before the runs."""
    settings = data["settings"]
    stages = {name: data["runs"].get(name, {}) for name in ("rater", "sft", "pairs", "reward")}
    words = {
        "rater": f"Pearson's correlation with people's ratings of held-out sentences {_number(stages['rater'], 'val/pearson')}",
        "sft": f"loss of held-out ends {_number(stages['sft'], 'val/loss')} nats a token",
        "pairs": f"{stages['pairs'].get('pairs', 0):.0f} pairs",
        "reward": f"accuracy on held-out pairs {_number(stages['reward'], 'val/accuracy')}",
    }
    return [
        f"From one SFT model ({settings['base']}, LoRA r=8), rate {settings['lr']:g}, {settings['rounds']} rounds of "
        f"{settings['prompts']} answers of at most {settings['new_tokens']} tokens; DPO as many optimizer steps on the pairs. "
        f"Measured on one end each for {settings['held']} held-out beginnings; intervals are over these, of one seed.",
        "",
        *(f"- {name}: {one}" for name, one in words.items()),
    ]


def table(data: dict[str, Any]) -> list[str]:
    """A row a run, at its end."""
    out = [
        "| run | beta | steps | KL, nats an end | rater | lexicon | reward model | tokens | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = runs(data)
    if found:
        out.append(_row("SFT", "", 0, found[0]["points"][0], ""))
    for run in found:
        out.append(_row(run["kind"].upper(), run["beta"], run["steps"], run["points"][-1], f"{run['seconds']:.0f}"))
    return out


def ends(data: dict[str, Any]) -> list[str]:
    """How each goes on with the first held-out beginning."""
    found = runs(data)
    if not found:
        return []
    each = [f"- {run['kind'].upper()}, beta {run['beta']}: {_one_line(run['points'][-1]['ends'][0])}" for run in found]
    start = f"- SFT: {_one_line(found[0]['points'][0]['ends'][0])}"
    return ["First held-out beginning, and how each goes on:", "", start, *each]


def docs(data: dict[str, Any]) -> list[str]:
    """What the page of PPO says of it; nothing where no run was measured."""
    if not runs(data):
        return []
    image = "![reward against KL](../images/sentiment_rl.png)"
    head, *rest = told(data)
    return [
        "## Measured",
        "",
        f"`python -m benchmarks.sentiment_rl`: {head} {machine(data)}",
        *rest,
        "",
        *table(data),
        "",
        image,
    ]


def render(data: dict[str, Any]) -> str:
    """The page beside the figures."""
    title = "# Controlled sentiment: PPO, GRPO and DPO, reward against KL"
    out = [title, "", *told(data), "", *table(data), "", *ends(data), "", machine(data)]
    return "\n".join(out) + "\n"


def _row(name: str, beta: object, steps: int, point: dict[str, Any], seconds: str) -> str:
    judged = []
    for one in ("kl", "rater", "lexicon", "model"):
        low, high = point[f"{one}/interval"]
        judged.append(f"{point[one]:.2f} ({low:.2f} to {high:.2f})")
    return f"| {name} | {beta} | {steps} | {' | '.join(judged)} | {point['tokens']:.1f} | {seconds} |"


def _number(stage: dict[str, Any], name: str) -> str:
    return f"{stage[name]:.3f}" if name in stage else "not measured"


def _one_line(text: str) -> str:
    return " ".join(text.split())
