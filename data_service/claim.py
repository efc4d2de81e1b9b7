"""The claim on a dataset folder: one process prepares into it at a time.

On this machine's file systems the claim is a lock (flock) on a file in the folder; the kernel releases it when its
holder ends, however that happens. The file is deleted with the claim, so a finished dataset holds none. On remote
stores there is no such lock: preparations work under names of their own, and the manifest, published last and by one
writer, decides (see `prepare`).

Owns the lock, its wait, and the folders that killed preparations left. Refuses to know what is prepared.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_service import storage
from data_service.errors import ConfigError, DataUnavailableError

__all__ = ["claim_folder"]

_LOG = logging.getLogger(__name__)
_LOCK_FILE = ".prepare.lock"
_POLL_S = 0.2
_TELL_AGAIN_S = 60.0
_WAIT_S = 12 * 3600.0
"""A preparation of a large corpus takes hours; one that takes this long is taken for hung."""
_WORK_FOLDER = re.compile(r"work-[0-9a-f]{32}")


@contextlib.contextmanager
def claim_folder(dataset_uri: str, wait_s: float = _WAIT_S) -> Iterator[str]:
    """Hold a dataset folder alone, and give the URI of a work folder in it, removed at the end.

    Args:
        dataset_uri: the folder; made where it is absent.
        wait_s: how long to wait for another process that holds it.

    Raises:
        DataUnavailableError: when another process still holds it after `wait_s`.
        ConfigError: when the file system knows no locks.
    """
    work_uri = storage.join(dataset_uri, f"work-{uuid.uuid4().hex}")
    if not storage.is_local(dataset_uri):
        try:
            yield work_uri
        finally:
            storage.remove_tree(work_uri)
        return
    folder = storage.local_path(dataset_uri)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder / _LOCK_FILE, wait_s)
    try:
        for name in storage.list_names(dataset_uri):
            if _WORK_FOLDER.fullmatch(name):
                _LOG.info("removing %s/%s, which a preparation that was killed left behind", dataset_uri, name)
                storage.remove_tree(storage.join(dataset_uri, name))
        yield work_uri
    finally:
        storage.remove_tree(work_uri)
        # Deleted while it is held: who waits for it sees that its file has no name any more, and opens the next.
        (folder / _LOCK_FILE).unlink(missing_ok=True)
        fcntl.flock(lock, fcntl.LOCK_UN)
        lock.close()


def _lock(path: Path, wait_s: float) -> BinaryIO:
    """The lock file, opened and locked."""
    deadline = time.monotonic() + wait_s
    tell_at = 0.0
    while True:
        file = path.open("a+b")
        try:
            if _try_lock(file, path):
                file.truncate(0)
                file.write(str(os.getpid()).encode())
                file.flush()
                return file
            file.seek(0)
            holder = file.read(20).decode("ascii", "replace") or "unknown"
        except BaseException:
            file.close()
            raise
        file.close()
        now = time.monotonic()
        if now >= deadline:
            raise DataUnavailableError(
                f"{path.parent}: another process (pid {holder}) has been preparing there for {wait_s:g} s. End it if "
                "it hangs, or choose another data.dataset."
            )
        if now >= tell_at:
            _LOG.warning("waiting for another process (pid %s), which prepares %s", holder, path.parent)
            tell_at = now + _TELL_AGAIN_S
        time.sleep(_POLL_S)


def _try_lock(file: BinaryIO, path: Path) -> bool:
    """Whether this process now holds the lock file that has the name."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise ConfigError(
            f"{path.parent}: a dataset was to be prepared there, the file system has no locks ({error.strerror}). "
            "Choose a folder on another file system, or an s3:// URI."
        ) from error
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
