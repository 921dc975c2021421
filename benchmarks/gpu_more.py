"""Other objectives on the small random Llama, a few steps each: does it run on the device, are losses numbers, do they fall?

Each name of `CHECKS` is a part of `benchmarks.gpu`: preferences, rollouts, distillation, continual learning, meta-learning, and
which attention kernels have a second derivative.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_fits import bare_trainer
from benchmarks.grpo_ours import vowels
from benchmarks.row_files import written

WORDS = ("red", "blue", "green", "small", "large", "round", "flat", "old", "new", "warm")


def preferences() -> list[dict[str, Any]]:
    """Eight prompts, each with two answers to rank, many times over."""
    pairs = [
        {"prompt": f"Say {n}, please.", "chosen": f" It is {n}.", "rejected": " No" + " no" * (n % 3) + "."}
        for n in range(8)
    ]
    return pairs * 64


def falling(
    device: str, steps: int, make: Callable[[Path], tuple[Any, Any, list[Any]]], **options: Any
) -> dict[str, Any]:
    """Losses of a few steps on the same rows.

    Args:
        device: where.
        steps: of the optimizer.
        make: given a folder, makes module, data and callbacks.
        options: of the trainer.

    Raises:
        AssertionError: when a loss is no number, or the last is not below the first.
    """
    import lightning.pytorch as pl
    import torch

    from benchmarks.step_watch import StepWatch

    pl.seed_everything(0, verbose=False)
    watch = StepWatch(0)
    watch.clock.tokens = _Uncounted()
    with tempfile.TemporaryDirectory() as name:
        module, data, callbacks = make(Path(name))
        bare_trainer(name, device, [*callbacks, watch], max_steps=steps, **options).fit(module, data)
    losses = watch.clock.losses
    if not all(map(math.isfinite, losses)):
        raise AssertionError(f"a loss is no number: {losses}")
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss did not fall: {losses}")
    used = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"losses": losses, "peak_memory_bytes": used, "device": str(next(module.parameters()).device)}


class _Uncounted(list):  # type: ignore[type-arg]
    """Takes the place of token counts where batches have none."""


def dpo(folder: Path, device: str, steps: int, share: bool | None = None) -> dict[str, Any]:
    """Pairs, one prompt for both answers or one for each."""
    from lightning_ft import DPO, LoRA, PreferenceData

    def make(place: Path) -> tuple[Any, Any, list[Any]]:
        pairs = written(place / "pairs.jsonl", preferences())
        data = PreferenceData(pairs, batch_size=8, shuffle=False, share_prompts=share, cache_dir=str(place / "cache"))
        return DPO(str(folder / "model"), lr=1e-3, warmup_steps=0, schedule="constant"), data, [LoRA(8)]

    return falling(device, steps, make)


def kto(folder: Path, device: str, steps: int) -> dict[str, Any]:
    """Answers that are marked good or bad."""
    from lightning_ft import KTO, LoRA, UnpairedPreferenceData

    def make(place: Path) -> tuple[Any, Any, list[Any]]:
        rows = [
            {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            for row in preferences()
            for kind in ("chosen", "rejected")
        ]
        path = written(place / "marked.jsonl", rows)
        data = UnpairedPreferenceData(path, batch_size=16, shuffle=False, cache_dir=str(place / "cache"))
        return KTO(str(folder / "model"), lr=1e-3, warmup_steps=0, schedule="constant"), data, [LoRA(8)]

    return falling(device, steps, make)


def reward_model(folder: Path, device: str, steps: int) -> dict[str, Any]:
    """Which answer is preferred, by a new head."""
    from lightning_ft import LoRA, PreferenceData, RewardModel

    def make(place: Path) -> tuple[Any, Any, list[Any]]:
        pairs = written(place / "pairs.jsonl", preferences())
        data = PreferenceData(pairs, batch_size=8, shuffle=False, cache_dir=str(place / "cache"))
        module = RewardModel(str(folder / "model"), lr=1e-3, head_lr=1e-3, warmup_steps=0, schedule="constant")
        return module, data, [LoRA(8)]

    return falling(device, steps, make)


def distillation(folder: Path, device: str, steps: int, **options: Any) -> dict[str, Any]:
    """Soft targets of a frozen teacher beside the rows' own."""
    from benchmarks.random_model import write_model
    from lightning_ft import SFT, Distillation, LoRA, SFTData

    def make(place: Path) -> tuple[Any, Any, list[Any]]:
        sizes = json.loads((folder / "model" / "config.json").read_text())
        kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        teacher = write_model(place / "teacher", seed=1, **{k: sizes[k] for k in kept}, vocab_size=sizes["vocab_size"])
        data = SFTData(
            _same(folder, place), batch_size=4, max_length=None, shuffle=False, cache_dir=str(place / "cache")
        )
        module = SFT(str(folder / "model"), lr=1e-3, warmup_steps=0, schedule="constant")
        return module, data, [LoRA(8), Distillation(str(teacher), **options)]

    return falling(device, steps, make)


