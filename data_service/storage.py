"""Bytes under a URI: a local path, or anything fsspec knows (`s3://`, `gs://`, `memory://` in tests).

Anything may be read; what only one writer may publish goes to local file systems with hard links and to S3.

Owns atomic publication (a reader sees the whole of a file or none of it), writes that fail when the file exists, and
reads that are whole or fail; requests to remote stores, their retries and deadlines are `data_service.object_store`'s.
What an absent file means is the caller's business: FileNotFoundError passes through.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, cast

from data_service.conditional_put import check_conditional_put, put_new
from data_service.errors import ConfigError
from data_service.object_store import call, configure_s3, fetch, filesystem, is_s3, retry, s3_environment
from data_service.remote_input import open_remote
from data_service.upload import upload

__all__ = [
    "check_commits",
    "configure_s3",
    "content_tag",
    "exists",
    "file_size",
    "file_state",
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
    "s3_environment",
    "write_bytes",
]

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_COMMIT_PROTOCOLS = ("s3", "s3a", "memory")
"""Stores whose exclusive create is one: a conditional put on S3, a check in this process's memory. What fsspec does for
a file system that has none of its own looks first and writes then, so that two writers may both win."""
_READ_PIECE = 32 << 20
"""Most bytes of one request of a read; a shard comes in one."""
_PARALLEL_READS = 4


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


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(uri):
        return local_path(uri).exists()
    fs, path = filesystem(uri)
    return retry(f"looking for {uri}", lambda: bool(call(fs, "exists", path)))


def kind_of(uri: str) -> Literal["file", "folder"] | None:
    """What is there; a store has folders where files are below them. None where nothing is."""
    if is_local(uri):
        here = local_path(uri)
        return "folder" if here.is_dir() else "file" if here.exists() else None
    fs, path = filesystem(uri)
    try:
        found = retry(f"looking for {uri}", lambda: call(fs, "info", path))
    except FileNotFoundError:
        return None
    return "folder" if found["type"] == "directory" else "file"


def content_tag(uri: str) -> str | None:
    """What a store itself says of a file's content, its size and ETag; None for local files and other stores."""
    if is_local(uri):
        return None
    fs, path = filesystem(uri)
    found = retry(f"looking at {uri}", lambda: call(fs, "info", path))
    tag = str(found.get("ETag") or "").strip('"')
    return f"{found['size']}/{tag}" if tag else None


def file_state(uri: str) -> str:
    """What is another once the file was written again, without reading it."""
    if is_local(uri):
        here = local_path(uri).stat()
        return f"{here.st_size}/{here.st_mtime_ns}/{here.st_ino}"
    fs, path = filesystem(uri)
    found = retry(f"looking at {uri}", lambda: call(fs, "info", path))
    names = ("ETag", "etag", "LastModified", "updated", "mtime", "created")
    return "/".join([str(found["size"]), *(str(found[name]) for name in names if found.get(name))])


