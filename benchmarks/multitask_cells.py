"""What `benchmarks.multitask` runs: eight tasks on sentences by an encoder, and eight that can be checked by a language model."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import fast_precision
from benchmarks.row_files import written
from benchmarks.silent import silent_trainer

SIZES = {"tweets": 800, "amazonReviewSnippets": 400, "movieReviewSnippets": 200, "nytEditorialSnippets": 100}
TEST, STEPS, BATCH, LR, HEAD_LR, SEEDS = 300, 240, 32, 1e-4, 1e-3, (0, 1, 2)
VADER = [f"{domain}_{kind}" for domain in SIZES for kind in ("tone", "rating")]
KINDS = {"tone": "sequence_classification", "rating": "regression"}

QUESTIONS: dict[str, tuple[int, dict[str, int]]] = {
    "chain_sum": (800, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "syllogism": (800, {}),
    "products": (400, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "letter_counting": (400, {"min_words": 3, "max_words": 5}),
    "gcd": (200, {"min_value": 2, "max_value": 60}),
    "spell_backward": (200, {"min_word_len": 3, "max_word_len": 5}),
    "leg_counting": (100, {"min_animals": 2, "max_animals": 2}),
    "simple_equations": (100, {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 20}),
}
"""Task of reasoning-gym -> rows to learn, and what makes it short."""
ASKED_TEST, ASKED_STEPS, ASKED_BATCH, ASKED_LR, RANK, NEW_TOKENS = 50, 200, 16, 1e-3, 16, 12
TRAIN_SEED, TEST_SEED = 0, 1

SETTING = {
    "vader": {"train": SIZES, "test": TEST, "steps": STEPS, "batch": BATCH, "lr": LR, "head_lr": HEAD_LR},
    "reasoning": {
        "train": {name: list(one) for name, one in QUESTIONS.items()},
        "test": ASKED_TEST,
        "steps": ASKED_STEPS,
        "batch": ASKED_BATCH,
        "lr": ASKED_LR,
        "lora_r": RANK,
        "new_tokens": NEW_TOKENS,
    },
}
Methods = dict[str, tuple[str, Callable[[], list[Any]]]]
"""Name -> (what a task weighs, its callbacks, made anew for each run)."""


def vader_methods() -> Methods:
    """Plain mixing, each sampler, each balancer, each surgery."""
    from lightning_ft import GradientSurgery, LossBalancing, TaskSampling

    shares = {f"{domain}_{kind}": 1 + number for number, domain in enumerate(SIZES) for kind in ("tone", "rating")}
    made: Methods = {
        "plain": ("rows", lambda: []),
        "capped": ("rows", lambda: [TaskSampling("proportional", cap=200)]),
        "temperature": ("rows", lambda: [TaskSampling("temperature", temperature=2.0)]),
        "uniform": ("rows", lambda: [TaskSampling("uniform")]),
        "annealed": ("rows", lambda: [TaskSampling("annealed")]),
        "round_robin": ("rows", lambda: [TaskSampling("round_robin")]),
        "weighted": ("rows", lambda: [TaskSampling("weighted", weights=shares)]),
        "loss_driven": ("rows", lambda: [TaskSampling("loss_driven", temperature=2.0)]),
        "static": ("tasks", lambda: []),
        "uncertainty": ("tasks", lambda: [LossBalancing("uncertainty", lr=100 * LR)]),
        "dwa": ("tasks", lambda: [LossBalancing("dwa", every_steps=20)]),
        "gradnorm": ("tasks", lambda: [LossBalancing("gradnorm", alpha=0.12)]),
        "famo": ("tasks", lambda: [LossBalancing("famo")]),
    }
    for name in ("pcgrad", "cagrad", "mgda", "nash", "upgrad"):
        made[name] = ("tasks", lambda name=name: [GradientSurgery(name)])  # type: ignore[misc]
    return made


def reasoning_methods() -> Methods:
    """Plain mixing, one sampler, one balancer."""
    from lightning_ft import LossBalancing, TaskSampling

    return {
        "plain": ("rows", lambda: []),
        "temperature": ("rows", lambda: [TaskSampling("temperature", temperature=2.0)]),
        "famo": ("tasks", lambda: [LossBalancing("famo")]),
    }


def write_rows(folder: Path, seed: int) -> dict[str, tuple[Path, Path]]:
    """Domain -> its training and test file; test rows do not depend on the seed, and no sentence is in both."""
    import numpy as np

    from lightning_ft.data.vader import ratings

    files = {}
    for domain, size in SIZES.items():
        rows = list(dict(reversed([(text, rating) for rating, text in ratings(domain)])).items())
        order = np.random.default_rng(zlib.crc32(domain.encode())).permutation(len(rows))
        train = np.random.default_rng(seed).permutation(order[TEST:])[:size]
        pair = []
        for part, chosen in (("train", train), ("test", order[:TEST])):
            told = [
                {"text": rows[n][0], "tone": "good" if rows[n][1] > 0 else "bad", "rating": rows[n][1] / 4}
                for n in chosen
            ]
            pair.append(Path(written(folder / f"{domain}-{part}-{seed}.jsonl", told)))
        files[domain] = (pair[0], pair[1])
    return files


def ask(name: str, size: int, seed: int, avoid: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Questions of a task, each once and none that is to be avoided, with the answer and what its check needs."""
    import reasoning_gym

    found: dict[str, dict[str, Any]] = {}
    for one in reasoning_gym.create_dataset(name, size=6 * size, seed=seed, **QUESTIONS[name][1]):
        question = one["question"].strip()
        if question not in avoid and len(found) < size:
            told = {"prompt": f"{question}\nAnswer:", "completion": f" {one['answer']}"}
            found.setdefault(question, {**told, "entry": one})
    return list(found.values())


