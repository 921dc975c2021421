"""What data of prompts with given answers share: how their rows are read, and who may learn from them."""

import copy
from typing import Any

from lightning_ft.data.answered_rows import AnsweredRows
from lightning_ft.data.loader import PlannedLoader
from lightning_ft.data.mixture import MixedRows, mixed
from lightning_ft.data.named_files import Split
from lightning_ft.data.preference_tokens import Read
from lightning_ft.data.shared_prompts import SharedPrompts
from lightning_ft.data.sources import Source, open_source
from lightning_ft.data.token_rows import TokenRows
from lightning_ft.functional.errors import Refusal


class AnsweredData(SharedPrompts):
    """Prompts with answers; a subclass defines `_reader` beside what `PlannedData` asks for."""

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokenised rows of this stage, after asking whether the module learns what they teach."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        if getattr(module, "imitates", False):
            raise Refusal(
                f"{type(module).__name__} learns every answer that it is given, and {type(self).__name__} has answers that are not "
                "to be learned: take a preference module, such as DPO, or SFTData."
            )
        super().setup(stage)

    def _reader(self, source: Source) -> Read:
        """What says what a row of this source is.

        Raises:
            Refusal: its columns are not those needed.
        """
        raise Refusal(f"{type(self).__name__} does not say what a row is; define _reader(source).")

    def _check(self, source: Source) -> None:
        read = self._reader(source)
        try:
            read(source.first)
        except Refusal as refusal:
            if self.bad_rows == "error":
                raise Refusal(f"{source.where(0)}: {refusal}") from None

    def _open(self, path: str) -> Source:
        return open_source(path, any_columns=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lets the module add what it knows of the rows while their tokens are in main memory."""
        annotate = getattr(self.trainer.lightning_module, "annotate", None) if self.trainer is not None else None
        return annotate(batch) if annotate is not None else batch

    def rows_of(self, path: str) -> PlannedLoader:
        """The rows of another file in its order, read, laid out and dealt as these are: to measure something on them."""
        other = copy.copy(self)
        other.test_path, other._rows = path, {}
        return other._eval_loader("test")

    def _get(self, split: Split) -> TokenRows | MixedRows:
        rows, shared = super()._get(split), self.shares_prompts
        why_not = "" if self.packing is False or self.share_prompts is False else self._why_not
        parts = rows.parts if isinstance(rows, MixedRows) else (rows,)
        found = mixed([part.sharing(shared, why_not) for part in parts if isinstance(part, AnsweredRows)])
        longest = int(found.lengths.max())
        if self.max_tokens is not None and longest > self.max_tokens:
            raise Refusal(
                f"A row of {type(self).__name__} takes {longest} tokens, its prompt {'once' if shared else 'for each answer'}, "
                f"which do not fit into max_tokens {self.max_tokens}: raise max_tokens, or lower max_length with truncation drop."
            )
        return found

    def _deal(self) -> dict[str, Any]:
        # Bins hold as many rows as their tokens allow, of which a shared prompt is part once.
        bins = {"share_prompts": self.shares_prompts} if self.max_tokens is not None else {}
        return {**super()._deal(), **bins}
