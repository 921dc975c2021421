"""Controlled sentiment, the DPO paper's experiment in small: PPO, GRPO and DPO from one SFT model, reward against KL.

    python -m benchmarks.sentiment_rl --lexicon vader_lexicon.txt     # each stage is kept when it is done; started again it goes on
    python -m benchmarks.sentiment_rl --tiny --folder /tmp/rl --output /tmp/rl.json              # does it run? a random model

1. ``rater``: MiniLM learns people's ratings of VADER's sentences: the ground truth of this experiment, which nothing trains on.
2. ``sft``: SmolLM2 with LoRA learns to go on with the first words of such sentences.
3. ``pairs``: the SFT model writes two ends for each beginning; the rater says which is the more positive.
4. ``reward``: a reward model learns from these pairs.
5. ``ppo``, ``grpo`` (rewarded by it) and ``dpo`` (on the pairs), two betas each, all from the SFT adapter and on the same
   beginnings. After every few rounds or steps each writes ends for held-out beginnings, of which are measured: what the reward
   model, the rater and the lexicon say, and the KL from the SFT model.
6. ``plot``: reward (rater) against KL, one line a run.

The lexicon of VADER (``vader_lexicon.txt`` of the package vaderSentiment) judges by words, and nothing here has learned from it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lightning.pytorch as pl  # noqa: E402

from benchmarks.lexicon import Lexicon  # noqa: E402
from benchmarks.runs import RESULTS, Store  # noqa: E402

BETAS = {"ppo": (0.02, 0.1), "grpo": (0.02, 0.1), "dpo": (0.05, 0.5)}
WORDS = 4
"""Words of a sentence that are given."""


@dataclass(frozen=True)
class Plan:
    """How large everything is."""

    base: str = "starter:smollm2-135m"
    rater_base: str = "starter:minilm-l6"
    sentences: int = 3000
    beginnings: int = 512
    held: int = 64
    new_tokens: int = 16
    rater_steps: int = 150
    sft_steps: int = 150
    reward_steps: int = 60
    rounds: int = 24
    prompts: int = 32
    batch: int = 16
    dpo_steps: int = 96
    look_every: int = 4
    lr: float = 5e-5


def tiny(folder: Path) -> Plan:
    """The same on random models, in seconds."""
    from benchmarks.random_model import write_model

    write_model(folder / "tiny")
    sizes = {"sentences": 60, "beginnings": 16, "held": 4, "new_tokens": 4, "prompts": 4, "batch": 4, "look_every": 1}
    steps = {"rater_steps": 2, "sft_steps": 2, "reward_steps": 2, "rounds": 2, "dpo_steps": 2}
    return Plan(base=str(folder / "tiny"), rater_base=str(folder / "tiny"), **sizes, **steps)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sentiment_rl", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--lexicon", type=Path, help="vader_lexicon.txt; without it the outside judge is left out")
    parser.add_argument("--tiny", action="store_true", help="random models and two steps of everything")
    parser.add_argument("--only", help="stop after this stage: rater, sft, pairs, reward, ppo, grpo or dpo")
    parser.add_argument("--folder", type=Path, default=Path("runs/sentiment_rl"), help="models and rows of the stages")
    parser.add_argument("--output", type=Path, default=RESULTS / "sentiment_rl.json", help="what was measured")
    return parser.parse_args(argv)


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


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# -- judges ---------------------------------------------------------------------------------------------------------------------


class Judges:
    """Who is asked about ends of held-out beginnings."""

    def __init__(self, folder: Path, lexicon: Path | None) -> None:
        from lightning_ft.engine.rewards import Rewards

        self.rewards = Rewards({
            "rater": {"classifier": str(folder / "rater"), "reads": "both"},
            "model": {"checkpoint": str(folder / "reward.ckpt")},
        })  # fmt: skip
        self.lexicon = Lexicon(lexicon) if lexicon is not None else None

    def of(self, module: Any, plan: Plan, prompts: Sequence[str]) -> dict[str, float]:
        """Means over one sampled end of each beginning; ``kl`` is the mean of log p - log q over ends, in nats an end."""
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
        scores = self.rewards.score(completions(prompts, texts, ids, answers, tokenizer))
        found = {name: float(each.nanmean()) for name, each in scores.each.items()}
        if self.lexicon is not None:
            whole = [p + t for p, t in zip(prompts, texts, strict=True)]
            found["lexicon"] = sum(map(self.lexicon.score, whole)) / len(whole)
        found["kl"] = sum(p - q for p, q in zip(now, before, strict=True)) / len(now)
        found["tokens"] = sum(len(a.ids) for a in answers) / len(answers)
        return found


def completions(prompts: Any, texts: Any, ids: Any, answers: Any, tokenizer: Any) -> Any:
    from lightning_ft.engine.rewards import Completions

    written, ended = [a.ids for a in answers], [a.ended for a in answers]
    return Completions(list(prompts), texts, ids, written, ended, list(range(len(texts))), {}, tokenizer)


def logps(module: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of each answer behind its prompt."""
    import torch

    found = []
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            row = torch.tensor([[*prompt, *answer]], device=module.device)
            logits = module.model(row).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            found.append(float(logits.gather(1, row[0, len(prompt) :, None]).sum()))
    return found


