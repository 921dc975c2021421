"""The place where the contract's checks work."""

from tests.contract.fixtures import chat, place

__all__ = ["chat", "place"]
