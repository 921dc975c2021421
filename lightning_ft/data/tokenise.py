"""Rows -> token ids and spans on disk, once: memory-mapped, found again by content.

The cache holds whole rows; lengths are cut afterwards (token_rows.py), so that another ``max_length`` costs nothing.
Its key is made of the file's content, the tokenizer with its template, and what is made of the rows.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.chat import LossOn, require_template, resolve_loss_on
from lightning_ft.data.sources import Source
from lightning_ft.data.spans import render_rows
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.starter import cache_folder

_FORMAT = 3  # of the cached table and of the rules that made it: raise it when either changes
_COLUMNS = {
    "ids": datasets.Sequence(datasets.Value("int32")),
    "length": datasets.Value("int32"),
    "row": datasets.Value("int64"),  # number in the source
    "problem": datasets.Value("string"),  # why the row is unfit; such a row has length 0
}
_SFT_COLUMNS = {
    "spans": datasets.Sequence(datasets.Value("int32")),  # start, end, start, end ...
    "scored": datasets.Value("int32"),
}

Render = Callable[[list[dict[str, Any]]], list[Mapping[str, Any] | Refusal]]
"""Rows of a source -> for each the values of its columns (``ids``, ``length`` and the reader's own), or why it is unfit."""


def tokenise(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: LossOn = "auto",
    keep_bad_rows: bool = False,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Tokenises a source, or finds it tokenised.

    Args:
        source: the rows.
        tokenizer: any.
        loss_on: what is learned, see :func:`~lightning_ft.data.spans.render`.
        keep_bad_rows: put the reason into the column ``problem`` instead of raising at the first unfit row.
        cache_dir: folder of the cache; None is ``tokenised`` below the cache folder of lightning_ft.

    Returns:
        One row for each of the source: ``ids``, ``spans`` (flat), ``length``, ``scored``, ``row``, ``problem``.

    Raises:
        Refusal: the first unfit row with its place, or no room on the disk.
    """
    resolve_loss_on(loss_on, source.kind)
    if source.kind == "messages":
        require_template(tokenizer)
    kind = source.kind

    def rendered(rows: list[dict[str, Any]]) -> list[Mapping[str, Any] | Refusal]:
        return [
            found
            if isinstance(found, Refusal)
            else {
                "ids": found.ids,
                "length": len(found.ids),
                "spans": [edge for span in found.spans for edge in span],
                "scored": found.scored,
            }
            for found in render_rows(tokenizer, rows, kind, loss_on)
        ]

    about = {"kind": kind, "loss_on": loss_on}
    return cached_rows(
        source, tokenizer, rendered, _SFT_COLUMNS, about, keep_bad_rows=keep_bad_rows, cache_dir=cache_dir
    )


def cached_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    render: Render,
    columns: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    keep_bad_rows: bool,
    cache_dir: str | Path | None,
) -> Dataset:
    """Tokenises a source as ``render`` says, or finds it tokenised.

    Args:
        source: the rows.
        tokenizer: used by ``render``; part of the cache's key.
        render: makes the rows; called with some hundreds at a time.
        columns: features of the reader's own columns.
        about: all else that decides what ``render`` makes, as JSON.
        keep_bad_rows: put the reason into the column ``problem`` instead of raising at the first unfit row.
        cache_dir: folder of the cache; None is ``tokenised`` below the cache folder of lightning_ft.

    Returns:
        One row for each of the source: ``ids``, ``length``, ``row``, ``problem``, and those of ``columns``.

    Raises:
        Refusal: the first unfit row with its place, or no room on the disk.
    """
    folder = Path(cache_dir).expanduser() if cache_dir is not None else cache_folder() / "tokenised"
    key = _key(source, tokenizer, about)
    file = folder / key / "rows.arrow"
    if not file.exists():
        _build(source, render, datasets.Features({**_COLUMNS, **columns}), keep_bad_rows, folder, key)
    table = Dataset.from_file(str(file))
    if not keep_bad_rows:
        bad = np.flatnonzero(table.data.column("length").to_numpy() == 0)
        if len(bad):
            raise Refusal(f"{source.where(int(bad[0]))}: {table[int(bad[0])]['problem']}")
    return table


def _build(
    source: Source, render: Render, features: datasets.Features, keep_bad_rows: bool, folder: Path, key: str
) -> None:
    void: dict[str, Any] = {
        name: [] if not isinstance(f, datasets.Value) else "" if f.dtype == "string" else 0
        for name, f in features.items()
    }

    def rendered(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in features}
        for number, found in zip(numbers, render(source.batch(columns)), strict=True):
            if isinstance(found, Refusal) and not keep_bad_rows:
                raise Refusal(f"{source.where(number)}: {found}")
            made = {"problem": str(found)} if isinstance(found, Refusal) else found
            for name, value in {**void, **made, "row": number}.items():
                out[name].append(value)
        return out

    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=folder))
        try:
            source.table.map(
                rendered,
                with_indices=True,
                batched=True,
                batch_size=1000,
                remove_columns=source.table.column_names,
                features=features,
                cache_file_name=str(work / "rows.arrow"),
                load_from_cache_file=False,
                new_fingerprint=key[:32],
                desc=f"tokenising {source.name}",
            )
            try:
                os.rename(work, folder / key)
            except OSError:  # another process was faster, and what it made is the same
                if not (folder / key / "rows.arrow").exists():
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        why = "the disk is full" if full else (error.strerror or str(error))
        raise Refusal(
            f"The tokenised rows of {source.name} cannot be written below {folder} ({why}): free some space, or set "
            "LIGHTNING_FT_CACHE to another folder."
        ) from error


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, about: Mapping[str, Any]) -> str:
    about = {
        "format": _FORMAT,
        "source": source.key,
        "tokenizer": tokenizer_hash(tokenizer),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        **about,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides what ids a text gets: vocabulary, merges, added and special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # left behind by whoever called the tokenizer last
        rules.pop("padding", None)
    else:
        added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        rules = {
            "vocab": tokenizer.get_vocab(),
            "added": added,
            "init": repr(sorted(map(str, tokenizer.init_kwargs.items()))),
        }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    about = [type(tokenizer).__name__, rules, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
