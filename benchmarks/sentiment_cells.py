"""The stages of `benchmarks.sentiment_rl`: rows, rater, SFT, pairs, reward model, and runs with their points."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.lexicon import Lexicon
from benchmarks.measure import fast_precision
from benchmarks.row_files import read, written
from benchmarks.silent import silent_trainer
from lightning_ft.functional.intervals import mean_interval

WORDS = 4
"""Words of a sentence that are given."""


@dataclass(frozen=True)
class Plan:
    """How large everything is; DPO takes as many optimizer steps as the rounds of the others have."""

    base: str = "starter:smollm2-135m"
    rater_base: str = "starter:minilm-l6"
    sentences: int = 6000
    beginnings: int = 1024
    held: int = 256
    new_tokens: int = 16
    rater_steps: int = 300
    sft_steps: int = 150
    reward_steps: int = 120
    rounds: int = 32
    prompts: int = 32
    batch: int = 16
    look_every: int = 4
    lr: float = 1e-4

    @property
    def steps_a_round(self) -> int:
        """Optimizer steps: two passes over the answers of a round."""
        return 2 * -(-self.prompts // self.batch)


def tiny(folder: Path) -> Plan:
    """The same on random models, in seconds."""
    from benchmarks.random_model import write_model

    if not (folder / "tiny").exists():
        part = folder / f"tiny.{os.getpid()}"
        write_model(part)
        part.replace(folder / "tiny")
    sizes = {"sentences": 60, "beginnings": 16, "held": 4, "new_tokens": 4, "prompts": 4, "batch": 4, "look_every": 1}
    steps = {"rater_steps": 2, "sft_steps": 2, "reward_steps": 2, "rounds": 2}
    return Plan(base=str(folder / "tiny"), rater_base=str(folder / "tiny"), **sizes, **steps)


# -- rows ---------------------------------------------------------------------------------------------------------------------


def sentences(plan: Plan) -> list[tuple[float, str]]:
    """(rating, sentence) of reviews with at least twice the words that are given, each once, shuffled."""
    from lightning_ft.data.vader import ratings

    found = {text: rating for d in ("movieReviewSnippets", "amazonReviewSnippets") for rating, text in ratings(d)}
    chosen = [(rating, text) for text, rating in found.items() if len(text.split()) >= 2 * WORDS]
    random.Random(0).shuffle(chosen)
    return chosen[: plan.sentences + plan.beginnings + plan.held]


def beginning(text: str) -> tuple[str, str]:
    """The first words, and how the sentence goes on."""
    words = text.split()
    return " ".join(words[:WORDS]), " " + " ".join(words[WORDS:])


# -- judges ---------------------------------------------------------------------------------------------------------------------


class Judges:
    """Who is asked about ends of held-out beginnings; the lexicon judges them together with their beginnings."""

    def __init__(self, folder: Path, lexicon: Path | None) -> None:
        from lightning_ft.engine.rewards import Rewards

        self.rewards = Rewards({
            "rater": {"classifier": str(folder / "rater"), "reads": "both"},
            "model": {"checkpoint": str(folder / "reward.ckpt")},
        })  # fmt: skip
        self.lexicon = Lexicon(lexicon)

    def of(self, module: Any, plan: Plan, prompts: Sequence[str]) -> dict[str, Any]:
        """Means over one sampled end of each beginning; ``kl`` is the mean of log p - log q over ends, in nats an end.

        Beside each mean stands its 95 % interval over beginnings, as ``<name>/interval``; three ends are kept as they are.
        """
        from lightning_ft.engine.sampling import sample
        from lightning_ft.models.admission import evaluating

        tokenizer, ids = module.tokenizer, [list(module.tokenizer(p)["input_ids"]) for p in prompts]
        with evaluating(module.model):
            drawn = sample(
                module.view, ids, seeds=[[n] for n in range(len(ids))], max_new_tokens=plan.new_tokens,
                end_ids=[tokenizer.eos_token_id],
            )  # fmt: skip
            answers = [one[0] for one in drawn]
            now = logps(module, ids, [a.ids for a in answers])
            with module.reference("start"):
                before = logps(module, ids, [a.ids for a in answers])
        texts = [tokenizer.decode(a.ids, skip_special_tokens=True) for a in answers]
        scores = self.rewards.score(completions(prompts, texts, ids, answers, tokenizer), module.device)
        whole = [p + t for p, t in zip(prompts, texts, strict=True)]
        each = {name: [one for one in values.tolist() if one == one] for name, values in scores.each.items()}
        each |= {"lexicon": [self.lexicon.score(text) for text in whole]}
        each |= {"kl": [p - q for p, q in zip(now, before, strict=True)], "tokens": [len(a.ids) for a in answers]}
        found: dict[str, Any] = {name: sum(values) / len(values) for name, values in each.items()}
        found |= {f"{name}/interval": mean_interval(values) for name, values in each.items()}
        return {**found, "ends": whole[:3]}


def completions(prompts: Any, texts: Any, ids: Any, answers: Any, tokenizer: Any) -> Any:
    from lightning_ft.engine.rewards import Completions

    written, ended = [a.ids for a in answers], [a.ended for a in answers]
    return Completions(list(prompts), texts, ids, written, ended, list(range(len(texts))), {}, tokenizer)


def logps(module: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of each answer behind its prompt; padding stands on the right, where no token before it looks."""
    import torch

    found: list[float] = []
    with torch.no_grad():
        for begin in range(0, len(prompts), 32):
            some = list(zip(prompts[begin : begin + 32], answers[begin : begin + 32], strict=True))
            longest = max(len(prompt) + len(answer) for prompt, answer in some)
            rows = torch.tensor([[*p, *a, *[0] * (longest - len(p) - len(a))] for p, a in some], device=module.device)
            every = module.model(rows).logits[:, :-1].float().log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
            found += [
                float(row[len(p) - 1 : len(p) + len(a) - 1].sum()) for row, (p, a) in zip(every, some, strict=True)
            ]
    return found


