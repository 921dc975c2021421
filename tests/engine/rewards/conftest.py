"""The tiny chat model, for the engine's parts that need a whole fit."""

from tests.contract.fixtures import chat

__all__ = ["chat"]
