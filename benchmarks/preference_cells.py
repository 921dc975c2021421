"""What `benchmarks.preferences` runs: a reward model on pairs of rated sentences, answers of a language model that it rates, and
fits of that language model on them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.lexicon import Lexicon
from benchmarks.row_files import read, written
from benchmarks.vader_cells import trainer
from lightning_ft.functional.intervals import mean_interval, wilson

LEARNED, UNSEEN = ("tweets", "amazonReviewSnippets"), ("movieReviewSnippets", "nytEditorialSnippets")
GAP = 1.0
"""Least difference of two sentences' mean ratings, from -4 to 4, for one of them to be called the better."""
TRAIN, VAL, TEST = 1000, 200, 400
"""Pairs; those of the test are of each unseen domain."""
BATCH, HEAD_LR = 16, 1e-3
PROMPT = "Sentence:"
"""What stands before each sentence that is rated; the data want a prompt."""

PROMPTS, HELD_OUT, WORDS, NEW_TOKENS, TOGETHER = 200, 100, 4, 24, 50
"""Beginnings of so many words, of training and of measuring; tokens that an answer may have; prompts sampled at once."""
POLICY_BATCH, LORA_R = 16, 16
OWN = (
    "The food at the new place was",
    "My week at work has been",
    "I opened the letter and",
    "The last chapter of the book",
)


def write_pairs(folder: Path) -> dict[str, str]:
    """Split -> file of pairs of sentences of one domain, the higher-rated one chosen; no sentence stands in two pairs.

    ``beginnings`` are the first words of sentences of the learned domains that stand in no pair, ``held_out`` those of films.
    """
    from lightning_ft.data.vader import ratings

    shuffler, left, found, met = random.Random(0), [], {}, set()
    for domain in (*LEARNED, *UNSEEN):
        unique = {" ".join(text.lower().split()): (rating, text) for rating, text in ratings(domain)}
        rows = [row for key, row in unique.items() if key not in met]  # some stand in two domains
        met |= unique.keys()
        shuffler.shuffle(rows)
        wanted = (TRAIN + VAL) // len(LEARNED) if domain in LEARNED else TEST
        pairs, rest = _paired(rows, wanted)
        found[domain] = pairs
        left += [text for _, text in rest] if domain != UNSEEN[1] else []
        if domain == LEARNED[-1]:
            seen, left = left, []
    learned = [pair for domain in LEARNED for pair in found[domain]]
    shuffler.shuffle(learned)
    files = {"train": written(folder / "train.jsonl", learned[:TRAIN])}
    files["val"] = written(folder / "val.jsonl", learned[TRAIN:])
    for domain in UNSEEN:
        files[domain] = written(folder / f"{domain}.jsonl", found[domain])
    for name, texts, count in (("beginnings", seen, PROMPTS), ("held_out", left, HELD_OUT)):
        shuffler.shuffle(texts)
        starts = dict.fromkeys(" ".join(text.split()[:WORDS]) for text in texts if len(text.split()) >= 2 * WORDS)
        chosen = [start for start in starts if start.isascii()][:count]
        files[name] = written(folder / f"{name}.jsonl", [{"prompt": start} for start in chosen])
    return files


def _paired(rows: Sequence[tuple[float, str]], wanted: int) -> tuple[list[dict[str, Any]], list[tuple[float, str]]]:
    """So many pairs that are ``GAP`` apart, and the rows that are in none."""
    waiting: list[tuple[float, str]] = []
    pairs: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        if len(pairs) == wanted:
            return pairs, [*waiting, *rows[number:]]
        partner = next((other for other in waiting if abs(other[0] - row[0]) >= GAP), None)
        if partner is None:
            waiting.append(row)
            continue
        waiting.remove(partner)
        better, worse = sorted((row, partner), reverse=True)
        pairs.append({"prompt": PROMPT, "chosen": f" {better[1]}", "rejected": f" {worse[1]}"})
    raise SystemExit(f"There are only {len(pairs)} pairs of {wanted}.")


# -- the reward model ---------------------------------------------------------------------------------------------------------


