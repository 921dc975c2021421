"""The peer: TRL's GRPOTrainer with PEFT's LoRA on a CPU, at one setting of the grid in `GRID`; answers by transformers' generate.

Facts of TRL 1.16 that bear on it: a prompt is padded and read once for each of its answers, in writing and in learning; old
log-probabilities are left out where a round has one step, as here on both sides; groups without signal count in the divisor.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from benchmarks.grpo_ours import vowels  # noqa: E402
from benchmarks.measure import Spec, StepClock, emit  # noqa: E402
from benchmarks.row_files import read  # noqa: E402

# precision: fp32; bf16 = autocast over fp32 weights; bf16-base = autocast over bf16 weights (PEFT keeps its factors in fp32);
# bf16-base-plain = bf16 weights without autocast.
GRID: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16-base": {"precision": "bf16-base"},
    "bf16-base-plain": {"precision": "bf16-base-plain"},
}


def run(spec: Spec) -> dict[str, Any]:
    """Play ``spec.steps`` rounds of one step each and print the side's JSON line."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    warnings.filterwarnings("ignore")
    options = {"prompts": 4, "samples": 8, "new_tokens": 64, **spec.options}
    precision = options["precision"]
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    dtype = torch.bfloat16 if precision.startswith("bf16-base") else torch.float32
    base = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype)
    model = PeftModel.from_pretrained(base, spec.adapter, is_trainable=True)
    clock = StepClock(spec.warmup)
    writing: list[float] = []
    written: list[int] = []

    class Timed(GRPOTrainer):  # type: ignore[misc]
        """Notes how long the writing of each round takes, and how much was written."""

        def _generate(self, prompts: Any) -> Any:
            begun = time.perf_counter()
            found = super()._generate(prompts)
            writing.append(time.perf_counter() - begun)
            written.append(sum(map(len, found[1])))
            return found

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Reads the clock at the end of each step, and the reward from the trainer's own log."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not clock.seconds and not clock._last:
                clock.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
            if logs and "reward" in logs:
                clock.step(written[-1], float(logs["reward"]))

    answers = options["prompts"] * options["samples"]
    rows = [{"prompt": row["prompt"]} for row in read(spec.rows)]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=spec.device == "cpu",
            bf16=precision in ("bf16", "bf16-base"),
            num_generations=options["samples"],
            max_completion_length=options["new_tokens"],
            per_device_train_batch_size=spec.batch_size,
            gradient_accumulation_steps=-(-answers // spec.batch_size),
            max_steps=spec.steps,
            learning_rate=spec.lr,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Timed(
            model=model,
            reward_funcs=[vowels],
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)  # it prints dictionaries on stdout between the steps
        trainer.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return emit(
        "trl", clock, spec.device, trainable_parameters=trainable, options={**options, "writing_seconds": writing}
    )


if __name__ == "__main__":
    run(Spec.from_argv())
