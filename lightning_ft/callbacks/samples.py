"""What the model answers to a few prompts, before training, after each validation, and at the end."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
from annotated_types import Ge

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Cannot, Traits
from lightning_ft.functional.errors import Refusal


class SampleGenerations(Technique):
    """Writes the model's answers to your prompts into ``samples.jsonl``, so that you see what training changes.

    Args:
        prompts: what to ask; each is sent as one user message where the tokenizer has a chat template.
        max_new_tokens: at most so many tokens an answer; 64 shows the style without slowing validation.
        temperature: 0 takes the most likely token, which makes steps comparable; above, samples.
        chat: wrap prompts as chat messages; false continues them as plain text.
        task: of `MultiTask` with adapters of single tasks: which of several that write texts answers; None: the one that does.
        name: tells two of them apart.

    Cost: one batch of generation at the start, after each validation, and at the end, on rank 0.

    Raises:
        Refusal: for no prompts here; at setup for a module without ``generate``, for a task that writes no text, and where it is
            not said which of several answers.

    Example:
        >>> SampleGenerations(["What is the capital of France?"], max_new_tokens=8)
        SampleGenerations(prompts=['What is the capital of France?'], max_new_tokens=8)
    """

    traits: ClassVar[Traits] = Traits(
        slot="samples",
        edits=frozenset({"nothing"}),
        needs=frozenset({"generator"}),
        cannot=(
            Cannot(
                "fsdp2",
                "its sharded weights are only gathered inside a step",
                "train without it and use `lightning-ft generate` on the checkpoint",
            ),
        ),
    )

    def __init__(
        self,
        prompts: list[str],
        *,
        max_new_tokens: Annotated[int, Ge(1)] = 64,
        temperature: Annotated[float, Ge(0)] = 0.0,
        chat: bool = True,
        task: str | None = None,
        name: str = "samples",
    ) -> None:
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.chat = chat
        self.task = task
        self.name = name
        self.check()
        if not prompts:
            raise Refusal("SampleGenerations.prompts is empty; give at least one prompt.")

    def register(self, attachment: Attachment) -> None:
        """Edits nothing; needs a module that generates."""
        if not callable(getattr(attachment.module, "generate", None)):
            raise Refusal(
                f"SampleGenerations needs a module with generate(prompts, ...), and {type(attachment.module).__name__} has none; "
                "define it, or leave the callback out."
            )
        speaker = getattr(attachment.module, "speaker", None)
        if self.task is not None and not callable(speaker):
            what = type(attachment.module).__name__
            raise Refusal(f"SampleGenerations.task chooses a task of MultiTask, and {what} has none; leave it out.")
        # Refused on all ranks: only rank 0 samples, and the others would wait for it for ever.
        if not getattr(attachment.module, "writes", True):
            what = getattr(attachment.module, "task", None) or type(attachment.module).__name__
            raise Refusal(f"SampleGenerations shows texts, and {what} writes none; leave the callback out.")
        if callable(speaker) and attachment.module._trainer is not None:
            speaker(self.task, {t.instance_name for t in attachment.techniques if "model" in t.traits.edits})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The answers before the first step."""
        super().on_train_start(trainer, pl_module)
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The answers at a validation inside training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The answers at the end, unless a validation has just written them."""
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        file = self._file(trainer)  # asked on every rank, since Lightning broadcasts the folder
        if not trainer.is_global_zero or self._written(file, trainer.global_step):
            return
        module: Any = pl_module  # `register` has proven that it generates
        tokenizer = module.tokenizer
        chat = self.chat and bool(getattr(tokenizer, "chat_template", None))
        prompts = [[{"role": "user", "content": p}] if chat else p for p in self.prompts]
        which = {} if self.task is None else {"task": self.task}
        with Attachment.of(pl_module).evaluated():
            answers = module.generate(
                prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, **which
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as out:
            for prompt, answer in zip(self.prompts, answers, strict=True):
                row = {"step": trainer.global_step, "prompt": prompt, "answer": answer}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _file(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir) / f"{self.name}.jsonl"

    def _written(self, file: Path, step: int) -> bool:
        """Whether the file's last line is already of this step (a resumed run, or a validation right before the end)."""
        if not file.exists():
            return False
        lines = file.read_text(encoding="utf-8").splitlines()
        return bool(lines) and json.loads(lines[-1]).get("step") == step
