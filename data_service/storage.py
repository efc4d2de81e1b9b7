"""Bytes under a URI: a local path, or anything fsspec knows (`s3://`, `gs://`, `memory://` in tests).

Anything may be read; what only one writer may publish goes to local file systems with hard links and to S3.

Owns atomic publication (a reader sees the whole of a file or none of it), writes that fail when the file exists,
ranged reads and bounded retries on remote stores. What an absent file means is the caller's business: FileNotFoundError
passes through. Filesystems are created on first use in the process that uses them, never inherited over a fork.
"""

import contextlib
import errno
import io
import logging
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from data_service.errors import ConfigError

__all__ = [
    "check_commits",
    "content_tag",
    "exists",
    "file_size",
    "glob_files",
    "is_local",
    "join",
    "kind_of",
    "list_names",
    "list_sizes",
    "list_tree",
    "local_path",
    "move_file",
    "open_input",
    "publish",
    "put_if_absent",
    "read_bytes",
    "read_range",
    "remove_file",
    "remove_tree",
    "write_bytes",
]

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 5
_FIRST_BACKOFF_S = 0.2
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_COMMIT_PROTOCOLS = ("s3", "s3a", "memory")
"""Stores whose exclusive create is one: a conditional put on S3, a check in this process's memory. What fsspec does for
a file system that has none of its own looks first and writes then, so that two writers may both win."""
_NOT_WORTH_RETRYING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

ResultT = TypeVar("ResultT")


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local URI."""
    if not is_local(uri):
        raise ValueError(f"{uri} is not a local path.")
    return Path(uri.removeprefix("file://"))


def join(uri: str, *parts: str) -> str:
    """The URI of a file below another."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *parts])


def _remote(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a remote URI, and the path in it."""
    import fsspec

    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(uri))
    except (ValueError, ImportError) as cause:
        raise ConfigError(f"{uri}: {str(cause).rstrip('.')}. Use a folder or an s3:// URI.") from cause


def _store_library(error: Exception) -> bool:
    """Whether an error comes from the libraries under s3fs, which raise their own kinds when no answer came at all."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")


def _refusal(what: str, error: Exception) -> ConfigError | None:
    """The message for an error that the user has to mend: no credentials, no permission, no such bucket."""
    if "Credentials" in type(error).__name__ or isinstance(error, PermissionError):
        fix = "Set credentials that may do this, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif isinstance(error, FileNotFoundError) and any(
        sign in repr((error, error.__cause__)) for sign in ("NoSuchBucket", "bucket does not exist")
    ):
        fix = "Create the bucket, or name another one"
    else:
        return None
    return ConfigError(f"{what}: {str(error).rstrip('.') or type(error).__name__}. {fix}.")


def _retry(what: str, action: Callable[[], ResultT]) -> ResultT:
    """Run a remote action, at most _ATTEMPTS times, with jittered exponential waits between.

    Raises:
        OSError: the last failure; failures of the libraries below are wrapped in one.
        ConfigError: credentials, permission or the bucket are missing.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            refusal = _refusal(what, error)
            if refusal is not None:
                raise refusal from error
            if isinstance(error, _NOT_WORTH_RETRYING):
                raise
            if not isinstance(error, OSError) and not _store_library(error):
                raise
            if attempt == _ATTEMPTS:
                raise OSError(
                    f"{what} failed {_ATTEMPTS} times, at last with {type(error).__name__}: {error}"
                ) from error
            wait_s = _FIRST_BACKOFF_S * 2 ** (attempt - 1) * (0.5 + random.random())
            _LOG.warning("%s failed (attempt %d of %d), again in %.1f s: %s", what, attempt, _ATTEMPTS, wait_s, error)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(uri):
        return local_path(uri).exists()
    fs, path = _remote(uri)
    fs.invalidate_cache()  # listings from before say nothing about other writers
    return _retry(f"looking for {uri}", lambda: bool(fs.exists(path)))


def kind_of(uri: str) -> Literal["file", "folder"] | None:
    """What is there; a store has folders where files are below them. None where nothing is."""
    if is_local(uri):
        here = local_path(uri)
        return "folder" if here.is_dir() else "file" if here.exists() else None
    fs, path = _remote(uri)
    try:
        found = _retry(f"looking for {uri}", lambda: fs.info(path))
    except FileNotFoundError:
        return None
    return "folder" if found["type"] == "directory" else "file"


def content_tag(uri: str) -> str | None:
    """What a store itself says of a file's content, its size and ETag; None for local files and other stores."""
    if is_local(uri):
        return None
    fs, path = _remote(uri)
    found = _retry(f"looking at {uri}", lambda: fs.info(path))
    tag = str(found.get("ETag") or "").strip('"')
    return f"{found['size']}/{tag}" if tag else None


