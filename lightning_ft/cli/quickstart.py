"""``make quickstart``: the main job on real input, and what it changed.

It is ``lightning-ft fit --config configs/quickstart.yaml`` and a summary: held-out accuracy before and after, answers
before and after, speed and memory, and where everything lies.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.intervals import wilson

LABELS = ("positive", "negative")
QUESTION = "Is the sentiment of this sentence positive or negative?\n{}"
SENTENCES = (
    "I waited two hours and the soup was cold.",
    "The battery lasts all week; I could not be happier.",
    "The plot is thin, but the actors carry it to a moving end.",
)


def main() -> None:
    """Trains, measures, prints and writes ``summary.json``."""
    flags = argparse.ArgumentParser(prog="python -m lightning_ft.cli.quickstart", description=__doc__)
    flags.add_argument("--config", default="configs/quickstart.yaml")
    given, rest = flags.parse_known_args()
    from lightning_ft.cli.errors import reported

    with reported():
        run(Path(given.config), rest)


def run(config: Path, overrides: list[str]) -> dict[str, Any]:
    """One quickstart; ``overrides`` are further flags of ``lightning-ft fit``."""
    if not config.exists():
        raise Refusal(f"There is no {config}; run this in the folder of the clone.")
    from lightning_ft.cli.console import quiet
    from lightning_ft.cli.training import FineTuningCLI

    quiet()
    cli = FineTuningCLI("fit", ["--config", str(config), *overrides])
    cli.start()
    folder = cli.run_path(cli.config["fit"])
    checkpoint = cli.last_checkpoint()
    if checkpoint is None:
        raise Refusal(f"The fit has left no checkpoint in {folder}; do not switch checkpoints off for the quickstart.")
    data = cli.datamodule
    # The module in memory is what the file holds, but the file is what the user keeps: measure that one.
    import lightning_ft

    del cli
    module = lightning_ft.load(checkpoint)
    return summarise(module, data, folder, checkpoint)


def summarise(module: Any, data: Any, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Measures before and after, exports the adapter, draws the curves and prints the table."""
    from lightning_ft.cli.console import progress
    from lightning_ft.cli.run_folder import SUMMARY
    from lightning_ft.cli.run_summary import write_json
    from lightning_ft.formats.peft import export_peft

    chats = [[{"role": "user", "content": QUESTION.format(s)}] for s in SENTENCES]
    with progress("held-out accuracy before"), module.reference("base"):
        before, n = label_accuracy(module, data)
        answers_before = module.generate(chats, max_new_tokens=24)
    with progress("held-out accuracy after"):
        after, _ = label_accuracy(module, data)
        answers_after = module.generate(chats, max_new_tokens=24)
    adapter = folder / "adapter"
    export_peft(module.model, adapter, base_model_name=module.base)
    plot = draw_curves(folder / "metrics.csv", folder / "curves.png")
    figures = json.loads((folder / "throughput.json").read_text(encoding="utf-8"))
    summary = {
        "accuracy_before": before / n,
        "accuracy_before_95": wilson(before, n),
        "accuracy_after": after / n,
        "accuracy_after_95": wilson(after, n),
        "n": n,
        **figures,
        "samples": [
            {"sentence": s, "before": b, "after": a}
            for s, b, a in zip(SENTENCES, answers_before, answers_after, strict=True)
        ],
    }
    of_fit = json.loads((folder / SUMMARY).read_text(encoding="utf-8")) if (folder / SUMMARY).exists() else {}
    write_json(folder / SUMMARY, {**of_fit, **summary})
    show(summary, folder, checkpoint, adapter, plot)
    return summary


def label_accuracy(module: Any, data: Any) -> tuple[int, int]:
    """(rows whose right label is the likelier one at the answer's first token, rows), over the held-out rows.

    Each row's answer is one of `LABELS`; the likelier first token of the two counts as the model's answer.
    """
    import torch

    ids = [module.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in LABELS]
    data.trainer = None
    data.use_tokenizer(module.tokenizer)
    right = rows = 0
    training = module.training
    module.eval()
    with torch.no_grad():
        for batch in data.test_dataloader():
            batch = batch.to(module.device)
            first = torch.ones_like(batch.segment_of_scored, dtype=torch.bool)
            first[1:] = (
                batch.segment_of_scored[1:] != batch.segment_of_scored[:-1]
            )  # the answer's first token of each row
            hidden = module.view.hidden(batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask)
            logits = module.view.logits(hidden.reshape(-1, hidden.shape[-1])[batch.scored[first]])[
                :, ids
            ].float()  # (S, 2)
            answer = torch.tensor(ids, device=logits.device)[logits.argmax(-1)]
            right += int((answer == batch.labels[first]).sum())
            rows += len(answer)
    module.train(training)
    return right, rows


def draw_curves(metrics: Path, target: Path) -> Path:
    """Loss and learning rate over the optimizer's steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: list[dict[str, str]] = []
    if metrics.exists():  # a run shorter than trainer.log_every_n_steps has logged nothing
        with open(metrics, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for key, colour in (("train/loss", "tab:blue"), ("val/loss", "tab:orange")):
        points = [(int(r["step"]) + 1, float(r[key])) for r in rows if r.get(key)]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=key)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats a scored token)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    axis.set_title("quickstart: SFT with LoRA")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def show(summary: dict[str, Any], folder: Path, checkpoint: Path, adapter: Path, plot: Path) -> None:
    """The table, the answers, the places and the next commands."""
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def share(key: str) -> str:
        low, high = summary[f"{key}_95"]
        return f"{summary[key]:.3f}  (95 %: {low:.3f} to {high:.3f})"

    table = Table(title="Quickstart: what one epoch of LoRA changed", show_header=False)
    table.add_row("held-out accuracy before", share("accuracy_before"))
    table.add_row("held-out accuracy after", share("accuracy_after"))
    table.add_row("held-out sentences", str(summary["n"]))
    table.add_row("trained", f"{summary['trainable_parameters']:,} of {summary['parameters']:,} parameters")
    table.add_row("training", f"{summary['train_seconds']:.0f} s, {summary['optimizer_steps']} steps")
    table.add_row("speed", f"{summary['tokens_per_second']:.0f} tokens/s")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 1e9:.2f} GB")
    console.print(table)
    answers = Table(title="Its answers", show_lines=True)
    for column in ("sentence", "before", "after"):
        answers.add_column(column, overflow="fold")
    for sample in summary["samples"]:
        answers.add_row(sample["sentence"], sample["before"], sample["after"])
    console.print(answers)
    for what, where in (("adapter (PEFT)", adapter), ("config", folder / "config.yaml"), ("plot", plot)):
        console.print(f"{what:<15} {where}", soft_wrap=True, highlight=False)
    console.print(f"{'figures':<15} {folder / 'summary.json'}", soft_wrap=True, highlight=False)
    console.print("\n[bold]Next[/bold]")
    for line in (
        f'lightning-ft generate --ckpt_path {checkpoint} --prompt "Is the sentiment positive or negative? What a day!"',
        f"lightning-ft merge --ckpt_path {checkpoint} --output runs/merged",
        "lightning-ft fit --config configs/sft_lora.yaml --data.path my.jsonl --model.base my/model",
    ):
        console.print(f"  .venv/bin/{line}", soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    main()
