"""Source files, record by record: CSV, TSV, JSONL, Parquet, Arrow and plain text.

Owns the readers of lines; `data_service.columnar` has those of columns. A record that cannot be used becomes a `Reject`
with its line and reason; a file that cannot be used is a SourceError that names the file, what was found and what to
change. Memory is bounded by the longest record allowed, or by a row group's pages or a record batch where a format is
written in those.
"""

import json
from collections.abc import Iterator
from typing import Any

from data_service.columnar import read_arrow, read_parquet
from data_service.csv_records import BrokenRecord, CsvRecord, read_csv_records
from data_service.errors import SourceError
from data_service.records import Message, Record, Reject, chat_record, label_of, over_long, text_record
from data_service.source_files import SourceFile, Tell, find_files, fingerprint, open_text, untold
from data_service.text_lines import ByteStream, chomp, read_lines

__all__ = ["Message", "Record", "Reject", "SourceFile", "find_files", "fingerprint", "read_records"]

_NAMES_SHOWN = 50


def read_records(file: SourceFile, max_record_bytes: int, tell: Tell = untold) -> Iterator[Record | Reject]:
    """All records of a file, in order, good ones and rejects; `tell` is called with the bytes that were read.

    Raises:
        SourceError: when the file is empty, damaged, lacks a column that is asked for, or is not of its format.
        DataUnavailableError: when it cannot be read now.
    """
    if file.format == "parquet":
        yield from read_parquet(file, max_record_bytes, tell)
    elif file.format == "arrow":
        yield from read_arrow(file, max_record_bytes, tell)
    else:
        with open_text(file, tell) as stream:
            if file.format == "jsonl":
                yield from _read_jsonl(file, stream, max_record_bytes)
            elif file.format == "txt":
                yield from _read_txt(stream, max_record_bytes)
            else:
                yield from _read_csv(file, stream, max_record_bytes)


def _read_txt(stream: ByteStream, max_record_bytes: int) -> Iterator[Record | Reject]:
    for number, line in read_lines(stream, max_record_bytes):
        if text := chomp(line):
            yield text_record(number, text, max_record_bytes)


def _read_csv(file: SourceFile, stream: ByteStream, max_record_bytes: int) -> Iterator[Record | Reject]:
    records = read_csv_records(stream, max_record_bytes, b"\t" if file.format == "tsv" else b",")
    names = _header(file, next(records, None))
    source = file.source
    is_chat = source.messages is not None
    column = _column(file, "messages" if is_chat else "text", names)
    label_column = None if source.label is None else _column(file, "label", names)
    label: str | None = None
    empty = True
    for record in records:
        empty = False
        if isinstance(record, BrokenRecord):
            yield Reject(record.line, record.reason)
            continue
        if label_column is not None:
            try:
                label = label_of(record.fields[label_column])
            except ValueError as error:
                yield Reject(record.line, str(error))
                continue
        make = chat_record if is_chat else text_record
        yield make(record.line, record.fields[column], max_record_bytes, label)
    if empty:
        raise SourceError(
            f"{file.uri}: the {file.format.upper()} holds a header and no records. Add records, or remove the source."
        )


def _header(file: SourceFile, header: CsvRecord | BrokenRecord | None) -> list[str]:
    if header is None:
        raise SourceError(
            f"{file.uri}: the {file.format.upper()} is empty, not even a header. Give it a header line and records."
        )
    if isinstance(header, BrokenRecord):
        raise SourceError(f"{file.uri}, line {header.line}: the header cannot be read ({header.reason}). Repair it.")
    if any(b"\0" in name for name in header.fields):
        raise SourceError(
            f"{file.uri}, line {header.line}: the header holds NUL characters, as UTF-16 without a byte order mark "
            "does. Save the file as UTF-8."
        )
    try:
        return [name.decode("utf-8").strip() for name in header.fields]
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file.uri}, line {header.line}: the header is not UTF-8. Save the file as UTF-8."
        ) from error


def _column(file: SourceFile, setting: str, found: list[str]) -> int:
    """Place of the column that a setting of the source names."""
    wanted = getattr(file.source, setting)
    if found.count(wanted) != 1:
        times = "not among" if wanted not in found else "more than once among"
        raise SourceError(
            f"{file.uri}: {file.key(setting)}={wanted} was asked for, it is {times} the columns "
            f"{', '.join(repr(name) for name in found[:_NAMES_SHOWN])}. Set {file.key(setting)} to one of them."
        )
    return found.index(wanted)


def _read_jsonl(file: SourceFile, stream: ByteStream, max_record_bytes: int) -> Iterator[Record | Reject]:
    source = file.source
    is_chat = source.messages is not None
    setting, key = ("messages", source.messages) if is_chat else ("text", source.text)
    seen: dict[str, None] = {}
    missing = {setting: 0} | ({} if source.label is None else {"label": 0})
    objects = 0
    for number, line in read_lines(stream, max_record_bytes):
        line = chomp(line)
        if not line or line.isspace():
            continue
        if len(line) > max_record_bytes:
            yield over_long(number, max_record_bytes)
            continue
        try:
            value: Any = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Reject(number, f"invalid UTF-8: {error.reason} at byte {error.start} of the line")
            continue
        except (ValueError, RecursionError) as error:
            yield Reject(number, f"not JSON: {error}"[:200])
            continue
        if not isinstance(value, dict):
            yield Reject(number, "not a JSON object")
            continue
        objects += 1
        absent = [name for name in missing if getattr(source, name) not in value]
        for name in absent:
            missing[name] += 1
        if absent:
            if len(seen) < _NAMES_SHOWN:
                seen.update(dict.fromkeys(value))
            yield Reject(number, f"no key {getattr(source, absent[0])!r}")
            continue
        yield _of_object(
            number, value[key], None if source.label is None else (value[source.label],), is_chat, max_record_bytes
        )
    for name, count in missing.items():
        if objects and count == objects:
            _column(file, name, list(seen))


def _of_object(
    line: int, value: Any, labelled: tuple[Any] | None, is_chat: bool, max_record_bytes: int
) -> Record | Reject:
    """The record of a JSON object from its text or messages, and the value of its label where one is asked for."""
    label = None
    if labelled is not None:
        try:
            label = label_of(labelled[0])
        except ValueError as error:
            return Reject(line, str(error))
    if is_chat:
        return chat_record(line, value, max_record_bytes, label)
    if not isinstance(value, str):
        return Reject(line, f"bad text: {type(value).__name__}, not a string")
    return text_record(line, value, max_record_bytes, label)
