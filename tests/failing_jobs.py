"""Jobs that go wrong on one rank; apart from the tests so that a pair starts without Lightning."""

from __future__ import annotations

import os
import time

import torch.distributed as dist


def one_rank_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second rank objects")
    dist.barrier()


def one_rank_dies() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    dist.barrier()


def one_rank_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def rank() -> int:
    return dist.get_rank()
