"""Shard files of a remote dataset on this machine's disk, up to a limit of bytes.

    FOLDER/worker-0000/.lock                  held while a process uses the sub-folder
    FOLDER/worker-0000/<checksum>.arrow       a shard, named by its checksum, so that it fits whatever dataset has it

Each process takes the first sub-folder that nobody holds: workers of one machine never disturb each other (each shard
belongs to one of them anyway), and a worker that comes back finds the files of the one before it. Those are verified
when they are first read, like any file. Sub-folders that nobody has used for a day are emptied.

Owns the folder's layout and eviction, least recently used first. Refuses to look into shards.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from data_service.errors import ConfigError, DataUnavailableError

__all__ = ["DiskCache"]

_LOG = logging.getLogger(__name__)
_MAX_FOLDERS = 1024
_UNUSED_S = 86_400.0
_NAME = re.compile(r"[0-9a-f]{32}\.arrow")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.arrow\.[0-9a-f]{8}\.tmp")


class DiskCache:
    """Files by checksum in a sub-folder that this object holds. Thread-safe."""

    def __init__(self, folder: str | None, limit_bytes: int, evicted: Callable[[bytes], None]) -> None:
        """Take a sub-folder.

        Args:
            folder: made where it is missing; by default one of this user below the temporary folder.
            limit_bytes: most bytes of files; the newest file stays even where it alone is larger.
            evicted: told the checksum of a file that was removed to make room; its space is free once nobody has it
                mapped.

        Raises:
            ConfigError: when the folder cannot be used.
        """
        self._limit_bytes = limit_bytes
        self._evicted = evicted
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._num_bytes = 0
        self._arriving = 0
        try:
            base = _base(folder)
            self.folder, self._held = _take(base)
            self._adopt()
            _empty_unused(base)
        except OSError as error:
            raise ConfigError(
                f"the data worker's cache was asked for in {folder or tempfile.gettempdir()}, which cannot be used: "
                f"{error}. Set data.service.cache_dir (--cache-dir) to a folder that it may write."
            ) from error

    @property
    def num_bytes(self) -> int:
        """Bytes of the files now."""
        return self._num_bytes

    def find(self, checksum: bytes) -> Path | None:
        """The file of a shard, which counts as used now; None where there is none."""
        name = f"{checksum.hex()}.arrow"
        with self._lock:
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
            return self.folder / name

    @contextlib.contextmanager
    def adding(self, checksum: bytes, data: bytes) -> Iterator[Path]:
        """A file with these bytes, which is in the cache when the block ends well and gone when it raises.

        Raises:
            DataUnavailableError: when the disk takes no more.
        """
        name = f"{checksum.hex()}.arrow"
        temporary = self.folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        with self._lock:
            self._arriving += len(data)
        try:
            self._evict()
            try:
                temporary.write_bytes(data)
            except OSError as error:
                hint = "Free space or lower data.service.cache_bytes" if error.errno == errno.ENOSPC else "Check it"
                raise DataUnavailableError(
                    f"a shard of {len(data)} bytes was to be kept in {self.folder}, the disk refused: "
                    f"{error.strerror}. {hint}."
                ) from error
            yield temporary
            temporary.replace(self.folder / name)
            with self._lock:
                self._num_bytes += len(data) - self._sizes.pop(name, 0)
                self._sizes[name] = len(data)
        finally:
            with self._lock:
                self._arriving -= len(data)
            temporary.unlink(missing_ok=True)
        os.utime(self._held.name)

    def discard(self, checksum: bytes) -> None:
        """Remove a file that is not what its name says."""
        name = f"{checksum.hex()}.arrow"
        with self._lock:
            self._num_bytes -= self._sizes.pop(name, 0)
        (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the folder to the next process, with its files."""
        self._held.close()

    def _evict(self) -> None:
        """Remove files, least recently used first, until there is room for those that arrive."""
        gone = []
        with self._lock:
            while self._sizes and self._num_bytes + self._arriving > self._limit_bytes:
                name, size = self._sizes.popitem(last=False)
                self._num_bytes -= size
                gone.append(name)
        for name in gone:
            (self.folder / name).unlink(missing_ok=True)
            self._evicted(bytes.fromhex(name.removesuffix(".arrow")))

    def _adopt(self) -> None:
        """Take over what an earlier process left: its files, oldest first, and none that it had not finished."""
        found = []
        for entry in os.scandir(self.folder):
            if _TEMPORARY.fullmatch(entry.name):
                Path(entry.path).unlink(missing_ok=True)
            elif _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                stat = entry.stat(follow_symlinks=False)
                found.append((stat.st_mtime, entry.name, stat.st_size))
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self._num_bytes += size
        self._evict()


def _base(folder: str | None) -> Path:
    if folder is not None:
        base = Path(folder).absolute()
        base.mkdir(parents=True, exist_ok=True)
        return base
    base = Path(tempfile.gettempdir()) / f"stormjib-data-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    # The name is predictable: another user of this machine could have made it.
    if base.is_symlink() or base.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(base))
    return base


def _try_lock(folder: Path) -> IO[str] | None:
    held = (folder / ".lock").open("a")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return None
    return held


def _take(base: Path) -> tuple[Path, IO[str]]:
    for number in range(_MAX_FOLDERS):
        folder = base / f"worker-{number:04d}"
        folder.mkdir(exist_ok=True)
        held = _try_lock(folder)
        if held is not None:
            os.utime(held.name)
            return folder, held
    raise OSError(errno.EBUSY, f"{_MAX_FOLDERS} processes use it already", str(base))


def _empty_unused(base: Path) -> None:
    """Remove the shards of sub-folders that nobody holds, and nobody has written to for a day."""
    for lock in base.glob("worker-*/.lock"):
        if time.time() - lock.stat().st_mtime < _UNUSED_S:
            continue
        held = _try_lock(lock.parent)
        if held is None:
            continue
        with held:
            files = [file for file in lock.parent.iterdir() if _NAME.fullmatch(file.name)]
            for file in files:
                file.unlink(missing_ok=True)
        if files:
            _LOG.info("removed %d shards from %s, which nobody uses", len(files), lock.parent)
