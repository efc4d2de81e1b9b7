"""A remote file as a stream, read by ranges; a range that breaks off is asked for again, and never ends the file."""

import io
from typing import Any, BinaryIO

from data_service.object_store import ReplacedError, call, fetch, filesystem, is_s3, retry

__all__ = ["open_remote"]

_STREAM_PIECE = 8 << 20


class _RemoteInput(io.RawIOBase):
    """Raw bytes of a file of a known size."""

    def __init__(self, uri: str, size: int, tag: str | None) -> None:
        self._uri = uri
        self._size = size
        self._tag = tag
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._next(_STREAM_PIECE), b""))  # Python's own would ask for 8 KiB at a time

    def _next(self, most: int) -> bytes:
        length = max(0, min(most, _STREAM_PIECE, self._size - self._place))
        data = fetch(self._uri, self._place, length, self._tag).data
        if len(data) != length:
            raise ReplacedError(f"{self._uri} had {self._size} bytes and is shorter now. Read it again.")
        self._place += length
        return data


def open_remote(uri: str) -> BinaryIO:
    """A readable, seekable, buffered stream of a remote file, which must not change meanwhile.

    Raises:
        FileNotFoundError: when it is not there, or a folder.
    """
    fs, path = filesystem(uri)
    found = retry(f"opening {uri}", lambda: call(fs, "info", path))
    if found["type"] == "directory":
        raise FileNotFoundError(f"{uri} is a folder.")
    tag = found.get("ETag") if is_s3(uri) else None
    return io.BufferedReader(_RemoteInput(uri, int(found["size"]), tag or None), _STREAM_PIECE)
