"""Which files the sources name, and their bytes.

A path is a file, a folder (its files with a known suffix, and those in folders below, hidden ones left out), or a glob;
on this machine or on a store. Owns formats and compression by suffix, the identity of a file's content, the refusal of
a file that is reached twice, and the difference between a file that is bad and one that cannot be read now.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from data_service import storage
from data_service.config import (
    COMPRESSION_BY_SUFFIX,
    FORMAT_BY_SUFFIX,
    Compression,
    SourceConfig,
    SourceFormat,
    default_source_name,
)
from data_service.decompression import DamagedError, decompressed
from data_service.errors import ConfigError, DataUnavailableError, SourceError
from data_service.object_store import ReplacedError
from data_service.text_lines import ByteStream

__all__ = [
    "SourceFile",
    "Tell",
    "check_unchanged",
    "find_files",
    "fingerprint",
    "open_source",
    "open_text",
    "source_state",
    "untold",
]

_BLOCK = 1 << 20
_OWN_COMPRESSION = ("parquet", "arrow")
"""Formats that compress inside, and are read by place."""

Tell = Callable[[int], None]
"""Called with the bytes that were read so far."""


def untold(done: int) -> None:
    """Take no notice."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    uri: str
    source: SourceConfig
    name: str
    """The source's."""
    format: SourceFormat
    compression: Compression
    number: int = 0
    """Place of its source in data.sources."""

    def key(self, name: str) -> str:
        """The dotted key of a setting of its source."""
        return f"data.sources.{self.number}.{name}"


def find_files(sources: tuple[SourceConfig, ...]) -> list[SourceFile]:
    """The files of all sources, in the order of the sources, each source's sorted.

    Raises:
        SourceError: when a path names no file, a file's format cannot be told or has not what is asked of it, or a file
            is reached twice.
        DataUnavailableError: when a store gives no answer.
    """
    files: list[SourceFile] = []
    reached: dict[object, SourceFile] = {}
    for number, source in enumerate(sources):
        key = f"data.sources.{number}.path={source.path}"
        name = source.name or default_source_name(source.path)
        try:
            uris = _matching(key, source)
            for uri in uris:
                file = _described(key, SourceFile(uri, source, name, "txt", "none", number))
                before = reached.setdefault(_identity(uri), file)
                if before is not file:
                    _refuse_twice(before, file)
                files.append(file)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
        except OSError as error:
            # A store that keeps silent may answer later; a file system that refuses will go on refusing.
            kind = SourceError if storage.is_local(source.path) else DataUnavailableError
            raise kind(f"{key}: it cannot be looked up: {error}. Check the address and the rights.") from error
    return files


def _matching(key: str, source: SourceConfig) -> list[str]:
    """URIs of a source's files, sorted."""
    path = source.path
    local = storage.is_local(path)
    if any(mark in path for mark in "*?[") and not (local and storage.local_path(path).exists()):
        wants_hidden = path.rpartition("/")[2].startswith(".")
        found = [uri for uri in storage.glob_files(path) if wants_hidden or not _file_name(uri).startswith(".")]
        if not found:
            raise SourceError(f"{key}: no file matches. Correct the pattern; it is relative to the YAML file.")
        return found
    kind = storage.kind_of(path)
    if kind is None:
        raise SourceError(f"{key}: the file does not exist. Correct the path; it is relative to the YAML file.")
    if kind == "file":
        return [path]
    found = []
    for below in storage.list_tree(path):
        is_hidden = any(part.startswith(".") for part in PurePosixPath(below).parts)
        kind_of_file = _by_suffix(below)[0]
        if not is_hidden and kind_of_file is not None and source.format in ("auto", kind_of_file):
            found.append(storage.join(path, below))
    if not found:
        wanted = sorted(suffix for suffix, one in FORMAT_BY_SUFFIX.items() if source.format in ("auto", one))
        raise SourceError(
            f"{key}: the folder holds no file that ends with {', '.join(wanted)}, .gz or .zst behind it or not. Name "
            "the files with a pattern such as *.dat, and set format."
        )
    return found


def _file_name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _by_suffix(name: str) -> tuple[SourceFormat | None, Compression]:
    """Format and compression as the suffixes of a file's name tell them."""
    path = PurePosixPath(name.lower())
    compression = COMPRESSION_BY_SUFFIX.get(path.suffix, "none")
    return FORMAT_BY_SUFFIX.get((path if compression == "none" else path.with_suffix("")).suffix), compression


def _described(key: str, file: SourceFile) -> SourceFile:
    """The file with its format and compression."""
    source = file.source
    by_suffix, compression = _by_suffix(_file_name(file.uri))
    compression = compression if source.compression == "auto" else source.compression
    kind = by_suffix if source.format == "auto" else source.format
    if kind is None:
        raise SourceError(
            f"{key}: the format of {file.uri} cannot be told from its name; known endings are "
            f"{', '.join(FORMAT_BY_SUFFIX)}. Set {file.key('format')}."
        )
    if kind in _OWN_COMPRESSION and compression != "none":
        raise SourceError(
            f"{key}: {file.uri} is {kind} in {compression}, which cannot be read in parts; {kind} compresses its own "
            "contents. Decompress the file."
        )
    if kind == "txt" and (source.messages is not None or source.label is not None):
        setting = "messages" if source.messages is not None else "label"
        raise SourceError(
            f"{key}: {file.key(setting)} is set and {file.uri} is plain text, which has no columns. Remove "
            f"{file.key(setting)}, or set {file.key('format')}."
        )
    return SourceFile(file.uri, source, file.name, kind, compression, file.number)


