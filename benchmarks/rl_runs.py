"""Real runs of reinforcement learning: GRPO on a task of reasoning-gym that the 135M chat model solves now and then.

    python -m benchmarks.rl_runs                       # three seeds, each at most 15 minutes of training; started again it goes on
    python -m benchmarks.rl_runs --at-once 3           # all three at once, each a process
    python -m benchmarks.rl_runs --only sum_of_two|1   # cells, task|seed, whose key contains one of these
    python -m benchmarks.rl_runs --render              # table and plot alone, from what is kept
    python -m benchmarks.rl_runs --probe               # what share of each candidate task the model solves before
    python -m benchmarks.rl_runs --tiny --folder /tmp/rl --output /tmp/rl.json                 # does it run? a random model

Tasks to learn from have seed 0, held-out ones seed 1; none of the latter is among the former. Answers to held-out tasks are greedy;
solved is what the task's own verifier scores with 1. Before and after are compared task by task. On a GPU everything runs there, as
Lightning chooses.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from benchmarks import pages, rl_report  # noqa: E402
from benchmarks.cell_jobs import device, run_cells  # noqa: E402
from benchmarks.row_files import written  # noqa: E402
from benchmarks.runs import RESULTS, Store  # noqa: E402
from benchmarks.silent import silent_trainer  # noqa: E402
from benchmarks.vader_cells import chosen, quiet  # noqa: E402
from lightning_ft.functional.intervals import mean_interval, wilson  # noqa: E402

SUM = {"operators": ("+",), "allow_parentheses": False, "allow_negation": False, "min_terms": 2, "max_terms": 2}
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "sum_of_digits": ("basic_arithmetic", {**SUM, "min_digits": 1, "max_digits": 1}),
    "sum_of_two": ("basic_arithmetic", {**SUM, "min_digits": 1, "max_digits": 2}),
    "product_of_digits": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "sum_and_difference": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
}
TASK = "sum_of_two"
NEW, PROMPTS, SAMPLES, SHOTS = 16, 16, 8, 4
BASE = "starter:smollm2-135m"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_runs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--probe", action="store_true", help="only ask what the model solves of each candidate")
    parser.add_argument("--tasks", default=TASK, help=f"tasks to learn, of {', '.join(CANDIDATES)}, with commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each task, with seeds 0, 1, ...")
    parser.add_argument("--rounds", type=int, default=100, help="rounds, of 16 tasks with 8 answers each")
    parser.add_argument("--minutes", type=float, default=15.0, help="most minutes of training")
    parser.add_argument("--held", type=int, default=200, help="held-out tasks")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak rate")
    parser.add_argument(
        "--tiny", action="store_true", help="a random model, two rounds, eight held-out tasks, two seeds"
    )
    parser.add_argument("--only", default="", help="only cells whose key contains one of these, separated by commas")
    parser.add_argument("--at-once", type=int, default=1, help="cells that run at a time, each a process of its own")
    parser.add_argument("--render", action="store_true", help="write table and plot from what is kept and run nothing")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/rl_grpo"), help="checkpoints; a run goes on from its last"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "rl_grpo.json", help="the results")
    parser.add_argument("--plot", type=Path, help="by default below docs/images, or beside another --output")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.folder, arguments.output = arguments.folder.resolve(), arguments.output.resolve()
    if arguments.tiny:
        arguments.rounds, arguments.held, arguments.seeds = 2, 8, 2
    if arguments.plot is None:
        kept = arguments.output == RESULTS / "rl_grpo.json"
        arguments.plot = rl_report.PLOT if kept else arguments.output.with_suffix(".png")
    return arguments


def tasks(name: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Questions with answers and metadata; before each stand the same solved ones (seed 2), so that the form is known."""
    import reasoning_gym

    def made(size: int, seed: int) -> Any:
        kind, settings = CANDIDATES[name]
        return reasoning_gym.create_dataset(kind, size=size, seed=seed, **settings)

    shown = "".join(f"{one['question']}\nAnswer: {one['answer']}\n\n" for one in made(SHOTS, 2))
    return [
        {
            "prompt": f"{shown}{one['question']}\nAnswer:",
            "question": one["question"],
            "answer": one["answer"],
            "metadata": one["metadata"],
        }
        for one in made(size, seed)
    ]


