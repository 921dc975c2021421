"""Exact match, BLEU and ROUGE-L of the model's own answers to validation rows."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from annotated_types import Ge
from torchmetrics import MeanMetric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SacreBLEUScore

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.generation import fits, prompts_and_references
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Cannot, Traits
from lightning_ft.functional.errors import Refusal


class GenerationMetrics(Technique):
    """Lets the model answer validation rows by itself and compares its answers with those in the data.

    A loss is measured with the right answer so far in view; this is not. Each row is continued from before its last answer, taking
    the most likely token, and compared as text, without special tokens and outer white space.

    Args:
        rows: how many validation rows, the first ones, over all ranks together; 32 shows a trend, a table needs hundreds.
        max_new_tokens: at most so many tokens an answer; longer references can then not be matched.
        batch_size: rows that are generated at once.
        name: tells two of them apart; any other than ``generation`` becomes part of the logged names.

    Logs:
        ``val/exact_match`` (share of equal answers), ``val/bleu`` (SacreBLEU of all answers together, 13a tokens, 0 to 1),
        ``val/rougeL`` (mean F of the longest common subsequence of words); likewise under ``test/``.

    A row whose prompt leaves no room for the answer in the model's context is left out. A module of your own with batches of its
    own defines ``prompts_and_references(batch)``, a list of (prompt for generate, expected text).

    Cost: generation of ``rows`` answers at each validation.

    Raises:
        Refusal: at setup for a module without ``generate``; at the first validation batch that no prompts can be read from.

    Example:
        >>> GenerationMetrics(64, max_new_tokens=16)
        GenerationMetrics(rows=64, max_new_tokens=16)
    """

    traits: ClassVar[Traits] = Traits(
        slot="generation",
        edits=frozenset({"nothing"}),
        needs=frozenset({"generator"}),
        cannot=(
            Cannot(
                "fsdp2",
                "its sharded weights are only gathered inside a step",
                "train without it and run `lightning-ft validate` with it on the checkpoint",
            ),
        ),
    )

    def __init__(
        self,
        rows: Annotated[int, Ge(1)] = 32,
        *,
        max_new_tokens: Annotated[int, Ge(1)] = 64,
        batch_size: Annotated[int, Ge(1)] = 16,
        name: str = "generation",
    ) -> None:
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.name = name
        self._pairs: list[tuple[Any, str]] = []
        self.check()

    def register(self, attachment: Attachment) -> None:
        """Edits nothing; needs a module that generates."""
        if not callable(getattr(attachment.module, "generate", None)):
            raise Refusal(
                f"GenerationMetrics needs a module with generate(prompts, ...), and {type(attachment.module).__name__} has none; "
                "define it, or leave the callback out."
            )
        module = attachment.module
        several = getattr(module, "trains_several_tasks", False)  # whose rows have no one answer
        if several or not getattr(module, "writes", True):
            what = getattr(module, "task", None) or type(module).__name__
            raise Refusal(f"GenerationMetrics compares texts, and {what} writes none; leave the callback out.")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to collect."""
        self._pairs = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the batch's rows until there are enough; the sanity check before training takes none."""
        if not trainer.sanity_checking:
            self._take(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answers and compares."""
        if not trainer.sanity_checking:
            self._log_scores(pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As for a validation."""
        self._pairs = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As for a validation."""
        self._take(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As for a validation."""
        self._log_scores(pl_module, "test")

    def _take(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        share = -(-self.rows // trainer.world_size)
        if len(self._pairs) >= share:
            return
        own = getattr(module, "prompts_and_references", None)
        if own is not None:
            self._pairs += own(batch)
        elif isinstance(batch, Batch) and (batch.targets is None or hasattr(module, "good_answers")):
            good = module.good_answers(batch) if hasattr(module, "good_answers") else None
            self._pairs += [
                (prompt, module.tokenizer.decode(reference, skip_special_tokens=True))
                for prompt, reference in prompts_and_references(batch, good)
                if not hasattr(module, "model") or fits(module.model, len(prompt), self.max_new_tokens)
            ]
        else:
            raise Refusal(
                f"GenerationMetrics cannot tell prompts from answers in a {type(batch).__name__} of this job; define "
                "prompts_and_references(batch) in the module, or leave the callback out."
            )
        del self._pairs[share:]

    def _answers(self, module: Any) -> Iterator[tuple[str, str]]:
        for begin in range(0, len(self._pairs), self.batch_size):
            prompts, references = zip(*self._pairs[begin : begin + self.batch_size], strict=True)
            answers = module.generate(list(prompts), max_new_tokens=self.max_new_tokens, temperature=0.0)
            yield from ((a.strip(), r.strip()) for a, r in zip(answers, references, strict=True))

    def _log_scores(self, module: pl.LightningModule, stage: str) -> None:
        # Sums and counts, which add up over ranks with any number of rows.
        exact, rouge, bleu = MeanMetric(), MeanMetric(), SacreBLEUScore()
        for metric in (exact, rouge, bleu):
            metric.to(module.device)
        pairs = list(self._answers(module))
        same = torch.tensor([float(answer == reference) for answer, reference in pairs], device=module.device)
        exact.update(same)
        overlaps = [rouge_score(a, r, rouge_keys="rougeL")["rougeL_fmeasure"] for a, r in pairs]
        rouge.update(torch.tensor([float(overlap) for overlap in overlaps], device=module.device))
        bleu.update([answer for answer, _ in pairs], [[reference] for _, reference in pairs])
        prefix = stage if self.name == self.traits.slot else f"{stage}/{self.name}"
        ranks = module.trainer.world_size > 1
        for name, metric in (("exact_match", exact), ("bleu", bleu), ("rougeL", rouge)):
            # compute() has reduced over ranks already; they all have one value.
            module.log(f"{prefix}/{name}", metric.compute(), prog_bar=name == "exact_match", sync_dist=ranks)
        self._pairs = []