def probe_cell(files: Mapping[str, str], base: str = "starter:minilm-l6") -> dict[str, Any]:
    """A logistic regression on the difference of two sentences' embeddings, which the frozen encoder gives."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    begun = time.perf_counter()
    apart = {}
    for split in ("train", "val", *UNSEEN):
        rows = read(files[split])
        chosen, rejected = (embeddings([row[which] for row in rows], base) for which in ("chosen", "rejected"))
        apart[split] = chosen - rejected
    signed = np.concatenate([apart["train"], -apart["train"]])
    labels = np.repeat([1, 0], len(apart["train"]))
    tried = {}
    for strength in (0.1, 1.0, 10.0, 100.0):
        fitted = LogisticRegression(C=strength, fit_intercept=False, max_iter=5000).fit(signed, labels)
        tried[strength] = fitted, float((apart["val"] @ fitted.coef_[0] > 0).mean())
    best = max(tried, key=lambda strength: tried[strength][1])
    weights = tried[best][0].coef_[0]
    scores = {"val/accuracy": tried[best][1], "C": best}
    for domain in UNSEEN:
        scores[f"{domain}/right"] = float((apart[domain] @ weights > 0).sum())
    return {"seconds": time.perf_counter() - begun, "trainable": len(weights), "scores": _shares(scores, files)}


def embeddings(texts: Sequence[str], base: str) -> Any:
    """(N, D) means over tokens of the encoder's last states, of length 1, as its authors use them."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from lightning_ft.models import starter

    folder = starter.path(base) if base.startswith("starter:") else base
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # little padding
    found = torch.empty(len(texts), model.config.hidden_size)
    with torch.no_grad():
        for begin in range(0, len(texts), 64):
            numbers = order[begin : begin + 64]
            batch = tokenizer([texts[n] for n in numbers], padding=True, truncation=True, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            found[numbers] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return found.numpy()


def reward_job(rate: float, files: Mapping[str, str], base: str = "starter:minilm-l6") -> tuple[Any, Any]:
    """(module, data) of the reward model: one epoch, all weights, a new head."""
    from lightning_ft import PreferenceData, RewardModel

    module = RewardModel(base, lr=rate, head_lr=max(rate, HEAD_LR), normalise="after")
    options = {"val_path": files["val"], "batch_size": BATCH, "val_batch_size": 64, "seed": 0}
    return module, PreferenceData(files["train"], packing=True, **options)


def reward_cell(
    rate: float, seed: int, files: Mapping[str, str], folder: Path, keep: Path, **job: Any
) -> dict[str, Any]:
    """One fit, kept as a checkpoint, and its accuracy on validation pairs and on those of unseen domains."""
    import lightning.pytorch as pl

    pl.seed_everything(seed, verbose=False)
    module, data = reward_job(rate, files, **job)
    fitter, begun = trainer(folder, [], max_epochs=1), time.perf_counter()
    fitter.fit(module, data)
    seconds = time.perf_counter() - begun
    fitter.save_checkpoint(keep)
    (val,) = trainer(folder, [], limit_val_batches=None).validate(module, data, verbose=False)
    scores = {**{name: float(value) for name, value in val.items()}, **tested(module, files, folder)}
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    told = {"seconds": seconds, "trainable": trainable, "device": measure.device_name()}
    return {**told, "scores": _shares(scores, files)}


def tested(module: Any, files: Mapping[str, str], folder: Path) -> dict[str, float]:
    """How many pairs of each unseen domain a reward model gets right, and its calibration; each by data of its own."""
    from lightning_ft import PreferenceData

    scores = {}
    for domain in UNSEEN:
        data = PreferenceData(files[domain], test_path=files[domain], batch_size=64, packing=True)
        (found,) = trainer(folder, []).test(module, data, verbose=False)
        scores[f"{domain}/right"] = round(found["test/accuracy"] * len(read(files[domain])))
        scores[f"{domain}/calibration"] = found["test/calibration"]
    return scores


def _shares(scores: dict[str, float], files: Mapping[str, str]) -> dict[str, Any]:
    for domain in UNSEEN:
        rows = len(read(files[domain]))
        scores |= {f"{domain}/rows": rows, f"{domain}/accuracy": scores[f"{domain}/right"] / rows}
    return scores


class Rater:
    """Rewards of texts by a kept reward model."""

    def __init__(self, checkpoint: Path) -> None:
        import lightning_ft

        self.module: Any = lightning_ft.load(checkpoint).to(measure.device()).eval()

    def rewards(self, texts: Sequence[str]) -> list[float]:
        """One each, with mean 0 and deviation 1 over the validation sentences."""
        tokenizer = self.module.tokenizer
        *prompt, end = tokenizer(PROMPT)["input_ids"]
        answers = [[*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], end] for text in texts]
        return [float(value) for value in self.module.score([prompt] * len(texts), answers)]


# -- the language model ---------------------------------------------------------------------------------------------------------


def sampled(module: Any, prompts: Sequence[str], seed: int, *, trained: bool) -> tuple[list[str], list[float]]:
    """One answer each, drawn at temperature 1 to its first sentence end, and log p - log q of it in nats (0 before training).

    The mean of the second over answers of the policy itself estimates its KL divergence from the reference without bias.
    """
    import torch

    texts, apart = [], []
    model, tokenizer = module.model.eval(), module.tokenizer
    for begin in range(0, len(prompts), TOGETHER):
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts[begin : begin + TOGETHER]]
        longest = max(map(len, rows))
        ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        torch.manual_seed(1000 * seed + begin)
        drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW_TOKENS}
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=mask, pad_token_id=tokenizer.eos_token_id, **drawing)
            new = whole[:, longest:]
            ends = [_length(tokenizer, row.tolist()) for row in new]
            kept = (torch.arange(new.shape[1]) < torch.tensor(ends)[:, None]).to(new.device)
            ours = theirs = torch.zeros(new.shape, device=new.device)
            if trained:
                ours = _logps(model, whole, mask, longest)
                with module.at_reference():
                    theirs = _logps(model, whole, mask, longest)
        apart += ((ours - theirs) * kept).sum(-1).tolist()
        texts += [tokenizer.decode(row[:end], skip_special_tokens=True) for row, end in zip(new, ends, strict=True)]
    return texts, apart


