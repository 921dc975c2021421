"""Supervised fine-tuning with LoRA from Python: train, reload, answer a prompt, export the adapter.

python examples/sft_from_python.py [MODEL] [ROWS.jsonl]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from lightning_ft import SFT, LoRA, SFTData
from lightning_ft.cli.main import main as command_line


def main(
    base: str = "starter:smollm2-135m",
    rows: str = "starter:vader/train",
    *,
    max_steps: int = 50,
    batch_size: int = 16,
    output: str | Path = "runs/sft_from_python",
) -> list[str]:
    """Trains, reloads, exports, and returns the trained model's answer to one prompt."""
    pl.seed_everything(0)
    output = Path(output)
    keep = ModelCheckpoint(output, save_last=True)
    trainer = pl.Trainer(
        callbacks=[LoRA(r=8), keep],  # what is trained
        max_steps=max_steps,
        accumulate_grad_batches=1,  # the loss is exact whatever you put here
        use_distributed_sampler=False,  # SFTData splits rows over ranks itself, without repeating any
        logger=False,
    )
    trainer.fit(
        SFT(base, lr=5e-4, warmup_steps=min(5, max_steps)),  # the objective, over a base model
        SFTData(rows, batch_size=batch_size, val_fraction=0.05),  # what it learns from
    )

    # The checkpoint holds the factors and the recipe; the base is loaded from where it lies.
    module = lightning_ft.load(keep.last_model_path)
    prompt = "Is the sentiment of this sentence positive or negative?\nI would buy it again."
    answers: list[str] = module.generate([[{"role": "user", "content": prompt}]], max_new_tokens=8)

    # A folder that PEFT reads. `merge` instead of `export` writes a plain Hugging Face model.
    command_line(["export", "--ckpt_path", keep.last_model_path, "--output", str(output / "adapter")])
    return answers


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