# -- stages ---------------------------------------------------------------------------------------------------------------------


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    given = {
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "use_distributed_sampler": False,
    }
    return silent_trainer(folder, callbacks, **{**given, **options})


def prepare(folder: Path, plan: Plan) -> None:
    """The rows that need no model."""
    if (folder / "held.jsonl").exists():
        return
    chosen = sentences(plan)
    rated = chosen[: plan.sentences]
    written(folder / "rated.jsonl", [{"text": t, "label": r} for r, t in rated])
    rows = [dict(zip(("prompt", "completion"), beginning(t), strict=True)) for _, t in rated]
    written(folder / "sft.jsonl", rows)
    others = [{"prompt": beginning(t)[0]} for _, t in chosen[plan.sentences :]]
    written(folder / "prompts.jsonl", others[plan.held :])
    written(folder / "held.jsonl", others[: plan.held])


def rater(folder: Path, plan: Plan) -> dict[str, float]:
    from lightning_ft import SFT, ClassificationData

    module = SFT(plan.rater_base, task="regression", lr=1e-4, head_lr=1e-3)
    data = ClassificationData(str(folder / "rated.jsonl"), val_fraction=0.1, batch_size=16)
    made = trainer(folder, max_steps=plan.rater_steps, limit_val_batches=None, precision=fast_precision())
    made.fit(module, data)
    module.model.float().save_pretrained(folder / "rater")
    module.tokenizer.save_pretrained(folder / "rater")
    return dict(made.validate(module, data, verbose=False)[0])


def sft(folder: Path, plan: Plan) -> dict[str, float]:
    from lightning_ft import SFT, ExportAdapter, LoRA, SFTData

    data = SFTData(str(folder / "sft.jsonl"), val_fraction=0.05, batch_size=plan.batch)
    made = trainer(
        folder, LoRA(r=8), ExportAdapter(output=str(folder / "sft")), max_steps=plan.sft_steps, limit_val_batches=None
    )
    module = SFT(plan.base, lr=5e-4)
    made.fit(module, data)
    made.save_checkpoint(folder / "sft.ckpt")
    return dict(made.validate(module, data, verbose=False)[0])


