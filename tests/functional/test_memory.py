"""Peak memory grows with what was allocated and never falls."""

import torch

from lightning_ft.functional.memory import peak_memory_bytes


def test_a_large_tensor_shows_and_stays() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + 50_000_000)  # as large as all that was ever resident, so it must raise the peak
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= held.numel() * 4
    del held
    assert peak_memory_bytes(torch.device("cpu")) >= 0.99 * after  # the kernel sums its counters lazily
