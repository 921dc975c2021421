"""Renders what `benchmarks.methods` has kept as tables; nothing is written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import mean, median
from typing import Any

from benchmarks.method_list import DECODER, ENCODER, methods
from benchmarks.vader_cells import SEEDS, best_rate
from lightning_ft.functional.intervals import mean_interval, wilson

Keys = Callable[..., dict[float, str]]
HEADS = ("method", "trained", "share", "rate", "test accuracy", "95 %", "tokens/s", "of full", "of LoRA", "peak GB")
TITLES = {
    ENCODER: "`starter:minilm-l6`: sentiment of a sentence, by a new head",
    DECODER: "`starter:smollm2-135m`: the same as a question with an answer of one word",
}


def render(kept: dict[str, Any], keys: Keys, scores: dict[str, str]) -> str:
    """The whole page of results.

    Args:
        kept: the content of methods.json.
        keys: (model, method, seed) -> rate -> key of its cell.
        scores: model -> what its rates are chosen by.
    """
    cells, setting = kept["cells"], kept.get("setting", {})
    lines = ["# Methods of training few parameters, and full training", "", *_how(kept, setting)]
    for model in (ENCODER, DECODER):
        lines += ["", f"## {TITLES[model]}", "", *table(model, kept, keys, scores[model])]
        lines += ["", f"{scores[model].replace('val/', 'Validation ')} of the rates tried (seed {SEEDS[0]}):", ""]
        lines += [_row(("method", "rate: score")), _row(("---", "---"))]
        for name in methods():
            found = {rate: cells.get(key, {}) for rate, key in keys(model, name).items()}
            shown = [f"{rate:g}: {_score(cell, scores[model])}" for rate, cell in found.items() if cell]
            lines += [_row((name, ", ".join(shown)))] if shown else []
    about = [f"- {name}: {method.about}" for name, method in methods().items()]
    return "\n".join([*lines, "", "## What each trains", "", *about]) + "\n"


def table(model: str, kept: dict[str, Any], keys: Keys, score: str) -> list[str]:
    """The lines of one model's table: the methods whose grid of rates is complete."""
    cells, speed = kept["cells"], kept.get("speed", {})
    full = (cells.get(key, {}) for key in keys(model, "full").values())
    whole = next((cell["trainable"] for cell in full if "scores" in cell), None)
    lines = [_row(HEADS), _row("---" for _ in HEADS)]
    for name in methods():
        lines += _method(model, name, cells, speed, keys, score, whole)
    return lines


def filled(page: str, kept: dict[str, Any], keys: Keys, scores: dict[str, str]) -> str:
    """A page with its tables between ``<!-- measured: encoder -->`` and ``<!-- end -->`` written anew."""

    def block(match: re.Match[str]) -> str:
        start, model, end = match.groups()
        return "\n".join([start, *table(model, kept, keys, scores[model]), end])

    return re.sub(r"(<!-- measured: (\w+) -->).*?(<!-- end -->)", block, page, flags=re.DOTALL)


def _how(kept: dict[str, Any], setting: dict[str, Any]) -> list[str]:
    if not kept.get("machine"):
        return ["Nothing has been measured yet."]
    one, two, machine = setting[ENCODER], setting[DECODER], kept["machine"]
    versions = machine["versions"]
    return [
        f"VADER's clearly rated sentences of three domains. Encoder: {one['train']} train, {one['val']} validation and "
        f"{one['test']} test rows, {one['steps']} steps of {one['batch']} rows for every method, the new head at "
        f"{one['head_lr']:g} or the method's rate, whichever is higher; the rate is the best of three by the accuracy on "
        f"validation rows with seed {SEEDS[0]}; the mean of {len(SEEDS)} seeds with Student's 95 % interval (three seeds make it "
        f"wide). Decoder: {two['train']} train, {two['val']} validation and {two['test']} test rows, one epoch of "
        f"{two['steps']} steps of {two['batch']} rows; the rate is the best of three by the loss on validation rows; one seed with "
        "Wilson's 95 % interval over the test rows, which says nothing about other seeds.",
        "",
        "Share: of the parameters of full training. Speed and peak memory (of the whole process) come from a pass of their own: a "
        "fresh process for each method, a few steps, one thread a core, nothing beside it; `gradual` thaws within these steps. "
        "Ratios are taken within a turn, and the median is shown.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}, lightning {versions['lightning']}, "
        f"transformers {versions['transformers']}.",
    ]


def _method(
    model: str,
    name: str,
    cells: dict[str, Any],
    speed: dict[str, Any],
    keys: Keys,
    score: str,
    whole: int | None,
) -> list[str]:
    rate = best_rate(cells, keys(model, name), score)
    if rate is None:
        return []
    done = [c for seed in SEEDS if "scores" in (c := cells.get(keys(model, name, seed)[rate], {}))]
    values = [cell["scores"]["test/accuracy"] for cell in done]
    if model == DECODER:
        low, high = wilson(done[0]["scores"]["test/right"], done[0]["scores"]["test/rows"])
    elif len(done) < len(SEEDS):
        return []
    else:
        low, high = mean_interval(values)
    interval = f"{low:.3f} to {min(high, 1.0):.3f}"
    trained = done[0]["trainable"]
    share = f"{100 * trained / whole:.3g} %" if whole else ""
    told = (name, f"{trained:,}", share, f"{rate:g}", f"{mean(values):.3f}", interval)
    return [_row((*told, *_speed(model, name, speed)))]


def _speed(model: str, name: str, speed: dict[str, Any]) -> tuple[str, ...]:
    """Tokens/s, its ratios to full training and to LoRA within a turn, and the peak."""

    def turns(method: str, what: str) -> dict[str, float]:
        start = f"{model}|{method}|turn "
        return {k.removeprefix(start): v[what] for k, v in speed.items() if k.startswith(start) and what in v}

    own = turns(name, "tokens_per_second")
    if not own:
        return ("", "", "", "")
    ratios = []
    for other in ("full", "LoRA"):
        theirs = turns(other, "tokens_per_second")
        both = [own[turn] / theirs[turn] for turn in own if turn in theirs]
        ratios.append(f"{median(both):.2f}" if both else "")
    peak = max(turns(name, "peak_memory_bytes").values()) / 1e9
    return (f"{median(own.values()):,.0f}", *ratios, f"{peak:.2f}")


def _score(cell: dict[str, Any], score: str) -> str:
    return f"{cell['scores'][score]:.3f}" if "scores" in cell else "failed"


def _row(values: Any) -> str:
    return "| " + " | ".join(values) + " |"