# -- stages ---------------------------------------------------------------------------------------------------------------------


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    given = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    given |= {
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=str(folder), **{**given, **options})


def prepare(folder: Path, plan: Plan) -> None:
    """The rows that need no model."""
    chosen = sentences(plan)
    if (folder / "held.jsonl").exists():
        return
    rated = chosen[: plan.sentences]
    write_rows(folder / "rated.jsonl", [{"text": t, "label": r} for r, t in rated])
    rows = [dict(zip(("prompt", "completion"), beginning(t), strict=True)) for _, t in rated]
    write_rows(folder / "sft.jsonl", rows)
    others = [{"prompt": beginning(t)[0]} for _, t in chosen[plan.sentences :]]
    write_rows(folder / "prompts.jsonl", others[plan.held :])
    write_rows(folder / "held.jsonl", others[: plan.held])


def rater(folder: Path, plan: Plan) -> dict[str, float]:
    from lightning_ft import SFT, ClassificationData

    module = SFT(plan.rater_base, task="regression", lr=1e-4, head_lr=1e-3)
    data = ClassificationData(str(folder / "rated.jsonl"), val_fraction=0.1, batch_size=16)
    made = trainer(folder, max_steps=plan.rater_steps, limit_val_batches=None)
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
    import lightning_ft
    from lightning_ft.engine.rewards import Rewards
    from lightning_ft.engine.sampling import sample

    module = lightning_ft.load(folder / "sft.ckpt")
    asked = [row["prompt"] for row in read_rows(folder / "prompts.jsonl")]
    judge = Rewards({"rater": {"classifier": str(folder / "rater"), "reads": "both"}})
    rows, tokenizer = [], module.tokenizer
    for begin in range(0, len(asked), 32):
        some = asked[begin : begin + 32]
        ids = [list(tokenizer(p)["input_ids"]) for p in some]
        seeds = [[2 * (begin + n), 2 * (begin + n) + 1] for n in range(len(some))]
        drawn = sample(module.view, ids, seeds=seeds, max_new_tokens=plan.new_tokens, end_ids=[tokenizer.eos_token_id])
        ends = [[tokenizer.decode(a.ids, skip_special_tokens=True) for a in two] for two in drawn]
        scores = [
            judge.score(completions(some, [e[k] for e in ends], ids, [d[k] for d in drawn], tokenizer)).total.tolist()
            for k in (0, 1)
        ]
        for n, prompt in enumerate(some):
            better = int(scores[1][n] > scores[0][n])
            if ends[n][0].strip() and ends[n][1].strip() and ends[n][0] != ends[n][1]:
                rows.append({"prompt": prompt, "chosen": ends[n][better], "rejected": ends[n][1 - better]})
    write_rows(folder / "pairs.jsonl", rows)
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

    def __init__(self, judges: Judges, plan: Plan, prompts: list[str], every: int, *, rounds: bool) -> None:
        self.judges, self.plan, self.prompts, self.every, self.rounds = judges, plan, prompts, every, rounds
        self.points: list[dict[str, float]] = []

    def look(self, module: Any, at: int) -> None:
        self.points.append({"at": float(at), **self.judges.of(module, self.plan, self.prompts)})
        print({name: round(value, 3) for name, value in self.points[-1].items()}, flush=True)

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
    prompts = [row["prompt"] for row in read_rows(folder / "held.jsonl")]
    every = plan.look_every * (1 if kind != "dpo" else max(1, plan.dpo_steps // plan.rounds))
    look = Look(Judges(folder, lexicon), plan, prompts, every, rounds=kind != "dpo")
    lora = LoRA(init_from=str(folder / "sft"))
    common: dict[str, Any] = {"beta": beta, "lr": plan.lr, "warmup_steps": 2, "schedule": "constant"}
    rollout = {"rewards": {"model": {"checkpoint": str(folder / "reward.ckpt")}}, "max_new_tokens": plan.new_tokens}
    file, batch = str(folder / "prompts.jsonl"), plan.batch
    module: Any
    data: Any
    if kind == "ppo":
        module = PPO(plan.base, value_lr=1e-3, **rollout, **common)
        data = PromptData(file, prompts=plan.prompts, passes=2, batch_size=batch, draw_batch=batch)
    elif kind == "grpo":
        module = GRPO(plan.base, samples=4, **rollout, **common)
        data = PromptData(file, prompts=max(plan.prompts // 4, 1), passes=2, batch_size=batch, draw_batch=batch)
    else:
        module = DPO(plan.base, **common)
        data = PreferenceData(str(folder / "pairs.jsonl"), batch_size=batch, bad_rows="drop")
    length = {"max_steps": plan.dpo_steps} if kind == "dpo" else {"max_epochs": plan.rounds}
    trainer(folder, lora, look, **length).fit(module, data)
    return {"kind": kind, "beta": beta, "points": look.points}


def plot(store: Store, file: Path) -> None:
    """Reward by the rater against KL from the SFT model, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    colours = {"ppo": "tab:blue", "grpo": "tab:orange", "dpo": "tab:green"}
    for run in (run for run in store.data["runs"].values() if "points" in run):
        points = sorted(run["points"], key=lambda point: point["at"])
        dashed = run["beta"] == max(BETAS[run["kind"]])
        for judge, axis in zip(("rater", "lexicon"), axes, strict=True):
            if judge in points[0]:
                style = {
                    "color": colours[run["kind"]],
                    "linestyle": "--" if dashed else "-",
                    "marker": "o",
                    "markersize": 3,
                }
                axis.plot(
                    [p["kl"] for p in points],
                    [p[judge] for p in points],
                    label=f"{run['kind']}, beta {run['beta']}",
                    **style,
                )
    for judge, axis in zip(("rater (the ground truth)", "lexicon (outside)"), axes, strict=True):
        axis.set(xlabel="KL from the SFT model, nats an end", ylabel=judge)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> Path:
    """Runs what is missing; returns the plot's file."""
    args = parse(argv)
    folder: Path = args.folder
    plan = tiny(folder) if args.tiny else Plan()
    store = Store(args.output, {**asdict(plan), "betas": {k: list(v) for k, v in BETAS.items()}})
    prepare(folder, plan)
    stages: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (name, lambda stage=stage: stage(folder, plan))  # type: ignore[misc]
        for name, stage in (("rater", rater), ("sft", sft), ("pairs", pairs), ("reward", reward))
    ]
    for kind, betas in BETAS.items():
        stages += [
            (f"{kind} {beta}", lambda kind=kind, beta=beta: learn(kind, beta, folder, plan, args.lexicon))
            for beta in betas
        ]  # type: ignore[misc]
    for name, stage in stages:
        if store.get(name) is None:
            print(f"--- {name}", flush=True)
            pl.seed_everything(0, verbose=False)
            begun = time.monotonic()
            store.put(name, {**stage(), "seconds": round(time.monotonic() - begun, 1)})
        if args.only == name.split()[0] and name.split()[0] not in BETAS:
            break
    file = args.output.with_suffix(".png")
    plot(store, file)
    print(file)
    return file


if __name__ == "__main__":
    main()
