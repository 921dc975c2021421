"""The configuration of the model that rows are made for, as far as a data module knows one."""

from __future__ import annotations

from typing import Any

from lightning_ft.models.load import load_config


def known_config(trainer: Any, tokenizer: str | None) -> Any:
    """That of the module that is trained, loaded or not; else of the model whose tokenizer was named; None where there is neither.

    Args:
        trainer: of the data module, or None.
        tokenizer: a model id or folder, or None.
    """
    module = trainer.lightning_module if trainer is not None else None
    config = getattr(getattr(module, "model", None), "config", None)
    if config is not None:
        return config
    base = getattr(module, "base", None)
    if isinstance(base, str):
        trusted, revision = getattr(module, "trust_remote_code", False), getattr(module, "revision", None)
        return load_config(base, trust_remote_code=trusted, revision=revision)
    return load_config(tokenizer) if tokenizer is not None else None


__all__ = ["known_config"]
