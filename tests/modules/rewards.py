"""Pairs of uneven length, tiny random bases of three kinds, and fits of reward models on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.distributed.tensor import DTensor

from lightning_ft import LoRA, PreferenceData, RewardModel
from lightning_ft.engine.strategies import FSDP2Strategy
from tests.contract.subjects import trainer
from tests.data.tiny_tokenizers import tiny_encoder_tokenizer, tiny_tokenizer

KINDS = ("llama", "gpt2", "bert")
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = 12


def write_base(kind: str, folder: Path) -> Path:
    """A random body without a head, whose tokenizer pads with what rows end with (of ``bert``: has a padding token)."""
    torch.manual_seed(0)
    tokenizer = tiny_encoder_tokenizer() if kind == "bert" else tiny_tokenizer()
    size, eos = len(tokenizer), tokenizer.eos_token_id
    model: Any
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, vocab_size=size, initializer_range=0.2, eos_token_id=eos))
    elif kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        ids = {"bos_token_id": eos, "eos_token_id": eos}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=size, **shape, **ids, initializer_range=0.2))
    else:
        model = hf.BertModel(hf.BertConfig(**SIZE, vocab_size=size, initializer_range=0.2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(rows: int = ROWS, *, margins: bool = False) -> list[dict[str, Any]]:
    """Random texts; better answers say yes."""
    draw = random.Random(2)

    def text(most: int) -> str:
        return " ".join(draw.choices(["hello", "world", "sentence", "thank", "you"], k=draw.randint(1, most)))

    found: list[dict[str, Any]] = [
        {"prompt": f"{text(6)} {n}", "chosen": f" yes {text(3)}", "rejected": f" no {text(6)}"} for n in range(rows)
    ]
    return [{**row, "margin": n % 3 / 2} for n, row in enumerate(found)] if margins else found


def write_pairs(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def job(base: Path, folder: Path, *, data: dict[str, Any] | None = None, **model: Any) -> tuple[RewardModel, Any]:
    """The module with plain SGD in fp32, and its rows in order, which are validated on too."""
    rows = folder / "pairs.jsonl"
    if not rows.exists():
        write_pairs(rows, pairs(margins=True))
    given = {"lr": 0.1, "base_dtype": "float32", "warmup_steps": 0, "schedule": "constant"}
    module = RewardModel(str(base), **{**given, "optimizer": torch.optim.SGD, **model})
    options = {"val_path": str(rows), "batch_size": 6, "shuffle": False, "cache_dir": str(folder / "cache")}
    return module, PreferenceData(str(rows), **{**options, **(data or {})})


def fit(folder: Path, module: Any, data: Any, *callbacks: Any, **options: Any) -> Any:
    """Two steps and a validation unless said otherwise; the trainer."""
    made = trainer(folder, *callbacks, **{"max_steps": 2, "limit_val_batches": None, **options})
    made.fit(module, data)
    return made


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained tensors and the normalisation, whole."""
    found = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found["normalisation"] = module.normalisation
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in found.items()}


def on_ranks(
    base: str, folder: str, devices: int, strategy: str, val: bool = True, full: bool = False
) -> tuple[dict[str, float], dict[str, torch.Tensor], torch.Tensor]:
    """(what was logged and validated, weights and normalisation, scores) after two steps of six pairs, on one rank or two."""
    torch.set_num_threads(1)
    rows = {"batch_size": 6 // devices, "val_batch_size": 5, **({} if val else {"val_path": None})}
    model = {"center_rewards_coefficient": 0.1, "normalise": "both", "lr": 0.05}
    module, data = job(Path(base), Path(folder), data=rows, **model)
    ranks: dict[str, Any] = {}
    if devices > 1:
        given = FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "fsdp2" else strategy
        ranks = {"devices": devices, "strategy": given}
    techniques = [] if full else [LoRA(r=4)]
    limit = None if val else 0
    made = fit(Path(folder), module, data, *techniques, log_every_n_steps=1, limit_val_batches=limit, **ranks)
    measured = {name: float(value) for name, value in made.callback_metrics.items()}
    return measured, weights(module), module.score([[5, 6], [5, 6], [7]], [[8, 9], [10], [11, 12, 1]]).cpu()
