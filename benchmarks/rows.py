"""The workloads, made from a seed: rows as prompt / completion messages, and the LoRA factors every side starts from.

- ``long``: 64 worked word problems (reasoning-gym's gsm_symbolic, one or two to a row, and plain sums), averaging
  about 174 tokens in SmolLM2's chat template, 44 % of them scored: an ordinary instruction set.
- ``short``: 160 sentences of ``starter:vader`` with one word to learn from each, as in the quickstart.

Runs as a process of its own (``python -m benchmarks.rows``), so that the driver stays small: on Linux a child's peak
memory can start from its parent's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

from benchmarks.row_files import written

TARGET_TOKENS = 174
SENTIMENT = "Is the sentiment of this sentence positive or negative?"
Row = dict[str, list[dict[str, str]]]


def row(question: str, answer: str) -> Row:
    """One conversation of one exchange."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def encode(tokenizer: Any, item: Row) -> tuple[list[int], list[int]]:
    """Token ids of a row and its labels, -100 on what is not scored.

    Scored are the answer and its end of turn; what a template writes after that (ChatML: a newline) is part of the row
    and not learned. All sides train on these tokens.
    """
    prompt = tokenizer.apply_chat_template(item["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(item["prompt"] + item["completion"], return_dict=True)["input_ids"]
    if ids[: len(prompt)] != prompt:
        raise RuntimeError("The chat template renders the prompt alone differently from the prompt of a whole row.")
    begin, end = len(prompt), ids.index(tokenizer.eos_token_id, len(prompt)) + 1
    return ids, [-100] * begin + ids[begin:end] + [-100] * (len(ids) - end)


def scored_count(labels: list[int]) -> int:
    """How many tokens of a row are learned."""
    return sum(label != -100 for label in labels)


def long_rows(tokenizer: Any, count: int = 64, seed: int = 0) -> list[Row]:
    """Word problems with their worked answers, steered to the target length on average."""
    import reasoning_gym

    words = reasoning_gym.create_dataset("gsm_symbolic", size=2 * count, seed=seed)
    sums = reasoning_gym.create_dataset("chain_sum", size=count, seed=seed)
    problems = iter([(item["question"], item["metadata"]["answer_cot"]) for item in words])
    plain = iter([(item["question"], f"The answer is {item['answer']}.") for item in sums])
    rng, rows, total = random.Random(seed), [], 0
    for n in range(count):
        # Short ones pull the average down, pairs pull it up; a quarter is left to chance, to keep lengths varied.
        wanted_longer = total < TARGET_TOKENS * n if rng.random() < 0.75 else rng.random() < 0.5
        if wanted_longer and rng.random() < 0.4:
            (q1, a1), (q2, a2) = next(problems), next(problems)
            made = row(f"Solve both problems.\n1. {q1}\n2. {q2}", f"1. {a1}\n2. {a2}")
        elif wanted_longer or rng.random() < 0.5:
            made = row(*next(problems))
        else:
            made = row(*next(plain))
        rows.append(made)
        total += len(encode(tokenizer, made)[0])
    return rows


def short_rows(folder: Path, count: int = 160, seed: int = 0) -> list[Row]:
    """Rated sentences of three domains; ``folder`` holds VADER's ground-truth files."""
    rows = []
    for domain in ("tweets", "amazonReviewSnippets", "movieReviewSnippets"):
        found = next(iter(sorted(folder.rglob(f"{domain}_GroundTruth.txt"))))
        for line in found.read_text(encoding="utf-8", errors="replace").splitlines():
            parts = line.split("\t")
            if len(parts) == 3 and abs(float(parts[1])) > 0.5:
                answer = "positive" if float(parts[1]) > 0 else "negative"
                rows.append(row(f"{SENTIMENT}\n{parts[2].strip()}", answer))
    random.Random(seed).shuffle(rows)
    return rows[:count]


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Name and (out, in) of every linear weight below the head, read from the files' headers."""
    from safetensors import safe_open

    shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and name.endswith("_proj.weight"):
                    shapes[name.removesuffix(".weight")] = (shape[0], shape[1])
    return shapes


def write_adapter(model: Path, folder: Path, r: int = 8, alpha: int = 16, seed: int = 0) -> None:
    """LoRA factors in PEFT's format: A uniform as usual, B zero, the same for every side."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng, tensors = np.random.default_rng(seed), {}
    shapes = linear_shapes(model)
    for name, (out_features, in_features) in shapes.items():
        bound = 1 / math.sqrt(in_features)
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = rng.uniform(-bound, bound, (r, in_features)).astype("float32")
        tensors[f"{key}.lora_B.weight"] = np.zeros((out_features, r), dtype="float32")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in shapes}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def facts(tokenizer: Any, rows: list[Row], model: Path, r: int = 8) -> dict[str, Any]:
    """Lengths of a workload, and the matrix-product work that a pass over it needs at least.

    Per token: forward and input gradient of every frozen linear weight (4 a weight), all three products of the LoRA
    factors (6 a weight); causal attention (6 L^2 a head dimension, forward and backward); per *scored* token forward
    and hidden gradient of the head (4 V D).
    """
    config = json.loads((model / "config.json").read_text())
    encoded = [encode(tokenizer, item) for item in rows]
    lengths = [len(ids) for ids, _ in encoded]
    scored = sum(scored_count(labels) for _, labels in encoded)
    shapes = linear_shapes(model).values()
    frozen = sum(o * i for o, i in shapes)
    factors = sum(r * (o + i) for o, i in shapes)
    width = config["hidden_size"]
    attention = 6 * sum(n * n for n in lengths) * width * config["num_hidden_layers"]
    flops = (4 * frozen + 6 * factors) * sum(lengths) + attention + 4 * config["vocab_size"] * width * scored
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "mean_tokens": sum(lengths) / len(rows),
        "longest": max(lengths),
        "scored_tokens": scored,
        "useful_gflop_per_token": flops / sum(lengths) / 1e9,
    }


def main() -> None:
    """Write ``long.jsonl``, ``short.jsonl``, ``adapter/`` and ``facts.json`` into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workloads", default="long,short")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    from lightning_ft.models import starter

    model = Path(starter.path("smollm2-135m"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"model": str(model)}
    for name in arguments.workloads.split(","):
        rows = long_rows(tokenizer) if name == "long" else short_rows(Path(starter.path("vader")))
        written(arguments.output / f"{name}.jsonl", rows, ascii_only=False)
        described[name] = facts(tokenizer, rows, model)
    write_adapter(model, arguments.output / "adapter")
    (arguments.output / "facts.json").write_text(json.dumps(described, indent=1))
    print(json.dumps(described))


if __name__ == "__main__":
    main()
