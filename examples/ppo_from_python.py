"""PPO or GRPO from Python: a reward of your own, a rule beside it, and how far the model went for it.

python examples/ppo_from_python.py [MODEL] [PROMPTS.jsonl] [ppo|grpo]

Each epoch is a round: the model writes answers, they are rewarded, and it learns from them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_ft import GRPO, PPO, ExportAdapter, LoRA, PromptData, Reward


def digits(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """The share of an answer's characters that are digits; columns of the data come as lists beside it."""
    return [sum(c.isdigit() for c in text) / len(text) if text else None for text in completions]


def main(
    base: str = "starter:smollm2-135m",
    prompts: str = "prompts.jsonl",
    method: str = "ppo",
    *,
    rounds: int = 20,
    max_new_tokens: int = 16,
    lr: float = 1e-4,
    output: str | Path = "runs/ppo_from_python",
) -> list[dict[str, float]]:
    """Trains and writes the adapter; returns what was measured of each round."""
    pl.seed_everything(0)
    rewards = {"digits": Reward(function=digits), "concise": Reward(length=max_new_tokens // 2, weight=0.1)}
    shared: dict[str, Any] = {"rewards": rewards, "max_new_tokens": max_new_tokens, "beta": 0.02, "lr": lr}
    module: pl.LightningModule
    if method == "ppo":
        module, samples = PPO(base, missing_end_penalty=0.1, **shared), 1
    else:
        module, samples = GRPO(base, samples=4, **shared), 4
    data = PromptData(prompts, prompts=16 // samples, passes=2, batch_size=8, chat=True, val_fraction=0.1)
    facts = Facts()
    trainer = pl.Trainer(
        callbacks=[LoRA(r=8), ExportAdapter(output=str(Path(output) / "adapter")), facts],
        max_epochs=rounds,
        use_distributed_sampler=False,  # the data split rows over ranks themselves
        logger=False,
        enable_checkpointing=False,
        gradient_clip_val=1.0,
        default_root_dir=str(output),
    )
    trainer.fit(module, data)
    return facts.rounds


class Facts(pl.Callback):
    """Keeps what each round was: rewards, lengths, KL."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        facts = trainer.datamodule.round.facts  # type: ignore[attr-defined]
        self.rounds.append(dict(facts))
        print(f"round {trainer.current_epoch}: reward {facts['reward']:.3f}, KL {facts['kl']:.2f} nats an answer")


if __name__ == "__main__":
    main(*sys.argv[1:])
