"""`lightning_ft.adapt`: what was meta-learned, and a few examples of a new task -> a model of that task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_ft.data.collate_labelled import collate_labelled
from lightning_ft.data.episode_data import EpisodeData
from lightning_ft.data.frames import Frame
from lightning_ft.data.labels import columns_of
from lightning_ft.data.number_tasks import text_segment
from lightning_ft.data.preference_rows import is_paired, wrong_columns
from lightning_ft.data.prefixes import plain_ids
from lightning_ft.data.sources import open_source
from lightning_ft.data.text_tasks import reader_of, rows_of_file
from lightning_ft.data.token_rows import Truncation
from lightning_ft.engine.adapting import AdaptingModule
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.checkpoints import kept_keys
from lightning_ft.engine.episode_tasks import KINDS
from lightning_ft.engine.loading import of_kind, read_checkpoint, read_recipe
from lightning_ft.engine.scoring import row_logits
from lightning_ft.functional.errors import Refusal
from lightning_ft.load import load
from lightning_ft.modules.reward_model import RewardModel
from lightning_ft.modules.sft import SFT

CHECKPOINT = "adapted.ckpt"


def adapt(
    path: str | Path,
    support: str | Path,
    *,
    steps: int | None = None,
    base: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    cache_dir: str | None = None,
) -> SFT | RewardModel:
    """A model of a new task: the start of a `MAML` or `Reptile` checkpoint after its inner steps on your examples.

    Args:
        path: a checkpoint of a fit of `MAML` or `Reptile` over a base.
        support: your examples: JSON lines, CSV ... with ``text`` and ``label``, which has no more classes than the episodes had,
            or a number (``task: regression``); ``tokens`` and ``tags`` (token_classification); of answers to write the columns of
            `SFTData` or, for an encoder-decoder, ``prompt`` and ``completion``; of pairs (reward, dpo) ``prompt``, ``chosen`` and
            ``rejected``.
        steps: of the inner loop; None: as many as in training.
        base: another place of the same base model.
        text_column: where the text is; None: ``text``, of tags ``tokens``. For classes, numbers and tags.
        label_column: where the class is; None: ``label``, of tags ``tags``. For classes, numbers and tags.
        max_length: most tokens of a text; None: as in training. Longer ones are cut at the end that training cut, and refused where
            it cut none (``truncation`` was ``error`` or ``drop``) or where answers are learned.
        cache_dir: where tokenised rows are kept, as in `EpisodeData`.

    Returns:
        An `SFT` with your classes (tags) as its labels, of numbers, or of a language model; a `RewardModel` where rewards were
        learned. In eval mode: to predict, generate, save (`save`), merge, export, or train on.

    Raises:
        Refusal: another kind of checkpoint, a net without a base, too many classes, or unfit examples.

    Example::

        module = lightning_ft.adapt("runs/maml_lora_text/checkpoints/last.ckpt", "my_20_examples.jsonl")
    """
    recipe = adapting_recipe(path)
    trained_length, truncation = cut_of(path)
    max_length = trained_length if max_length is None else max_length
    truncation = "error" if truncation == "drop" else truncation  # an example of few is not left out without a word
    task = recipe["init_args"].get("task", "sequence_classification")
    asks = KINDS[task].asks
    if asks in ("answers", "pairs") and (text_column is not None or label_column is not None):
        raise Refusal(
            f"text_column and label_column are of examples with classes, and this checkpoint learned to {KINDS[task].learns}; "
            "leave them out."
        )
    # What can be told without the base is refused before it is loaded.
    cut: dict[str, Any] = {"max_length": max_length, "truncation": truncation}
    data = EpisodeData(str(support), text_column=text_column, label_column=label_column, cache_dir=cache_dir, **cut)
    columns = None
    if asks == "answers":
        open_source(str(support))
    elif asks == "pairs":
        source = open_source(str(support), any_columns=True)
        if not is_paired(source.columns):
            raise wrong_columns(str(support), source.columns, ("chosen", "rejected"), "prompt, chosen and rejected")
    elif asks in ("numbers", "tags"):
        source = open_source(str(support), any_columns=True)
        columns = columns_of(source, task, text_column, None, label_column, labelled=True)
    elif data.folders:
        raise Refusal(f"{support} holds images or tensors, and a base reads texts; give a file of texts and labels.")
    else:
        data.check_tables("fit")
    meta: AdaptingModule = load(path, base=base)
    labels: list[str] | None
    if asks == "classes":
        data.use_tokenizer(meta.tokenizer)
        rows, labels = data.everything()
    else:
        if asks in ("answers", "pairs"):  # what is cut of an answer would be learned
            cut["truncation"] = "error"
        reader = reader_of(
            asks, meta.tokenizer, **cut, way=None, config=meta.model.config, judged=task == "reward", columns=columns
        )
        rows, labels = rows_of_file(str(support), reader)
    if labels is not None:
        meta.keep_classes_(len(labels))
    meta.adapt_(rows, steps=steps)
    return _plain(meta, labels)


def adapting_recipe(path: str | Path) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of the module of a checkpoint, which has an inner loop over a base.

    Raises:
        Refusal: it has none, it has a net, or there is no such checkpoint.
    """
    recipe = read_recipe(Path(path).expanduser())
    if not of_kind(recipe, AdaptingModule):
        name = recipe.get("class_path", "a LightningModule of your own").rpartition(".")[2]
        raise Refusal(f"{path} was written by {name}, which has no inner loop; give a checkpoint of MAML or Reptile.")
    if recipe["init_args"].get("base") is None:
        name = recipe["class_path"].rpartition(".")[2]
        raise Refusal(
            f"{path} was learned by a net, and adapt makes a model of texts; in Python call module = lightning_ft.load(path, "
            f"module={name}(net=...)) and module.adapt_((x, y))."
        )
    return recipe


