"""Students with and without what their teacher says: sentences, chats and digits.

    python -m benchmarks.distillation_runs                  # all cells that are missing; on a GPU minutes, on one core hours
    python -m benchmarks.distillation_runs --only digits    # cells whose key contains this; several are separated by commas
    python -m benchmarks.distillation_runs --render         # the tables alone, from the kept results

- ``sentences``: `starter:minilm-l6` tuned on clearly rated sentences teaches a student of three of its six blocks. Every student of
  a seed begins with the same blocks and head of the same teacher and takes equally many steps.
- ``chats``: `starter:smollm2-135m`, tuned on worked word problems (reasoning-gym) and questions about rated sentences, teaches a
  student of ten of its thirty blocks.
- ``digits``: a teacher 64-512-512-10, students 64-32-10 with 100 labels and 1,300 images without.

The rate of a method is chosen on validation rows with the first seed; two more seeds run at that rate, and test rows are reported.
Chats take the rate that is best for the student alone, whatever the method, so that the choice never favours a teacher.
Sentences and chats run under autocast to bfloat16 where that is fast. Cells are kept as they are done, teachers in ``--work``; a
stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.distillation_cells import CHAT_METHODS, SENTENCE_METHODS, Chats, Sentences, Sizes
from benchmarks.distillation_digits import digits
from benchmarks.vader_cells import SEEDS, Kept, best_rate, chosen, quiet

RESULTS = Path(__file__).resolve().parent / "results"
WORK = Path("runs") / "distillation"
SENTENCE_RATES, CHAT_RATES = (5e-5, 1e-4, 2e-4), (3e-4, 1e-3)
DIGIT_METHODS = ("teacher", "alone", "teacher alone", "labels and teacher")
SHOWN = {
    "alone": "student alone",
    "soft targets": "labels and soft targets",
    "distilbert": "labels, soft targets, cosine of the last states",
    "teacher alone": "soft targets, no label",
    "labels and teacher": "labels and soft targets",
    "unlabelled too": "soft targets, no label, all rows",
    "states too": "soft targets and hidden states of three blocks, no label, all rows",
}
"""Method -> what a table calls it."""
Cells = Mapping[str, Mapping[str, Any]]


def key(kind: str, method: str, rate: float, seed: int) -> str:
    """Of a student's cell."""
    return f"{kind}|{method}|{rate:g}|{seed}"


def judge(kind: str, method: str) -> str:
    """The method by whose cells the rate of a method is chosen: its own, or of chats the student alone."""
    return method if kind == "sentences" else "alone"


def rates(kind: str, method: str) -> dict[float, str]:
    """Rate -> key of the cell by which it is judged, with the first seed."""
    values = SENTENCE_RATES if kind == "sentences" else CHAT_RATES
    return {rate: key(kind, judge(kind, method), rate, SEEDS[0]) for rate in values}


def run(kept: Kept, work: Path, sizes: Sizes) -> None:
    """Every missing cell that is asked for."""
    for seed in SEEDS:
        kept.ensure(f"digits|{seed}", lambda seed=seed: digits(seed, sizes), "labels and teacher")  # type: ignore[misc]
    sentences, chats = Sentences(sizes, work), Chats(sizes, work)
    kept.ensure("sentences|probe|0", sentences.probe, "val/accuracy")
    for seed in SEEDS:
        kept.ensure(f"sentences|teacher|{seed}", lambda seed=seed: sentences.teacher(seed), "val/accuracy")  # type: ignore[misc]
    kept.ensure("chats|teacher|0", chats.teacher, "val/loss")
    kept.ensure("chats|untrained|0", chats.untrained, "val/loss")
    for kind, methods, student, score in (
        ("sentences", list(SENTENCE_METHODS), sentences.student, "val/accuracy"),
        ("chats", list(CHAT_METHODS), chats.student, "val/loss"),
    ):
        for method in methods:
            first = judge(kind, method)
            for rate, name in rates(kind, method).items():
                kept.ensure(name, lambda m=first, r=rate, s=student: s(m, r, SEEDS[0]), score)  # type: ignore[misc]
            best = best_rate(kept.cells, rates(kind, method), score)
            for seed in SEEDS if best is not None else ():
                made = lambda m=method, r=best, n=seed, s=student: s(m, r, n)  # type: ignore[misc] # noqa: E731
                kept.ensure(key(kind, method, best or 0.0, seed), made, score)
    if chosen("sentences|speed", kept.only) and (sentences.student_folder(0) / "config.json").exists():
        kept.ensure("sentences|speed", sentences.speed, "speed_up")


# -- tables -----------------------------------------------------------------------------------------------------------------------


def render(cells: Cells) -> str:
    """The tables of what there is."""
    return "\n".join(part for part in (_sentences(cells), _chats(cells), _digits(cells)) if part)


