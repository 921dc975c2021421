"""Parts of `benchmarks.gpu` as processes of their own: forks of a parent that has imported everything and never touched the GPU.

A fork begins where the imports have ended, so that a part costs what it does and not twenty seconds of imports before it; memory,
CUDA's state and crashes are its own all the same. Where the parent's CUDA is no longer untouched, parts start afresh.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[], dict[str, Any]]


class Part:
    """A process that is working on a part.

    Args:
        name: of the part.
        folder: for what it prints and finds.
        work: what a fork does; its answer is the part's.
        command: what to start instead of a fork; it writes its answer to ``answer``.
        limit: seconds after which it is ended with all that it started.

    Attributes:
        answer: file of what was found.
    """

    def __init__(self, name: str, folder: Path, work: Work | list[str], limit: float) -> None:
        self.name, self.limit, self.begun = name, limit, time.perf_counter()
        plain = "".join(c if c.isalnum() else "_" for c in name)
        self.log, self.answer = folder / f"{plain}.log", folder / f"{plain}.answer"
        self.answer.unlink(missing_ok=True)
        self.process: subprocess.Popen[bytes] | None = None
        if callable(work):
            sys.stdout.flush()
            sys.stderr.flush()
            self.pid = os.fork()
            if self.pid == 0:
                self._child(work)
        else:
            with open(self.log, "wb") as log:
                command = [*work, "--answer", str(self.answer)]
                self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            self.pid = self.process.pid

    def _child(self, work: Work) -> None:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = os.fdopen(os.dup(log), "w", buffering=1)
            write_answer(self.answer, work())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # the parent's exit handlers are the parent's

    def found(self) -> dict[str, Any] | None:
        """The figures, or why there are none; None while it works and has time."""
        seconds = time.perf_counter() - self.begun
        code = self._code()
        if code is None:
            if seconds < self.limit:
                return None
            self.end()
            return {"failed": f"no result after {self.limit:.0f} s: {self._said()}".rstrip(": ")}
        self.end()
        if code != 0 or not self.answer.exists():
            return {"failed": self._said() or f"no output, exit code {code}"}
        return {**json.loads(self.answer.read_text(encoding="utf-8")), "wall_seconds": seconds}

    def _said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace").strip()[-3000:]

    def _code(self) -> int | None:
        if self.process is not None:
            return self.process.poll()
        done, status = os.waitpid(self.pid, os.WNOHANG)
        return None if done == 0 else os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        """Ends its session: itself, or what it has left behind."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        if self.process is not None:
            self.process.wait()
            return
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            return


def write_answer(file: Path, figures: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(figures), encoding="utf-8")
    part.replace(file)


def run_parts(
    names: list[str], start: Callable[[str], Part], lanes: int, done: Callable[[str, dict[str, Any]], None]
) -> None:
    """All parts in order, so many at a time; ``done`` is told of each as it ends; none is left when this process is stopped."""
    waiting, working = list(names), []
    try:
        while waiting or working:
            while waiting and len(working) < lanes:
                working.append(start(waiting.pop(0)))
            time.sleep(0.02)
            for part in list(working):
                figures = part.found()
                if figures is not None:
                    working.remove(part)
                    done(part.name, figures)
    finally:
        for part in working:
            part.end()
