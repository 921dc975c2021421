"""The base of episode modules that compare embeddings of rows, and adapt nothing inside the model."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.episode_module import EpisodeModule
from lightning_ft.engine.freezing import LOWER
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.load_task import head_names
from lightning_ft.nn.task_head import pool_rows

Pooling = Literal["mean", "first", "last"]


class EmbeddingModule(EpisodeModule):
    """Subclasses store ``pooling``; a base is loaded with a head that nobody asks, and which is not trained."""

    pooling: Pooling

    def check(self) -> None:
        """Refuses arguments out of bounds; the number of classes is each episode's own."""
        super().check()
        self.task = "regression"
        self.way = None

    @property
    def asks_for(self) -> str:
        """Classes, though the base is loaded under a head of one output."""
        return "classes"

    def _classes(self) -> tuple[list[str] | None, bool]:
        return None, False

    def register(self, attachment: Attachment) -> None:
        """The base's own edits; the head, and a pooler that only the head would ask, stay as they are."""
        super().register(attachment)
        if self.base is not None:
            attachment.edit("freeze", "no head", lambda module: self._freeze_head(), order=LOWER + 1)

    def _freeze_head(self) -> None:
        unused = head_names(self.model)
        for name, parameter in self.model.named_parameters():
            if name in unused or "pooler" in name.split("."):
                parameter.requires_grad_(False)

    def embed(self, inputs: Tensor | Batch) -> Tensor:
        """Embeddings of rows: (S, D) in fp32; of texts the mean (first, last) of the last hidden states."""
        if not isinstance(inputs, Batch):
            return self(inputs).flatten(1).float()  # type: ignore[no-any-return]
        if self.base is None:
            raise Refusal(
                f"{type(self).__name__}.net takes tensors, and these episodes are texts; give a base instead."
            )
        view, rows = self.view, self.laid(inputs)
        typed = view._typed(rows.types)
        hidden = view.hidden(rows.ids, rows.positions, bounds=rows.bounds, mask=rows.mask, **typed)
        return pool_rows(hidden.float(), bounds=rows.bounds, mask=rows.mask, how=self.pooling)

    def _measured(self) -> list[str]:
        return ["loss", "accuracy"]


__all__ = ["EmbeddingModule", "Pooling"]
