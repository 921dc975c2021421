"""This library's GRPO, used the Python way, at its defaults for a CPU: packed answers, one prompt for a group, LoRA."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from benchmarks.measure import Spec, StepClock, emit  # noqa: E402
from benchmarks.silent import silent_trainer  # noqa: E402


def vowels(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs: the share of vowels; of texts, or of messages as TRL gives them."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts]


def run(spec: Spec) -> dict[str, Any]:
    """Play ``spec.steps`` rounds of one step each and print the side's JSON line."""
    from lightning import Callback, LightningModule, Trainer, seed_everything

    from lightning_ft import GRPO, LoRA, PromptData

    warnings.filterwarnings("ignore")
    options = {"prompts": 4, "samples": 8, "new_tokens": 64, "share_prompts": None, **spec.options}
    clock = StepClock(spec.warmup)
    writing: list[float] = []

    class Timed(GRPO):
        """Notes how long the writing of each round takes."""

        def roll_out(self, *args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            round = super().roll_out(*args, **kwargs)
            writing.append(time.perf_counter() - begun)
            return round

    class Watch(Callback):
        """Reads the clock at the end of each round."""

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            clock.start()

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            round = trainer.datamodule.round  # type: ignore[attr-defined]
            clock.step(int(round.lengths.sum()), round.facts["reward"])

    seed_everything(0, verbose=False)
    module = Timed(
        spec.model,
        rewards={"vowels": vowels},  # type: ignore[dict-item]
        samples=options["samples"],
        max_new_tokens=options["new_tokens"],
        drop_without_signal=False,
        lr=spec.lr,
        warmup_steps=0,
        schedule="constant",
    )
    answers = options["prompts"] * options["samples"]
    with tempfile.TemporaryDirectory() as folder:
        data = PromptData(
            path=spec.rows,
            prompts=options["prompts"],
            batch_size=spec.batch_size,
            draw_batch=options["prompts"],
            share_prompts=options["share_prompts"],
            shuffle=False,
            max_length=None,
            log_answers=0,
            cache_dir=folder,
        )
        trainer = silent_trainer(
            folder,
            [LoRA(r=spec.r, alpha=spec.alpha, init_from=spec.adapter), Watch()],
            accelerator="gpu" if spec.device == "cuda" else "cpu",
            devices=1,
            max_epochs=spec.steps,
            accumulate_grad_batches=-(-answers // spec.batch_size),
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=data)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return emit(
        "ours", clock, spec.device, trainable_parameters=trainable, options={**options, "writing_seconds": writing}
    )


if __name__ == "__main__":
    run(Spec.from_argv())
