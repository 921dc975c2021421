"""What techniques are tried on: a LightningModule that knows nothing of this library, and a tiny chat model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.data.task_stream import TaskStream
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.functional.task_sampling import rows_in_tasks, task_sequence
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.registry import injected_layers

FEATURES, CLASSES, ROWS = 4, 3, 16
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 1,
}


class PlainNet(pl.LightningModule):
    """Two linear layers and a norm, with a user's own mean loss."""

    built: ClassVar[int] = 0

    def __init__(self, dtype: str = "float32", fail_at: int | None = None) -> None:
        super().__init__()
        PlainNet.built += 1
        self.fail_at = fail_at
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, CLASSES)
            )  # (B, FEATURES) -> (B, CLASSES)
        self.to(getattr(torch, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("a step that fails")
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


class SpeakingNet(PlainNet):
    """The same, with the ``generate`` that some techniques need."""

    tokenizer = SimpleNamespace(chat_template=None)

    def generate(self, prompts: list[str], *, max_new_tokens: int, temperature: float) -> list[str]:
        return [prompt[::-1][:max_new_tokens] for prompt in prompts]

    def prompts_and_references(self, batch: list[Tensor]) -> list[tuple[str, str]]:
        return [(f"row {number}", f"{number} wor") for number in batch[1].tolist()]


class WordNet(PlainNet):
    """The same behind an embedding, that of the numbers' rounded values."""

    def __init__(self, dtype: str = "float32", fail_at: int | None = None) -> None:
        super().__init__(dtype, fail_at)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.words = nn.Embedding(7, FEATURES, dtype=getattr(torch, dtype))

    def forward(self, x: Tensor) -> Tensor:
        words = (x.float() * 2).round().clamp(-3, 3).long() + 3  # (B, FEATURES), numbers from 0 to 6
        return self.net(self.words(words).mean(1))


class LogitsNet(PlainNet):
    """The same, which says its logits."""

    def logits(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0]).float()


class TermsNet(PlainNet):
    """The same with two terms, whose gradients disagree."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("a step that fails")
        out = self(batch[0]).float()
        losses = {
            "own": nn.functional.cross_entropy(out, batch[1]),
            "other": nn.functional.cross_entropy(-out, batch[1]),
        }
        Attachment.of(self).terms([Term(name, loss, 1.0, "mean") for name, loss in losses.items()])
        return losses["own"] + losses["other"]


class AdaptedNet(PlainNet):
    """The same with factors that it has injected by itself."""

    def __init__(self, dtype: str = "float32", fail_at: int | None = None) -> None:
        super().__init__(dtype, fail_at)
        inject_lora(self.net, LoRAConfig(r=2), seed=0)


class AttentionNet(PlainNet):
    """The same behind a tiny Llama that reads those words."""

    def __init__(self, dtype: str = "float32", fail_at: int | None = None) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__(dtype, fail_at)
        sizes = {"hidden_size": FEATURES, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.reader = LlamaModel(LlamaConfig(**sizes, vocab_size=7, initializer_range=0.5))
        self.reader.to(getattr(torch, dtype)).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        words = (x.float() * 2).round().clamp(-3, 3).long() + 3  # (B, FEATURES), numbers from 0 to 6
        return self.net(self.reader(words, use_cache=False).last_hidden_state.mean(1))


class TaskLoader(DataLoader):
    """Rows in order, or as a sampling of two tasks says: the first twelve rows, and the last four."""

    sampling: Any = None

    def use_sampling(self, sampling: Any) -> None:
        self.sampling = sampling

    def __iter__(self) -> Any:
        if self.sampling is None:
            return super().__iter__()
        tasks = task_sequence(self.sampling.chances(["a", "b"], [12, 4], 0), ROWS, seed=0, epoch=0)
        places = torch.from_numpy(12 * tasks + rows_in_tasks(tasks, [12, 4], seed=0, epoch=0))
        return iter([list(self.dataset[places[n : n + 4]]) for n in range(0, ROWS, 4)])


class PlainData(pl.LightningDataModule):
    """The rows as a data module, for the command line."""

    sampling: Any = None

    def use_sampling(self, sampling: Any) -> None:
        self.sampling = sampling

    def train_dataloader(self) -> DataLoader:
        made = loader()
        made.use_sampling(self.sampling)
        return made

    def val_dataloader(self) -> DataLoader:
        return loader()


class PlainStream(TaskStream):
    """Two tasks of the same rows, for techniques that act between tasks."""

    def __init__(self) -> None:
        super().__init__({"a": PlainData(), "b": PlainData()}, epochs=1)


def subject(technique: type[Technique]) -> type[PlainNet]:
    """The plain module that has what the technique needs."""
    kinds = {
        "logits": LogitsNet,
        "terms": TermsNet,
        "generator": SpeakingNet,
        "embedding": WordNet,
        "adapter": AdaptedNet,
        "attention": AttentionNet,
    }
    return next((kind for need, kind in kinds.items() if need in technique.traits.needs), PlainNet)


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(ROWS, FEATURES) inputs and (ROWS,) classes, the same each time."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float32)
    return x.to(dtype), torch.randint(CLASSES, (ROWS,), generator=generator)


def loader(dtype: torch.dtype = torch.float32) -> TaskLoader:
    """Four batches of four rows, in order."""
    return TaskLoader(TensorDataset(*rows(dtype)), batch_size=4)


def trainer(folder: Path, *techniques: Technique, **options: Any) -> pl.Trainer:
    """A quiet Trainer of three steps on the CPU."""
    return pl.Trainer(**{**QUIET, "max_steps": 3, "default_root_dir": folder, "callbacks": list(techniques), **options})


def fit(folder: Path, net: PlainNet, *techniques: Technique, **options: Any) -> pl.Trainer:
    """Three steps of ``net`` with the techniques."""
    made = trainer(folder, *techniques, **options)
    rows_ = loader(next(net.parameters()).dtype)
    made.fit(net, rows_, rows_)
    return made


class Steps(pl.Callback):
    """What each micro-batch and each optimizer step were: batches, rates, logged losses, gradients."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A validation clears gradients, so they are read right after the step.
        def read(*_: Any) -> None:
            self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        trainer.optimizers[0].register_step_post_hook(read)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        if len(self.losses) < len(self.gradients):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and persistent buffer."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not bit-equal, or that only one side has."""
    names = sorted(first.keys() | second.keys())
    return [n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n])]