def pairs(folder: Path, plan: Plan) -> dict[str, float]:
    import torch

    import lightning_ft
    from lightning_ft.engine.rewards import Rewards
    from lightning_ft.engine.sampling import sample

    module = lightning_ft.load(folder / "sft.ckpt").eval().to("cuda" if torch.cuda.is_available() else "cpu")
    asked = [row["prompt"] for row in read(folder / "prompts.jsonl")]
    judge = Rewards({"rater": {"classifier": str(folder / "rater"), "reads": "both"}})
    rows, tokenizer = [], module.tokenizer
    for begin in range(0, len(asked), 32):
        some = asked[begin : begin + 32]
        ids = [list(tokenizer(p)["input_ids"]) for p in some]
        seeds = [[2 * (begin + n), 2 * (begin + n) + 1] for n in range(len(some))]
        drawn = sample(module.view, ids, seeds=seeds, max_new_tokens=plan.new_tokens, end_ids=[tokenizer.eos_token_id])
        ends = [[tokenizer.decode(a.ids, skip_special_tokens=True) for a in two] for two in drawn]
        scores = [
            judge.score(
                completions(some, [e[k] for e in ends], ids, [d[k] for d in drawn], tokenizer), module.device
            ).total.tolist()
            for k in (0, 1)
        ]
        for n, prompt in enumerate(some):
            better = int(scores[1][n] > scores[0][n])
            if ends[n][0].strip() and ends[n][1].strip() and ends[n][0] != ends[n][1]:
                rows.append({"prompt": prompt, "chosen": ends[n][better], "rejected": ends[n][1 - better]})
    written(folder / "pairs.jsonl", rows)
    return {"pairs": float(len(rows))}


def reward(folder: Path, plan: Plan) -> dict[str, float]:
    from lightning_ft import LoRA, PreferenceData, RewardModel

    module = RewardModel(plan.base, head_lr=2e-3, normalise="after", center_rewards_coefficient=0.01)
    data = PreferenceData(str(folder / "pairs.jsonl"), val_fraction=0.1, batch_size=plan.batch, bad_rows="drop")
    made = trainer(folder, LoRA(r=8), max_steps=plan.reward_steps, limit_val_batches=None)
    made.fit(module, data)
    made.save_checkpoint(folder / "reward.ckpt")
    return dict(made.validate(module, data, verbose=False)[0])


class Look(pl.Callback):
    """Asks the judges before the run, every few rounds or optimizer steps, and after it."""

    def __init__(self, name: str, judges: Judges, plan: Plan, prompts: list[str], every: int, *, rounds: bool) -> None:
        self.name = name
        self.judges, self.plan, self.prompts, self.every, self.rounds = judges, plan, prompts, every, rounds
        self.points: list[dict[str, Any]] = []

    def look(self, module: Any, at: int) -> None:
        self.points.append({"at": float(at), **self.judges.of(module, self.plan, self.prompts)})
        told = {name: round(value, 3) for name, value in self.points[-1].items() if isinstance(value, float)}
        print(f"{self.name}: {told}", flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(pl_module, 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.rounds and (trainer.current_epoch + 1) % self.every == 0:
            self.look(pl_module, trainer.current_epoch + 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if not self.rounds and trainer.global_step % self.every == 0:
            self.look(pl_module, trainer.global_step)


def learn(kind: str, beta: float, folder: Path, plan: Plan, lexicon: Path | None) -> dict[str, Any]:
    """One run from the SFT adapter; its points."""
    from lightning_ft import DPO, GRPO, PPO, LoRA, PreferenceData, PromptData

    pl.seed_everything(0, verbose=False)
    prompts = [row["prompt"] for row in read(folder / "held.jsonl")]
    every = plan.look_every * (1 if kind != "dpo" else plan.steps_a_round)
    look = Look(f"{kind} {beta}", Judges(folder, lexicon), plan, prompts, every, rounds=kind != "dpo")
    lora = LoRA(init_from=str(folder / "sft"))
    common: dict[str, Any] = {"beta": beta, "lr": plan.lr, "warmup_steps": 2, "schedule": "constant"}
    rollout = {"rewards": {"model": {"checkpoint": str(folder / "reward.ckpt")}}, "max_new_tokens": plan.new_tokens}
    file, batch = str(folder / "prompts.jsonl"), plan.batch
    module: Any
    data: Any
    if kind == "ppo":
        module = PPO(plan.base, value_lr=1e-3, **rollout, **common)
        data = PromptData(file, prompts=plan.prompts, passes=2, batch_size=batch, draw_batch=plan.prompts)
    elif kind == "grpo":
        module = GRPO(plan.base, samples=4, **rollout, **common)
        data = PromptData(file, prompts=max(plan.prompts // 4, 1), passes=2, batch_size=batch, draw_batch=batch)
    else:
        module = DPO(plan.base, **common)
        data = PreferenceData(str(folder / "pairs.jsonl"), batch_size=batch, bad_rows="drop")
    steps = plan.rounds * plan.steps_a_round
    length = {"max_steps": steps, "max_epochs": -1} if kind == "dpo" else {"max_epochs": plan.rounds}
    fitter = trainer(folder, lora, look, **length)
    fitter.fit(module, data)
    return {"kind": kind, "beta": beta, "steps": fitter.global_step, "points": look.points}
