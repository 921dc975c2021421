"""Tiny jobs of several tasks."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.distributed.tensor import DTensor

from lightning_ft import ClassificationData, MultiTask, MultiTaskData, PreferenceData, SFTData
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.nn.adapters import set_adapters
from tests.contract.subjects import trainer
from tests.modules.tasks import rows_of, write_base

TASKS = ["classes", "words", "numbers"]
"""Of `job`."""


def job(
    folder: Path, kind: str = "bert", model: dict[str, Any] | None = None, **data: Any
) -> tuple[MultiTask, MultiTaskData]:
    """Classes, words and numbers on a tiny BERT; on a tiny Llama texts, too."""
    base = folder / kind
    if not base.exists():
        write_base(kind, base)
    rows = {"classes": rows_of("sequence_classification", 24), "words": rows_of("token_classification", 10)}
    rows["numbers"] = rows_of("regression", 7)
    if kind == "llama":
        rows["texts"] = [{"text": row["text"]} for row in rows_of("regression", 9)]
    parts: dict[str, Any] = {}
    for name, found in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        cls = SFTData if name == "texts" else ClassificationData
        task = {"task": "regression"} if name == "numbers" else {}
        parts[name] = cls(str(path), val_path=str(path), cache_dir=str(folder / "cache"), **task)
    options = {"lr": 0.05, "schedule": "constant", "warmup_steps": 0, "base_dtype": "float32", "head_dropout": 0.0}
    options |= {"optimizer": torch.optim.SGD, **(model or {})}
    return MultiTask(str(base), **options), MultiTaskData(parts, **{"batch_size": 8, "seed": 1, **data})


def by_hand(module: MultiTask, batch: Any, weigh: str, own: Sequence[str] = ()) -> torch.Tensor:
    """Row after row through transformers' own backbone, each head on what it reads; the mean of each task, added up.

    With adapters ``own``, which have names of tasks, a row is read with its task's and the shared one.
    """
    backbone, flat = module.view.backbone, batch.ids.reshape(-1)
    bounds = batch.bounds or [n * batch.ids.shape[1] for n in range(len(batch.rows) + 1)]
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in TASKS}
    for s, k in enumerate(batch.columns["task"].tolist()):
        begin, end = bounds[s], bounds[s + 1]
        if batch.mask is not None:
            end = begin + int(batch.mask[s].sum())
        if own:
            set_adapters(module.model, {"shared": 1.0, **{name: float(name == TASKS[k]) for name in own}})
        hidden = backbone(input_ids=flat[None, begin:end]).last_hidden_state[0]
        head = module.heads[TASKS[k]].out
        if TASKS[k] == "words":
            for place, label in zip(batch.scored.tolist(), batch.labels, strict=True):
                if begin <= place < end:
                    losses["words"].append(-F.log_softmax(head(hidden[place - begin]), -1)[label])
        else:
            at = batch.columns[f"rows/{k}"].tolist().index(s)
            target = batch.columns[f"targets/{k}"][at]
            logits = head(hidden[0])
            loss = (logits[0] - target) ** 2 if TASKS[k] == "numbers" else -F.log_softmax(logits, -1)[target]
            losses[TASKS[k]].append(loss)
    if own:
        set_adapters(module.model, dict.fromkeys(("shared", *own), 1.0))
    rows = [batch.columns["task"].eq(k).sum() / len(batch.rows) for k in range(3)]
    means = [torch.stack(losses[name]).mean() if losses[name] else torch.zeros(()) for name in TASKS]
    return sum(
        mean * (share if weigh == "rows" else float(bool(share))) for mean, share in zip(means, rows, strict=True)
    )


def fit(folder: Path, module: MultiTask, data: MultiTaskData, *callbacks: Any, **options: Any) -> Any:
    made = trainer(folder, *callbacks, **{"max_steps": 4, "use_distributed_sampler": False, **options})
    made.fit(module, data)
    return made


def weights(module: MultiTask) -> dict[str, torch.Tensor]:
    whole = {
        n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters() if p.requires_grad
    }
    return {name: p.detach().clone() for name, p in whole.items()}


def on_ranks(
    folder: str,
    batch_size: int,
    accumulate: int = 1,
    devices: int = 1,
    fsdp2: bool = False,
    surgery: str | None = None,
    teachers: bool = False,
    adapters: bool = False,
    balancing: dict[str, Any] | None = None,
    **data: Any,
) -> dict[str, torch.Tensor]:
    """Trained weights after four steps."""
    from lightning_ft import Distillation, GradientSurgery, LoRA, LossBalancing

    torch.set_num_threads(1)
    module, rows = job(Path(folder), model={"weigh": "tasks"}, batch_size=batch_size, **data)
    strategy = FSDP2Strategy(save_distributed_checkpoint=False, process_group_backend="gloo") if fsdp2 else "ddp"
    ranks: dict[str, Any] = {"devices": devices, "strategy": strategy} if devices > 1 else {}
    callbacks: list[Any] = [GradientSurgery(surgery)] if surgery else []
    callbacks += [LossBalancing(**balancing)] if balancing else []
    if adapters:
        callbacks += [LoRA(2, name=name) for name in ("shared", "classes", "numbers")]
    if teachers:
        callbacks += [
            Distillation(str(Path(folder) / f"teacher-{name}.ckpt"), name=name, dtype="float32")
            for name in ("classes", "numbers")
        ]
    fit(Path(folder), module, rows, *callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=1.0, **ranks)
    return weights(module)


def pairs_job(folder: Path, model: dict[str, Any] | None = None, **data: Any) -> tuple[MultiTask, MultiTaskData]:
    """Numbers, a reward with margins, a policy and texts on a tiny Llama."""
    _, others = job(folder, "llama")
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": row["text"],
            "chosen": f" yes {'hello ' * (n % 3)}you",
            "rejected": " no thank you",
            "margin": n / 10,
        }
        for n, row in enumerate(rows_of("regression", 9))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts: dict[str, Any] = {"numbers": others.tasks["numbers"]}
    for name in ("liked", "policy"):
        parts[name] = PreferenceData(str(path), val_path=str(path), cache_dir=str(folder / "cache"))
    parts["texts"] = others.tasks["texts"]
    options = {"objectives": {"liked": "reward", "policy": "dpo"}, "dpo_beta": 0.3, **(model or {})}
    module, _ = job(folder, "llama", model=options)
    return module, MultiTaskData(parts, **{"batch_size": 8, "seed": 1, **data})


def pairs_on_ranks(folder: str, batch_size: int, devices: int = 1, fsdp2: bool = False) -> dict[str, torch.Tensor]:
    """Trained weights after four steps."""
    torch.set_num_threads(1)
    module, rows = pairs_job(Path(folder), model={"weigh": "tasks"}, batch_size=batch_size)
    strategy = FSDP2Strategy(save_distributed_checkpoint=False, process_group_backend="gloo") if fsdp2 else "ddp"
    ranks: dict[str, Any] = {"devices": devices, "strategy": strategy} if devices > 1 else {}
    fit(Path(folder), module, rows, limit_val_batches=0, **ranks)
    return weights(module)


def taught(folder: Path, **data_options: Any) -> tuple[dict[str, str], MultiTask, MultiTaskData]:
    """Task -> checkpoint of a teacher of it, and the job of all tasks."""
    from lightning_ft import SFT

    module, data = job(folder, **data_options)
    found = {}
    kinds = {"classes": "sequence_classification", "numbers": "regression"}
    for name, task in kinds.items():
        teacher = SFT(str(folder / "bert"), task=task, lr=0.05, optimizer=torch.optim.SGD, base_dtype="float32")  # type: ignore[arg-type]
        run = trainer(folder, max_steps=3, use_distributed_sampler=False, limit_val_batches=0)
        run.fit(teacher, copy.deepcopy(data.tasks[name]))
        found[name] = str(folder / f"teacher-{name}.ckpt")
        run.save_checkpoint(found[name])
    return found, module, data


def predicted_on_ranks(folder: str, rows: int, devices: int = 2) -> dict[str, list[int]]:
    """Task -> numbers of the rows that this rank has predicted, of so many of the first task and all of the others."""
    torch.set_num_threads(1)
    module, data = job(Path(folder))
    for name, one in data.tasks.items():
        one.predict_path = one.val_path
        if name == "classes":
            one.predict_path = str(Path(folder) / f"{rows}.jsonl")
            lines = Path(str(one.val_path)).read_text().splitlines(keepends=True)[:rows]
            Path(str(one.predict_path)).write_text("".join(lines))
    ranks: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    run = trainer(Path(folder), max_steps=1, use_distributed_sampler=False, **ranks)
    found: dict[str, list[int]] = {}
    for batches in run.predict(module, data) or []:
        for said in batches:
            found.setdefault(said["task"], []).extend(n for n in said["rows"].tolist() if n >= 0)
    return found
