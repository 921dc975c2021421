"""Real runs of reinforcement learning: GRPO on a task of reasoning-gym that the 135M chat model solves now and then.

    python -m benchmarks.rl_runs                       # 15 minutes of training at most; started again it goes on
    python -m benchmarks.rl_runs --probe               # what share of each candidate task the model solves before
    python -m benchmarks.rl_runs --rounds 2 --held 8 --folder /tmp/rl --output /tmp/rl.json    # does it run?

Tasks to learn from have seed 0, held-out ones seed 1; none of the latter is among the former. Answers to held-out tasks are greedy;
solved is what the task's own verifier scores with 1. Before and after are compared task by task.
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

from benchmarks import measure  # noqa: E402
from benchmarks.runs import RESULTS  # noqa: E402
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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_runs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--probe", action="store_true", help="only ask what the model solves of each candidate")
    parser.add_argument("--task", default=TASK, choices=list(CANDIDATES), help="which task is learned")
    parser.add_argument("--rounds", type=int, default=100, help="rounds, of 16 tasks with 8 answers each")
    parser.add_argument("--minutes", type=float, default=15.0, help="most minutes of training")
    parser.add_argument("--held", type=int, default=200, help="held-out tasks")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak rate")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/rl_grpo"), help="checkpoints; a run goes on from the last"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "rl_grpo.json", help="the result")
    return parser.parse_args(argv)


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


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split(name: str, held: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tasks to learn from, and others that are not among them, each question once."""
    kept = {row["question"]: row for row in tasks(name, 4 * held, 1)}
    held_out = list(kept.values())[:held]
    asked = {row["question"] for row in held_out}
    learned = {row["question"]: row for row in tasks(name, 2000, 0) if row["question"] not in asked}
    return list(learned.values()), held_out


def solved(module: Any, data: Any, trainer: Any, rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[str]]:
    """1 for each held-out task that is solved, else 0, and the answers."""
    import reasoning_gym

    verify = reasoning_gym.get_score_answer_fn(CANDIDATES[name][0])
    found = [one for batch in trainer.predict(module, data, return_predictions=True) for one in batch]
    texts = {one["row"]: one["answer"].strip() for one in found}
    answers = [texts[number] for number in range(len(rows))]
    return [int(verify(answer=text, entry=row) >= 1) for text, row in zip(answers, rows, strict=True)], answers


def parts(arguments: argparse.Namespace, name: str, train: Path, held: Path) -> tuple[Any, Any]:
    """Module and data."""
    from lightning_ft import GRPO, PromptData, Reward

    rewards = {"right": Reward(verifier=CANDIDATES[name][0]), "concise": Reward(length=8, weight=0.1)}
    module = GRPO(
        "starter:smollm2-135m",
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
    data = PromptData(
        str(train),
        predict_path=str(held),
        prompts=PROMPTS,
        draw_batch=PROMPTS,
        batch_size=32,
    )
    return module, data


def quiet(folder: Path, **options: Any) -> Any:
    """A Trainer without bars."""
    from lightning import Trainer

    bare = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **{**bare, **options})


def probe(arguments: argparse.Namespace) -> None:
    """Prints the share that is solved of each candidate, with an interval."""
    from lightning_ft import LoRA

    for name in CANDIDATES:
        rows = split(name, arguments.held)[1]
        held = write(arguments.folder / f"{name}.jsonl", rows)
        module, data = parts(arguments, name, held, held)
        right, answers = solved(module, data, quiet(arguments.folder, callbacks=[LoRA(r=16)]), rows, name)
        low, high = wilson(sum(right), len(right))
        print(
            f"{name}: {sum(right) / len(right):.2f} ({low:.2f} to {high:.2f}) of {len(right)}; as {answers[:4]}",
            flush=True,
        )


def learn(arguments: argparse.Namespace) -> None:
    """Before, training, after."""
    from lightning import Callback, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from lightning_ft import LoRA

    seed_everything(0, verbose=False)
    folder, name = arguments.folder, arguments.task
    learned, held_out = split(name, arguments.held)
    train, held = write(folder / "train.jsonl", learned), write(folder / "held.jsonl", held_out)
    module, data = parts(arguments, name, train, held)
    before_file = folder / "before.json"
    if not before_file.exists():
        first, answers = solved(module, data, quiet(folder, callbacks=[LoRA(r=16)]), held_out, name)
        before_file.write_text(json.dumps({"right": first, "answers": answers}))
        print(f"before: {sum(first)} of {len(first)}", flush=True)
    points: Path = folder / "rounds.jsonl"

    class Points(Callback):
        """One line a round."""

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            facts = {**trainer.datamodule.round.facts, "round": trainer.current_epoch, "time": time.time()}
            with points.open("a") as out:
                out.write(json.dumps(facts) + "\n")
            print(
                f"round {trainer.current_epoch}: "
                + ", ".join(f"{k} {facts[k]:.3f}" for k in ("rewards/right", "kl", "length")),
                flush=True,
            )

    save = ModelCheckpoint(folder, filename="last-{epoch}", every_n_epochs=1, save_on_train_epoch_end=True)
    module, data = parts(arguments, name, train, held)
    trainer = quiet(
        folder,
        max_epochs=arguments.rounds,
        max_time={"minutes": int(arguments.minutes), "seconds": int(arguments.minutes * 60) % 60},
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[LoRA(r=16, alpha=32), save, Points()],
        enable_checkpointing=True,
        logger=CSVLogger(folder, name="logs"),
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    newest = max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)
    begun = time.perf_counter()
    trainer.fit(module, data, ckpt_path=newest)
    trained = time.perf_counter() - begun
    after, answers = solved(module, data, trainer, held_out, name)
    report(arguments, trainer, json.loads(before_file.read_text()), {"right": after, "answers": answers}, trained)


def report(arguments: argparse.Namespace, trainer: Any, before: Any, after: Any, seconds: float) -> None:
    """Writes and prints what came out."""
    shares = {}
    for when, found in (("before", before), ("after", after)):
        right = found["right"]
        shares[when] = {"share": sum(right) / len(right), "interval": wilson(sum(right), len(right))}
    gains = [b - a for a, b in zip(before["right"], after["right"], strict=True)]
    result = {
        "task": arguments.task,
        "made_by": CANDIDATES[arguments.task],
        "machine": measure.machine(),
        "rounds": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds_of_last_start": seconds,
        "lr": arguments.lr,
        "held_out": len(gains),
        **shares,
        "gain": {"mean": sum(gains) / len(gains), "interval": mean_interval(gains)},
        "answers": list(zip(before["answers"][:8], after["answers"][:8], strict=True)),
        "points": [json.loads(line) for line in (arguments.folder / "rounds.jsonl").read_text().splitlines()],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for when, share in shares.items():
        low, high = share["interval"]
        print(f"{when}: {share['share']:.3f} ({low:.3f} to {high:.3f}) of {len(gains)} held-out tasks")
    low, high = mean_interval(gains)
    print(
        f"gain: {sum(gains) / len(gains):.3f} ({low:.3f} to {high:.3f}), {result['rounds']} rounds; written to {arguments.output}"
    )


def main(argv: list[str] | None = None) -> None:
    """Probe or learn."""
    arguments = parse(argv)
    (probe if arguments.probe else learn)(arguments)


if __name__ == "__main__":
    main()
