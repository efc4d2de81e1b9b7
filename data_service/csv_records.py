r"""CSV and TSV, record by record, where one broken record costs itself and nothing else.

The grammar is RFC 4180 with a comma or a tab, any line ends and an optional byte order mark; a quote in the middle of
an unquoted field is an ordinary character. A field that opens with a quote must close before a delimiter or the end of
the line, and may hold line breaks. Where it does not close so, or where a record that spans lines has another number of
fields than the header, its first line alone is rejected and reading goes on with the next line: a stray quote then
cannot swallow the rows behind it.

Much TSV is written without quoting. A line whose quotes do not work out is therefore cut at its tabs where that gives
the right number of fields, and so is each line of a record that spans lines when it does for every one of them.

Works on bytes and with bounded memory. Refuses to guess encodings or delimiters.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from data_service.text_lines import ByteStream, chomp, read_lines

__all__ = ["BrokenRecord", "CsvRecord", "read_csv_records"]


@dataclass(frozen=True, slots=True)
class CsvRecord:
    """The fields of one record, as bytes, quotes removed."""

    line: int
    fields: list[bytes]


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """A line that is no record."""

    line: int
    reason: str


class _Lines:
    """Numbered lines that can be given back."""

    def __init__(self, stream: ByteStream, limit: int) -> None:
        self._read = read_lines(stream, limit)
        self._returned: deque[tuple[int, bytes]] = deque()

    def next(self) -> tuple[int, bytes] | None:
        if self._returned:
            return self._returned.popleft()
        return next(self._read, None)

    def give_back(self, lines: list[tuple[int, bytes]]) -> None:
        self._returned.extendleft(reversed(lines))


class _Broken(Exception):
    """The record being read is broken; the message says why."""


def _read_fields(
    lines: _Lines, first: bytes, taken: list[tuple[int, bytes]], delimiter: bytes, limit: int
) -> list[bytes]:
    """The fields of the record that begins with the line `first`; further lines it takes are appended to `taken`."""
    if b'"' not in first:
        return chomp(first).split(delimiter)
    fields: list[bytes] = []
    line, place, total = first, 0, len(first)
    while True:
        if line[place : place + 1] != b'"':
            end = line.find(delimiter, place)
            if end < 0:
                fields.append(chomp(line[place:]))
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
        behind = line[place : place + 2]
        if behind.startswith(delimiter):
            place += 1
        elif behind in (b"", b"\n", b"\r", b"\r\n"):
            return fields
        else:
            raise _Broken("text follows a closing quote")


def _unquoted(field: bytes) -> bytes:
    """The field without its quotes, where they are well-formed; as it stands otherwise."""
    inside = field[1:-1]
    if len(field) < 2 or not (field.startswith(b'"') and field.endswith(b'"')) or b'"' in inside.replace(b'""', b""):
        return field
    return inside.replace(b'""', b'"')


def read_csv_records(
    stream: ByteStream, max_record_bytes: int, delimiter: Literal[b",", b"\t"] = b","
) -> Iterator[CsvRecord | BrokenRecord]:
    """Every record of a CSV or TSV file, the header first, blank lines left out.

    Args:
        stream: the file, opened for bytes.
        max_record_bytes: a longer record is broken.
        delimiter: what stands between fields.

    Yields:
        Records in the order of the file. The first record sets how many fields a record has.
    """
    lines = _Lines(stream, max_record_bytes)
    unquoted_too = delimiter == b"\t"
    width: int | None = None
    while (start := lines.next()) is not None:
        number, first = start
        if first in (b"\n", b"\r\n", b"\r"):
            continue
        if len(first) > max_record_bytes and len(chomp(first)) > max_record_bytes:
            yield BrokenRecord(number, f"over-long: more than {max_record_bytes} bytes")
            continue
        taken: list[tuple[int, bytes]] = []
        reason = None
        try:
            fields = _read_fields(lines, first, taken, delimiter, max_record_bytes)
            if width is not None and len(fields) != width:
                reason = (
                    f"broken quotes: a quoted field runs over lines, and {len(fields)} fields instead of {width} follow"
                    if taken
                    else f"ragged: {len(fields)} fields where the header has {width}"
                )
        except _Broken as error:
            reason = f"broken quotes: {error}"
        if unquoted_too and b'"' in first and (reason is not None or taken):
            alone = chomp(first).split(delimiter)
            wanted = len(alone) if width is None else width
            whole = reason is not None or (wanted > 1 and all(line.count(delimiter) == wanted - 1 for _, line in taken))
            if len(alone) == wanted and whole:
                lines.give_back(taken)
                taken, fields, reason = [], [_unquoted(field) for field in alone], None
        if reason is not None:
            lines.give_back(taken)
            yield BrokenRecord(number, reason)
            continue
        width = len(fields) if width is None else width
        yield CsvRecord(number, fields)
