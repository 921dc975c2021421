"""Tiny bases and rows for each task of SFT, and fits of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.distributed.tensor import DTensor

from lightning_ft import SFT, ClassificationData, Seq2SeqData
from lightning_ft.engine.strategies import FSDP2Strategy
from tests.contract.subjects import trainer
from tests.data.tiny_tokenizers import tiny_encoder_tokenizer, tiny_seq2seq_tokenizer, tiny_tokenizer

WORDS = ["hello", "world", "sentence", "positive", "yes", "no", "thank", "you"]
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_base(kind: str, folder: Path) -> Path:
    """A random ``bert``, ``llama`` or ``t5`` body with its tokenizer, as a folder; without the head of any task."""
    torch.manual_seed(0)
    model: Any
    if kind == "bert":
        tokenizer = tiny_encoder_tokenizer()
        config = hf.BertConfig(
            **SIZE,
            vocab_size=len(tokenizer),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
        )
        model = hf.BertModel(config, add_pooling_layer=False)
    elif kind == "llama":
        tokenizer = tiny_tokenizer()
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, vocab_size=len(tokenizer), initializer_range=0.1))
    else:
        tokenizer = tiny_seq2seq_tokenizer()
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        start = tokenizer.pad_token_id
        config = hf.T5Config(vocab_size=len(tokenizer), **sizes, decoder_start_token_id=start, pad_token_id=start)
        model = hf.T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(task: str, n: int = 32) -> list[dict[str, Any]]:
    """Random texts with random answers (tags: of a word and the one before it), to be learnt by heart."""
    draw = random.Random(0)
    found: list[dict[str, Any]] = []
    for _ in range(n):
        words = [draw.choice(WORDS) for _ in range(draw.randint(4, 9))]
        text = " ".join(words)
        if task == "token_classification":
            before = ["hello", *words]  # decoders see what comes before a word, not what follows it
            codes = [WORDS.index(word) + 3 * WORDS.index(last) for word, last in zip(words, before, strict=False)]
            found.append({"tokens": words, "tags": [("O", "B-X", "I-X")[code % 3] for code in codes]})
        elif task == "regression":
            found.append({"text": text, "label": draw.uniform(-1, 1)})
        elif task == "multi_label":
            found.append({"text": text, "label": [name for name in "abc" if draw.random() < 0.4]})
        elif task == "seq2seq_lm":
            found.append({"prompt": text, "completion": " ".join(draw.choice(WORDS) for _ in range(2))})
        else:
            found.append({"text": text, "label": draw.choice(["low", "middle", "high"])})
    return found


def job(
    base: Path, folder: Path, task: str, *, model: dict[str, Any] | None = None, n: int = 32, **data: Any
) -> tuple[SFT, Any]:
    """(module, data) of a task over rows in ``folder``."""
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, n)))
    name = "sequence_classification" if task == "multi_label" else task
    options = {"lr": 5e-3, "schedule": "constant", "warmup_steps": 0, "base_dtype": "float32", **(model or {})}
    cls: Callable[..., Any] = Seq2SeqData if task == "seq2seq_lm" else ClassificationData
    rows = cls(str(path), val_path=str(path), cache_dir=str(folder / "cache"), **{"batch_size": 32, **data})
    return SFT(str(base), task=name, **options), rows


def fit(module: SFT, rows: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    """The trainer after its fit; validation rows are the training rows."""
    made = trainer(folder, *callbacks, **{"limit_val_batches": None, "val_check_interval": None, **options})
    made.fit(module, rows)
    return made


def fit_on_ranks(
    base: str, folder: str, task: str, devices: int, fsdp2: bool = False
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(what a validation measured, trained weights) after three steps of eight rows, on one rank or a job of two."""
    torch.set_num_threads(1)
    module, rows = job(
        Path(base),
        Path(folder),
        task,
        model={"optimizer": torch.optim.SGD, "lr": 0.1},
        batch_size=8 // devices,
        val_batch_size=3,
    )
    strategy = FSDP2Strategy(save_distributed_checkpoint=False) if fsdp2 else "ddp"
    ranks: dict[str, Any] = {"devices": devices, "strategy": strategy} if devices > 1 else {}
    made = fit(module, rows, Path(folder), max_steps=3, **ranks)
    measured = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("val/")}
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return measured, {name: p.detach().clone() for name, p in whole.items()}
