"""A data module's own hooks around the transfer of a batch, called by the stream on the one whose batch it is.

Lightning asks one data module for them, the stream, which knows whose rows come. Where that one has no such hook, the module's
own is called, as in a run without a stream. Rows that are replayed are kept as the step saw them, and pass no hook again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_ft.data.made_of_modules import MadeOfModules
from lightning_ft.data.planned import PlannedData
from lightning_ft.functional.errors import Refusal

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def lend_hooks(stream: MadeOfModules, owner: Callable[[int], pl.LightningDataModule], *, joint: bool) -> None:
    """Gives the stream the hooks that its data modules have.

    Args:
        stream: set up; `return_hooks` takes them away again.
        owner: number of a loader -> the data module whose batch comes now.
        joint: whether one batch holds rows of several.

    Raises:
        Refusal: a user's hook where nobody knows whose rows a batch has.
    """
    return_hooks(stream)
    modules = list(stream._modules().values())
    for hook in _HOOKS:
        having = [data for data in modules if is_overridden(hook, data)]
        if not having:
            continue
        users = [data for data in having if not isinstance(data, PlannedData)]
        if joint and len(modules) > 1 and users:
            raise Refusal(
                f"TaskStream.baseline joint has batches of rows of all tasks, and {hook} is one of {type(users[0]).__name__} "
                "alone; define it in the LightningModule, or do its work in the collate_fn."
            )
        stream.__dict__[hook] = _lent(hook, stream, owner)


def _lent(hook: str, stream: MadeOfModules, owner: Callable[[int], pl.LightningDataModule]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:  # the number of the loader comes last
        data, trainer = owner(given[-1]), stream.trainer
        assert trainer is not None
        return getattr(data if is_overridden(hook, data) else trainer.lightning_module, hook)(*given)

    return call


def return_hooks(stream: MadeOfModules) -> None:
    """Takes from the stream what `lend_hooks` gave."""
    for hook in _HOOKS:
        stream.__dict__.pop(hook, None)


__all__ = ["lend_hooks", "return_hooks"]
