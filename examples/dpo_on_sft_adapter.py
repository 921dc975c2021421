"""DPO on top of an SFT adapter: teach a model to answer, then which answers are better, and ask how far it went.

python examples/dpo_on_sft_adapter.py [MODEL] [CHATS.jsonl] [PAIRS.jsonl]

The second run goes on with the factors of the first, and compares with the model as the first one left it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl

from lightning_ft import DPO, SFT, ExportAdapter, LoRA, PreferenceData, SFTData


def main(
    base: str = "starter:smollm2-135m",
    chats: str = "starter:vader/train",
    pairs: str = "pairs.jsonl",
    *,
    max_steps: int = 50,
    batch_size: int = 8,
    output: str | Path = "runs/dpo_on_sft_adapter",
) -> dict[str, float]:
    """Trains twice; returns the loss of DPO's first step and what was measured after its last."""
    pl.seed_everything(0)
    output = Path(output)

    def trainer(*callbacks: pl.Callback) -> pl.Trainer:
        return pl.Trainer(
            callbacks=list(callbacks),
            max_steps=max_steps,
            use_distributed_sampler=False,  # the data split rows over ranks themselves
            logger=False,
            enable_checkpointing=False,
        )

    # 1. Imitation: the adapter that DPO starts from.
    sft = trainer(LoRA(r=8), ExportAdapter(output=str(output / "sft")))
    sft.fit(SFT(base, lr=5e-4), SFTData(chats, batch_size=batch_size, val_fraction=0.05))

    # 2. Preference. The reference is the SFT adapter as it was, not the bare base: nothing has to be merged or loaded twice.
    first = First()
    dpo = trainer(LoRA(init_from=str(output / "sft")), ExportAdapter(output=str(output / "dpo")), first)
    module = DPO(base, losses={"sigmoid": 1.0, "sft": 0.1}, beta=0.1, lr=5e-5)
    data = PreferenceData(pairs, val_fraction=0.1, batch_size=batch_size)
    dpo.fit(module, data)
    measured = dict(dpo.validate(module, data, verbose=False)[0])
    return {"first": first.loss, **measured}


class First(pl.Callback):
    """Keeps the preference loss of the first step, which is ln 2 where the reference is the start."""

    loss = float("nan")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step == 1:
            self.loss = float(trainer.callback_metrics["train/sigmoid"])


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
