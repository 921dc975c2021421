"""Two questions about the same texts on one encoder: a class and a number, with PCGrad where their gradients disagree.

    python examples/several_tasks.py            a minute on two cores; needs starter:minilm-l6

Prints what each task measures on held-out rows.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_ft import ClassificationData, GradientSurgery, MultiTask, MultiTaskData

GOOD, BAD = ("lovely", "fine", "bright"), ("dull", "poor", "broken")


def write_rows(path: Path, count: int) -> Path:
    """Texts of good and bad words, their tone, and how many of the words are good."""
    rows = []
    for n in range(count):
        good = [GOOD[(n + k) % 3] for k in range(n % 4)]
        bad = [BAD[(n // 4 + k) % 3] for k in range(3 - n % 4)]
        tone = "good" if len(good) > len(bad) else "bad"
        rows.append({"text": f"the day was {' and '.join(good + bad)}", "tone": tone, "share": len(good) / 3})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main(base: str = "starter:minilm-l6", rows: int = 400, steps: int = 60) -> dict[str, float]:
    """Trains and measures."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(write_rows(Path(folder) / "rows.jsonl", rows))
        tasks = {
            "tone": ClassificationData(file, label_column="tone", val_fraction=0.2, cache_dir=folder),
            "share": ClassificationData(
                file, label_column="share", task="regression", val_fraction=0.2, cache_dir=folder
            ),
        }
        trainer = Trainer(
            max_steps=steps,
            val_check_interval=steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[GradientSurgery("pcgrad")],
        )
        trainer.fit(
            MultiTask(base, pool="mean", weigh="tasks", lr=2e-4, head_lr=2e-3), MultiTaskData(tasks, batch_size=16)
        )
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name in ("val/tone/accuracy", "val/share/pearson", "val/macro", "train/conflict_rate"):
        print(f"{name}: {measured[name]:.3f}")
    return measured


if __name__ == "__main__":
    main()
