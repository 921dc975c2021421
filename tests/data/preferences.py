"""Rows of preferences, data of them, and what their batches score, for the tests of these data."""

import json
from pathlib import Path
from typing import Any

from lightning_ft import PreferenceData, UnpairedPreferenceData
from tests.data.test_collate_pairs import account
from tests.data.tiny_tokenizers import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer(CHATML)
LAYOUTS = {
    "shared": {"packing": True, "share_prompts": True},
    "separate": {"packing": True, "share_prompts": False},
    "padded": {"packing": False},
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def uneven(count: int = 23) -> list[dict[str, Any]]:
    """Pairs of many lengths."""
    return [
        {
            "prompt": "hello world" * (n % 4 + 1),
            "chosen": " yes" * (n % 5 + 1),
            "rejected": " no thank you" * (n % 3 + 1),
        }
        for n in range(count)
    ]


def pairs_of(path: str, folder: Path, tokenizer: Any = TOKENIZER, **options: Any) -> PreferenceData:
    data = PreferenceData(path, cache_dir=str(folder / "cache"), **{"batch_size": 3, **options})
    data.use_tokenizer(tokenizer)
    return data


def singles_of(path: str, folder: Path, tokenizer: Any = TOKENIZER, **options: Any) -> UnpairedPreferenceData:
    data = UnpairedPreferenceData(path, cache_dir=str(folder / "cache"), **{"batch_size": 3, **options})
    data.use_tokenizer(tokenizer)
    return data


def scored(data: Any, split: str = "train") -> dict[Any, Any]:
    """(row, which segment of it) -> what its tokens are predicted from, and as what, over an epoch."""
    data.setup("fit")
    found: dict[Any, Any] = {}
    for batch in data.train_dataloader() if split == "train" else data.val_dataloader():
        for row, tokens in zip(batch.rows.tolist(), account(batch), strict=True):
            if row >= 0:
                key = (row, sum(1 for known, _ in found if known == row))
                found[key] = tokens
    return found
