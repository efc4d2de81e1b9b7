"""Decompression as a stream, block by block, whatever the ratio.

A file that is cut off or damaged is an error and never a shorter file. Gzip files may have several members, and zeros
behind the last one (as `tar` and tapes pad them).

Owns the two codecs. Knows nothing of what is inside, nor where the bytes come from.
"""

import zlib
from typing import BinaryIO, Literal

import pyarrow as pa

from data_service.text_lines import ByteStream

__all__ = ["DamagedError", "decompressed"]

_BLOCK = 1 << 20
_GZIP_BITS = 31


class DamagedError(Exception):
    """Why the bytes are not a whole compressed file."""


def decompressed(stream: BinaryIO, codec: Literal["gzip", "zstd"]) -> ByteStream:
    """The content of a compressed file.

    Raises:
        DamagedError: here or in `read`, when it is empty, cut off or damaged.
    """
    if not stream.read(1):
        raise DamagedError("it is empty")
    stream.seek(0)
    return _Gzip(stream) if codec == "gzip" else _Zstd(stream)


class _Zstd:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")

    def read(self, size: int, /) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(str(error)) from error


class _Gzip:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._input = b""
        self._member = zlib.decompressobj(_GZIP_BITS)

    def read(self, size: int, /) -> bytes:
        while True:
            if self._member.eof and not self._next_member():
                return b""
            if not self._input:
                self._input = self._stream.read(_BLOCK)
            try:
                found = self._member.decompress(self._input, size)
            except zlib.error as error:
                raise DamagedError(str(error)) from error
            self._input = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if not self._input and not self._member.eof:
                # Before anything of the last block is handed out, the member's end must be there.
                self._input = self._stream.read(_BLOCK)
                if not self._input:
                    raise DamagedError("it is cut off")
            if found:
                return found

    def _next_member(self) -> bool:
        """Go on behind a member and zeros; returns whether there is another one."""
        while True:
            self._input = self._input.lstrip(b"\0")
            if self._input:
                self._member = zlib.decompressobj(_GZIP_BITS)
                return True
            self._input = self._stream.read(_BLOCK)
            if not self._input:
                return False