def split(name: str, held: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tasks to learn from, and others that are not among them, each question once."""
    kept = {row["question"]: row for row in tasks(name, 4 * held, 1)}
    held_out = list(kept.values())[:held]
    asked = {row["question"] for row in held_out}
    learned = {row["question"]: row for row in tasks(name, 2000, 0) if row["question"] not in asked}
    return list(learned.values()), held_out


def solved(module: Any, data: Any, trainer: Any, rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """``right``: 1 for each held-out task that is solved, else 0; and the answers."""
    import reasoning_gym

    verify = reasoning_gym.get_score_answer_fn(CANDIDATES[name][0])
    found = [one for batch in trainer.predict(module, data, return_predictions=True) for one in batch]
    texts = {one["row"]: one["answer"].strip() for one in found}
    answers = [texts[number] for number in range(len(rows))]
    right = [int(verify(answer=text, entry=row) >= 1) for text, row in zip(answers, rows, strict=True)]
    return {"right": right, "answers": answers}


def parts(arguments: argparse.Namespace, folder: Path, name: str, train: str, held: str) -> tuple[Any, Any]:
    """Module and data."""
    from lightning_ft import GRPO, PromptData, Reward

    base = BASE
    if arguments.tiny:
        from benchmarks.random_model import write_model

        base = str(write_model(folder / "tiny"))
    rewards = {"right": Reward(verifier=CANDIDATES[name][0]), "concise": Reward(length=8, weight=0.1)}
    module = GRPO(
        base,
        rewards=rewards,
        samples=SAMPLES,
        max_new_tokens=NEW,
        stop_strings=["\n"],
        clip_high=0.28,
        watch_kl=True,
        lr=arguments.lr,
        warmup_steps=5,
        schedule="linear",
    )
    data = PromptData(train, predict_path=held, prompts=PROMPTS, draw_batch=4 * PROMPTS, batch_size=32)
    return module, data


def probe(arguments: argparse.Namespace) -> None:
    """Prints the share that is solved of each candidate, with an interval."""
    from lightning_ft import LoRA

    for name in CANDIDATES:
        rows = split(name, arguments.held)[1]
        held = written(arguments.folder / f"{name}.jsonl", rows)
        module, data = parts(arguments, arguments.folder, name, held, held)
        found = solved(module, data, silent_trainer(arguments.folder, [LoRA(r=16)], devices=1), rows, name)
        right, answers = found["right"], found["answers"]
        low, high = wilson(sum(right), len(right))
        print(
            f"{name}: {sum(right) / len(right):.2f} ({low:.2f} to {high:.2f}) of {len(right)}; as {answers[:4]}",
            flush=True,
        )


def learn(arguments: argparse.Namespace, key: str) -> dict[str, Any]:
    """Before, training, after; goes on from the cell's last checkpoint."""
    from lightning import Callback, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_ft import LoRA

    name, seed = key.split("|")
    seed_everything(int(seed), verbose=False)
    folder = arguments.folder / f"{name}_{seed}"
    learned, held_out = split(name, arguments.held)
    train, held = written(folder / "train.jsonl", learned), written(folder / "held.jsonl", held_out)
    before_file: Path = folder / "before.json"
    if not before_file.exists():
        module, data = parts(arguments, folder, name, train, held)
        found = solved(module, data, silent_trainer(folder, [LoRA(r=16)], devices=1), held_out, name)
        before_file.write_text(json.dumps(found))
        print(f"{key}: before {sum(found['right'])} of {len(found['right'])}", flush=True)
    points: Path = folder / "rounds.jsonl"

    class Points(Callback):
        """One line a round."""

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            facts = {**trainer.datamodule.round.facts, "round": trainer.current_epoch, "time": time.time()}
            with points.open("a") as out:
                out.write(json.dumps(facts) + "\n")
            told = ", ".join(
                f"{name} {facts.get(name, float('nan')):.3f}" for name in ("rewards/right", "kl", "length")
            )
            print(f"{key}: round {trainer.current_epoch}, {told}", flush=True)

    save = ModelCheckpoint(folder, filename="last-{epoch}", every_n_epochs=1, save_on_train_epoch_end=True)
    module, data = parts(arguments, folder, name, train, held)
    trainer = silent_trainer(
        folder,
        [LoRA(r=16, alpha=32), save, Points()],
        devices=1,
        max_epochs=arguments.rounds,
        max_time={"minutes": int(arguments.minutes), "seconds": int(arguments.minutes * 60) % 60},
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    newest = max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)
    begun = time.perf_counter()
    trainer.fit(module, data, ckpt_path=newest)
    seconds = time.perf_counter() - begun
    before, after = json.loads(before_file.read_text()), solved(module, data, trainer, held_out, name)
    gains = [b - a for a, b in zip(before["right"], after["right"], strict=True)]
    by_round = {line["round"]: line for line in map(json.loads, points.read_text().splitlines())}
    return {
        "rounds": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds_of_last_start": seconds,
        "device": device(),
        "held_out": len(gains),
        "before": _share(before["right"]),
        "after": _share(after["right"]),
        "gain": {"mean": sum(gains) / len(gains), "interval": mean_interval(gains)},
        "answers": list(zip(before["answers"][:8], after["answers"][:8], strict=True)),
        "points": [by_round[number] for number in sorted(by_round)],
    }


def _share(right: list[int]) -> dict[str, Any]:
    return {"share": sum(right) / len(right), "interval": wilson(sum(right), len(right))}


def publish(arguments: argparse.Namespace, data: dict[str, Any]) -> None:
    """Table, plot and, of the results that are kept, the block in the docs."""
    table = arguments.output.with_suffix(".md")
    table.write_text(rl_report.render(data), encoding="utf-8")
    rl_report.plot(data, arguments.plot)
    if arguments.output == RESULTS / "rl_grpo.json":
        pages.fill(RESULTS.parents[1] / "docs" / "techniques" / "grpo.md", "rl_grpo", rl_report.docs(data))
    print(rl_report.render(data))
    print(f"Written to {arguments.output}, {table} and {arguments.plot}.")


def main(argv: list[str] | None = None) -> int:
    """Probes, or makes the missing cells; returns the exit code."""
    arguments = parse(argv)
    if arguments.probe:
        probe(arguments)
        return 0
    if arguments.render:  # they may be those of another machine
        publish(arguments, json.loads(arguments.output.read_text()))
        return 0
    named = arguments.tasks.split(",")
    unknown = [name for name in named if name not in CANDIDATES]
    if unknown:
        raise SystemExit(f"There is no task {unknown[0]}; there are {', '.join(CANDIDATES)}.")
    settings = {name: getattr(arguments, name) for name in ("rounds", "minutes", "held", "lr", "tiny")}
    settings |= {"base": BASE, "prompts": PROMPTS, "samples": SAMPLES, "new_tokens": NEW}
    store = Store(arguments.output, settings)
    if arguments.cell is not None:
        quiet()
        store.put(arguments.cell, learn(arguments, arguments.cell))
        return 0

    def done(key: str) -> bool:
        store.read()
        return store.get(key) is not None

    words = ["--folder", str(arguments.folder), "--output", str(arguments.output)]
    for name in ("rounds", "minutes", "held", "lr"):
        words += [f"--{name}", str(getattr(arguments, name))]
    words += ["--tiny"] if arguments.tiny else []
    keys: dict[str, tuple[str, ...]] = {f"{name}|{seed}": () for name in named for seed in range(arguments.seeds)}
    failed = run_cells(
        "benchmarks.rl_runs", keys, words, at_once=arguments.at_once, done=done,
        wanted=lambda key: chosen(key, arguments.only),
    )  # fmt: skip
    store.read()
    publish(arguments, store.data)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