def cut_of(path: str | Path) -> tuple[int | None, Truncation]:
    """Most tokens of a text in the run that wrote a checkpoint, and what became of longer ones.

    Where it does not say, they are the defaults of `EpisodeData`.
    """
    data = read_checkpoint(Path(path).expanduser(), mapped=True).get(EpisodeData.__qualname__, {})
    defaults = signature(EpisodeData).parameters
    length, truncation = (data.get(name, defaults[name].default) for name in ("max_length", "truncation"))
    return length, truncation


def _plain(meta: AdaptingModule, labels: list[str] | None) -> SFT | RewardModel:
    """The same model under the module of ordinary fine-tuning, weights copied."""
    same: dict[str, Any] = {
        "base_dtype": meta.base_dtype,
        "attention": meta.attention,
        "trust_remote_code": meta.trust_remote_code,
        "revision": meta.revision,
        "quantize": meta.quantize,
    }
    asked: str = meta.task
    found: SFT | RewardModel = (
        RewardModel(meta.base, **same) if asked == "reward" else SFT(meta.base, task=meta.loads, labels=labels, **same)
    )
    given = Attachment.of(meta)
    techniques = [type(one)(**one.resolved_arguments()) for one in given.techniques]
    Attachment.of(found).rebuild(techniques, seed=given.seed)
    theirs, own = meta.state_dict(keep_vars=True), found.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in kept_keys(found):
            if name.startswith("model."):
                own[name].copy_(theirs[name])
    found.eval()
    return found


def save(module: SFT | RewardModel, folder: str | Path) -> Path:
    """Writes an adapted model as a checkpoint in a folder, which `lightning_ft.load`, merge and export read."""
    path = Path(folder) / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(path, weights_only=True)
    return path


@torch.no_grad()
def classify(
    module: SFT,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = 128,
    keep_end: bool = False,
) -> Iterator[tuple[str, float]]:
    """The most likely class of each text, and its probability; texts are framed, cut and padded as those adapted on were.

    Args:
        module: an adapted classifier.
        texts: any number.
        batch_size: texts at once.
        max_length: most tokens of a text, as for `adapt`; longer ones are cut. None: as many as the model can read.
        keep_end: cut them at their start.
    """
    frame, labels = Frame.of(module.tokenizer, pair=False), module.view.labels
    room = min(max_length or _longest(module), _longest(module)) - frame.size
    for begin in range(0, len(texts), batch_size):
        chosen = texts[begin : begin + batch_size]
        ids = plain_ids(module.tokenizer, chosen)
        numbered = enumerate(chosen, start=begin)
        segments = [text_segment(frame, ids[text], room, row=at, keep_end=keep_end) for at, text in numbered]
        # Padded on the right, whatever side the tokenizer pads: the last token of a row is what a decoder classifies by.
        for line in row_logits(module.view, collate_labelled(segments, packed=False)).softmax(-1):
            number = int(line.argmax())
            yield labels[number], float(line[number])


def _longest(module: SFT) -> int:
    """Most tokens that the model can read."""
    return int(getattr(module.view.config, "max_position_embeddings", None) or 512)


__all__ = ["CHECKPOINT", "adapt", "adapting_recipe", "classify", "cut_of", "save"]
