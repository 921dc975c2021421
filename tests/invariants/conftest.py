"""Fixtures of the invariants; see `tests.invariants.ground`."""

from pathlib import Path

import pytest

from benchmarks.random_model import write_model
from tests.invariants import ground


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers, fp32, and a byte tokenizer with ChatML marks."""
    return write_model(tmp_path_factory.mktemp("invariants") / "base", initializer_range=0.05)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty conversations."""
    return ground.write_rows(tmp_path_factory.mktemp("invariants") / "rows.jsonl")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised once for the session."""
    return tmp_path_factory.mktemp("invariants_cache")
