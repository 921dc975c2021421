"""The guard itself: it finds a line of the library, and lets everybody else's pass."""

import pytest
import torch

from tests.device_guard import OURS, NamesItsDevice


def test_only_lines_of_the_library_must_name_a_device():
    line = compile("import torch\ndef made(**more): return torch.zeros(2, **more)", f"{OURS}/made_up.py", "exec")
    space = {}
    exec(line, space)
    with NamesItsDevice():
        assert torch.zeros(2).shape == space["made"](device="cpu").shape
        with pytest.raises(AssertionError, match=r"made_up\.py:2 calls torch\.zeros without a device"):
            space["made"]()
