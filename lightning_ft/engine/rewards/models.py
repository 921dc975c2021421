"""Models as rewards: reward models that this library has trained, and classifiers in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ft.engine.checkpoints import record_of
from lightning_ft.engine.frozen import Frozen
from lightning_ft.engine.loading import load, read_checkpoint
from lightning_ft.engine.rewards.guarded import guarded
from lightning_ft.engine.rewards.source import Completions
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.classifier import Classifier
from lightning_ft.models.load import open_base
from lightning_ft.models.load_task import label_names, load_for_task

Reads = Literal["answer", "both"]
_BATCH = 32
_UNREAD = "shorten such answers, or take a model that can read them"


class CheckpointReward:
    """What a `RewardModel` gives, normalised as it was trained to; on every rank a copy of its own."""

    def __init__(self, path: str) -> None:
        """Args: path: a checkpoint that a fit of `RewardModel` has written."""
        self.path = path
        self.held: Frozen[Any] = Frozen(lambda: load(self.path))

    def check(self, name: str, columns: Collection[str] | None) -> None:
        """Reads what the checkpoint says of itself."""
        recipe = record_of(read_checkpoint(Path(self.path).expanduser()))["module"]
        kind = recipe["class_path"].rpartition(".")[2] if recipe is not None else "a module of your own"
        if recipe is None or not recipe["class_path"].startswith("lightning_ft.modules.reward_model."):
            raise Refusal(f"The reward {name} takes a checkpoint of RewardModel, and {self.path} is one of {kind}.")

    def score(self, name: str, answers: Completions, device: torch.device) -> list[float | None]:
        """One number an answer; the reward model reads prompt, answer and end as it did in training.

        Where it has the writer's tokenizer and template it reads the very tokens that were written. Otherwise it reads the texts,
        each as if it had ended, and judges no empty one.
        """
        with self.held.on(device) as module:
            alike = answers.tokenizer is not None and _alike(answers.tokenizer, module.tokenizer)

            def scores(some: Completions) -> Any:
                if alike:
                    return module.score(list(some.prompt_ids), as_written(some))
                return module.score_texts(some.prompts, some.texts)

            return guarded(name, scores, answers, None, _UNREAD)


def as_written(answers: Completions) -> list[list[int]]:
    """Token ids of the answers, with what the chat template puts behind its end (ChatML's newline) where they are in a chat.

    An answer that a stop string has ended has no such end, and so nothing behind it.
    """
    tail, end = after_end(answers.tokenizer), answers.tokenizer.eos_token_id
    return [
        [*ids, *(tail if ids and ids[-1] == end and not isinstance(prompt, str) else [])]
        for prompt, ids in zip(answers.prompts, answers.ids, strict=True)
    ]


def after_end(tokenizer: Any) -> list[int]:
    """Tokens that the chat template puts behind an answer's end, as ChatML's newline; none where it has no such end."""
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ends = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return ids[ends[-1] + 1 :] if ends else []


def _alike(one: Any, other: Any) -> bool:
    return bool(one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template)


class ClassifierReward:
    """What a model with a classification or regression head says of an answer."""

    def __init__(self, base: str, label: str | None, reads: Reads) -> None:
        """Args: base: folder, hub id or starter asset; label: the class whose probability counts; reads: what it is given."""
        self.base = base
        self.label = label
        self.reads = reads
        self.held: Frozen[_Classifying] = Frozen(self._load)

    def check(self, name: str, columns: Collection[str] | None) -> None:
        """Reads the configuration, and looks for the class."""
        config = open_base(self.base, "auto", "sdpa", False, None)[1]
        labels = label_names(config)
        if len(labels) == 1 and self.label is not None:
            raise Refusal(f"The reward {name}: {self.base} gives one number and no classes; leave label out.")
        if len(labels) > 1 and self.label not in labels:
            got = "none is given" if self.label is None else f"not {self.label!r}"
            raise Refusal(
                f"The reward {name} needs the label of {self.base} that is rewarded: {', '.join(labels)}; {got}."
            )

    def _load(self) -> _Classifying:
        config = open_base(self.base, "auto", "sdpa", False, None)[1]
        task = "regression" if config.num_labels == 1 else "sequence_classification"
        several = config.num_labels > 1 and config.problem_type == "multi_label_classification"
        model, tokenizer, new = load_for_task(task, self.base, multi_label=several, attention="sdpa")
        if new:
            raise Refusal(
                f"{self.base} has no trained head for {task} (its file lacks {sorted(new)[0]}), so its rewards would be random; "
                "give a model that was trained to classify."
            )
        return _Classifying(model, task, tokenizer)

    def score(self, name: str, answers: Completions, device: torch.device) -> list[float | None]:
        """The probability of the class, or the one number that the model gives."""
        with self.held.on(device) as classifying:
            return guarded(name, lambda some: self._scores(classifying, some, device), answers, None, _UNREAD)

    def _scores(self, classifying: _Classifying, answers: Completions, device: torch.device) -> Tensor:
        found: list[Tensor] = []
        texts = [self._text(answers, number, classifying.tokenizer) for number in range(len(answers))]
        for begin in range(0, len(texts), _BATCH):
            logits = classifying(texts[begin : begin + _BATCH], device)
            if self.label is None:
                found.append(logits[:, 0])
            else:
                several = classifying.model.config.problem_type == "multi_label_classification"
                chances = logits.sigmoid() if several else logits.softmax(-1)
                found.append(chances[:, label_names(classifying.model.config).index(self.label)])
        return torch.cat(found)

    def _text(self, answers: Completions, number: int, tokenizer: Any) -> str:
        prompt, text = answers.prompts[number], answers.texts[number]
        if self.reads == "answer":
            return text
        if isinstance(prompt, str):
            return prompt + text
        if tokenizer.chat_template:
            turns = [*prompt, {"role": "assistant", "content": text}]
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        return "\n".join([*(str(turn.get("content", "")) for turn in prompt), text])


class _Classifying(nn.Module):
    """A classifier with its tokenizer."""

    def __init__(self, model: Any, task: str, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.view = Classifier(model, task)
        self.tokenizer = tokenizer
        limit = getattr(model.config, "max_position_embeddings", None) or 1 << 20
        self.limit = min(int(tokenizer.model_max_length), int(limit) - self.view.first_position)

    def forward(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """(S, C) logits, fp32; of a text that is too long the end counts."""
        rows = [self._ids(text) for text in texts]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = True
        return self.view.row_logits(ids.to(device), mask=mask.to(device)).float()

    def _ids(self, text: str) -> list[int]:
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
        try:
            ids = list(self.tokenizer(text, truncation=True, max_length=self.limit)["input_ids"])
        finally:
            self.tokenizer.truncation_side = side
        return ids or [self.tokenizer.eos_token_id or 0]  # an empty answer