def _over_seeds(
    cells: Cells, kind: str, method: str, score: str, chosen_by: str
) -> tuple[float | None, dict[int, float]]:
    """(the chosen rate, seed -> score)."""
    best = best_rate(cells, rates(kind, method), chosen_by)
    if best is None:
        return None, {}
    found = {seed: cells.get(key(kind, method, best, seed), {}) for seed in SEEDS}
    return best, {seed: cell["scores"][score] for seed, cell in found.items() if "scores" in cell}


def _sentences(cells: Cells) -> str:
    teachers = {
        s: cells[f"sentences|teacher|{s}"] for s in SEEDS if "scores" in cells.get(f"sentences|teacher|{s}", {})
    }
    if not teachers:
        return ""
    accuracy = {seed: cell["scores"]["test/accuracy"] for seed, cell in teachers.items()}
    lines = [
        "| sentences | rate | test accuracy | to the student alone | of the teacher's | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| teacher | 0.0001 | {shown(list(accuracy.values()))} |  |  | {len(accuracy)} |",
    ]
    probe = cells.get("sentences|probe|0", {}).get("scores")
    if probe:
        lines.append(f"| linear probe on the teacher's base |  | {probe['test/accuracy']:.3f} |  |  |  |")
    alone = _over_seeds(cells, "sentences", "alone", "test/accuracy", "val/accuracy")[1]
    for method in SENTENCE_METHODS:
        rate, own = _over_seeds(cells, "sentences", method, "test/accuracy", "val/accuracy")
        if not own:
            continue
        shares = [own[s] / accuracy[s] for s in own if s in accuracy]
        gains = paired(own, alone) if method != "alone" else ""
        lines.append(
            f"| {SHOWN[method]} | {rate:g} | {shown(list(own.values()))} | {gains} | {mean(shares):.1%} | {len(own)} |"
        )
    speed = cells.get("sentences|speed", {})
    if "scores" in speed:
        sizes = speed["sizes"]
        lines += [
            "",
            f"Speed-up {speed['scores']['speed_up']:.2f}; {sizes['student']:,} of {sizes['teacher']:,} parameters.",
        ]
    return "\n".join(lines) + "\n"


def _chats(cells: Cells) -> str:
    lines = [
        "| chats | rate | test perplexity | agreement | KL to the teacher | loss to the student alone | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for who in ("teacher", "untrained"):
        scores = cells.get(f"chats|{who}|0", {}).get("scores")
        if scores:
            perplexity = scores["test/perplexity"]
            numbers = f"{perplexity:,.0f}" if perplexity > 1000 else f"{perplexity:.3f}"
            numbers += f" | {scores['test/agreement']:.3f} | {scores['test/kl']:.3f}"
            lines.append(f"| {who} |  | {numbers} |  | 1 |")
    alone = _over_seeds(cells, "chats", "alone", "test/loss", "val/loss")[1]
    for method in CHAT_METHODS:
        scores = ("test/perplexity", "test/agreement", "test/kl", "test/loss")
        found = [_over_seeds(cells, "chats", method, name, "val/loss") for name in scores]
        rate, own = found[-1]
        if own:
            gains = paired(own, alone) if method != "alone" else ""
            numbers = " | ".join(shown(list(each.values())) for _, each in found[:3])
            name = SHOWN.get(method, f"labels and {method}")
            lines.append(f"| {name} | {rate:g} | {numbers} | {gains} | {len(own)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _digits(cells: Cells) -> str:
    done = {s: cells[f"digits|{s}"]["scores"] for s in SEEDS if "scores" in cells.get(f"digits|{s}", {})}
    if not done:
        return ""
    lines = ["| digits | accuracy on 397 images | to the student alone | seeds |", "| --- | --- | --- | --- |"]
    for method in DIGIT_METHODS:
        own = {seed: scores[method] for seed, scores in done.items()}
        against = {seed: scores["alone"] for seed, scores in done.items()}
        gains = paired(own, against) if method not in ("teacher", "alone") else ""
        lines.append(f"| {SHOWN.get(method, method)} | {shown(list(own.values()))} | {gains} | {len(own)} |")
    return "\n".join(lines) + "\n"


def shown(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> str:
    """The mean difference over the seeds that both have, with Student's 95 % interval."""
    from lightning_ft.functional.intervals import mean_interval

    differences = [own[seed] - other[seed] for seed in own if seed in other]
    if not differences:
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.3f}"
    low, high = mean_interval(differences)
    return f"{mean(differences):+.3f} ({low:+.3f} to {high:+.3f})"


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation_runs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--render", action="store_true", help="write the tables from the kept results and run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "distillation_runs.json")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="where rows, teachers and students' beginnings are kept"
    )
    given, sizes = parser.parse_args(argv), sizes or Sizes()
    kept = Kept(given.output, asdict(sizes), given.only)
    if not given.render:
        import lightning.pytorch  # noqa: F401  (which sets the level of its logs when it is imported)

        quiet()
        given.work.mkdir(parents=True, exist_ok=True)
        run(kept, given.work, sizes)
    table = given.output.with_suffix(".md")
    table.write_text(render(kept.cells), encoding="utf-8")
    print(f"Written to {given.output} and {table}.")


if __name__ == "__main__":
    main()