def _logps(model: Any, whole: Any, mask: Any, begin: int) -> Any:
    """(B, T) log-probabilities of the tokens from ``begin`` on."""
    import torch

    seen = torch.cat([mask, torch.ones_like(whole[:, begin:])], 1)
    logits = model(whole, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0)).logits[
        :, begin - 1 : -1
    ]
    return logits.float().log_softmax(-1).gather(-1, whole[:, begin:, None])[..., 0]


def _length(tokenizer: Any, ids: list[int]) -> int:
    """How many tokens there are to the first sentence end, or to the end of the text."""
    for number, token in enumerate(ids):
        if token == tokenizer.eos_token_id or any(mark in tokenizer.decode([token]) for mark in ".!?\n"):
            return number + 1
    return len(ids)


def write_answers(base: str, files: Mapping[str, str], rater: Rater, target: Path) -> str:
    """Two answers of the base to each beginning as pairs, the one of the higher reward chosen; those alike are left out."""
    prompts = [row["prompt"] for row in read(files["beginnings"])]
    module = started(base)
    drawn = [sampled(module, prompts, seed, trained=False)[0] for seed in (1, 2)]
    rewards = [rater.rewards([prompt + text for prompt, text in zip(prompts, texts, strict=True)]) for texts in drawn]
    rows = []
    for prompt, one, other, high, low in zip(prompts, *drawn, *rewards, strict=True):
        if one.strip() and other.strip() and one.strip() != other.strip():
            chosen, rejected = (one, other) if high > low else (other, one)
            rows.append({"prompt": prompt, "chosen": chosen.rstrip(), "rejected": rejected.rstrip()})
    return written(target, rows)


def started(base: str) -> Any:
    """The language model before any step."""
    from lightning_ft import DPO
    from lightning_ft.engine.attachment import Attachment

    module = DPO(base)
    Attachment.of(module).rebuild([], seed=0)
    return module.to(measure.device())


def policy_cell(
    method: str,
    rate: float,
    answers: str,
    files: Mapping[str, str],
    rater: Rater,
    lexicon: Lexicon,
    folder: Path,
    base: str = "starter:smollm2-135m",
) -> dict[str, Any]:
    """One epoch of LoRA on the rated answers (or none, for ``start``), then what the policy writes."""
    import lightning.pytorch as pl

    from lightning_ft import DPO, KTO, LoRA, PreferenceData, UnpairedPreferenceData

    pl.seed_everything(0, verbose=False)
    begun, metrics, trainable = time.perf_counter(), {}, 0
    if method == "start":
        module = started(base)
    else:
        kind, data = {"DPO": (DPO, PreferenceData), "KTO": (KTO, UnpairedPreferenceData)}[method]
        module = kind(base, lr=rate, beta=0.1)
        size = POLICY_BATCH * (2 if method == "KTO" else 1)  # a pair is two of KTO's rows
        fitter = trainer(folder, [LoRA(r=LORA_R, alpha=2.0 * LORA_R)], max_epochs=1)
        fitter.fit(module, data(answers, batch_size=size, seed=0))
        metrics = {f"last {name}": float(value) for name, value in fitter.callback_metrics.items()}
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    seconds = time.perf_counter() - begun
    module.to(measure.device())
    prompts = [row["prompt"] for row in read(files["held_out"])]
    texts, apart = sampled(module, prompts, seed=3, trained=method != "start")
    whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    tokens = [len(module.tokenizer(text)["input_ids"]) for text in texts]
    scores: dict[str, Any] = {"rows": len(texts), "tokens": sum(tokens) / len(tokens), "different": len(set(texts))}
    judged = {"reward": rater.rewards(whole), "lexicon": [lexicon.score(text) for text in texts], "kl": apart}
    for name, values in judged.items():
        scores[name] = sum(values) / len(values)
        scores[f"{name}/interval"] = list(mean_interval(values))
    positive = sum(value > 0 for value in judged["lexicon"])
    scores |= {"positive": positive, "positive/interval": list(wilson(positive, len(texts)))}
    samples = dict(zip(OWN, module.generate(list(OWN), max_new_tokens=NEW_TOKENS), strict=True))
    told = {"seconds": seconds, "trainable": trainable, "device": measure.device_name()}
    return {**told, "scores": scores, "last": metrics, "samples": samples}
