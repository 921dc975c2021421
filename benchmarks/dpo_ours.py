"""This library's DPO, used the Python way, at its defaults for a CPU: packed rows, one prompt for both answers, LoRA."""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from benchmarks.measure import Spec, StepClock, emit  # noqa: E402
from benchmarks.silent import silent_trainer  # noqa: E402


def run(spec: Spec) -> dict[str, Any]:
    """Train for ``spec.steps`` steps and print the side's JSON line."""
    from lightning import Callback, LightningModule, Trainer, seed_everything

    from lightning_ft import DPO, LoRA, PreferenceData

    warnings.filterwarnings("ignore")
    options = {"share_prompts": None, "packing": None, "tokens": [], "checkpointing": False, **spec.options}
    clock = StepClock(spec.warmup)

    class Watch(Callback):
        """Reads the clock at the end of each step; the loss after it, so that reading is part of the next step."""

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            clock.start()

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            rows = batch.rows[::2].tolist()
            clock.step(sum(options["tokens"][row] for row in rows), float(loss))

    seed_everything(0, verbose=False)
    module = DPO(
        spec.model,
        beta=0.1,
        lr=spec.lr,
        warmup_steps=0,
        schedule="constant",
        gradient_checkpointing=options["checkpointing"],
    )
    with tempfile.TemporaryDirectory() as folder:
        data = PreferenceData(
            path=spec.rows,
            batch_size=spec.batch_size,
            packing=options["packing"],
            share_prompts=options["share_prompts"],
            shuffle=False,
            max_length=None,
            cache_dir=folder,
        )
        trainer = silent_trainer(
            folder,
            [LoRA(r=spec.r, alpha=spec.alpha, init_from=spec.adapter), Watch()],
            accelerator="gpu" if spec.device == "cuda" else "cpu",
            devices=1,
            max_steps=spec.steps,
            max_epochs=-1,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    del options["tokens"]
    return emit("ours", clock, spec.device, trainable_parameters=trainable, options=options)


if __name__ == "__main__":
    run(Spec.from_argv())
