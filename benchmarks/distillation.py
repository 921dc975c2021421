"""What a step of distillation costs: ours, a chunk of logits at a time, against a plain step on all logits of both models.

    python -m benchmarks.distillation               # both sides, each in a process of its own: alone on the machine, two minutes
    python -m benchmarks.distillation --turns 3     # in turn, so that a drift of the machine meets both
    python -m benchmarks.distillation --tokens 256  # rows of another length, kept beside the others
    python -m benchmarks.distillation --render      # the table alone, from the kept results

A student of 4 random blocks and a teacher of 8, 576 wide, with 49,152 tokens, learn 4 rows of 512 tokens in float32: cross-entropy
and the forward KL at temperature 2, all of the student trained by plain SGD, which keeps no state. Both sides must find one loss.
Memory is the peak of a step above what the process holds when both models are loaded; bar: ours 0.3 of the plain step's at most.
Beside the time of a step stands what it took of the processors, on all threads, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure
from benchmarks.row_files import read, written
from benchmarks.silent import silent_trainer

OUTPUT = Path(__file__).resolve().parent / "results" / "distillation.json"
BAR = 0.3
TEMPERATURE, ROWS, TOKENS, STEPS = 2.0, 4, 512, 3
SIZE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
BLOCKS = {"student": 4, "teacher": 8}
SIDES = ("ours", "plain")


class Watch:
    """Seconds of each step, and the peak of memory above what there was when it began."""

    def __init__(self) -> None:
        self.clock = measure.StepClock(warmup=1)
        self.held = 0
        self.marks: list[float] = []

    def begin(self) -> None:
        """Both models are loaded, and nothing has been computed."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.held = _status("VmRSS")
        self.clock.start()
        self.marks = [time.process_time()]

    def step(self, loss: float) -> None:
        """A step is done; reading its loss has waited for the device."""
        self.clock.step(ROWS * TOKENS, loss)
        self.marks.append(time.process_time())

    def found(self, side: str) -> dict[str, Any]:
        """What the side has measured."""
        import torch

        on = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if on else _status("VmHWM")
        device = torch.cuda.get_device_name() if on else measure.cpu_model()
        seconds = self.clock.seconds[self.clock.warmup :]
        return {
            "side": side,
            "device": device,
            "threads": torch.get_num_threads(),
            "loss": self.clock.losses[0],
            "seconds": seconds,
            "processor_seconds": [b - a for a, b in pairwise(self.marks)][self.clock.warmup :],
            "above_bytes": peak - self.held,
        }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def write(folder: Path, size: dict[str, int], tokens: int) -> None:
    """Both models, with the same tokenizer, and rows of bytes."""
    import random

    from benchmarks.random_model import write_model

    for seed, (who, blocks) in enumerate(BLOCKS.items()):
        write_model(folder / who, seed=seed, num_hidden_layers=blocks, **size)
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=tokens - 1)) for _ in range(ROWS)]  # and the end
    written(folder / "rows.jsonl", [{"text": text} for text in texts])