def _same(folder: Path, place: Path) -> str:
    """Four rows many times over."""
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "same.jsonl").write_text("".join(lines[:4] * 64), encoding="utf-8")
    return str(place / "same.jsonl")


def rollouts(folder: Path, device: str, steps: int, kind: str) -> dict[str, Any]:
    """Two rounds: answers are written, rewarded and learned from."""
    import lightning.pytorch as pl

    from lightning_ft import GRPO, PPO, LoRA, PromptData

    class Watch(pl.Callback):
        """Keeps what was logged of each round."""

        rounds: list[dict[str, float]] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.rounds.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    pl.seed_everything(0, verbose=False)
    watch = Watch()
    common: dict[str, Any] = {
        "rewards": {"vowels": vowels},
        "max_new_tokens": 16,
        "lr": 1e-3,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    with tempfile.TemporaryDirectory() as name:
        prompts = written(Path(name) / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(64)])
        base = str(folder / "model")
        module: Any = PPO(base, value_lr=1e-3, **common) if kind == "ppo" else GRPO(base, samples=4, **common)
        data = PromptData(prompts, prompts=4, batch_size=4, draw_batch=4, cache_dir=str(Path(name) / "cache"))
        bare_trainer(name, device, [LoRA(8), watch], max_epochs=2).fit(module, data)
    told = [one[name] for one in watch.rounds for name in ("train/loss", "train/reward")]
    if len(watch.rounds) != 2 or not all(map(math.isfinite, told)):
        raise AssertionError(f"of two rounds, a number is missing: {watch.rounds}")
    return {"last": watch.rounds[-1], "device": str(module.device)}


def stream(folder: Path, device: str, steps: int, kind: str) -> dict[str, Any]:
    """Two tasks, one after the other, with a technique that keeps the first."""
    import lightning.pytorch as pl

    import lightning_ft as ft

    makers: dict[str, Callable[[], Any]] = {
        "EWC": lambda: ft.EWC(10.0),
        "SI": lambda: ft.SynapticIntelligence(1.0),
        "MAS": lambda: ft.MAS(1.0),
        "LwF": lambda: ft.LwF(1.0),
        "Replay": lambda: ft.Replay(16),
        "der++": lambda: ft.Replay(16, mode="der++", alpha=0.1),
        "AGEM": lambda: ft.AGEM(16),
        "OrthogonalLoRA": lambda: ft.OrthogonalLoRA(8),
    }
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tasks = {}
        for task, word in (("first", "one"), ("second", "two")):
            rows = [{"prompt": f"Say {n}.", "completion": f" {word} {n}"} for n in range(24)]
            path = written(place / f"{task}.jsonl", rows)
            tasks[task] = ft.SFTData(path, val_path=path, batch_size=8, max_length=None, cache_dir=str(place / "cache"))
        module = ft.SFT(str(folder / "model"), lr=1e-3, warmup_steps=0, schedule="constant")
        course = ft.TaskStream(tasks, epochs=1, metric="val/loss")
        made = makers[kind]()
        parts = [made] if isinstance(made, ft.OrthogonalLoRA) else [ft.LoRA(8), made]
        bare_trainer(name, device, parts, limit_val_batches=None).fit(module, course)
        matrix, start = course.scores.matrix()
    flat = [value for row in [*matrix, start] for value in row if value is not None]
    if not flat or not all(map(math.isfinite, flat)):
        raise AssertionError(f"a score is no number: {matrix}, {start}")
    return {"matrix": matrix, "start": start, "device": str(module.device)}


def several_tasks(folder: Path, device: str, steps: int, kind: str) -> dict[str, Any]:
    """Classes, numbers and the next token at once, with what weighs their losses or combines their gradients."""
    import lightning_ft as ft

    makers: dict[str, Callable[[], list[Any]]] = {
        "plain": list,
        "pcgrad": lambda: [ft.GradientSurgery("pcgrad")],
        "nash": lambda: [ft.GradientSurgery("nash")],
        **{name: lambda name=name: [ft.LossBalancing(name)] for name in ("uncertainty", "dwa", "gradnorm", "famo")},
    }

    def make(place: Path) -> tuple[Any, Any, list[Any]]:
        texts = [{"text": f"{word} thing {n}", "label": word} for n in range(40) for word in WORDS[:3]]
        rated = [{"text": f"{word} thing {n}", "label": len(word) / 4} for n in range(40) for word in WORDS[:3]]
        kept = {"cache_dir": str(place / "cache")}
        tasks = {
            "class": ft.ClassificationData(written(place / "texts.jsonl", texts), **kept),
            "number": ft.ClassificationData(written(place / "rated.jsonl", rated), task="regression", **kept),
            "words": ft.SFTData(_same(folder, place), max_length=None, **kept),
        }
        data = ft.MultiTaskData(tasks, batch_size=12)
        module = ft.MultiTask(
            str(folder / "model"), lr=1e-3, head_lr=1e-2, warmup_steps=0, schedule="constant", weigh="tasks"
        )
        return module, data, [ft.LoRA(8), *makers[kind]()]

    return falling(device, 3 * steps, make)