def questions(name: str, test: int = ASKED_TEST) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to learn and others to be tested by; of a task with few different questions, fewer to learn."""
    held = ask(name, test, TEST_SEED)
    asked = frozenset(row["entry"]["question"].strip() for row in held)
    return ask(name, QUESTIONS[name][0], TRAIN_SEED, asked), held


def fitted(
    module: Any, data: Any, callbacks: list[Any], steps: int, folder: Path, accelerator: str
) -> tuple[dict[str, float], float]:
    """What a validation after the fit measures, and seconds of the fit."""
    place: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "precision": fast_precision()}
    epochs = -(-steps // max(1, steps // 6))  # six, and what is left over; annealed sampling must know how many
    fit: dict[str, Any] = {"max_steps": steps, "max_epochs": epochs, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    begin = time.perf_counter()
    silent_trainer(folder, callbacks, **place, **fit, use_distributed_sampler=False).fit(module, data)
    seconds = time.perf_counter() - begin
    judge = silent_trainer(folder, **place)
    judge.validate(module, data, verbose=False)
    return {name: float(value) for name, value in judge.callback_metrics.items()}, seconds


def vader_cell(
    method: str,
    seed: int,
    only: str | None,
    folder: Path,
    *,
    base: str = "starter:minilm-l6",
    steps: int = STEPS,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """One fit of the encoder; of each task accuracy or Pearson's correlation on test rows."""
    import lightning.pytorch as pl

    from lightning_ft import ClassificationData, MultiTask, MultiTaskData
    from lightning_ft.engine.task_measures import MAIN

    pl.seed_everything(seed, verbose=False)
    tasks: dict[str, Any] = {}
    for domain, (train, test) in write_rows(folder, seed).items():
        for kind, task in KINDS.items():
            tasks[f"{domain}_{kind}"] = ClassificationData(
                str(train),
                val_path=str(test),
                label_column=kind,
                labels=["bad", "good"] if kind == "tone" else None,
                task=task,  # type: ignore[arg-type]
                truncation="keep_start",
                max_length=64,
                cache_dir=str(folder / "cache"),
            )
    weigh, callbacks = vader_methods()[method]
    steps = shared(steps, only, {task: SIZES[task.rpartition("_")[0]] for task in VADER})
    data = MultiTaskData(tasks, batch_size=BATCH, val_batch_size=64, epoch_rows=BATCH * max(1, steps // 6), only=only)
    module = MultiTask(base, pool="mean", weigh=weigh, lr=LR, head_lr=HEAD_LR)  # type: ignore[arg-type]
    values, seconds = fitted(module, data, callbacks(), steps, folder, accelerator)
    main = {task: values[f"val/{task}/{MAIN[KINDS[task.rpartition('_')[2]]]}"] for task in data.task_names}
    return told(main, {}, seconds, steps, module, accelerator)


def reasoning_cell(
    method: str,
    seed: int,
    only: str | None,
    folder: Path,
    *,
    base: str = "starter:smollm2-135m",
    steps: int = ASKED_STEPS,
    test: int = ASKED_TEST,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """One fit of the language model's LoRA; of each task the share of test questions solved, and nats for a token of the answer."""
    import lightning.pytorch as pl
    import reasoning_gym

    from lightning_ft import LoRA, MultiTask, MultiTaskData, SFTData

    pl.seed_everything(seed, verbose=False)
    tasks: dict[str, Any] = {}
    held, sizes = {}, {}
    for name in QUESTIONS:
        train, held[name] = questions(name, test)
        sizes[name] = len(train)
        files = [
            written(folder / f"{name}-{part}.jsonl", [{k: row[k] for k in ("prompt", "completion")} for row in rows])
            for part, rows in (("train", train), (f"test{test}", held[name]))
        ]
        tasks[name] = SFTData(
            files[0], val_path=files[1], loss_on="completion", max_length=192, cache_dir=str(folder / "cache")
        )
    weigh, callbacks = reasoning_methods()[method]
    steps = shared(steps, only, sizes)
    data = MultiTaskData(
        tasks,
        batch_size=ASKED_BATCH,
        val_batch_size=64,
        epoch_rows=ASKED_BATCH * max(1, steps // 6),
        only=only,
    )
    module = MultiTask(base, weigh=weigh, lr=ASKED_LR)  # type: ignore[arg-type]
    parts = [LoRA(r=RANK, alpha=2.0 * RANK), *callbacks()]
    values, seconds = fitted(module, data, parts, steps, folder, accelerator)
    solved = {}
    if accelerator != "cpu":  # Lightning has moved the module back
        module.to(pl.Trainer(accelerator=accelerator, devices=1, logger=False).strategy.root_device)
    for name in data.task_names:
        check = reasoning_gym.get_score_answer_fn(name)
        written_answers = module.generate([row["prompt"] for row in held[name]], max_new_tokens=NEW_TOKENS)
        answers = [(text.strip().splitlines() or [""])[0].strip() for text in written_answers]
        right = [check(answer=text, entry=row["entry"]) >= 1 for text, row in zip(answers, held[name], strict=True)]
        solved[name] = sum(right) / len(right)
    losses = {name: values[f"val/{name}/loss"] for name in data.task_names}
    return told(solved, losses, seconds, steps, module, accelerator)


def shared(steps: int, only: str | None, sizes: Mapping[str, int]) -> int:
    """Steps of a run: all, or the share that one task gets of them under plain mixing."""
    return steps if only is None else max(1, round(steps * sizes[only] / sum(sizes.values())))


def told(
    measures: dict[str, float], losses: dict[str, float], seconds: float, steps: int, module: Any, accelerator: str
) -> dict[str, Any]:
    """A cell as it is kept."""
    import torch

    where = torch.cuda.get_device_name() if accelerator != "cpu" and torch.cuda.is_available() else "CPU"
    return {
        "scores": {"mean": sum(measures.values()) / len(measures), **measures},
        **({"losses": losses} if losses else {}),
        "seconds": seconds,
        "steps": steps,
        "device": f"{where} ({fast_precision()})",
        "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }
