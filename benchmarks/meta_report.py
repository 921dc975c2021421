"""Renders what `benchmarks.meta_sinusoid` and `benchmarks.meta_text` have kept as tables; nothing is written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_ft.functional.intervals import mean_interval

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "few_shot.md"
Content = dict[str, Any]


def write(output: Path, results: Path) -> None:
    """The tables beside a file of results, and in the guide where it is the one of the tree.

    Args:
        output: the file of results, ``meta_sinusoid.json`` or ``meta_text.json`` or a copy of one.
        results: the folder of the tree's results.
    """
    content = json.loads(output.read_text()) if output.exists() else {"cells": {}}
    page = output.with_suffix(".md")
    lines = sinusoid_page(content) if "sinusoid" in output.stem else text_page(content)
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"Written to {output} and {page}.")
    if output.parent == results:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def filled(page: str, results: Path) -> str:
    """A page with what stands between ``<!-- measured: waves -->`` and ``<!-- end -->`` written anew; also speed and texts."""
    contents = {name: results / f"meta_{name}.json" for name in ("sinusoid", "text")}
    waves, texts = (json.loads(file.read_text()) if file.exists() else {"cells": {}} for file in contents.values())
    made = {"waves": waves_table(waves), "speed": speed_lines(waves), "texts": texts_tables(texts)}

    def block(match: re.Match[str]) -> str:
        lines = made[match[2]] or ["Not measured yet."]
        return "\n".join([match[1], "", *lines, "", match[3]])

    return re.sub(r"(<!-- measured: (waves|speed|texts) -->).*?(<!-- end -->)", block, page, flags=re.DOTALL)


# ---- sine waves


def sinusoid_page(content: Content) -> list[str]:
    """The whole page of meta_sinusoid."""
    lines = ["# Sine waves, through the Lightning modules", "", *_machine(content), "", *waves_table(content)]
    return [*lines, "", "## Speed", "", *(speed_lines(content) or ["Not measured yet."])]


def waves_table(content: Content) -> list[str]:
    """Row, steps, what was measured with each seed, what was to be reached, and whether the intervals meet."""
    rows: dict[str, dict[str, Any]] = {}
    for key, one in content["cells"].items():
        if "scores" in one:
            name, _, seed = key.partition("|")
            rows.setdefault(name, {})[seed] = one
    if not rows:
        return []
    heads = "| row | inner steps | mean squared error of each seed | NumPy in float64 | intervals meet |"
    lines = [heads, "| --- | --- | --- | --- | --- |"]
    for name, seeds in rows.items():
        expected = next(iter(seeds.values()))["expected"]
        for step, (value, half) in expected.items():
            found = [(one["scores"][f"{step}/loss"], one["scores"][f"{step}/loss_ci95"]) for one in seeds.values()]
            shown = ", ".join(f"{m:.3f} ± {h:.3f}" for m, h in found)
            told = f"{value:.3f}" + (f" ± {half:.3f}" if half else "")
            # Two means with intervals of their own: their difference has the root of both squares. Where no width was
            # written down, ours stands for it: as many tasks were measured.
            meet = [abs(m - value) <= (h**2 + (half or h) ** 2) ** 0.5 for m, h in found]
            lines.append(f"| {name} | {step.removeprefix('step_')} | {shown} | {told} | {_share(meet)} |")
    return [*lines, *_numpy_seeds(content)]


def _numpy_seeds(content: Content) -> list[str]:
    """What further seeds of the NumPy program gave, where it was run with some: an interval over tasks knows nothing of them."""
    lines = []
    for name, steps in content.get("numpy_seeds", {}).items():
        told = [
            f"after {step.removeprefix('step_')} step{'s' * (step != 'step_1')} {', '.join(f'{v:.3f}' for v in sorted(values))}"
            for step, values in steps.items()
        ]
        count = len(next(iter(steps.values())))
        lines += [
            "",
            f"The intervals are over tasks, for one trained model; models of other seeds differ by more. Of `{name}` the NumPy "
            f"program, run with {count} seeds anew, gives {'; '.join(told)}.",
        ]
    return lines


def _share(found: list[bool]) -> str:
    return "yes" if all(found) else "no" if not any(found) else f"{sum(found)} of {len(found)}"


def speed_lines(content: Content) -> list[str]:
    """One sentence with the figures of `--speed`."""
    speed = content.get("speed")
    if not speed:
        return []
    ms = speed["milliseconds"]
    low, high = speed["spread"]
    return [
        f"A meta-iteration of 25 waves, one inner step to order 2, Adam, one thread: {ms['lightning']:.2f} ms through Lightning "
        f"with its data and logging, {ms['plain']:.2f} ms in a plain loop of torch.func, {ms['clone']:.1f} ms where the module is "
        f"cloned for each task, as learn2learn does it. Ratios, medians of {speed['rounds']} rounds of {speed['steps']} steps in "
        f"turn: {speed['lightning / plain']:.2f} x the plain loop ({low:.2f} to {high:.2f}), "
        f"{speed['clone / lightning']:.1f} x faster than cloning.",
    ]


# ---- texts


def text_page(content: Content) -> list[str]:
    """The whole page of meta_text."""
    setting = content.get("setting", {})
    lines = ["# Few-shot text classification", "", *_machine(content), ""]
    if setting:
        lines += [
            f"{setting['base']}, {setting['way']} classes an episode, {setting['episodes']} training episodes in meta-batches of "
            f"four (for what is trained), {setting['test_episodes']} test episodes with five queries a class, of "
            f"{setting['test_classes']} classes kept out of training. A seed splits the classes and draws the episodes, the same "
            "for all rows. Rates are those of configs/, not searched for.",
            "",
        ]
    return [*lines, *texts_tables(content)]


def texts_tables(content: Content) -> list[str]:
    """For each data set and number of shots: row, accuracy over seeds, each seed's, and against the probe on the same episodes."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for key, one in content["cells"].items():
        if "scores" in one:
            data, shots, row, seed = key.split("|")
            groups.setdefault(f"{data}, {shots}", {}).setdefault(row, {})[seed] = one
    lines = []
    for title, rows in groups.items():
        lines += ["", f"**{title}**", ""]
        lines += ["| row | accuracy | 95 % over seeds | each seed ± 95 % over episodes | above the probe | GB |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        probe = {seed: one["scores"]["accuracy"] for seed, one in rows.get("probe", {}).items()}
        for row, cells in sorted(rows.items(), key=lambda item: -_mean(item[1])):
            values = [one["scores"]["accuracy"] for one in cells.values()]
            each = ", ".join(
                f"{one['scores']['accuracy']:.3f} ± {one['scores']['accuracy_ci95']:.3f}" for one in cells.values()
            )
            gaps = [one["scores"]["accuracy"] - probe[seed] for seed, one in cells.items() if seed in probe]
            gap = f"{mean(gaps):+.3f}{_interval(gaps, sign='+')}" if gaps and row != "probe" else ""
            lines.append(
                f"| {row} | {mean(values):.3f} | {_interval(values).strip(' ()')} | {each} | {gap} | {_memory(cells)} |"
            )
        adapting = {
            row: cells for row, cells in rows.items() if "step_0/accuracy" in next(iter(cells.values()))["scores"]
        }
        if adapting:
            lines += ["", "| after inner steps | 0 | 1 | 5 | 10 |", "| --- | --- | --- | --- | --- |"]
            for row, cells in adapting.items():
                means = [mean(one["scores"][f"step_{n}/accuracy"] for one in cells.values()) for n in (0, 1, 5, 10)]
                lines.append(f"| {row} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    return lines[1:]


def _memory(cells: dict[str, Any]) -> str:
    """The most of any cell: of a GPU its tensors, else the whole process, which is told."""
    on_gpu = {"NVIDIA" in one["device"]: one["peak_memory_bytes"] / 1e9 for one in cells.values()}
    return f"{on_gpu[True]:.1f}" if True in on_gpu else f"{on_gpu[False]:.1f} (process)"


def _mean(cells: dict[str, Any]) -> float:
    return mean(one["scores"]["accuracy"] for one in cells.values())


def _interval(values: list[float], sign: str = "") -> str:
    if len(values) < 2:
        return ""
    low, high = mean_interval(values)
    return f" ({low:{sign}.3f} to {high:{sign}.3f})"


# ---- both


def _machine(content: Content) -> list[str]:
    cells = [one for one in content["cells"].values() if "device" in one]
    beside = "A process with one thread for each cell, several beside one another."
    if cells:  # they may be of several machines, and each says which
        devices = {f"{one['device']} (torch {one['torch']})" if "torch" in one else one["device"] for one in cells}
        return [f"{'; '.join(sorted(devices))}. {beside}"]
    machine = content.get("machine")
    if not machine:
        return ["Nothing has been measured yet."]
    versions = machine["versions"]
    return [
        f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}. lightning {versions['lightning']}, transformers "
        f"{versions['transformers']}. {beside}"
    ]
