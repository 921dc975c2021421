"""A data module that consists of others, and is asked what they would be."""

from __future__ import annotations

from abc import abstractmethod

import lightning.pytorch as pl
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.named_files import Split
from lightning_ft.data.planned import PlannedData
from lightning_ft.data.preview import Preview
from lightning_ft.functional.errors import Refusal


class MadeOfModules(pl.LightningDataModule):
    """What is asked of all of its data modules; subclasses name them in `_modules`."""

    @abstractmethod
    def _modules(self) -> dict[str, pl.LightningDataModule]:
        """The data modules that were given, by name."""

    def resolved_task(self) -> str | None:
        """What the rows are for, where the data modules say so."""
        asked = [getattr(data, "resolved_task", None) for data in self._modules().values()]
        found = {ask() for ask in asked if callable(ask)}
        if len(found) > 1:
            raise Refusal(
                f"{type(self).__name__}'s tasks are of several kinds, {', '.join(sorted(found))}; one module learns one."
            )
        return found.pop() if found else None

    def label_names(self) -> list[str] | None:
        """Names of the classes of all tasks, those of the first task first; None where there are none."""
        names: dict[str, None] = {}
        for data in self._modules().values():
            asked = getattr(data, "label_names", None)
            if callable(asked) and (given := asked()) is not None:
                names |= dict.fromkeys(given)
        return list(names) or None

    def multi_label(self) -> bool:
        """Whether a row may have several classes."""
        return any(data.multi_label() for data in self._modules().values() if hasattr(data, "multi_label"))

    @property
    def packing(self) -> bool | None:
        """As the data modules have it: one that packs is enough to need a model that can."""
        return any(getattr(data, "packing", False) for data in self._modules().values())

    def check_files(self, stage: str | None = None) -> None:
        """Reads every file that the stage needs, and refuses what is wrong with it; needs neither model nor tokenizer."""
        for data in self._modules().values():
            if hasattr(data, "check_files"):
                data.check_files(stage)
        _ = self.resolved_task()

    def prepare_data(self) -> None:
        """Each data module's own."""
        for data in self._modules().values():
            data.trainer = self.trainer
            data.prepare_data()

    def teardown(self, stage: str) -> None:
        """The data modules' own; what calls the hooks leaves the Trainer in its own teardown."""
        for data in self._modules().values():
            data.teardown(stage)

    def preview(self, n: int = 3, split: Split = "train") -> list[Preview]:
        """The first rows of the first data module as the model will see them."""
        for data in self._modules().values():
            if isinstance(data, PlannedData):
                return data.preview(n, split)
        return []

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes this tokenizer where none was given by name and no trainer leads to a module."""
        for data in self._modules().values():
            if isinstance(data, PlannedData):
                data.use_tokenizer(tokenizer)


__all__ = ["MadeOfModules"]
