"""Where a run writes, and the promise that nothing already there is lost.

    runs/sft_lora/            config.yaml, metrics.csv, checkpoints/, and what callbacks add
    runs/sft_lora.1/          the run that was there before, moved aside untouched
    runs/.sft_lora.lock       held while a run writes there; a second run is refused by it

A run that is refused or fails before it has saved anything leaves no folder behind, and puts back what it moved aside.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from lightning_ft.functional.errors import Refusal

CONFIG = "config.yaml"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
ROW = "row.json"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"


class RunFolder:
    """One run's folder, locked from `claim` until `release`."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.resume = resume
        self.moved_to: Path | None = None  # where the previous run now lies
        self._lock: IO[str] | None = None

    @classmethod
    def claim(cls, path: str | Path, *, resume: bool = False) -> RunFolder:
        """Locks ``path`` and moves a run that already lies there to the first free ``path.N``.

        Args:
            path: the run's folder; its parents are made.
            resume: go on in the folder as it is, because the checkpoint that is resumed lies inside it.

        Raises:
            Refusal: another process is writing there, or the folder cannot be written.
        """
        folder = cls(Path(path), resume=resume)
        try:
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            folder._take_lock()
            if folder.path.is_dir() and not resume and any(folder.path.iterdir()):
                folder.moved_to = free_sibling(folder.path)
                folder.path.rename(folder.moved_to)
            folder.path.mkdir(exist_ok=True)
        except Refusal:
            raise
        except OSError as error:
            folder.release()
            raise Refusal(f"Cannot write the run to {path}: {error.strerror}; give another --name.") from error
        return folder

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint of this run, or None."""
        return newest_checkpoint(self.path)

    def abandon(self) -> None:
        """Undoes the claim of a run that has saved no checkpoint, so that a failed attempt costs nothing."""
        if not self.resume and self._lock is not None and self.last_checkpoint() is None:
            shutil.rmtree(self.path, ignore_errors=True)
            if self.moved_to is not None and not self.path.exists():
                self.moved_to.rename(self.path)
                self.moved_to = None
        self.release()

    def release(self) -> None:
        """Gives the lock back; safe to call twice."""
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)  # while it is still held: see _take_lock
            self._lock.close()
            self._lock = None

    @property
    def _lock_path(self) -> Path:
        return self.path.parent / f".{self.path.name}.lock"  # beside the folder: the folder itself may be moved

    def _take_lock(self) -> None:
        while True:
            lock = open(self._lock_path, "a+")  # noqa: SIM115 - it stays open as long as the run
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                lock.close()
                raise Refusal(
                    f"Process {holder} is already writing a run to {self.path}; wait for it, or give another --name."
                ) from None
            # Who held the lock may have removed the file between our open and our flock: then nobody else sees ours.
            if self._lock_path.exists() and os.fstat(lock.fileno()).st_ino == self._lock_path.stat().st_ino:
                break
            lock.close()
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock


def free_sibling(path: Path) -> Path:
    """The first of ``path.1``, ``path.2`` ... that does not exist."""
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")


def folder_of(checkpoint: str | Path) -> Path | None:
    """The run folder that a checkpoint lies in (``runs/x`` for ``runs/x/checkpoints/last.ckpt``), or None."""
    inside = Path(checkpoint).parent
    folder = inside.parent if inside.name == CHECKPOINTS else inside
    return folder if (folder / CONFIG).is_file() else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run that was written last; ``last.ckpt`` wins a draw."""
    found = list((folder / CHECKPOINTS).glob("*.ckpt"))
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name == LAST), default=None)


def check_disk(folder: str | Path, need_bytes: int) -> None:
    """Refuses to start what could not be saved.

    Args:
        folder: where checkpoints will be written; it need not exist yet.
        need_bytes: bytes that the run will write, roughly.

    Raises:
        Refusal: less is free on that disk.
    """
    at = Path(folder).absolute()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < need_bytes:
        raise Refusal(
            f"The checkpoints of this run need about {_size(need_bytes)} in {folder}, but {_size(free)} are free; "
            "free some space, or give another --trainer.default_root_dir."
        )


def checkpoint_bytes(trainable: int, copies: int = 3) -> int:
    """Bytes that a run's checkpoints take: fp32 weights and Adam's two moments, in ``copies`` files at a time.

    Three copies: the best, the last, and the one that is being written before it replaces the last.
    """
    return 3 * trainable * 4 * copies


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
