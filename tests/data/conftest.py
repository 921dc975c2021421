"""The tiny chat model."""

from tests.contract.fixtures import chat

__all__ = ["chat"]
