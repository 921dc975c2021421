"""What cannot work together, refused at setup with the reason and the fix; docs and matrix tests read the same rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor, nn

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.checkpoints import kept_keys
from lightning_ft.engine.episodes import MetaBatch
from lightning_ft.engine.traits import TERMS_APART, Cannot
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.dtype import cast_beside
from lightning_ft.nn.packed import has_packed_weights
from lightning_ft.nn.registry import injected_layers

if TYPE_CHECKING:
    from lightning_ft.engine.technique import Technique


@dataclass(frozen=True)
class Situation:
    """Where a run takes place, in the words that `Cannot.meets` and `RULES` use.

    Attributes:
        words: e.g. ``{"ddp", "several_ranks", "manual_optimization"}``; `WORDS` has all of them, and how a message says each.
    """

    words: frozenset[str]


@dataclass(frozen=True)
class Rule:
    """All of ``words`` together cannot work, whatever the techniques that have one of ``edits`` (empty: any technique)."""

    words: frozenset[str]
    edits: frozenset[str]
    why: str
    fix: str


WORDS = {
    "deepspeed": "DeepSpeed",
    "fsdp1": "FSDP1 (FSDPStrategy)",
    "fsdp2": "FSDP2",
    "ddp": "DDP",
    "spawn": "a strategy that spawns or forks its processes",
    "tensor_parallel": "tensor parallelism",
    "stock_fsdp2_files": "ModelParallelStrategy with distributed checkpoints",
    "fp16": "fp16 gradient scaling",
    "manual_optimization": "manual optimization",
    "dataloader_iter": "a training_step that takes dataloader_iter",
    "several_ranks": "several ranks",
    "weight_averaging": "Lightning's weight averaging",
    "quantised": "a quantised base",
    "mismatched_answers": "a loss over mismatched answers (KTO)",
    "episodes": "learning from episodes (MAML, Reptile, ProtoNet)",
    "several_tasks": "MultiTask",
    "rollouts": "rounds of answers that the model writes itself (GRPO, PPO, OnlineDPO, OnPolicyDistillation)",
    "bitsandbytes_precision": "Lightning's BitsandbytesPrecision",
    "time_saves_in_window": "ModelCheckpoint.train_time_interval with accumulation on several ranks",
}
"""Every word of a situation, and how a message says it."""

_FSDP2 = "FSDP2Strategy (--trainer.strategy fsdp2)"

RULES = (
    Rule(frozenset({"deepspeed"}), frozenset(), "it owns gradients, weights and files", f"use ddp or {_FSDP2}"),
    Rule(
        frozenset({"fsdp1"}),
        frozenset(),
        "it cuts flat vectors of many weights, whose pieces lack the shapes that techniques and checkpoints go by",
        f"use {_FSDP2}",
    ),
    Rule(
        frozenset({"spawn"}),
        frozenset(),
        "the parent process would never get the trained parts back",
        'use strategy="ddp", which starts fresh processes',
    ),
    Rule(
        frozenset({"tensor_parallel"}),
        frozenset(),
        "injected layers are not split along it",
        "set tensor_parallel_size to 1",
    ),
    Rule(
        frozenset({"stock_fsdp2_files"}),
        frozenset(),
        "it could not resume from a file that holds trained parts only",
        "use lightning_ft.FSDP2Strategy (--trainer.strategy fsdp2), or save_distributed_checkpoint=False",
    ),
    Rule(
        frozenset({"weight_averaging"}),
        frozenset(),
        "it copies the whole model, frozen weights too, into memory and into every checkpoint",
        "use lightning_ft.WeightEMA, which averages what is trained (--ema.decay 0.999)",
    ),
    Rule(
        frozenset({"fsdp2", "quantised"}),
        frozenset(),
        "FSDP2 shards packed weights without what unpacks them, and trains on garbage without an error",
        "use ddp, or FSDP2 without quantize",
    ),
    Rule(
        frozenset({"episodes", "fsdp2"}),
        frozenset(),
        "a task's weights would have to be gathered and kept whole at every inner step",
        "use ddp",
    ),
    Rule(
        frozenset({"episodes", "fp16"}),
        frozenset(),
        "the gradients of inner steps never pass the scaler",
        "use bf16-mixed or 32-true",
    ),
    Rule(
        frozenset({"bitsandbytes_precision"}),
        frozenset(),
        "it packs layers after techniques have chosen what trains: chosen weights would be packed, frozen biases trained",
        "leave the plugin out and set quantize (--model.quantize nf4), or call quantize_ in your configure_model",
    ),
    Rule(
        frozenset({"manual_optimization"}),
        frozenset({"loss", "gradients"}),
        "a hand-written backward does not say which step a term or gradient belongs to",
        "use automatic optimization",
    ),
    Rule(
        frozenset({"dataloader_iter"}),
        frozenset({"loss"}),
        "the step draws its own batches, so terms cannot see them",
        "take (batch, batch_idx)",
    ),
    Rule(
        frozenset({"time_saves_in_window"}),
        frozenset(),
        "a file saved within a window cannot hold each rank's partial gradients",
        "use every_n_train_steps",
    ),
)


def situation(trainer: pl.Trainer, module: pl.LightningModule) -> Situation:
    """Reads the words off a Trainer and a module."""
    strategy = trainer.strategy
    words = set()
    if isinstance(strategy, DeepSpeedStrategy):
        words.add("deepspeed")
    if isinstance(strategy, FSDPStrategy):
        words.add("fsdp1")
    if isinstance(strategy, DDPStrategy):
        words.add("ddp")
        if strategy._start_method != "popen":
            words.add("spawn")
    if isinstance(strategy, ModelParallelStrategy):
        words.add("fsdp2")
        if strategy._tensor_parallel_size not in (1, "auto"):
            words.add("tensor_parallel")
        if strategy._save_distributed_checkpoint and type(strategy) is ModelParallelStrategy:
            words.add("stock_fsdp2_files")
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(c, (WeightAveraging, StochasticWeightAveraging)) for c in callbacks):
        words.add("weight_averaging")
    precision = strategy.precision_plugin
    if isinstance(precision, MixedPrecision) and precision.scaler is not None:
        words.add("fp16")
    if isinstance(precision, BitsandbytesPrecision):
        words.add("bitsandbytes_precision")
    if isinstance(getattr(module, "quantize", None), str) or has_packed_weights(module):
        words.add("quantised")
    if getattr(module, "learns_from_episodes", False):
        words.add("episodes")
    if getattr(module, "writes_its_rows", False):
        words.add("rollouts")
    if getattr(module, "wants_mismatched", False):
        words.add("mismatched_answers")
    if getattr(module, "trains_several_tasks", False):
        words.add("several_tasks")
    if not module.automatic_optimization:
        words.add("manual_optimization")
    if trainer.world_size > 1:
        words.add("several_ranks")
        timed = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c._train_time_interval]
        if timed and trainer.accumulate_grad_batches > 1:
            words.add("time_saves_in_window")
    code = getattr(getattr(module.training_step, "__func__", module.training_step), "__code__", None)
    if code is not None and "dataloader_iter" in code.co_varnames[: code.co_argcount]:
        words.add("dataloader_iter")
    return Situation(frozenset(words))


def check(techniques: Iterable[Technique], where: Situation) -> None:
    """Refuses the first combination that cannot work.

    Raises:
        Refusal: ``EWC cannot work with DeepSpeed, because it owns gradients ...; use ddp or FSDP2Strategy.``
    """
    chosen = list(techniques)
    slots = {technique.traits.slot for technique in chosen}
    for rule in RULES:
        if not rule.words <= where.words:
            continue
        hit = [t for t in chosen if not rule.edits or rule.edits & t.traits.edits]
        if hit or not rule.edits:
            subject = type(hit[0]).__name__ if hit else "lightning_ft"
            said = " and ".join(WORDS[word] for word in sorted(rule.words))
            raise Refusal(f"{subject} cannot work with {said}, because {rule.why}; {rule.fix}.")
    for technique in chosen:
        for cannot in technique.traits.cannot:
            if cannot.meets in where.words or cannot.meets in slots:
                said = WORDS.get(cannot.meets, f"the {cannot.meets} technique")
                raise Refusal(
                    f"{type(technique).__name__} cannot work with {said}, because {cannot.why}; {cannot.fix}."
                )
    names: dict[str, Any] = {}
    for technique in chosen:
        if technique.traits.alone and sum(type(other) is type(technique) for other in chosen) > 1:
            raise Refusal(f"A run can hold only one {type(technique).__name__}; leave one of them out.")
        if technique.state_key in names:
            raise Refusal(
                f"Two {type(technique).__name__} callbacks are both named {technique.instance_name!r}; "
                "give one of them another name."
            )
        names[technique.state_key] = technique


def check_packed_for_fsdp2(module: nn.Module) -> None:
    """Refuses packed weights under FSDP2, wherever they come from.

    Raises:
        Refusal: ``lightning_ft cannot work with FSDP2 and a quantised base, because ...``
    """
    if has_packed_weights(module):
        check([], Situation(frozenset({"fsdp2", "quantised"})))


def check_surgery(where: Situation) -> None:
    """Refuses gradient surgery where the terms' gradients cannot be had one by one, whichever technique asks for it.

    Raises:
        Refusal: ``Gradient surgery cannot work with FSDP2, because ...; use ddp.``
    """
    by_hand = Cannot("manual_optimization", "it takes the place of backward", "use automatic optimization")
    for cannot in (*TERMS_APART, by_hand):
        if cannot.meets in where.words:
            raise Refusal(
                f"Gradient surgery cannot work with {WORDS[cannot.meets]}, because {cannot.why}; {cannot.fix}."
            )


def table(techniques: Iterable[type[Technique]]) -> list[tuple[str, str, str, str]]:
    """Every refusal as (who, with what, why, what to do), for the docs."""
    rows = []
    for rule in RULES:
        who = "any technique" if not rule.edits else "techniques that edit the " + " or ".join(sorted(rule.edits))
        rows.append((who, " and ".join(WORDS[w] for w in sorted(rule.words)), rule.why, rule.fix))
    for technique in techniques:
        for cannot in technique.traits.cannot:
            said = WORDS.get(cannot.meets, f"the {cannot.meets} technique")
            rows.append((technique.__name__, said, cannot.why, cannot.fix))
    return rows


def keep_factors_in_fp32(strategy: Strategy, on_leave: Callable[[Callable[[], None]], None]) -> None:
    """Under ``bf16-true`` Lightning casts every parameter, injected factors too; for those the cast is undone.

    A rate of 1e-4 on a bf16 factor changes nothing (its step is 2^-8 of the value), so training would silently stall.
    Modules of ours keep whatever is trainable in fp32 unless ``dtype: pure_bfloat16`` asks otherwise, and a net that they were
    given as it is, since its layers would meet rows of another dtype. Nor are the numbers in a batch of ours rounded:
    log-probabilities of an earlier policy, say, of which ratios are made.
    """
    precision = strategy.precision_plugin
    if not isinstance(precision, HalfPrecision):
        return
    original = precision.convert_module

    def convert_module(module: nn.Module) -> nn.Module:
        inner = getattr(strategy, "lightning_module", None) or module
        kept: list[tuple[nn.Parameter, Tensor]] = []
        ours = hasattr(inner, "lightning_ft_module")
        if ours and getattr(inner, "net", None) is not None:
            return module
        for layer in injected_layers(module).values():
            kept += [(p, p.data) for p in layer.injected_parameters().values()]
        if ours:
            named = kept_keys(inner)  # what trains now or later
            kept += [(p, p.data) for n, p in inner.named_parameters() if n in named]
        converted = original(module)
        for parameter, data in kept:
            parameter.data = data
        # Under FSDP2 layers have been given their classes when it sharded them.
        sharded = isinstance(strategy, ModelParallelStrategy)
        if ours and not sharded and isinstance(model := getattr(inner, "model", None), nn.Module):
            cast_beside(model, precision._desired_input_dtype)
        return converted

    convert = precision.convert_input

    def convert_input(data: Any) -> Any:
        return data if isinstance(data, (Batch, MetaBatch)) else convert(data)

    for name, wrapper in (("convert_module", convert_module), ("convert_input", convert_input)):
        object.__setattr__(precision, name, wrapper)
        on_leave(lambda name=name: precision.__dict__.pop(name, None))  # type: ignore[misc]