def _identity(uri: str) -> object:
    """What is the same for two names of one file."""
    if storage.is_local(uri):
        found = storage.local_path(uri).stat()
        return found.st_dev, found.st_ino
    protocol, _, path = uri.partition("://")
    return {"s3a": "s3"}.get(protocol, protocol), path


def _refuse_twice(before: SourceFile, file: SourceFile) -> None:
    if before.number == file.number:
        both = f"data.sources.{file.number}.path={file.source.path} reaches one file twice"
    else:
        both = (
            f"data.sources.{before.number}.path={before.source.path} ({before.name}) and data.sources.{file.number}"
            f".path={file.source.path} ({file.name}) reach the same file"
        )
    names = file.uri if before.uri == file.uri else f"{before.uri}, also called {file.uri}"
    raise SourceError(f"{both}: {names}. Its records would count twice; narrow a path, or remove a source.")


def fingerprint(uri: str, tell: Tell = untold) -> str:
    """What tells a file's content from another's.

    On this machine, and on stores that know no better, BLAKE2b-128 of the content. On stores that keep an ETag, which
    changes with the content, a digest of ETag and size: nothing is downloaded only to be looked at. The same content
    under another ETag (a copy uploaded in other parts, or a file moved from here to a store) therefore counts as
    changed.

    Args:
        uri: the file.
        tell: called with the bytes that were hashed so far.

    Raises:
        SourceError: when there is no such file, or it may not be read.
        DataUnavailableError: when it cannot be read now.
    """
    try:
        tag = storage.content_tag(uri)
        if tag is not None:
            return hashlib.blake2b(tag.encode(), digest_size=16).hexdigest()
        state = hashlib.blake2b(digest_size=16)
        done = 0
        with storage.open_input(uri) as stream:
            while block := stream.read(_BLOCK):
                state.update(block)
                done += len(block)
                tell(done)
        return state.hexdigest()
    except OSError as error:
        raise _unreadable(uri, error) from error


def source_state(uri: str) -> str:
    """What is another once a file was written again, found without reading it.

    On this machine size, time of the last change (ns) and inode; on a store size and ETag, or the time of its making.

    Raises:
        SourceError: when there is no such file.
        DataUnavailableError: when it cannot be looked at now.
    """
    try:
        return storage.file_state(uri)
    except OSError as error:
        raise _unreadable(uri, error) from error


def check_unchanged(uri: str, state: str) -> None:
    """Raise SourceError when a file is not in this state of `source_state` any more; see there."""
    found = source_state(uri)
    if found != state:
        raise SourceError(
            f"{uri} changed while it was read (size, time and place were {state}, they are {found}). Prepare again "
            "when nothing writes to it."
        )


def _unreadable(uri: str, error: OSError) -> SourceError | DataUnavailableError:
    """A source that is not there, or a store that does not give it now."""
    if isinstance(error, ReplacedError):
        return SourceError(f"{uri} changed while it was read: {error}")
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return SourceError(f"{uri} was to be read: {error}. Check the path and its permissions.")
    return DataUnavailableError(
        f"{uri} was to be read: {error}. The file was not found bad: what was finished is kept, prepare again."
    )


class _Watched(io.RawIOBase):
    """A file that tells how much was read, and whose failures are told from damaged contents."""

    def __init__(self, uri: str, stream: BinaryIO, tell: Tell) -> None:
        self._uri = uri
        self._stream = stream
        self._told = tell
        self._done = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._stream.read(size)
        except OSError as error:
            raise _unreadable(self._uri, error) from error
        self._done += len(data)
        self._told(self._done)
        return data


@contextlib.contextmanager
def open_source(file: SourceFile, tell: Tell = untold) -> Iterator[BinaryIO]:
    """The file's bytes as they are; what goes wrong with them inside the block is a SourceError that names the file.

    Args:
        file: which.
        tell: called with the bytes that were read so far; of a file that is read by place some may count twice.

    Raises:
        SourceError: see above.
        DataUnavailableError: in the block, when the bytes cannot be read now.
    """
    try:
        stream = storage.open_input(file.uri)
    except OSError as error:
        raise _unreadable(file.uri, error) from error
    with stream:
        try:
            yield cast(BinaryIO, _Watched(file.uri, stream, tell))
        except OSError as error:  # Arrow's, of what it found in them
            raise SourceError(f"{file.uri} could not be read: {error}. Write the file again.") from error


@contextlib.contextmanager
def open_text(file: SourceFile, tell: Tell = untold) -> Iterator[ByteStream]:
    """The file's bytes, decompressed as they are read; see `open_source`.

    Raises:
        SourceError: in the block, when the file cannot be read or is not a whole compressed file.
        DataUnavailableError: in the block, when the bytes cannot be read now.
    """
    with open_source(file, tell) as stream:
        try:
            yield stream if file.compression == "none" else decompressed(stream, file.compression)
        except DamagedError as error:
            raise SourceError(
                f"{file.uri} could not be read to its end as {file.compression}: {str(error).rstrip('.')}. Fetch or "
                f"write the file again, or correct {file.key('compression')}."
            ) from error
