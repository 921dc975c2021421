"""What every test process needs before torch and transformers are imported: no hub, one thread."""

import os
from collections.abc import Iterator

# setdefault would let a user's environment reach for a hub in the middle of a test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
import torch  # noqa: E402  (after the environment is set)

torch.set_num_threads(1)

pytest_plugins = ["tests.two_ranks"]


@pytest.fixture(autouse=True, scope="session")
def models_are_configured_as_on_a_gpu() -> Iterator[None]:
    """A tensor that is made without a device there would lie on the GPU."""
    from tests.device_guard import guarded

    undo = guarded()
    yield
    undo()


@pytest.fixture(autouse=True)
def environment_is_left_as_it_was() -> Iterator[None]:
    """Lightning and accelerate tell each other ranks through the environment: one test's must not reach the next."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