def file_size(uri: str) -> int:
    """Bytes of a file."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    fs, path = filesystem(uri)
    return retry(f"the size of {uri}", lambda: int(call(fs, "size", path)))


def read_bytes(uri: str, heard: Callable[[], object] = lambda: None) -> bytes:
    """The whole of a file, as it was at one moment; `heard` as in `fetch`."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    if not is_s3(uri):
        fs, path = filesystem(uri)
        return retry(f"reading {uri}", lambda: bytes(call(fs, "cat_file", path)))
    first = fetch(uri, 0, _READ_PIECE, heard=heard)
    if first.size is None or first.size <= len(first.data):
        return first.data
    return first.data + _read_pieces(uri, len(first.data), first.size - len(first.data), first.tag, heard)


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`; fewer where the file ends."""
    if is_local(uri):
        with local_path(uri).open("rb") as file:
            file.seek(start)
            return file.read(length)
    return _read_pieces(uri, start, length, None)


def _read_pieces(
    uri: str, start: int, length: int, tag: str | None, heard: Callable[[], object] = lambda: None
) -> bytes:
    """A range of a remote file; a long one by several requests at a time, each tried again by itself."""
    if length <= _READ_PIECE:
        return fetch(uri, start, length, tag, heard).data
    places = range(start, start + length, _READ_PIECE)
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        pieces = pool.map(lambda place: fetch(uri, place, min(_READ_PIECE, start + length - place), tag, heard), places)
        return b"".join(piece.data for piece in pieces)


def open_input(uri: str) -> BinaryIO:
    """A readable, seekable stream of a file; the caller closes it. A remote file must not change while it is read."""
    return local_path(uri).open("rb") if is_local(uri) else open_remote(uri)


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
    this machine's temporary folder and uploaded at the end, so that what fails of an upload can be tried again.
    """
    if is_s3(uri):
        with tempfile.TemporaryFile(prefix="stormjib-") as nameless:  # a kill leaves nothing of it on the disk
            yield cast(BinaryIO, nameless)
            nameless.flush()
            upload(uri, cast(BinaryIO, nameless), os.fstat(nameless.fileno()).st_size)
        return
    if not is_local(uri):
        fs, remote_path = filesystem(uri, "transfer")
        with tempfile.NamedTemporaryFile(prefix="stormjib-") as spool:
            yield cast(BinaryIO, spool)
            spool.flush()
            size = os.fstat(spool.fileno()).st_size
            retry(f"writing {uri}", lambda: call(fs, "put_file", spool.name, remote_path, num_bytes=size))
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
    """Check that `put_if_absent` can work below this folder: by the URI, and on S3 by trying it once in each bucket.

    Raises:
        ConfigError: for a remote store that is not known to let exactly one of several writers win, or does not.
    """
    protocol = uri.partition("://")[0]
    if not is_local(uri) and protocol not in _COMMIT_PROTOCOLS:
        raise ConfigError(
            f"{uri}: manifests were to be published there, and {protocol}:// is not known to refuse a second writer of "
            "one file. Use s3:// or a folder."
        )
    if is_s3(uri):
        check_conditional_put(uri)


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
    Remote: a conditional put (`If-None-Match: *` on S3), with the writer's mark as metadata.

    Returns:
        Whether this call wrote it.

    Raises:
        ConfigError: where exactly one winner cannot be promised: a local file system without hard links, or a remote
            store that `check_commits` refuses.
    """
    check_commits(uri.rpartition("/")[0] or uri)
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
    return put_new(uri, data)


def list_names(uri: str) -> list[str]:
    """Names directly below a folder, sorted, without files that are still being written. Empty when it is absent."""
    if is_local(uri):
        path = local_path(uri)
        names: Sequence[str] = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    else:
        fs, remote_path = filesystem(uri, "transfer")
        try:
            found = retry(f"listing {uri}", lambda: fs.ls(remote_path, detail=False))
        except FileNotFoundError:
            found = []
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found]
    return sorted(name for name in names if not (name.startswith(".") and name.endswith(".tmp")))


def list_sizes(uri: str) -> dict[str, int]:
    """Bytes of the files directly below a folder, by name. Empty when it is absent."""
    if is_local(uri):
        path = local_path(uri)
        return {one.name: one.stat().st_size for one in path.iterdir() if one.is_file()} if path.is_dir() else {}
    fs, remote_path = filesystem(uri, "transfer")
    try:
        found = retry(f"listing {uri}", lambda: fs.ls(remote_path, detail=True))
    except FileNotFoundError:
        return {}
    return {str(one["name"]).rsplit("/", 1)[-1]: int(one["size"]) for one in found if one["type"] == "file"}


def list_tree(uri: str) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted. Links to folders are not followed."""
    if is_local(uri):
        root = local_path(uri)
        below = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        return sorted(path.relative_to(root).as_posix() for path in below)
    fs, remote_path = filesystem(uri, "transfer")
    prefix = remote_path.rstrip("/") + "/"
    found = retry(f"listing {uri}", lambda: fs.find(remote_path))
    return sorted(str(entry).removeprefix(prefix) for entry in found if str(entry).startswith(prefix))


def move_file(source: str, target: str) -> None:
    """Move a file within one store, replacing what is there. Local: a rename, made durable. Remote: a server's copy."""
    if is_local(source):
        path = local_path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        local_path(source).replace(path)
        _sync_folder(path.parent)
        return
    fs, source_path = filesystem(source, "transfer")
    _, target_path = filesystem(target, "transfer")
    size = file_size(source)
    retry(f"writing {target}", lambda: call(fs, "cp_file", source_path, target_path, num_bytes=size))
    remove_file(source)


def glob_files(pattern: str) -> list[str]:
    """Files that match a pattern with `*`, `?` or `[…]`, as URIs, sorted."""
    fs, path = filesystem(pattern, "transfer")

    def look() -> list[str]:
        return sorted(str(name) for name, found in fs.glob(path, detail=True).items() if found["type"] != "directory")

    found = look() if is_local(pattern) else retry(f"looking for {pattern}", look)
    return found if is_local(pattern) else [str(fs.unstrip_protocol(entry)) for entry in found]


def remove_file(uri: str) -> None:
    """Delete a file; none there is well too."""
    if is_local(uri):
        local_path(uri).unlink(missing_ok=True)
        return
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        retry(f"deleting {uri}", lambda: call(fs, "rm_file", path))


def remove_tree(uri: str) -> None:
    """Delete a folder and all below it; none there is well too."""
    if is_local(uri):
        path = local_path(uri)
        if path.exists():
            shutil.rmtree(path)
        return
    fs, remote_path = filesystem(uri, "transfer")
    with contextlib.suppress(FileNotFoundError):
        retry(f"deleting {uri}", lambda: fs.rm(remote_path, recursive=True))
