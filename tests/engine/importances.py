"""Fits at whose end the Fisher information is measured, and the same by a loop over examples, for the tests of importances."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft import SFT, BottleneckAdapter, LoRA, PrefixTuning, Seq2SeqData
from lightning_ft.engine.importance import Importance, importance
from lightning_ft.engine.likelihood import LogLikelihood, SquaredNorm
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.nn.registry import injected_layers
from tests.contract.subjects import chat_job, trainer

SEED = 3


class AtTheEnd(pl.Callback):
    """Measures importances once a fit is over, in float64 unless it is told otherwise."""

    def __init__(self, labels: str | None = "sample", batches: Any = None, double: bool = True) -> None:
        self.labels, self.batches, self.double = labels, batches, double
        self.found: Importance | None = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.double:
            pl_module.double()
        stir_(pl_module)
        batches = self.batches if self.batches is not None else trainer.datamodule.in_order()["train"]
        ask = LogLikelihood(self.labels, SEED) if self.labels else SquaredNorm()
        self.found = importance(trainer, pl_module, batches, ask, power=2 if self.labels else 1)


def stir_(module: nn.Module, seed: int = 5) -> None:
    """Seeded values for injected parameters: the Fisher information of A is zero while B is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in sorted(injected_layers(module).items()):
            for _, parameter in sorted(layer.injected_parameters().items()):
                drawn = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if isinstance(parameter, DTensor):
                    from lightning_ft.engine.gradients import like

                    parameter.to_local().add_(like(drawn.to(parameter.dtype), parameter).to_local())
                else:
                    parameter.add_(drawn.to(parameter))


def loop(module: nn.Module, losses: Iterable[Tensor], power: int = 2) -> dict[str, Tensor]:
    """``1/N sum_s |g_s|^power``, one backward pass an example."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    count = 0
    for loss in losses:
        count += 1
        for (name, _), grad in zip(
            named.items(), torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True
        ):
            if grad is not None:
                total[name] += grad.abs() ** power
    return {n: value / count for n, value in total.items()}


def drawn(logits: Tensor, key: int) -> Tensor:
    """Labels as the documentation says: the inverse of the distribution function at uniform numbers of (seed, row)."""
    words = np.random.SeedSequence([SEED, key]).generate_state(1)
    uniform = torch.rand(
        len(logits), generator=torch.Generator().manual_seed(int(words[0])), dtype=torch.float64
    ).numpy()
    labels = []
    for row, u in zip(logits.detach().double().softmax(-1).numpy(), uniform, strict=True):
        heap, label = 0.0, 0
        for label, p in enumerate(row):  # noqa: B007
            heap += p
            if heap > u:
                break
        labels.append(label)
    return torch.tensor(labels)


def nll(logits: Tensor, labels: Tensor, kind: str, key: int) -> Tensor:
    """The log-probability of an example's labels of some kind, summed: logits (n, C)."""
    if kind == "sample":
        labels = drawn(logits, key)
    elif kind == "predicted":
        labels = logits.argmax(-1)
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()


def whole(diagonal: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach() for n, v in diagonal.items()}


ADAPTERS: dict[str, Callable[[], list[Any]]] = {
    "full": list,
    "lora": lambda: [LoRA(2)],
    "everywhere": lambda: [LoRA(2, target=["embed_tokens", "q_proj", "down_proj"], modules_to_save=["norm"])],
    "adapter": lambda: [BottleneckAdapter(reduction_factor=8)],
    "prefix": lambda: [PrefixTuning(3)],
    "dora": lambda: [LoRA(2, dora=True)],
}


def chat_fisher(
    chat: str,
    folder: str,
    adapter: str = "lora",
    labels: str | None = "sample",
    strategy: str | None = None,
    double: bool = True,
    **data: Any,
) -> dict[str, Any]:
    """Importances of the tiny chat model at the end of one step."""
    module, source = chat_job(Path(chat), Path(folder), data=data)
    measure = AtTheEnd(labels, double=double)
    options: dict[str, Any] = {"max_steps": 1, "use_distributed_sampler": False, "limit_val_batches": 0}
    if strategy:
        options |= {"devices": 2, "strategy": FSDP2Strategy() if strategy == "fsdp2" else strategy}
    trainer(Path(folder), *ADAPTERS[adapter](), measure, **options).fit(module, source)
    found = measure.found
    assert found is not None
    kinds = {type(v).__name__ for v in found.diagonal.values()}
    return {
        "diagonal": whole(found.diagonal),
        "examples": found.examples,
        "trace": found.trace,
        "slow": found.slow,
        "kinds": kinds,
        "module": None if strategy else module,
        "data": None if strategy else source,
    }


def seq2seq_fisher(base: str, folder: str, sharded: bool = False) -> dict[str, Any]:
    """Importances of a tiny T5; of two ranks the first has as many rows as tokens, the length of a row of its table of biases.

    Args:
        base: folder of the model.
        folder: for everything else.
        sharded: two ranks under FSDP2 with four rows each; else one process with all eight.
    """
    read = ["hello world yes"] * 4 + ["hello world yes no thank you"] * 4  # 4 and 7 tokens with the end token
    rows = [{"prompt": text, "completion": ("yes no", "no")[n % 2]} for n, text in enumerate(read)]
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"task": "seq2seq_lm", "lr": 0.1, "warmup_steps": 0, "schedule": "constant", "base_dtype": "float32"}
    module = SFT(base, optimizer=torch.optim.SGD, **given)
    dealt: dict[str, Any] = {"batch_size": 4 if sharded else 8, "shuffle": False}
    source = Seq2SeqData(str(path), val_path=str(path), cache_dir=f"{folder}/cache", **dealt)
    measure = AtTheEnd(double=False)
    options: dict[str, Any] = {"max_steps": 1, "use_distributed_sampler": False, "limit_val_batches": 0}
    if sharded:
        options |= {"devices": 2, "strategy": FSDP2Strategy()}
    trainer(Path(folder), measure, **options).fit(module, source)
    found = measure.found
    assert found is not None
    shapes = [tuple(batch.source.ids.shape) for batch in source.in_order()["train"]]
    return {"diagonal": whole(found.diagonal), "slow": found.slow, "shapes": shapes}
