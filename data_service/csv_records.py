r"""CSV, record by record, where one broken record costs itself and nothing else.

The grammar is RFC 4180 with a comma, `\n` or `\r\n` and an optional byte order mark; a quote in the middle of an
unquoted field is an ordinary character. A field that opens with a quote must close before a comma or the end of the
line, and may hold line breaks. Where it does not close so, or where a record that spans lines has another number of
fields than the header, its first line alone is rejected and reading goes on with the next line: a stray quote then
cannot swallow the rows behind it.

Works on bytes and with bounded memory. Refuses to guess encodings or delimiters.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["BrokenRecord", "CsvRecord", "read_csv_records"]

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class CsvRecord:
    """The fields of one record, as bytes, quotes removed."""

    line: int
    fields: list[bytes]


@dataclass(frozen=True)
class BrokenRecord:
    """A line that is no record."""

    line: int
    reason: str


class _Lines:
    """Numbered lines of a stream, with their line ends, that can be given back. A line beyond the limit is cut."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._returned: deque[tuple[int, bytes]] = deque()
        self._number = 0

    def next(self) -> tuple[int, bytes] | None:
        if self._returned:
            return self._returned.popleft()
        line = self._stream.readline(self._limit + 1)
        if not line:
            return None
        self._number += 1
        if len(line) > self._limit:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = self._stream.readline(1 << 20)
        elif self._number == 1:
            line = line.removeprefix(_BOM)
        return self._number, line

    def give_back(self, lines: list[tuple[int, bytes]]) -> None:
        self._returned.extendleft(reversed(lines))


def _chomp(line: bytes) -> bytes:
    return line[:-2] if line.endswith(b"\r\n") else line[:-1] if line.endswith((b"\n", b"\r")) else line


class _Broken(Exception):
    """The record being read is broken; the message says why."""


def _read_fields(lines: _Lines, first: bytes, taken: list[tuple[int, bytes]], limit: int) -> list[bytes]:
    """The fields of the record that begins with the line `first`; further lines it takes are appended to `taken`."""
    if b'"' not in first:
        return _chomp(first).split(b",")
    fields: list[bytes] = []
    line, place, total = first, 0, len(first)
    while True:
        if line[place : place + 1] != b'"':
            end = line.find(b",", place)
            if end < 0:
                fields.append(_chomp(line[place:]))
                return fields
            fields.append(line[place:end])
            place = end + 1
            continue
        place += 1
        parts: list[bytes] = []
        while True:
            quote = line.find(b'"', place)
            if quote < 0:
                parts.append(line[place:])
                following = lines.next()
                if following is None:
                    raise _Broken("a quoted field is never closed")
                taken.append(following)
                line, place = following[1], 0
                total += len(line)
                if total > limit:
                    raise _Broken(f"a quoted field is not closed within {limit} bytes")
                continue
            parts.append(line[place:quote])
            place = quote + 1
            if line[place : place + 1] != b'"':
                break
            parts.append(b'"')
            place += 1
        fields.append(b"".join(parts))
        rest = line[place:]
        if rest.startswith(b","):
            place += 1
        elif _chomp(rest) == b"":
            return fields
        else:
            raise _Broken("text follows a closing quote")


def read_csv_records(stream: BinaryIO, max_record_bytes: int) -> Iterator[CsvRecord | BrokenRecord]:
    """Every record of a CSV file, the header first, blank lines left out.

    Args:
        stream: the file, opened for bytes.
        max_record_bytes: a longer record is broken.

    Yields:
        Records in the order of the file. The first record sets how many fields a record has.
    """
    lines = _Lines(stream, max_record_bytes)
    width: int | None = None
    while (start := lines.next()) is not None:
        number, first = start
        if not _chomp(first):
            continue
        if len(first) > max_record_bytes:
            yield BrokenRecord(number, f"over-long: more than {max_record_bytes} bytes")
            continue
        taken: list[tuple[int, bytes]] = []
        try:
            fields = _read_fields(lines, first, taken, max_record_bytes)
            if width is not None and len(fields) != width:
                if taken:
                    raise _Broken(f"a quoted field runs over lines, and {len(fields)} fields instead of {width} follow")
                yield BrokenRecord(number, f"ragged: {len(fields)} fields where the header has {width}")
                continue
        except _Broken as error:
            lines.give_back(taken)
            yield BrokenRecord(number, f"broken quotes: {error}")
            continue
        width = len(fields) if width is None else width
        yield CsvRecord(number, fields)
