"""Workloads of preference pairs, made from a seed, and what is known of them.

- ``long``: 48 prompts of several worked word problems (reasoning-gym's gsm_symbolic) and one to solve, about four times as long as
  an answer; a right worked answer is preferred to one whose numbers are wrong.
- ``short``: 64 short sums with a long worked answer, so that a prompt is about half as long as an answer.

Runs as a process of its own (``python -m benchmarks.pairs``), so that the driver stays small.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from benchmarks.row_files import written
from benchmarks.rows import linear_shapes, write_adapter

Pair = dict[str, list[dict[str, str]]]
RANK = 8


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    """One prompt of a user with two answers."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def encode(tokenizer: Any, item: Pair) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the rendered prompt and of both answers with their end of turn, as both sides train them."""
    prompt = tokenizer.apply_chat_template(item["prompt"], add_generation_prompt=True)["input_ids"]
    answers = []
    for name in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(item["prompt"] + item[name])["input_ids"]
        end = len(whole) - 1 - whole[::-1].index(tokenizer.eos_token_id)
        answers.append(whole[len(prompt) : end + 1])
    return prompt, answers[0], answers[1]


def spoiled(answer: str, rng: random.Random) -> str:
    """The same words with other numbers."""
    return re.sub(r"\d+", lambda found: str(int(found.group()) + rng.randint(1, 9)), answer)


def long_pairs(count: int = 48, seed: int = 0) -> list[Pair]:
    """Two or three solved problems, then one to solve."""
    import reasoning_gym

    problems = iter(reasoning_gym.create_dataset("gsm_symbolic", size=5 * count, seed=seed))
    rng, made = random.Random(seed), []
    for n in range(count):
        shown = [next(problems) for _ in range(1 + n % 2)]
        asked = next(problems)
        examples = "\n\n".join(f"Problem: {p['question']}\nSolution: {p['metadata']['answer_cot']}" for p in shown)
        answer = asked["metadata"]["answer_cot"]
        made.append(pair(f"{examples}\n\nProblem: {asked['question']}", answer, spoiled(answer, rng)))
    return made


def short_pairs(count: int = 64, seed: int = 0) -> list[Pair]:
    """A sum of three to five numbers, worked out step by step."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        terms = [rng.randint(10, 99) for _ in range(rng.randint(3, 5))]
        lines, total = [], terms[0]
        for term in terms[1:]:
            lines.append(f"First take {total} and add {term}; that makes {total + term}.")
            total += term
        lines.append(f"So the sum of all the numbers that were given is {total}, which is the answer to the question.")
        answer = " ".join(lines)
        made.append(pair(" + ".join(map(str, terms)) + " = ?", answer, spoiled(answer, rng)))
    return made


def facts(tokenizer: Any, pairs: list[Pair], model: Path) -> dict[str, Any]:
    """Lengths of a workload, and the matrix-product work that a pair needs at least.

    With one copy of its prompt: forward and input gradient of frozen weights (4 a weight and token), the factors' three products
    (6), the reference's forward (2), causal attention of prompt and answers (8 L^2 a head dimension, the reference's included), the
    head of answer tokens forward, gradient and reference (6 V D).
    """
    config = json.loads((model / "config.json").read_text())
    encoded = [encode(tokenizer, item) for item in pairs]
    prompts, answers = [len(p) for p, _, _ in encoded], [len(c) + len(r) for _, c, r in encoded]
    shapes = linear_shapes(model).values()
    frozen, factors = sum(o * i for o, i in shapes), sum(RANK * (o + i) for o, i in shapes)
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    seen = sum(
        p * p + (2 * p + len(c)) * len(c) + (2 * p + len(r)) * len(r)
        for (_, c, r), p in zip(encoded, prompts, strict=True)
    )
    once = sum(prompts) + sum(answers)
    flops = (
        (6 * frozen + 6 * factors) * once
        + 8 * seen * width * layers / 2
        + 6 * config["vocab_size"] * width * sum(answers)
    )
    return {
        "pairs": len(pairs),
        "prompt_tokens": sum(prompts) / len(pairs),
        "answer_tokens": sum(answers) / len(pairs) / 2,
        "longest": max(p + max(len(c), len(r)) for (_, c, r), p in zip(encoded, prompts, strict=True)),
        "tokens": [2 * p + a for p, a in zip(prompts, answers, strict=True)],
        "useful_gflop_per_pair": flops / len(pairs) / 1e9,
    }


def main() -> None:
    """Write ``long.jsonl``, ``short.jsonl``, ``adapter/`` and print what is known of them."""
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
        pairs = long_pairs() if name == "long" else short_pairs()
        written(arguments.output / f"{name}.jsonl", pairs, ascii_only=False)
        described[name] = facts(tokenizer, pairs, model)
    write_adapter(model, arguments.output / "adapter", r=RANK)
    print(json.dumps(described))


if __name__ == "__main__":
    main()
