"""Two gloo processes that live as long as the test session, because starting a pair costs about ten seconds.

A test asks for the ``two_ranks`` fixture and names a function of an importable module; both ranks call it with the same
keyword arguments and the test gets both results::

    def test_something(two_ranks):
        rank0, rank1 = two_ranks.run("tests.engine.jobs:train", steps=3)

Inside a job the process group exists already (``torch.distributed.get_rank()``), and the environment is torchelastic's,
so ``Trainer(accelerator="cpu", devices=2, strategy="ddp")`` joins the pair instead of launching processes of its own. A
result is plain Python or plain tensors (call ``full_tensor()`` on a DTensor first). Jobs start from the same state:
seed 0, the environment, working directory and torch defaults as they were when the pair started.

This module is a pytest plugin (``pytest_plugins = ["tests.two_ranks"]`` in ``tests/conftest.py``). Tests that use the
fixture are put into one xdist group, so ``-n 2 --dist loadgroup`` starts one pair and not two.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0  # importing torch and lightning twice on a busy machine
MOST_THREADS = (
    200  # gloo keeps the threads of groups that are gone: after hundreds of jobs they take the machine's time
)


class RankFailure(AssertionError):
    """A job failed on a rank, died or ran out of time; the text holds what every rank said."""


class TwoRanks:
    """Handle on the pair of processes. They start at the first :meth:`run`, and again after a failure.

    Args:
        preload: a module that the ranks import while they start, so that no job's timeout pays for it.
        grace: seconds that the other rank gets to answer once one has failed: it may be on its way to the same error,
            or wait for ever.
    """

    def __init__(self, preload: str = "lightning.pytorch", grace: float = 5.0) -> None:
        self.preload, self.grace = preload, grace
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._logs: list[Path] = []
        self._folder = tempfile.TemporaryDirectory(prefix="two_ranks_")

    def run(self, target: str, /, *, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call ``module:function`` with ``kwargs`` on both ranks.

        Args:
            target: ``"package.module:function"``; imported by the workers from the repository root.
            timeout: seconds until a rank that has not answered counts as hung and the pair is killed.
            kwargs: what the function is called with, pickled.

        Returns:
            ``[result of rank 0, result of rank 1]``.

        Raises:
            RankFailure: with the tracebacks of both ranks. The pair is then replaced: the collectives of two ranks that
                did not leave a job together would pair up wrongly in the next one.
        """
        if any(threads_of(pid) > MOST_THREADS for pid in self.pids):
            self._leave()
        if not self._processes:
            self._start()
        message = pickle.dumps((target, kwargs))
        try:
            for pipe in self._pipes:
                pipe.send_bytes(message)
        except OSError:
            pass  # the rank has died since the last job: its answer says so
        try:
            answers = self._collect(timeout)
        except BaseException:  # pytest-timeout, or Ctrl-C: else the next job would read this one's answers
            self.kill()
            raise
        if all(kind == "result" for kind, _ in answers):
            return [value for _, value in answers]
        report = [f"{target} failed on two ranks"]
        for rank, (kind, value) in enumerate(answers):
            report.append(f"---- rank {rank}: {'finished' if kind == 'result' else value}")
        self.kill()
        raise RankFailure("\n".join(report))

    def close(self) -> None:
        """Let both ranks leave, and remove what they wrote."""
        self._leave()
        self._folder.cleanup()

    def _leave(self) -> None:
        """Let both ranks meet at a barrier, leave the process group and exit; kill what does not."""
        with contextlib.suppress(OSError):
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps(None))
        deadline = time.monotonic() + self.grace
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End both processes at once; the next :meth:`run` starts a new pair."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    @property
    def pids(self) -> list[int]:
        """Process ids of the running pair, empty before the first job."""
        return [process.pid for process in self._processes]

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._logs = [Path(self._folder.name) / f"rank{rank}.log" for rank in range(2)]
        for rank, log in enumerate(self._logs):
            ours, theirs = Pipe()
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
                "TORCHELASTIC_RUN_ID": "two_ranks",  # Lightning picks TorchElasticEnvironment by this name
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            }
            environment.pop("PL_GLOBAL_SEED", None)
            with log.open("wb") as out:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.two_ranks", str(theirs.fileno()), self.preload],
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        pass_fds=[theirs.fileno()],
                    )
                )
            theirs.close()  # else a dead rank would not read as the end of the pipe
            self._pipes.append(ours)
        answers = self._collect(START_SECONDS)
        if any(kind != "result" for kind, _ in answers):
            self.kill()
            raise RankFailure("the two ranks did not start\n" + "\n".join(str(value) for _, value in answers))

    def _collect(self, timeout: float) -> list[tuple[str, Any]]:
        answers: dict[int, tuple[str, Any]] = {}
        start = time.monotonic()
        deadline = start + timeout
        while len(answers) < 2 and (left := deadline - time.monotonic()) > 0:
            waiting = {id(pipe): rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for ready in wait([self._pipes[rank] for rank in waiting.values()], left):
                rank = waiting[id(ready)]
                try:
                    answers[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    code = self._processes[rank].wait()
                    answers[rank] = ("died", f"the process ended with code {code}\n{self._tail(rank)}")
                if answers[rank][0] != "result":
                    deadline = min(deadline, time.monotonic() + self.grace)
        for rank in set(range(2)) - answers.keys():
            self._processes[rank].send_signal(signal.SIGUSR1)  # faulthandler writes the stack into the log
            time.sleep(0.2)
            seconds = time.monotonic() - start
            answers[rank] = ("hung", f"no answer after {seconds:.0f} s; it was here:\n{self._tail(rank)}")
        return [answers[0], answers[1]]

    def _tail(self, rank: int, characters: int = 4000) -> str:
        return self._logs[rank].read_text(errors="replace")[-characters:]


def threads_of(pid: int) -> int:
    """How many threads a process has; 0 where the system does not say."""
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    """The pair of processes of this test session; see the module's docstring."""
    pair = TwoRanks()
    yield pair
    pair.close()


def pytest_configure(config: pytest.Config) -> None:
    """Declare xdist's marker, so that ``--strict-markers`` passes without xdist."""
    config.addinivalue_line("markers", "xdist_group(name): tests of one group run in one xdist worker")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put every test that asks for the pair into one xdist group, before xdist reads the groups."""
    for item in items:
        if "two_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("two_ranks"))


def _serve(pipe: Connection, preload: str) -> None:
    """Run jobs from ``pipe`` until it ends."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        importlib.import_module(preload)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        dist.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        raise
    environment, folder = dict(os.environ), os.getcwd()
    pipe.send_bytes(pickle.dumps(("result", None)))
    while True:
        try:
            job = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the test session is gone
            os._exit(1)
        if job is None:
            break
        _fresh(environment, folder)
        target, kwargs = job
        try:
            module, name = target.split(":")
            answer = pickle.dumps(("result", getattr(importlib.import_module(module), name)(**kwargs)))
        except BaseException:
            answer = pickle.dumps(("error", traceback.format_exc()))
        pipe.send_bytes(answer)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter would take seconds to take every module apart, and the session waits for it


def _fresh(environment: dict[str, str], folder: str) -> None:
    """Undo what a job may have left behind: seeds, environment, folder, torch's defaults, garbage."""
    import gc
    import random

    import numpy
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    gc.collect()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    if torch.are_deterministic_algorithms_enabled():  # asked first, since setting it imports the compiler
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2])