def write_chat(folder: Path) -> Path:
    """A folder with ``model`` (a random two-layer Llama, byte tokenizer) and ``rows.jsonl`` (16 rows of uneven length)."""
    from benchmarks.random_model import write_model

    write_model(folder / "model", initializer_range=0.2)
    chats = [{"prompt": "ask" * (n % 3) + f" {n}:", "completion": " " + "ab"[n % 2] * (1 + n % 5)} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


def chat_job(chat: Path, folder: Path, needs: frozenset[str] = frozenset(), **more: Any) -> tuple[Any, Any]:
    """(SFT, SFTData) of the tiny chat model in fp32, plain SGD at a constant rate, rows in order, nothing held out.

    A technique that needs an adapter gets one.
    """
    from lightning_ft import SFT, SFTData

    class Adapted(SFT):
        def configure_model(self) -> None:
            super().configure_model()
            if not injected_layers(self.model):
                inject_lora(self.model, LoRAConfig(r=2), seed=0)

    model = {"lr": 0.5, "warmup_steps": 0, "schedule": "constant", "optimizer": torch.optim.SGD}
    model |= {"base_dtype": "float32", **more.pop("model", {})}
    rows_path = str(chat / "rows.jsonl")
    data = {
        "val_path": rows_path,
        "batch_size": 8,
        "shuffle": False,
        "cache_dir": str(folder / "cache"),
        **more.pop("data", {}),
    }
    if "tasks" in needs:
        from lightning_ft import MultiTask, MultiTaskData

        own = {key: data.pop(key) for key in ("val_path", "cache_dir")}
        tasks = {name: SFTData(rows_path, **own) for name in "ab"}
        return MultiTask(str(chat / "model"), **model), MultiTaskData(tasks, epoch_rows=ROWS, **data)
    kind = Adapted if "adapter" in needs else SFT
    return kind(str(chat / "model"), **model), SFTData(rows_path, **data)
