r"""Numbered lines of a stream of bytes, with bounded memory.

Lines end with `\n`, `\r\n` or `\r`, mixed as they come. A byte order mark is taken off; a stream that begins with the
mark of UTF-16 is turned into UTF-8, and what is not UTF-16 in it into bytes that are not UTF-8. A line beyond the
limit is cut just behind it. Knows no format, and guesses no encoding.
"""

import codecs
from collections.abc import Iterator
from typing import Protocol

__all__ = ["ByteStream", "chomp", "read_lines"]

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_UTF16 = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}


class ByteStream(Protocol):
    """What gives bytes."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


def chomp(line: bytes) -> bytes:
    """The line without its end."""
    return line[:-2] if line.endswith(b"\r\n") else line[:-1] if line.endswith((b"\n", b"\r")) else line


def read_lines(stream: ByteStream, limit: int) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1, and their ends.

    A line of more than `limit` bytes, its end not counted, comes with at least `limit` + 1 of them; the rest may be
    missing.
    """
    number = 0
    pending = b""
    """The beginning of a line whose end has not been read yet, or one that ends with the first half of a CRLF."""
    for block in _utf8_blocks(stream):
        if len(pending) > limit and not pending.endswith(b"\r"):
            pending = pending[: limit + 1]
            end = _first_end(block)
            if end < 0:
                continue
            block = block[end:]
        lines = (pending + block).splitlines(keepends=True)
        pending = b"" if lines[-1].endswith(b"\n") else lines.pop()
        for line in lines:
            number += 1
            yield number, line
    if pending:
        yield number + 1, pending


def _first_end(block: bytes) -> int:
    """Place of the first line end, or -1."""
    newline = block.find(b"\n")
    other = block.find(b"\r") if newline < 0 else block.find(b"\r", 0, newline)
    return newline if other < 0 else other


def _utf8_blocks(stream: ByteStream) -> Iterator[bytes]:
    """Blocks that are not empty, without the byte order mark."""
    first = b""
    while len(first) < len(_BOM) and (more := stream.read(_BLOCK)):
        first += more
    encoding = _UTF16.get(first[:2])
    if encoding is None:
        if block := first.removeprefix(_BOM):
            yield block
        while block := stream.read(_BLOCK):
            yield block
        return
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    block = first[2:]
    while block:
        # A lone surrogate becomes three bytes that no UTF-8 decoder takes, so that it costs its own record.
        if text := decoder.decode(block):
            yield text.encode("utf-8", "surrogatepass")
        block = stream.read(_BLOCK)
    try:
        decoder.decode(b"", True)
    except UnicodeDecodeError:
        yield b"\xff"  # half a character at the end of the file
