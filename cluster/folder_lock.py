"""One controller at a time for a run's folder.

On a disk of this machine an advisory lock ends with the process that holds it, so a crash leaves nothing to clean. On
an object store there is none; there the attempt number, claimed with a conditional put, is the only fence, and a
superseded controller's commits lose.
"""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from data_service import storage
from data_service.errors import ConfigError

__all__ = ["FolderLock", "holder"]

_PROBE_S = 0.5
"""Whoever only looks (`holder`) has let go again within this time."""


class FolderLock:
    """The right to write a run's folder."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file
        self.pid = os.getpid()
        self.host = socket.gethostname()

    @classmethod
    def acquire(cls, root: str) -> "FolderLock":
        """Take the folder.

        Raises:
            ConfigError: another process holds it, or it cannot be written.
        """
        if not storage.is_local(root):
            return cls(None)
        path = Path(root) / ".lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as cause:
            raise ConfigError(
                f"run.storage: cannot write {root} ({cause.strerror}). Choose a writable folder."
            ) from cause
        try:
            _lock(file)
        except OSError as cause:
            file.seek(0)
            name = file.read().strip() or "another process"
            file.close()
            raise ConfigError(
                f"{root} is in use by {name}. Wait for it, end it with `stormjib stop`, or choose another run.name."
            ) from cause
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return cls(file)

    def release(self) -> None:
        """Give the folder back."""
        if self._file is not None:
            self._file.close()
            self._file = None


def holder(root: str) -> str | None:
    """Who holds a local run's folder, as `process PID on HOST`; None where nobody does.

    Looks by taking the lock for a moment, shared with others that look.
    """
    try:
        file = (storage.local_path(root) / ".lock").open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
        return None  # closing the file gives the lock back


def _lock(file: TextIO) -> None:
    """Take the lock; one that goes on being held is BlockingIOError."""
    deadline = time.monotonic() + _PROBE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)
        else:
            return