def file_size(uri: str) -> int:
    """Bytes of a file."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    fs, path = _remote(uri)
    return _retry(f"the size of {uri}", lambda: int(fs.size(path)))


def read_bytes(uri: str) -> bytes:
    """The whole of a file."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    fs, path = _remote(uri)
    return _retry(f"reading {uri}", lambda: bytes(fs.cat_file(path)))


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`; fewer where the file ends."""
    if is_local(uri):
        with local_path(uri).open("rb") as file:
            file.seek(start)
            return file.read(length)
    fs, path = _remote(uri)
    return _retry(f"reading {uri}", lambda: bytes(fs.cat_file(path, start=start, end=start + length)))


def open_input(uri: str) -> BinaryIO:
    """A readable, seekable stream of a file; the caller closes it."""
    if is_local(uri):
        return local_path(uri).open("rb")
    fs, path = _remote(uri)
    raw = _retry(f"opening {uri}", lambda: fs.open(path, "rb"))
    # fsspec's own files read lines without a bound.
    return io.BufferedReader(raw, 1 << 20)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses and no listing takes for a finished file."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def publish(uri: str) -> Iterator[BinaryIO]:
    """A stream whose bytes appear under `uri` together, when the block ends well, and not at all when it raises.

    Replaces an existing file. Local files are synced before they are renamed into place; remote ones are spooled to
    this machine's temporary folder and uploaded at the end, so that a failed upload can be tried again.
    """
    if not is_local(uri):
        fs, remote_path = _remote(uri)
        with tempfile.NamedTemporaryFile(prefix="stormjib-") as spool:
            yield cast(BinaryIO, spool)
            spool.flush()
            _retry(f"writing {uri}", lambda: fs.put_file(spool.name, remote_path))
        return
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(uri: str, data: bytes) -> None:
    """Publish a file at once, replacing one that is there."""
    with publish(uri) as file:
        file.write(data)


def check_commits(uri: str) -> None:
    """Check that `put_if_absent` can work at this place, as far as its URI tells.

    Raises:
        ConfigError: for a remote store that is not known to let exactly one of several writers win.
    """
    protocol = uri.partition("://")[0]
    if not is_local(uri) and protocol not in _COMMIT_PROTOCOLS:
        raise ConfigError(
            f"{uri}: manifests were to be published there, and {protocol}:// is not known to refuse a second writer of "
            "one file. Use s3:// or a folder."
        )


def _file_system(path: Path) -> str:
    """The type and mount point of the file system that holds a path, for messages."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "of unknown type"
    resolved = path.resolve()
    # The last of the deepest mount points is the one on top.
    holding = [one for one in mounts if resolved.is_relative_to(one[1])]
    found = max(enumerate(holding), key=lambda item: (len(item[1][1]), item[0]), default=None)
    return "of unknown type" if found is None else f"{found[1][2]} on {found[1][1]}"


def put_if_absent(uri: str, data: bytes) -> bool:
    """Publish a file unless one is there; of several writers exactly one wins.

    Local: the bytes are synced under another name, then hard-linked into place, which fails when the name is taken.
    Remote: a conditional put (`If-None-Match: *` on S3).

    Returns:
        Whether this call wrote it.

    Raises:
        ConfigError: where exactly one winner cannot be promised: a local file system without hard links, or a remote
            store that `check_commits` refuses.
    """
    check_commits(uri)
    if is_local(uri):
        path = local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            raise ConfigError(
                f"{uri} was to be published, the file system there ({_file_system(path.parent)}) makes no hard links "
                f"({error.strerror}), without which a crash could leave half a file or two writers could both win. "
                "Choose a folder on another file system, or an s3:// URI."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True
    fs, remote_path = _remote(uri)
    attempts = 0

    def put() -> None:
        nonlocal attempts
        attempts += 1
        try:
            fs.pipe_file(remote_path, data, mode="create")
        except OSError as error:
            # Stores differ in what they say beside the code; some leave out which condition failed.
            if "PreconditionFailed" in repr(error) or "PreconditionFailed" in repr(error.__cause__):
                raise FileExistsError(f"{uri} is there already.") from error
            raise

    try:
        _retry(f"writing {uri}", put)
    except FileExistsError:
        # An earlier attempt may have arrived although its answer did not.
        return attempts > 1 and read_bytes(uri) == data
    return True


def list_names(uri: str) -> list[str]:
    """Names directly below a folder, sorted, without files that are still being written. Empty when it is absent."""
    if is_local(uri):
        path = local_path(uri)
        names: Sequence[str] = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    else:
        fs, remote_path = _remote(uri)
        fs.invalidate_cache()
        try:
            found = _retry(f"listing {uri}", lambda: fs.ls(remote_path, detail=False))
        except FileNotFoundError:
            found = []
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found]
    return sorted(name for name in names if not (name.startswith(".") and name.endswith(".tmp")))


def list_sizes(uri: str) -> dict[str, int]:
    """Bytes of the files directly below a folder, by name. Empty when it is absent."""
    if is_local(uri):
        path = local_path(uri)
        return {one.name: one.stat().st_size for one in path.iterdir() if one.is_file()} if path.is_dir() else {}
    fs, remote_path = _remote(uri)
    fs.invalidate_cache()
    try:
        found = _retry(f"listing {uri}", lambda: fs.ls(remote_path, detail=True))
    except FileNotFoundError:
        return {}
    return {str(one["name"]).rsplit("/", 1)[-1]: int(one["size"]) for one in found if one["type"] == "file"}


def list_tree(uri: str) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted. Links to folders are not followed."""
    if is_local(uri):
        root = local_path(uri)
        below = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        return sorted(path.relative_to(root).as_posix() for path in below)
    fs, remote_path = _remote(uri)
    prefix = remote_path.rstrip("/") + "/"
    found = _retry(f"listing {uri}", lambda: fs.find(remote_path))
    return sorted(str(entry).removeprefix(prefix) for entry in found if str(entry).startswith(prefix))


def move_file(source: str, target: str) -> None:
    """Move a file within one store, replacing what is there. Local: a rename, made durable. Remote: a server's copy."""
    if is_local(source):
        path = local_path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        local_path(source).replace(path)
        _sync_folder(path.parent)
        return
    fs, source_path = _remote(source)
    _, target_path = _remote(target)
    _retry(f"writing {target}", lambda: fs.cp_file(source_path, target_path))
    remove_file(source)


def glob_files(pattern: str) -> list[str]:
    """Files that match a pattern with `*`, `?` or `[…]`, as URIs, sorted."""
    fs, path = _remote(pattern)

    def look() -> list[str]:
        return sorted(str(entry) for entry in fs.glob(path) if not fs.isdir(entry))

    found = look() if is_local(pattern) else _retry(f"looking for {pattern}", look)
    return found if is_local(pattern) else [str(fs.unstrip_protocol(entry)) for entry in found]


def remove_file(uri: str) -> None:
    """Delete a file; none there is well too."""
    if is_local(uri):
        local_path(uri).unlink(missing_ok=True)
        return
    fs, path = _remote(uri)
    with contextlib.suppress(FileNotFoundError):
        _retry(f"deleting {uri}", lambda: fs.rm_file(path))


def remove_tree(uri: str) -> None:
    """Delete a folder and all below it; none there is well too."""
    if is_local(uri):
        path = local_path(uri)
        if path.exists():
            shutil.rmtree(path)
        return
    fs, remote_path = _remote(uri)
    with contextlib.suppress(FileNotFoundError):
        _retry(f"deleting {uri}", lambda: fs.rm(remote_path, recursive=True))
