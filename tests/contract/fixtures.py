"""Fixtures for the folders whose tests run the contract or train the tiny chat model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.case import Place, environment_kept
from tests.contract.subjects import write_chat


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny chat model and its rows; read only."""
    return write_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def place(
    tmp_path: Path, chat: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Iterator[Place]:
    """Where one check works."""
    with environment_kept():
        yield Place(tmp_path, chat, capsys, request)
