"""NEFTune: noise on the input embeddings while training."""

import zlib
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.batch import Batch
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Cannot, Traits
from lightning_ft.functional.embedding_noise import row_generator, uniform_noise
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.registry import innermost, pristine_modules


class NEFTune(Technique):
    """Adds uniform noise to the embeddings of the input tokens while training, which makes answers of chat models fuller.

    ``x <- x + U(-1, 1) alpha / sqrt(L D)`` for each row: L its number of tokens (in packed rows each segment's own), D the width
    of the embeddings. Evaluation, generation and references see no noise, and weights are not touched.

    Args:
        alpha: size of the noise; 5 is the smallest the paper tried (5, 10, 15), and 0 turns it off. Raise it for short data.
        target: name of the module whose output gets the noise; None takes a Hugging Face model's input embeddings, or the only
            embedding of your own module.
        name: tells two of them apart.

    The noise depends on (seed, optimizer step, row of the data), so batch size, packing, accumulation and ranks do not change it on
    a CPU, and a resumed run draws the same. In a module of your own with batches of your own, L is the whole padded row, and the
    noise depends on (seed, batch, rank).

    Cost: one addition to the embeddings.

    Raises:
        Refusal: at setup, when there is no embedding to add it to, or several.

    Example:
        >>> NEFTune(10.0)
        NEFTune(alpha=10.0)

    References:
        Jain et al., 2024, algorithm 1. Proven against the formula in tests/functional and tests/callbacks.
    """

    traits: ClassVar[Traits] = Traits(
        slot="neftune",
        edits=frozenset({"data"}),
        needs=frozenset({"embedding"}),
        cannot=(
            Cannot(
                "episodes",
                "its noise belongs to the rows of a batch, and an inner step passes over rows again",
                "leave it out",
            ),
        ),
    )

    def __init__(
        self, alpha: Annotated[float, Ge(0)] = 5.0, *, target: str | None = None, name: str = "neftune"
    ) -> None:
        self.alpha = alpha
        self.target = target
        self.name = name
        self._batch: Any = None  # what is trained on at this moment; no noise without it
        self._key: tuple[int, ...] = ()
        self.check()

    def register(self, attachment: Attachment) -> None:
        """Hooks the embedding for this run."""

        def hook(module: pl.LightningModule) -> None:
            if not attachment.installed:
                return  # `lightning_ft.load` only rebuilds what was trained
            for embedding in self._embeddings(module):
                handle = embedding.register_forward_hook(self._noised, with_kwargs=True)
                attachment.on_leave(handle.remove)

        attachment.on_leave(self._forget)
        attachment.edit("hooks", f"neftune:{self.name}", hook, again=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on there is noise."""
        self._batch = batch
        self._key = (Attachment.of(pl_module).seed, trainer.global_step, zlib.crc32(self.name.encode()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Until here: what runs between batches (a validation, samples) sees none."""
        self._forget()

    def _forget(self) -> None:
        self._batch = None

    def _embeddings(self, module: pl.LightningModule) -> list[nn.Module]:
        """The modules, with what was injected around them, whose outputs get the noise."""
        root = model_root(module)[1]
        present = {name: place for name, (_, place) in pristine_modules(root).items()}
        if self.target is not None:
            if self.target not in present:
                raise Refusal(
                    f"NEFTune.target names {self.target!r}, which the model does not have; name a module of it."
                )
            return [present[self.target]]
        found = {name: place for name, place in present.items() if isinstance(innermost(place), nn.Embedding)}
        if isinstance(root, PreTrainedModel):
            weight = getattr(innermost(root.get_input_embeddings()), "weight", None)
            # An encoder and a decoder may each have a module of its own around one weight.
            found = {name: place for name, place in found.items() if innermost(place).weight is weight}
        elif len(found) > 1:
            raise Refusal(
                f"NEFTune found {len(found)} embeddings in {type(module).__name__} ({', '.join(sorted(found)[:3])}); "
                "say which one by target."
            )
        if not found:
            raise Refusal(
                f"NEFTune found no input embedding in {type(root).__name__}; name the module whose output gets the noise by "
                "target, or leave the technique out."
            )
        return list(found.values())

    def _noised(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """A forward hook: the embeddings (B, T, D) with noise, or as they are."""
        if self._batch is None or not self.alpha or not torch.is_grad_enabled():
            return None
        ids = args[0] if args else next(iter(kwargs.values()), None)
        rows = _layout(self._batch, ids) if isinstance(self._batch, Batch) else None
        if rows is None:
            noise = uniform_noise(
                output.numel() // output.shape[-1],
                output.shape[-1],
                alpha=self.alpha,
                length=output[0].numel() // output.shape[-1],
                device=output.device,
            )
        else:
            noise = torch.cat([self._row_noise(*row, output) for row in rows])
        return output + noise.view_as(output).to(output.dtype)

    def _row_noise(self, key: tuple[int, int], length: int, tokens: int, elsewhere: int, output: Tensor) -> Tensor:
        generator = row_generator(output.device, *self._key, *key)
        noise = uniform_noise(
            tokens, output.shape[-1], alpha=self.alpha, length=length, generator=generator, device=output.device
        )
        noise[length:] = 0  # padding stays as it is
        return noise[elsewhere:]  # (tokens - elsewhere, D)


def _layout(batch: Batch, ids: Any) -> list[tuple[tuple[int, int], int, int, int]] | None:
    """((row of the data, side), its length, tokens with padding, tokens that another row holds) of each row; or None.

    None when ``ids`` are not the batch's. A row whose beginning another one holds is as long as the whole of it.

    Models look the batch's own ids up, perhaps through a view, so it is told by their memory, without a look at the numbers.
    """
    sides = [(batch.ids, batch.mask)]
    if batch.source is not None:
        sides.append((batch.source.ids, batch.source.mask))
    for side, (own, mask) in enumerate(sides):
        if not isinstance(ids, Tensor) or ids.data_ptr() != own.data_ptr() or ids.numel() != own.numel():
            continue
        keys = [(row, side) for row in batch.rows.tolist()]
        if mask is not None:
            return [(key, int(n), own.shape[1], 0) for key, n in zip(keys, mask.sum(1).tolist(), strict=True)]
        if batch.bounds is not None:
            before = [seen[1] if seen else 0 for seen in batch.shared or (None,) * len(keys)]
            whole = [e - s + b for s, e, b in zip(batch.bounds, batch.bounds[1:], before, strict=False)]
            return [(key, n, n, b) for key, n, b in zip(keys, whole, before, strict=True)]
    return None
