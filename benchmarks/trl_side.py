"""The peer: TRL's SFTTrainer with PEFT's LoRA on a CPU, at one setting of the grid in `GRID`.

Facts of TRL 1.16 that bear on the grid: ``loss_type="chunked_nll"`` is an alias of the default ``"nll"``, whose
fused head never builds all logits; without a GPU that head scores every position, padding and prompt included.
Best-fit packing always runs padding-free: all packs of a batch become one row whose dense mask transformers builds
from the positions, so one pack a step is its best case.
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
from benchmarks.rows import encode  # noqa: E402

# precision: fp32; bf16 = autocast over fp32 weights; bf16-base = autocast over bf16 weights (PEFT keeps its factors
# in fp32); bf16-base-plain = bf16 weights without autocast. layout: rows in order, rows grouped by length, packed.
GRID: dict[str, dict[str, Any]] = {
    "fp32-padded": {"precision": "fp32", "layout": "padded"},
    "bf16-padded": {"precision": "bf16", "layout": "padded"},
    "bf16-base-padded": {"precision": "bf16-base", "layout": "padded"},
    "bf16-base-plain-padded": {"precision": "bf16-base-plain", "layout": "padded"},
    "bf16-grouped": {"precision": "bf16", "layout": "grouped"},
    "bf16-base-grouped": {"precision": "bf16-base", "layout": "grouped"},
    "bf16-base-plain-grouped": {"precision": "bf16-base-plain", "layout": "grouped"},
    "bf16-packed-sdpa": {"precision": "bf16", "layout": "packed"},
    "bf16-base-packed-sdpa": {"precision": "bf16-base", "layout": "packed"},
    "bf16-base-plain-packed-sdpa": {"precision": "bf16-base-plain", "layout": "packed"},
    "bf16-base-plain-packed-eager": {"precision": "bf16-base-plain", "layout": "packed", "attention": "eager"},
}
# Less memory for more time on both sides; shown beside the main comparison, never picked as its best.
CHECKPOINTED = {"precision": "bf16-base", "layout": "padded", "checkpointing": True}


def run(spec: Spec) -> dict[str, Any]:
    """Train for ``spec.steps`` steps and print the side's JSON line."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    warnings.filterwarnings("ignore")
    options = {"attention": "sdpa", "checkpointing": False, "loss_type": "nll", **spec.options}
    precision, layout = options["precision"], options["layout"]
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    encoded = [encode(tokenizer, item) for item in read(spec.rows)]
    # Token ids and labels are handed over ready: its own tokenisation is not timed, and all sides score the same.
    data = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in encoded])
    lengths = [len(ids) for ids, _ in encoded]
    packed = layout == "packed"
    capacity = max(max(lengths), round(spec.batch_size * sum(lengths) / len(lengths)))
    dtype = torch.bfloat16 if precision.startswith("bf16-base") else torch.float32
    base = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype, attn_implementation=options["attention"])
    model = PeftModel.from_pretrained(base, spec.adapter, is_trainable=True)
    clock = StepClock(spec.warmup)

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Reads the clock at the end of each step, the loss and the token count from the trainer's own log."""

        seen = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not clock.seconds and not clock._last:
                clock.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
            if logs and "loss" in logs:
                clock.step(int(logs["num_tokens"] - self.seen), float(logs["loss"]))
                self.seen = logs["num_tokens"]

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            use_cpu=spec.device == "cpu",
            bf16=precision in ("bf16", "bf16-base"),
            loss_type=options["loss_type"],
            per_device_train_batch_size=1 if packed else spec.batch_size,
            packing=packed,
            packing_strategy="bfd",
            max_length=capacity if packed else None,
            train_sampling_strategy="group_by_length" if layout == "grouped" else "sequential",
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
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
        )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)  # it prints dictionaries on stdout between the steps
        trainer.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return emit("trl", clock, spec.device, trainable_parameters=trainable, options=options)


if __name__ == "__main__":
    run(Spec.from_argv())
