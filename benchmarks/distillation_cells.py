"""What `benchmarks.distillation_runs` runs: teachers, students of some of their layers, and their scores; on a CPU or a GPU."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure, vader_cells
from benchmarks.row_files import written
from benchmarks.vader_cells import trainer

TEMPERATURE = 2.0
"""Of classes, DistilBERT's; of tokens 1, as their distributions are broad already."""
PROBE_PENALTIES = (0.1, 1.0, 10.0)
"""Of the linear probe, chosen on validation rows."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        encoder: the teacher of classes.
        decoder: the teacher of chats.
        encoder_layers: blocks that the student of classes keeps.
        decoder_layers: those of the student of chats.
        teacher_steps: of the encoder.
        steps: of its students.
        worked: chats of worked word problems to train on.
        rated: chats about rated sentences to train on.
        held: chats of each kind to choose by, and to test on.
        epochs: of the teacher of chats and of its students.
        batch: chats a step.
        digit_epochs: of the teacher of digits and of its students, in passes over 1,400 images.
    """

    encoder: str = "starter:minilm-l6"
    decoder: str = "starter:smollm2-135m"
    encoder_layers: int = 3
    decoder_layers: int = 10
    teacher_steps: int = 189
    steps: int = 630
    worked: int = 320
    rated: int = 80
    held: tuple[int, int] = (40, 60)
    epochs: int = 2
    batch: int = 8
    digit_epochs: tuple[int, int] = (20, 60)


def precision() -> dict[str, Any]:
    """Of a Trainer: bfloat16 where that is fast."""
    return {"precision": measure.fast_precision()}


def cut(folder: Path, keep: int, output: Path, cls: Any) -> None:
    """Writes a student of a teacher's blocks at even distances."""
    from lightning_ft.engine.layer_selection import with_layers
    from lightning_ft.formats.merged import export_merged
    from lightning_ft.functional.distillation import uniform_layers
    from lightning_ft.models.load import load_tokenizer

    model = cls.from_pretrained(folder)
    student = with_layers(model, uniform_layers(keep, model.config.num_hidden_layers))
    export_merged(student, load_tokenizer(str(folder)), output)


def fitted(module: Any, data: Any, callbacks: list[Any], folder: Path, **options: Any) -> float:
    """Seconds of a fit."""
    begun = time.perf_counter()
    trainer(folder, callbacks, **{**precision(), **options}).fit(module, data)
    return time.perf_counter() - begun


def scored(module: Any, data: Any, seconds: float, folder: Path) -> dict[str, Any]:
    """A cell: what the fit took, how large the model is, and what all validation and test rows say of it."""
    scores = vader_cells.judged(module, data, folder, **precision())
    parameters = sum(p.numel() for p in module.parameters())  # a model that nothing has trained is there since then
    return {"seconds": seconds, "parameters": parameters, "scores": scores}


