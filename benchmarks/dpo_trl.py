"""The peer: TRL's DPOTrainer with PEFT's LoRA on a CPU, at one setting of the grid in `GRID`.

Facts of TRL 1.16 that bear on the grid: rows are padded (``padding_free`` is switched off with a warning); chosen and rejected are
two rows with a prompt each, of one batch; log-probabilities come from a fused head that never builds all logits; with an adapter
that starts from a folder the reference is a frozen copy of it in the same model. Dropout is 0 on both sides.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from benchmarks.measure import Spec, StepClock, emit  # noqa: E402
from benchmarks.row_files import read  # noqa: E402

# precision: fp32; bf16 = autocast over fp32 weights; bf16-base = autocast over bf16 weights (PEFT keeps its factors in fp32);
# bf16-base-plain = bf16 weights without autocast; checkpointed: activations computed again in backward, TRL's default, which
# takes the least memory.
GRID: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16-base": {"precision": "bf16-base"},
    "bf16-base-plain": {"precision": "bf16-base-plain"},
    "bf16-base-plain-eager": {"precision": "bf16-base-plain", "attention": "eager"},
    "bf16-base-plain-checkpointed": {"precision": "bf16-base-plain", "checkpointing": True},
}


def run(spec: Spec) -> dict[str, Any]:
    """Train for ``spec.steps`` steps and print the side's JSON line."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    warnings.filterwarnings("ignore")
    options = {"attention": "sdpa", "checkpointing": False, "tokens": [], **spec.options}
    precision = options["precision"]
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    dtype = torch.bfloat16 if precision.startswith("bf16-base") else torch.float32
    base = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype, attn_implementation=options["attention"])
    model = PeftModel.from_pretrained(base, spec.adapter, is_trainable=True)
    clock = StepClock(spec.warmup)

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Reads the clock at the end of each step, and the loss from the trainer's own log."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not clock.seconds and not clock._last:
                clock.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
            if logs and "loss" in logs:
                done, batch = len(clock.seconds), spec.batch_size
                rows = [row % len(options["tokens"]) for row in range(done * batch, (done + 1) * batch)]
                clock.step(sum(options["tokens"][row] for row in rows), float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            use_cpu=spec.device == "cpu",
            bf16=precision in ("bf16", "bf16-base"),
            beta=0.1,
            per_device_train_batch_size=spec.batch_size,
            max_length=None,
            train_sampling_strategy="sequential",
            max_steps=spec.steps,
            learning_rate=spec.lr,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            gradient_accumulation_steps=1,
            gradient_checkpointing=options["checkpointing"],
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(read(spec.rows)),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)  # it prints dictionaries on stdout between the steps
        trainer.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    del options["tokens"]
    return emit("trl", clock, spec.device, trainable_parameters=trainable, options=options)


if __name__ == "__main__":
    run(Spec.from_argv())