def meta(folder: Path, device: str, steps: int, kind: str) -> dict[str, Any]:
    """Episodes of three classes of texts."""
    import lightning.pytorch as pl

    from lightning_ft import MAML, EpisodeData, LoRA, ProtoNet, Reptile

    base = str(folder / "model")
    makers: dict[str, Callable[[], Any]] = {
        "MAML": lambda: MAML(base, order=2, steps=2, inner_lr=0.01, lr=1e-4),
        "FOMAML": lambda: MAML(base, order=1, steps=2, inner_lr=0.01, lr=1e-4),
        "MAML + LoRA": lambda: MAML(base, inner="adapter_and_head", order=2, steps=2, inner_lr=0.1, lr=1e-3),
        "ANIL": lambda: MAML(base, inner="head", steps=3, inner_lr=0.1, lr=1e-4),
        "Reptile": lambda: Reptile(base, steps=2, inner_lr=1e-3, lr=0.5),
        "ProtoNet": lambda: ProtoNet(base, lr=1e-4),
    }
    pl.seed_everything(0, verbose=False)
    losses: list[float] = []

    class Watch(pl.Callback):
        """Keeps the losses."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    with tempfile.TemporaryDirectory() as name:
        rows = [{"text": f"{word} thing {n}", "label": word} for word in WORDS for n in range(8)]
        path = written(Path(name) / "texts.jsonl", rows)
        data = EpisodeData(
            path, way=3, shot=2, query=2, episodes=2 * steps, batch_size=2, seed=0, cache_dir=str(Path(name) / "cache")
        )
        module = makers[kind]()
        parts = [LoRA(8)] if "LoRA" in kind else []
        bare_trainer(name, device, [*parts, Watch()], max_epochs=1).fit(module, data)
    if not losses or not all(map(math.isfinite, losses)):
        raise AssertionError(f"a loss is no number: {losses}")
    return {"losses_of_episodes": losses, "device": str(module.device)}


def double_backward(folder: Path, device: str, steps: int) -> dict[str, Any]:
    """Which of torch's attention kernels can be differentiated twice, in fp32 and bf16; the plain one must."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    found: dict[str, Any] = {"torch": torch.__version__}
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in (
            SDPBackend.MATH,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
        ):
            x = torch.randn(1, 4, 64, 64, device=device, dtype=dtype, requires_grad=True)
            try:
                with sdpa_kernel([kernel]):
                    out = scaled_dot_product_attention(x, x, x, is_causal=True).float().square().sum()
                    (once,) = torch.autograd.grad(out, x, create_graph=True)
                    (twice,) = torch.autograd.grad(once.float().square().sum(), x)
                said = "yes" if bool(twice.isfinite().all()) and float(twice.float().abs().sum()) > 0 else "no numbers"
            except RuntimeError as error:
                said = str(error).splitlines()[0][:160]
            found[f"{kernel.name}, {str(dtype).removeprefix('torch.')}"] = said
    if found["MATH, float32"] != "yes":
        raise AssertionError(f"plain attention has no second derivative: {found}")
    return found


def _with(part: Callable[..., dict[str, Any]], *words: Any, **options: Any) -> Callable[..., dict[str, Any]]:
    return lambda folder, device, steps: part(folder, device, steps, *words, **options)


STREAMS = ("EWC", "SI", "MAS", "LwF", "Replay", "der++", "AGEM", "OrthogonalLoRA")

CHECKS: dict[str, Callable[[Path, str, int], dict[str, Any]]] = {
    "DPO": _with(dpo),
    "DPO, prompts apart": _with(dpo, share=False),
    "KTO": kto,
    "reward model": reward_model,
    "GRPO": _with(rollouts, "grpo"),
    "PPO": _with(rollouts, "ppo"),
    "distillation": distillation,
    **{
        f"tasks, {kind}": _with(several_tasks, kind)
        for kind in ("plain", "pcgrad", "nash", "uncertainty", "dwa", "gradnorm", "famo")
    },
    "distillation, hidden states": _with(distillation, hidden=0.5),
    **{f"stream + {kind}": _with(stream, kind) for kind in STREAMS},
    **{
        f"episodes, {kind}": _with(meta, kind)
        for kind in ("MAML", "FOMAML", "MAML + LoRA", "ANIL", "Reptile", "ProtoNet")
    },
    "double backward": double_backward,
}