def let_go() -> None:
    """Gives memory back between cells."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- sentences ----------------------------------------------------------------------------------------------------------------


@dataclass
class Sentences:
    """Teachers of clearly rated sentences, one a seed, and students of half their layers."""

    sizes: Sizes
    work: Path
    _files: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, str]:
        """Split -> file."""
        if not self._files:
            self._files = vader_cells.write_rows(self.work)
        return self._files

    def _job(self, base: str, train: str, rate: float) -> tuple[Any, Any]:
        module, data = vader_cells.encoder_job("classification", rate, {**self.files, "train": self.files[train]}, base)
        data.truncation = "keep_start"  # nothing that a real tokenizer makes of these sentences is so long
        return module, data

    def probe(self) -> dict[str, Any]:
        """Logistic regression on the mean hidden states of the encoder as it is: what its teacher has to beat."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        from lightning_ft.functional.prototypes import logistic_regression
        from lightning_ft.models import starter

        folder = starter.path(self.sizes.encoder) if self.sizes.encoder.startswith("starter:") else self.sizes.encoder
        model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        begun = time.perf_counter()
        features, labels = {}, {}
        for split in ("train", "val", "test"):
            rows = [json.loads(line) for line in Path(self.files[split]).read_text(encoding="utf-8").splitlines()]
            labels[split] = torch.tensor([int(row["label"] == "positive") for row in rows])
            features[split] = torch.cat(
                [_mean_states(model, tokenizer, rows[i : i + 64]) for i in range(0, len(rows), 64)]
            )
        right = {}
        for penalty in PROBE_PENALTIES:
            weight, bias = logistic_regression(features["train"], labels["train"], 2, penalty=penalty)
            said = {split: (features[split].double() @ weight.t() + bias).argmax(-1) for split in ("val", "test")}
            right[penalty] = {f"{s}/accuracy": float((said[s] == labels[s]).double().mean()) for s in said}
        best = max(right, key=lambda penalty: right[penalty]["val/accuracy"])
        return {"seconds": time.perf_counter() - begun, "penalty": best, "scores": right[best]}

    def teacher(self, seed: int) -> dict[str, Any]:
        """Tunes the whole encoder, and keeps it and its student's beginning."""
        import lightning.pytorch as pl
        from transformers import AutoModelForSequenceClassification

        from lightning_ft.formats.merged import export_merged

        pl.seed_everything(seed, verbose=False)
        module, data = self._job(self.sizes.encoder, "train", 1e-4)
        seconds = fitted(module, data, [], self.work, max_steps=self.sizes.teacher_steps, max_epochs=-1)
        found = scored(module, data, seconds, self.work)
        export_merged(module.model.cpu(), module.tokenizer, self.teacher_folder(seed))
        cut(
            self.teacher_folder(seed),
            self.sizes.encoder_layers,
            self.student_folder(seed),
            AutoModelForSequenceClassification,
        )
        return found

    def teacher_folder(self, seed: int) -> Path:
        """Where the tuned teacher of a seed is kept."""
        return self.work / f"sentences-teacher-{seed}"

    def student_folder(self, seed: int) -> Path:
        """Where its student begins."""
        return self.work / f"sentences-student-{seed}"

    def student(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """One student: the same blocks of the same teacher, the same steps, with or without what the teacher says."""
        import lightning.pytorch as pl

        if not (self.student_folder(seed) / "config.json").exists():
            self.teacher(seed)
        pl.seed_everything(seed, verbose=False)
        callbacks, train = SENTENCE_METHODS[method]
        module, data = self._job(str(self.student_folder(seed)), train, rate)
        made = callbacks(str(self.teacher_folder(seed)))
        seconds = fitted(module, data, made, self.work, max_steps=self.sizes.steps, max_epochs=-1)
        found = scored(module, data, seconds, self.work)
        let_go()
        return found

    def speed(self, turns: int = 5) -> dict[str, Any]:
        """Sentences a second of teacher and student, in turn; the median of a few."""
        seconds: dict[str, list[float]] = {"teacher": [], "student": []}
        sizes = {}
        judges = {}
        for who, folder in (("teacher", self.teacher_folder(0)), ("student", self.student_folder(0))):
            module, data = self._job(str(folder), "train", 1e-4)
            data.predict_path = self.files["test"]
            judges[who] = (trainer(self.work, [], **precision()), module, data)
        for turn in range(turns + 1):
            for who, (judge, module, data) in judges.items():
                begun = time.perf_counter()
                judge.predict(module, data)
                if turn:  # the first loads
                    seconds[who].append(time.perf_counter() - begun)
                sizes[who] = sum(p.numel() for p in module.parameters())
        rates = {f"{who}/rows_per_second": vader_cells.TEST / median(each) for who, each in seconds.items()}
        ratio = rates["student/rows_per_second"] / rates["teacher/rows_per_second"]
        return {"seconds": sum(map(sum, seconds.values())), "sizes": sizes, "scores": {**rates, "speed_up": ratio}}


def _mean_states(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    """(rows, width): hidden states of the last layer, their mean over a row's tokens."""
    import torch

    longest = model.config.max_position_embeddings
    batch = tokenizer(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    counted = batch["attention_mask"].unsqueeze(-1)
    return (states * counted).sum(1) / counted.sum(1)


def _taught(**settings: Any) -> Callable[[str], list[Any]]:
    def made(teacher: str) -> list[Any]:
        from lightning_ft import Distillation

        return [Distillation(teacher, **settings)]

    return made


SENTENCE_METHODS: dict[str, tuple[Callable[[str], list[Any]], str]] = {
    "alone": (lambda teacher: [], "train"),
    "soft targets": (_taught(temperature=TEMPERATURE), "train"),
    "distilbert": (_taught(recipe="distilbert"), "train"),
    "teacher alone": (_taught(temperature=TEMPERATURE, task=0.0), "train"),
    "unlabelled too": (_taught(temperature=TEMPERATURE, task=0.0), "more"),
    "states too": (_taught(temperature=TEMPERATURE, task=0.0, hidden=1.0, layers="uniform"), "more"),
}
"""Method -> its callbacks and the rows it is given. The last two never look at a label, so they may have all rows."""


# -- chats ----------------------------------------------------------------------------------------------------------------------


def write_chats(folder: Path, sizes: Sizes) -> dict[str, str]:
    """Split -> file of worked word problems and of one-word answers about rated sentences, shuffled with one seed."""
    import reasoning_gym

    from lightning_ft.data.vader import vader_rows

    val, test = sizes.held
    counts = {"train": (sizes.worked, sizes.rated), "val": (val, val), "test": (test, test)}
    total = sum(worked for worked, _ in counts.values())
    items = iter(reasoning_gym.create_dataset("gsm_symbolic", size=total, seed=0))
    worked = [_chat(item["question"], item["metadata"]["answer_cot"]) for item in items]
    rated = {split: vader_rows("train" if split == "train" else "test") for split in counts}
    rated["val"], rated["test"] = rated["val"][:val], rated["test"][val:]
    files, begin = {}, 0
    for split, (some, others) in counts.items():
        rows = worked[begin : begin + some] + [
            {k: r[k] for k in ("prompt", "completion")} for r in rated[split][:others]
        ]
        random.Random(0).shuffle(rows)
        files[split], begin = written(folder / f"chats-{split}.jsonl", rows), begin + some
    return files


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


CHAT_METHODS: dict[str, Callable[[str], list[Any]]] = {
    "alone": lambda teacher: [],
    "forward KL": _taught(divergence="forward_kl"),
    "reverse KL": _taught(divergence="reverse_kl"),
    "Jensen-Shannon": _taught(divergence="jensen_shannon"),
}
"""Each beside the answers themselves, at the same weight."""


@dataclass
class Chats:
    """A tuned decoder and students of a third of its layers."""

    sizes: Sizes
    work: Path
    _files: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, str]:
        """Split -> file."""
        if not self._files:
            self._files = write_chats(self.work, self.sizes)
        return self._files

    @property
    def teacher_folder(self) -> Path:
        """Where the tuned teacher is kept."""
        return self.work / "chats-teacher"

    @property
    def student_folder(self) -> Path:
        """Where its students begin."""
        return self.work / "chats-student"

    def _job(self, base: str, rate: float) -> tuple[Any, Any]:
        from lightning_ft import SFT, SFTData

        files = self.files
        data = SFTData(
            files["train"],
            val_path=files["val"],
            test_path=files["test"],
            batch_size=self.sizes.batch,
            loss_on="completion",
            seed=0,
        )
        return SFT(base, lr=rate), data

    def teacher(self) -> dict[str, Any]:
        """Tunes the whole decoder as long as its students are tuned, and keeps it with their beginning.

        By LoRA for one epoch it stayed behind the students that learned without it, and held the others back (NOTES.md).
        """
        import lightning.pytorch as pl
        from transformers import AutoModelForCausalLM

        from lightning_ft.formats.merged import export_merged

        pl.seed_everything(0, verbose=False)
        module, data = self._job(self.sizes.decoder, 3e-4)
        seconds = fitted(module, data, [], self.work, max_epochs=self.sizes.epochs)
        export_merged(module.model.cpu(), module.tokenizer, self.teacher_folder)
        cut(self.teacher_folder, self.sizes.decoder_layers, self.student_folder, AutoModelForCausalLM)
        return self._scored(module, data, seconds)

    def student(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """One student, trained whole."""
        import lightning.pytorch as pl

        if not (self.student_folder / "config.json").exists():
            self.teacher()
        pl.seed_everything(seed, verbose=False)
        module, data = self._job(str(self.student_folder), rate)
        data.seed = seed
        callbacks = CHAT_METHODS[method](str(self.teacher_folder))
        seconds = fitted(module, data, callbacks, self.work, max_epochs=self.sizes.epochs)
        found = self._scored(module, data, seconds)
        let_go()
        return found

    def untrained(self) -> dict[str, Any]:
        """The student as it begins."""
        if not (self.student_folder / "config.json").exists():
            self.teacher()
        return self._scored(*self._job(str(self.student_folder), 1e-4), 0.0)

    def _scored(self, module: Any, data: Any, seconds: float) -> dict[str, Any]:
        found = scored(module, data, seconds, self.work)
        return {**found, "scores": {**found["scores"], **self._agreement(module, data)}}

    def _agreement(self, module: Any, data: Any) -> dict[str, float]:
        """Share of the test rows' answer tokens where student and teacher hold the same token likeliest, and KL(q || p)."""
        import torch

        from lightning_ft.engine.scoring import scored_hidden
        from lightning_ft.engine.teacher import load_teacher, origin_of

        at = torch.device(measure.device())
        view, frozen = load_teacher(origin_of(str(self.teacher_folder)), "causal_lm", packing=True, device=at)
        module.to(at).eval()
        same = count = 0
        divergence = 0.0
        with torch.no_grad(), frozen.on(at):
            for batch in data.test_dataloader():
                batch = batch.to(at)
                theirs = scored_hidden(view, batch)
                own = module.view.score(
                    scored_hidden(module.view, batch),
                    batch.labels,
                    outputs=("argmax", "forward_kl"),
                    other=lambda rows, theirs=theirs: view.logits(theirs[rows]),
                )
                other = view.score(theirs, batch.labels, outputs=("argmax", "logprob"))
                same += int((own["argmax"] == other["argmax"]).sum())
                divergence += float(own["forward_kl"].double().sum())
                count += len(batch.labels)
        return {"test/agreement": same / count, "test/kl": divergence / count, "test/tokens": float(count)}
