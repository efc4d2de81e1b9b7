"""The claim on a dataset folder: one process prepares into it at a time.

On this machine's file systems the claim is a lock (flock) on a file in the folder; the kernel releases it when its
holder ends, however that happens. The file is deleted with the claim, so a finished dataset holds none. On remote
stores there is no such lock: preparations of different things work under different names, those of the same thing write
the same bytes, and the manifest, published last and by one writer, decides (see `prepare`).

Work is done in a folder that is named by what is prepared, so that one that was killed is taken up again.

Owns the lock, its wait, and the folders that killed preparations left. Refuses to know what is prepared.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_service import storage
from data_service.errors import ConfigError, DataUnavailableError

__all__ = ["claim_folder", "remove_leftovers", "work_folder"]

_LOG = logging.getLogger(__name__)
_LOCK_FILE = ".prepare.lock"
_POLL_S = 0.2
_TELL_AGAIN_S = 60.0
_WAIT_S = 12 * 3600.0
"""A preparation of a large corpus takes hours; one that takes this long is taken for hung."""
_WORK_FOLDER = re.compile(r"work-[0-9a-f]{32}")


@contextlib.contextmanager
def claim_folder(dataset_uri: str, wait_s: float = _WAIT_S) -> Iterator[None]:
    """Hold a dataset folder alone.

    Args:
        dataset_uri: the folder; made where it is absent.
        wait_s: how long to wait for another process that holds it.

    Raises:
        DataUnavailableError: when another process still holds it after `wait_s`.
        ConfigError: when the file system knows no locks.
    """
    if not storage.is_local(dataset_uri):
        yield
        return
    folder = storage.local_path(dataset_uri)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder / _LOCK_FILE, wait_s)
    try:
        yield
    finally:
        # Deleted while it is held: who waits for it sees that its file has no name any more, and opens the next.
        (folder / _LOCK_FILE).unlink(missing_ok=True)
        fcntl.flock(lock, fcntl.LOCK_UN)
        lock.close()


def remove_leftovers(dataset_uri: str) -> None:
    """Remove work folders that nobody works in, when the dataset is found finished; does not wait for a claim."""
    if not storage.is_local(dataset_uri):
        return
    names = [name for name in storage.list_names(dataset_uri) if _WORK_FOLDER.fullmatch(name)]
    if names:
        with contextlib.suppress(DataUnavailableError), claim_folder(dataset_uri, wait_s=0.0):
            for name in names:
                storage.remove_tree(storage.join(dataset_uri, name))


def work_folder(dataset_uri: str, key: str) -> str:
    """The URI of the work folder of a key, with what a killed preparation of the same key left in it.

    Those of other keys are removed, on this machine's file systems, where the claim tells that nobody works in them.

    Args:
        dataset_uri: a folder that is claimed.
        key: 32 hexadecimal digits.
    """
    own = f"work-{key}"
    if storage.is_local(dataset_uri):
        for name in storage.list_names(dataset_uri):
            if name == own:
                _LOG.info("going on in %s/%s, which a preparation that was killed left behind", dataset_uri, name)
            elif _WORK_FOLDER.fullmatch(name):
                _LOG.info("removing %s/%s, left behind by a preparation of something else", dataset_uri, name)
                storage.remove_tree(storage.join(dataset_uri, name))
    return storage.join(dataset_uri, own)


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
