"""The pair of ranks itself: it joins Lightning's trainers, survives jobs that fail or hang, and leaks nothing."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.two_ranks import MOST_THREADS, RankFailure, TwoRanks


class Line(LightningModule):
    """Least squares on one feature; records the weight after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.net.weight, 1.0)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def job_ddp(steps: int) -> dict[str, Any]:
    rows = DataLoader(torch.tensor([[1.0], [3.0]] * steps), batch_size=1, shuffle=False)
    module = Line()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, rows)
    environment = type(trainer.strategy.cluster_environment).__name__
    return {
        "rank": trainer.global_rank,
        "world": trainer.world_size,
        "weight": module.net.weight.detach(),
        "environment": environment,
        "pid": os.getpid(),
        "steps": trainer.global_step,
    }


def job_leave_traces() -> tuple[str | None, float, torch.dtype]:
    seen = os.environ.get("PL_GLOBAL_SEED"), torch.rand(()).item(), torch.get_default_dtype()
    os.environ["PL_GLOBAL_SEED"] = "7"
    torch.set_default_dtype(torch.float64)
    return seen


def test_trainers_join_the_pair_one_after_the_other(two_ranks: TwoRanks) -> None:
    first = two_ranks.run("tests.test_two_ranks:job_ddp", steps=1)
    second = two_ranks.run("tests.test_two_ranks:job_ddp", steps=1)
    assert [answer["rank"] for answer in first] == [0, 1]
    assert all(answer["world"] == 2 and answer["steps"] == 1 for answer in first)
    assert first[0]["environment"] == "TorchElasticEnvironment"
    # d/dw mean over ranks of (w x)^2 at w = 1 is mean(2, 18) = 10
    for answer in first + second:
        assert answer["weight"].item() == pytest.approx(0.0, abs=1e-6)
    assert [answer["pid"] for answer in first] == [answer["pid"] for answer in second]


def test_nothing_leaks_into_the_next_job(two_ranks: TwoRanks) -> None:
    first = two_ranks.run("tests.test_two_ranks:job_leave_traces")
    second = two_ranks.run("tests.test_two_ranks:job_leave_traces")
    assert first == second
    assert first[0][0] is None and first[0][2] == torch.float32


@pytest.mark.parametrize(
    ("job", "timeout", "words"),
    [
        ("one_rank_raises", 60.0, ["rank 1", "ValueError: the second rank objects", "rank 0", "barrier"]),
        ("one_rank_dies", 60.0, ["code 3", "barrier"]),
        ("one_rank_hangs", 2.0, ["rank 0: finished", "no answer after 2 s", "in one_rank_hangs"]),
    ],
)
def test_a_failing_job_is_reported_and_the_pair_replaced(job: str, timeout: float, words: list[str]) -> None:
    pair = TwoRanks(preload="torch", grace=1.0)  # without Lightning the pair starts in a third of the time
    try:
        with pytest.raises(RankFailure) as failure:
            pair.run(f"tests.failing_jobs:{job}", timeout=timeout)
        for word in words:
            assert word in str(failure.value)
        assert pair.pids == []
        if job == "one_rank_hangs":  # one restart is enough to see that the pair can be replaced
            assert pair.run("tests.failing_jobs:rank") == [0, 1]
    finally:
        pair.close()


def job_threads(more: int) -> int:
    """Leaves threads behind, as gloo does."""
    for _ in range(more):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return os.getpid()


def test_a_pair_full_of_threads_is_replaced() -> None:
    pair = TwoRanks(preload="torch")
    try:
        crowded = pair.run("tests.test_two_ranks:job_threads", more=MOST_THREADS)
        assert pair.run("tests.test_two_ranks:job_threads", more=0)[0] not in crowded
    finally:
        pair.close()


def test_a_pair_whose_job_was_interrupted_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = TwoRanks(preload="torch")

    def interrupted(timeout: float) -> None:
        raise KeyboardInterrupt  # as pytest-timeout and Ctrl-C do while the answers are waited for

    try:
        pair._start()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pair, "_collect", interrupted)
            pair.run("tests.failing_jobs:rank")
        assert pair.pids == []
    finally:
        pair.close()
