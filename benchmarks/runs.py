"""What the drivers of benchmarks share: a side is a process of its own, and a finished run is kept at once."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def launch(module: str, arguments: list[str], timeout: float = 1800.0) -> dict[str, Any]:
    """Run one side and read the JSON line that it prints last.

    Raises:
        RuntimeError: when it fails, with the end of what it wrote.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{module} failed (exit code {done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(lines[-1])


class Store:
    """The results file: a flat dictionary of finished runs, written after each; several processes may write to it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Open or begin the file.

        Raises:
            SystemExit: when it holds runs made with other settings.
        """
        self.path = path
        self.data: dict[str, Any] = {"settings": settings, "machine": measure.machine(), "runs": {}}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != settings:
                raise SystemExit(
                    f"{path} holds runs made with other settings; move it away, or give another --output: "
                    f"they were {kept['settings']}, now {settings}."
                )
            if kept["machine"] != self.data["machine"]:
                raise SystemExit(f"{path} holds runs of another machine or other versions; move it away first.")
            self.data["runs"] = kept["runs"]

    def get(self, key: str) -> dict[str, Any] | None:
        """A finished run."""
        return self.data["runs"].get(key)

    def read(self) -> None:
        """Takes over what other processes have kept since."""
        if self.path.exists():
            self.data["runs"] |= json.loads(self.path.read_text())["runs"]

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keep a run, beside what other processes have kept; the file appears whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.read()
            self.data["runs"][key] = result
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.data, indent=1) + "\n")
            part.replace(self.path)
