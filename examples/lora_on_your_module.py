"""LoRA on a LightningModule of your own, which knows nothing of lightning_ft and is not changed.

    python examples/lora_on_your_module.py [FOLDER_OR_HUGGING_FACE_ID]

The module holds a Hugging Face model, its own loss, optimizer and data. One callback freezes that model, puts factors
beside its attention and keeps everything else as you wrote it; the checkpoint holds the factors alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_ft
from lightning_ft import LoRA

LINES = [f"The capital of {land} is {city}." for land, city in (("France", "Paris"), ("Italy", "Rome"))] * 8


class MyModule(pl.LightningModule):
    """As you may have written it long ago: plain Lightning, plain transformers."""

    def __init__(self, folder: str, lr: float = 1e-3) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.language_model.train()  # transformers returns models in eval mode and Lightning leaves them so
        self.lr = lr

    def training_step(self, batch: list[str], batch_idx: int) -> Tensor:
        """Your loss, whatever it is: here that of transformers, over all tokens."""
        encoded = self.tokenizer(batch, return_tensors="pt", padding=True).to(self.device)
        labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
        loss: Tensor = self.language_model(**encoded, labels=labels).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Called after the factors are in place, so what still requires a gradient is what to train."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def main(base: str, *, max_steps: int = 8, output: str | Path = "runs/lora_on_your_module") -> dict[str, float]:
    """Trains and returns the first and last loss, and the share of parameters that the checkpoint holds."""
    module = MyModule(base)
    if module.tokenizer.pad_token is None:
        module.tokenizer.pad_token = module.tokenizer.eos_token
    losses = Losses()
    keep = ModelCheckpoint(output, save_last=True)
    trainer = pl.Trainer(
        # "*" also crosses dots, so the pattern needs no knowledge of where your module keeps its model.
        callbacks=[LoRA(r=8, target=["*.q_proj", "*.v_proj"]), losses, keep],
        max_steps=max_steps,
        accelerator="auto",
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(LINES, batch_size=4, shuffle=True, num_workers=0))

    # The file holds factors only. Lightning's load_from_checkpoint could not rebuild them; this can.
    again = lightning_ft.load(keep.last_model_path, module=MyModule(base))
    saved = torch.load(keep.last_model_path, weights_only=True)["state_dict"]
    share = sum(value.numel() for value in saved.values()) / sum(p.numel() for p in again.parameters())
    return {"first_loss": losses.values[0], "last_loss": losses.values[-1], "saved_share": share}


class Losses(pl.Callback):
    """Remembers the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """After each step."""
        self.values.append(float(trainer.callback_metrics["loss"]))


def starter_or(argument: list[str]) -> str:
    """The model named on the command line, else the starter model, fetched into the cache where missing."""
    from lightning_ft.models import starter

    return argument[0] if argument else str(starter.path("smollm2-135m"))


if __name__ == "__main__":
    print(main(starter_or(sys.argv[1:])))
