"""Renders what `benchmarks.preferences` has kept as tables; nothing is written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import mean
from typing import Any

from benchmarks.preference_cells import UNSEEN
from benchmarks.vader_cells import SEEDS, best_rate
from lightning_ft.functional.intervals import mean_interval, wilson

RESULTS = "[preferences.md](../../benchmarks/results/preferences.md); `make reproduce-preferences` runs it again"
INTRODUCTIONS = {
    "reward": "On pairs of rated sentences (the higher-rated is chosen) of two domains, tested on two others. How, and which rates "
    f"were tried: {RESULTS}.",
    "policy": "`starter:smollm2-135m` toward those of its own continuations that a [reward model](reward_model.md) rates higher, "
    "judged by VADER's lexicon too, which had no part in it. KL: from the start, estimated on the policy's own answers. One seed. "
    f"How: {RESULTS}.",
    "samples": "The likeliest continuations of prompts of our own:",
}
RewardKeys = Callable[..., dict[float, str]]
PolicyKeys = Callable[[], dict[str, tuple[str, float]]]
NAMES = dict(zip(UNSEEN, ("films", "editorials"), strict=True))


def render(kept: dict[str, Any], probe: str, reward_keys: RewardKeys, policy_keys: PolicyKeys) -> str:
    """The whole page of results."""
    lines = ["# A reward model on rated sentences, and DPO and KTO toward what it rates higher", ""]
    if not kept.get("machine"):
        return "\n".join([*lines, "Nothing has been measured yet."]) + "\n"
    setting, machine = kept["setting"], kept["machine"]
    versions = machine["versions"]
    lines += [
        f"Pairs of VADER's sentences of one domain, at least {setting['gap']:g} apart in people's mean rating from -4 to 4, no "
        f"sentence in two pairs: {setting['train']} train and {setting['val']} validation pairs of tweets and product reviews, "
        f"{setting['test']} test pairs each of film reviews and of newspaper editorials, which no fit has seen. Such pairs come "
        f"from ratings of single sentences, not from comparisons. Reward model: `starter:minilm-l6`, all weights, a new head at "
        f"{setting['head_lr']:g}, one epoch in steps of {setting['batch']} pairs. Probe: scikit-learn's logistic regression on the "
        "differences of sentence embeddings of the frozen encoder, its strength chosen on the validation pairs.",
        "",
        *reward_table(kept, probe, reward_keys),
        "",
        "Accuracy on validation pairs of the rates tried (seed 0): " + _tried(kept, reward_keys) + ".",
        "",
        "## Policies",
        "",
        f"`starter:smollm2-135m` continues the first words of {setting['prompts']} tweets and product reviews twice, at "
        f"temperature 1, to the first sentence end or {setting['new_tokens']} tokens; the reward model (seed 0) says which of two "
        f"answers is the better: {kept.get('pairs', 0)} pairs, made by models alone. LoRA of rank {setting['lora_r']}, beta "
        f"{setting['beta']:g}, one epoch in steps of {setting['policy_batch']} pairs, or of twice as many of KTO's rows. Measured "
        f"on one answer each to {setting['held_out']} beginnings of film reviews; intervals are over these, of one seed.",
        "",
        *policy_table(kept, policy_keys),
        "",
        *sample_table(kept, policy_keys),
        "",
        f"{machine['cpu']}, {machine['cores']} cores, one of them used; torch {versions['torch']}, lightning "
        f"{versions['lightning']}, transformers {versions['transformers']}. SHA-256 of the lexicon: {kept.get('lexicon', 'none')}.",
    ]
    return "\n".join(lines) + "\n"


def reward_table(kept: dict[str, Any], probe: str, keys: RewardKeys) -> list[str]:
    """Accuracy on pairs of domains that were not learned."""
    rows = [("model", "pairs of", "accuracy", "95 % over pairs", "seeds", "95 % over seeds", "calibration error")]
    cells = kept["cells"]
    if "scores" in cells.get(probe, {}):
        scores = cells[probe]["scores"]
        rows += [("logistic probe", NAMES[d], *_share(scores, d), "", "", "") for d in UNSEEN]
    best = best_rate(cells, keys(), "val/accuracy")
    if best is not None:
        done = [c for seed in SEEDS if "scores" in (c := cells.get(keys(seed)[best], {}))]
        for domain in UNSEEN:
            values = [cell["scores"][f"{domain}/accuracy"] for cell in done]
            low, high = mean_interval(values) if len(values) > 1 else (float("nan"), float("nan"))
            error = mean(cell["scores"][f"{domain}/calibration"] for cell in done)
            seeds = ", ".join(f"{value:.3f}" for value in values)
            over = f"{low:.3f} to {min(high, 1.0):.3f}" if len(values) > 1 else ""
            first = _share(done[0]["scores"], domain)
            rows.append(
                (f"RewardModel, {best:g}", NAMES[domain], f"{mean(values):.3f}", f"{first[1]} (seed 0)", seeds, over,
                 f"{error:.3f}")
            )  # fmt: skip
    return _table(rows)


def policy_table(kept: dict[str, Any], keys: PolicyKeys) -> list[str]:
    """Reward, judge and KL of what each policy writes."""
    rows = [
        (
            "policy",
            "rate",
            "reward",
            "lexicon, -1 to 1",
            "answers it calls positive",
            "KL, nats an answer",
            "tokens",
        )
    ]
    for key, (method, rate) in keys().items():
        cell = kept["cells"].get(key, {})
        if "scores" in cell:
            s = cell["scores"]
            low, high = s["positive/interval"]
            share = f"{s['positive']} of {s['rows']} ({low:.2f} to {high:.2f})"
            judged = [_mean(s, name) for name in ("reward", "lexicon")]
            kl = _mean(s, "kl") if method != "start" else "0"
            rows.append(
                (
                    method,
                    f"{rate:g}" if rate else "",
                    *judged,
                    share,
                    kl,
                    f"{s['tokens']:.1f}",
                )
            )
    return _table(rows)


def sample_table(kept: dict[str, Any], keys: PolicyKeys) -> list[str]:
    """The likeliest continuation of prompts of our own, before and after."""
    rows: list[tuple[str, ...]] = [("prompt", "policy", "rate", "goes on with")]
    cells = kept["cells"]
    found = [(key, *about) for key, about in keys().items() if "samples" in cells.get(key, {})]
    for prompt in cells[found[0][0]]["samples"] if found else ():
        for key, method, rate in found:
            text = " ".join(cells[key]["samples"][prompt].split())
            rows.append((prompt, method, f"{rate:g}" if rate else "", text))
    return _table(rows)


def filled(page: str, kept: dict[str, Any], probe: str, reward_keys: RewardKeys, policy_keys: PolicyKeys) -> str:
    """A page with what stands between ``<!-- measured: reward -->`` (``policy``, ``samples``) and ``<!-- end -->`` written anew.

    That is nothing where nothing was measured.
    """
    tables = {
        "reward": lambda: reward_table(kept, probe, reward_keys),
        "policy": lambda: policy_table(kept, policy_keys),
        "samples": lambda: sample_table(kept, policy_keys),
    }

    def block(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        table = tables[name]()
        if len(table) < 3:
            return f"{start}\n{end}"
        heading = ["## Measured", ""] if name != "samples" else []
        return "\n".join([start, "", *heading, INTRODUCTIONS[name], "", *table, "", end])

    return re.sub(r"(<!-- measured: (reward|policy|samples) -->).*?(<!-- end -->)", block, page, flags=re.DOTALL)


def _tried(kept: dict[str, Any], keys: RewardKeys) -> str:
    cells = kept["cells"]
    found = {
        rate: cells[key]["scores"]["val/accuracy"] for rate, key in keys().items() if "scores" in cells.get(key, {})
    }
    return ", ".join(f"{rate:g}: {value:.3f}" for rate, value in found.items()) or "none yet"


def _share(scores: dict[str, Any], domain: str) -> tuple[str, str]:
    low, high = wilson(scores[f"{domain}/right"], scores[f"{domain}/rows"])
    return f"{scores[f'{domain}/accuracy']:.3f}", f"{low:.3f} to {high:.3f}"


def _mean(scores: dict[str, Any], name: str) -> str:
    low, high = scores[f"{name}/interval"]
    return f"{scores[name]:.2f} ({low:.2f} to {high:.2f})"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]
    return ["| " + " | ".join(entry.replace("|", "\\|") for entry in line) + " |" for line in lines]
