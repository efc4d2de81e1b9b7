"""Which files the sources name, and their bytes.

A path is a file, a folder (its files with a known suffix, and those in folders below, hidden ones left out), or a glob;
on this machine or on a store. Owns formats and compression by suffix, the identity of a file's content, the refusal of
a file that is reached twice, and decompression as a stream: a compressed file that is cut off or damaged is an error
and never a shorter file.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import pyarrow as pa

from data_service import storage
from data_service.config import (
    COMPRESSION_BY_SUFFIX,
    FORMAT_BY_SUFFIX,
    Compression,
    SourceConfig,
    SourceFormat,
    default_source_name,
)
from data_service.errors import ConfigError, SourceError
from data_service.text_lines import ByteStream

__all__ = ["SourceFile", "find_files", "fingerprint", "open_source", "open_text"]

_BLOCK = 1 << 20
_OWN_COMPRESSION = ("parquet", "arrow")
"""Formats that compress inside, and are read by place."""


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
            raise SourceError(f"{key}: it cannot be looked up: {error}. Check the address and the rights.") from error
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


def fingerprint(uri: str) -> str:
    """What tells a file's content from another's.

    On this machine, and on stores that know no better, BLAKE2b-128 of the content. On stores that keep an ETag, which
    changes with the content, a digest of ETag and size: nothing is downloaded only to be looked at. The same content
    under another ETag (a copy uploaded in other parts, or a file moved from here to a store) therefore counts as
    changed.

    Raises:
        SourceError: when it cannot be read.
    """
    try:
        tag = storage.content_tag(uri)
        if tag is not None:
            return hashlib.blake2b(tag.encode(), digest_size=16).hexdigest()
        state = hashlib.blake2b(digest_size=16)
        with storage.open_input(uri) as stream:
            while block := stream.read(_BLOCK):
                state.update(block)
        return state.hexdigest()
    except OSError as error:
        raise SourceError(f"{uri} was to be read: {error}. Check the path and its permissions.") from error


@contextlib.contextmanager
def open_source(file: SourceFile) -> Iterator[BinaryIO]:
    """The file's bytes as they are; what goes wrong with them inside the block is a SourceError that names the file."""
    try:
        with storage.open_input(file.uri) as stream:
            yield stream
    except OSError as error:
        raise SourceError(f"{file.uri} was to be read: {error}. Check the path and its permissions.") from error


@contextlib.contextmanager
def open_text(file: SourceFile) -> Iterator[ByteStream]:
    """The file's bytes, decompressed as they are read.

    Raises:
        SourceError: in the block, when the file cannot be read or is not a whole compressed file.
    """
    with open_source(file) as stream:
        yield stream if file.compression == "none" else _Decompressed(file, stream)


class _Decompressed:
    """Decompresses block by block, whatever the ratio, and notices where the file is damaged."""

    def __init__(self, file: SourceFile, stream: BinaryIO) -> None:
        self._file = file
        if not stream.read(1):
            raise self._damaged("it is empty")
        stream.seek(0)
        self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), file.compression)

    def read(self, size: int, /) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> SourceError:
        return SourceError(
            f"{self._file.uri} could not be read to its end as {self._file.compression}: {why.rstrip('.')}. Fetch or "
            f"write the file again, or correct {self._file.key('compression')}."
        )
