"""What is trained on what: a module, a tiny base and rows for each task; a new module adds one declaration here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from lightning_ft import (
    DPO,
    GRPO,
    MAML,
    PPO,
    SFT,
    ClassificationData,
    EpisodeData,
    MultiTask,
    MultiTaskData,
    PreferenceData,
    PromptData,
    ProtoNet,
    Reptile,
    RewardModel,
    Seq2SeqData,
    SFTData,
)
from tests.data.tiny_tokenizers import tiny_tokenizer
from tests.modules.tasks import SIZE, rows_of
from tests.modules.tasks import write_base as write_other_base

ROWS = 24  # three steps of eight
BATCH = 8


@dataclass(frozen=True)
class Subject:
    """A module on a tiny base.

    Attributes:
        name: in the table and in the key of a cell.
        base: ``llama``, ``gpt2``, ``bert`` or ``t5``.
        task: what the base's head is for.
        head: the names of the head's parameters, as a regular expression.
        last_block: those of the last block's.
        new_head: whether the base brings no head, so that one is made, and trained with any part.
        module: what makes the LightningModule of a base; further options are added.
        data: the data module's class.
        kind: which rows there are: None for those of the task, ``pairs``, ``prompts`` or ``episodes``.
        own: the names of parameters that the module brings and trains beside any part, as a regular expression.
        rollouts: whether it writes the answers that it learns from, in rounds of two steps.
        unused: those of parts that the base has and that this module never asks, as a regular expression; they do not train.
        taught: the one of several tasks that a teacher teaches.
    """

    name: str
    base: str
    task: str
    head: str
    last_block: str
    new_head: bool
    module: Callable[..., Any]
    data: Callable[..., Any]
    kind: str | None = None
    own: str | None = None
    rollouts: bool = False
    unused: str | None = None
    taught: str | None = None

    @property
    def rows(self) -> str:
        """Name of the file of its rows."""
        return self.kind or self.task

    @property
    def recomputes(self) -> bool:
        """Whether it can be asked to recompute activations."""
        made = self.module.func if isinstance(self.module, partial) else self.module
        return "gradient_checkpointing" in signature(made).parameters

    @property
    def packs(self) -> bool:
        """Whether its rows can be asked to be packed."""
        return self.data is several_tasks or "packing" in signature(self.data).parameters

    @property
    def generates(self) -> bool:
        """Whether it writes text."""
        return self.task.endswith("_lm")

    def job(self, ground: Path, *, ranks: int, packing: bool, model: dict[str, Any]) -> tuple[Any, Any]:
        """(module, data module): plain SGD with momentum at a constant rate, so that runs compare by their weights."""
        options = {
            "lr": 0.05,
            "schedule": "constant",
            "warmup_steps": 0,
            "base_dtype": "float32",
            "optimizer": partial(torch.optim.SGD, momentum=0.9),
            **model,
        }
        path = str(ground / f"{self.rows}.jsonl")
        rows: dict[str, Any] = {"val_path": path, "batch_size": BATCH // ranks}
        rows |= {"prompts": 4, "draw_batch": 2} if self.rollouts else {"val_batch_size": BATCH}
        rows |= {"packing": packing} if self.packs else {}
        made = self.data(path, cache_dir=str(ground / "cache"), seed=1, **rows)
        return self.module(str(ground / self.base), **options), made

    def says(self, module: Any, batch: Any) -> dict[str, Any]:
        """What a module says of a batch: its prediction, or how likely the answers are that it has written."""
        found = module.measure(batch) if self.rollouts else module.predict_step(batch, 0)
        return {name: value for name, value in found.items() if name != "reference_logps"}


BLOCKS = {"llama": r"\.layers\.1\.", "gpt2": r"\.h\.1\.", "bert": r"\.layer\.1\.", "t5": r"\.block\.1\."}


def _sft(task: str, base: str, head: str) -> Subject:
    data = {"causal_lm": SFTData, "seq2seq_lm": Seq2SeqData}.get(task, ClassificationData)
    new = not task.endswith("_lm")
    return Subject(f"{task}-{base}", base, task, head, BLOCKS[base], new, partial(SFT, task=task), data)


def _of_pairs(cls: type[Any], base: str, task: str, head: str) -> Subject:
    name, new = f"{cls.__name__}-{base}", not task.endswith("_lm")
    return Subject(name, base, task, head, BLOCKS[base], new, partial(cls), PreferenceData, "pairs")


def share_of_vowels(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs from answer to answer."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def _rollouts(cls: type[Any], own: str | None, **options: Any) -> Subject:
    module = partial(cls, rewards={"vowels": share_of_vowels}, samples=4, max_new_tokens=6, **options)
    return Subject(
        f"{cls.__name__}-llama", "llama", "causal_lm", r"^model\.lm_head\.", BLOCKS["llama"], False, module, PromptData, "prompts",
        own, rollouts=True,
    )  # fmt: skip


def _of_episodes(cls: type[Any], *, head_trains: bool, **model: Any) -> Subject:
    """On classes of texts."""
    name, head = f"{cls.__name__}-bert", r"^model\.(classifier|bert\.pooler)\."
    made, unused = partial(cls, **model), None if head_trains else head
    task = "sequence_classification"
    return Subject(name, "bert", task, head, BLOCKS["bert"], head_trains, made, episodes, "episodes", unused=unused)


def episodes(
    path: str, *, val_path: str, batch_size: int, val_batch_size: int, cache_dir: str, seed: int
) -> EpisodeData:
    """Three steps of eight tasks of two classes; those of the validation are other classes of the same file."""
    shape = {"way": 2, "shot": 2, "query": 2, "val_classes": 2, "episodes": ROWS, "val_episodes": 2}
    return EpisodeData(path, **shape, batch_size=batch_size, val_batch_size=2, cache_dir=cache_dir, seed=seed)


def several_tasks(path: str, *, cache_dir: str, val_path: str, **options: Any) -> MultiTaskData:
    """Texts, numbers and pairs of answers beside one another."""
    beside, own = Path(path).parent, {"cache_dir": cache_dir}
    files = {name: str(beside / f"{name}.jsonl") for name in ("causal_lm", "regression", "pairs")}
    tasks = {
        "texts": SFTData(files["causal_lm"], val_path=val_path, **own),
        "numbers": ClassificationData(files["regression"], val_path=files["regression"], task="regression", **own),
        "policy": PreferenceData(files["pairs"], val_path=files["pairs"], **own),
    }
    return MultiTaskData(tasks, **options)


def _several() -> Subject:
    module = partial(MultiTask, objectives={"policy": "dpo"}, head_dropout=0.0)  # noise differs from rank to rank
    head = r"^model\.lm_head\."
    shape = ("MultiTask-llama", "llama", "causal_lm", head, BLOCKS["llama"], False, module, several_tasks)
    return Subject(*shape, own=r"^heads\.", taught="texts")


SUBJECTS = {
    subject.name: subject
    for subject in (
        _sft("causal_lm", "llama", r"^model\.lm_head\."),
        _sft("causal_lm", "gpt2", r"^model\.(lm_head|transformer\.wte)\."),  # tied
        _sft("seq2seq_lm", "t5", r"^model\.(lm_head|shared)\."),
        _sft("sequence_classification", "bert", r"^model\.(classifier|bert\.pooler)\."),
        _sft("sequence_classification", "llama", r"^model\.score\."),
        _sft("token_classification", "bert", r"^model\.classifier\."),
        _sft("regression", "gpt2", r"^model\.score\."),
        _of_pairs(DPO, "llama", "causal_lm", r"^model\.lm_head\."),
        _several(),
        _of_pairs(RewardModel, "bert", "regression", r"^model\.(classifier|bert\.pooler)\."),
        _rollouts(GRPO, None, beta=0.05),
        _rollouts(PPO, r"^values\."),
        _of_episodes(MAML, head_trains=True, steps=2, inner_lr=0.1, eval_steps=[0]),
        _of_episodes(Reptile, head_trains=True, steps=2, inner_lr=0.1, eval_steps=[0]),
        _of_episodes(ProtoNet, head_trains=False),
    )
}


#: Public modules that are in no cell yet, and why; one that has a subject may not stand here.
NOT_YET = {
    "KTO": "it estimates a KL term in each micro-batch, so that its layouts differ by design; tests/modules/test_kto compares them",
    "LinearProbe": "it learns from episodes, and trains nothing; tests/modules/test_protonet",
    "OnlineDPO": "its rounds are GRPO's and its loss DPO's; tests/modules/test_online_dpo has all placements",
    "OnPolicyDistillation": "its rows are written while it trains; tests/modules/test_on_policy_distillation has all placements",
}


def write_base(kind: str, folder: Path) -> Path:
    """A random body of two blocks with its tokenizer, as a folder."""
    if kind != "gpt2":
        return write_other_base(kind, folder)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": SIZE["hidden_size"], "n_layer": SIZE["num_hidden_layers"], "n_head": SIZE["num_attention_heads"]}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = hf.GPT2Config(
        **sizes, **none, **ends, n_positions=128, vocab_size=len(tokenizer), pad_token_id=0, initializer_range=0.1
    )
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_ground(folder: Path) -> Path:
    """All bases and rows; read only, but for the cache of tokenised rows."""
    for kind in sorted({subject.base for subject in SUBJECTS.values()}):
        write_base(kind, folder / kind)
    for task in sorted({subject.rows for subject in SUBJECTS.values()}):
        rows = rows_of("seq2seq_lm" if task in ("causal_lm", "pairs", "prompts", "episodes") else task, ROWS)
        if task in ("causal_lm", "pairs"):  # their tokenizer has words with the white space before them
            rows = [{**row, "completion": f" {row['completion']}"} for row in rows]
        if task == "pairs":
            rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no thank you"} for r in rows]
        if task == "prompts":
            rows = [{"prompt": row["prompt"]} for row in rows]
        if task == "episodes":
            rows = [{"text": row["text"], "label": f"class {n % 6}"} for n, row in enumerate(rows_of("episodes", 30))]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


__all__ = ["BATCH", "NOT_YET", "ROWS", "SUBJECTS", "Subject", "write_base", "write_ground"]