def ours(folder: Path) -> dict[str, Any]:
    """SFT with Distillation."""
    import lightning.pytorch as pl
    import torch

    from lightning_ft import SFT, Distillation, SFTData

    watch = Watch()

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            watch.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            watch.step(float(outputs["loss"]))

    module = SFT(
        str(folder / "student"),
        lr=1e-3,
        schedule="constant",
        warmup_steps=0,
        base_dtype="float32",
        optimizer=torch.optim.SGD,
    )
    data = SFTData(str(folder / "rows.jsonl"), batch_size=ROWS, shuffle=False, cache_dir=str(folder / "cache"))
    taught = Distillation(str(folder / "teacher"), temperature=TEMPERATURE, dtype="float32")
    trainer = silent_trainer(
        folder,
        [taught, Look()],
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    return watch.found("ours")


def plain(folder: Path) -> dict[str, Any]:
    """The same step as it is usually written."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / who, dtype=torch.float32).to(device) for who in BLOCKS
    )
    student.train(), teacher.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    texts = [row["text"] for row in read(folder / "rows.jsonl")]
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    ids = torch.tensor(rows, device=device)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    watch = Watch()
    watch.begin()
    for _ in range(STEPS):
        logits = student(ids).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            other = teacher(ids).logits[:, :-1].flatten(0, 1)
        q, p = F.log_softmax(other / TEMPERATURE, -1), F.log_softmax(logits / TEMPERATURE, -1)
        divergence = F.kl_div(p, q, reduction="batchmean", log_target=True) * TEMPERATURE**2
        loss = F.cross_entropy(logits, ids[:, 1:].flatten()) + divergence
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(float(loss))
        del logits, other, q, p, divergence, loss
    return watch.found("plain")


def launched(side: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.distillation", "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=OUTPUT.parents[2])
    if done.returncode:
        raise RuntimeError(f"The side {side} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(turns: int, size: dict[str, int], tokens: int) -> dict[str, Any]:
    """Both sides in turn, and their ratios.

    Raises:
        RuntimeError: they do not compute the same loss.
    """
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), size, tokens)
        for _ in range(turns):
            for side in SIDES:
                found[side].append(launched(side, Path(name)))
    losses = [found[side][0]["loss"] for side in SIDES]
    if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[1]):
        raise RuntimeError(f"The two sides compute other losses: {losses}.")
    memory = {side: median(one["above_bytes"] for one in found[side]) for side in SIDES}
    seconds, spent = (
        {side: median(s for one in found[side] for s in one[kind]) for side in SIDES}
        for kind in ("seconds", "processor_seconds")
    )
    return {
        "machine": measure.machine(),
        "setting": {**size, "blocks": BLOCKS, "rows": ROWS, "tokens": tokens, "temperature": TEMPERATURE},
        "sides": found,
        "memory_bytes": memory,
        "seconds": seconds,
        "processor_seconds": spent,
        "memory_ratio": memory["ours"] / memory["plain"],
        "time_ratio": seconds["ours"] / seconds["plain"],
        "processor_ratio": spent["ours"] / spent["plain"],
    }


def render(kept: dict[str, dict[str, Any]]) -> str:
    """A table, by the number of tokens in a step."""
    lines = [
        "| tokens a step | in chunks, above the models | all logits | memory | seconds in chunks | all logits | time | "
        "of processors |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tokens in sorted(kept, key=int):
        found = kept[tokens]
        memory = [f"{found['memory_bytes'][side] / 2**20:,.0f} MiB" for side in SIDES]
        seconds = [f"{found['seconds'][side]:.2f}" for side in SIDES]
        lines.append(
            f"| {int(tokens):,} | {' | '.join(memory)} | {found['memory_ratio']:.2f} x | {' | '.join(seconds)} | "
            f"{found['time_ratio']:.2f} x | {found['processor_ratio']:.2f} x |"
        )
    one = found["sides"]["ours"][0]
    turns, steps = len(found["sides"]["ours"]), len(one["seconds"])
    lines += [
        "",
        f"Bar: {BAR} x the memory. Medians of {turns} turn{'s' * (turns > 1)} of {steps} steps or more on {one['device']}, "
        f"{one['threads']} thread{'s' * (one['threads'] > 1)}, torch {found['machine']['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each of the rows")
    parser.add_argument("--side", choices=SIDES, default=None)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true", help="does the script itself work?")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args(argv)
    if given.side is not None:
        found = {"ours": ours, "plain": plain}[given.side](given.folder)
        print(json.dumps(found), flush=True)
        return
    kept = json.loads(given.output.read_text()) if given.output.exists() else {}
    if not given.render:
        size = {**SIZE, **({"hidden_size": 36, "vocab_size": 600, "intermediate_size": 40} if given.tiny else {})}
        kept[str(ROWS * given.tokens)] = run(given.turns, size, given.tokens)
        given.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    given.output.with_suffix(".md").write_text(render(kept), encoding="utf-8")
    print(render(kept))


if __name__ == "__main__":
    main()
