"""Source files, record by record: CSV, JSONL, Parquet and plain text.

Owns one reader per format. A record that cannot be used becomes a `Reject` with its line and reason; a file that
cannot be used is a SourceError that names the file, what was found and what to change. Memory is bounded by the longest
record allowed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from data_service import storage
from data_service.config import SourceConfig
from data_service.csv_records import BrokenRecord, CsvRecord, read_csv_records
from data_service.errors import SourceError

__all__ = ["Record", "Reject", "SourceFile", "find_files", "fingerprint", "read_records"]

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Record:
    """A text and the line (Parquet: the row, from 1) that it begins on."""

    line: int
    text: str


@dataclass(frozen=True)
class Reject:
    """A record that was left out."""

    line: int
    reason: str


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    uri: str
    source: SourceConfig


def find_files(sources: tuple[SourceConfig, ...]) -> list[SourceFile]:
    """The files of all sources, globs expanded, in order.

    Raises:
        SourceError: when a path names no file.
    """
    files: list[SourceFile] = []
    for number, source in enumerate(sources):
        key = f"data.sources.{number}.path={source.path}"
        try:
            found = _matching(key, source.path)
        except OSError as error:
            raise SourceError(f"{key}: it cannot be looked up: {error}. Check the address and the rights.") from error
        files.extend(SourceFile(uri, source) for uri in found)
    return files


def _matching(key: str, path: str) -> list[str]:
    if any(mark in path for mark in "*?["):
        found = storage.glob_files(path)
        if not found:
            raise SourceError(f"{key}: no file matches. Correct the pattern; it is relative to the YAML file.")
        return found
    if not storage.exists(path):
        raise SourceError(f"{key}: the file does not exist. Correct the path; it is relative to the YAML file.")
    if storage.is_local(path) and storage.local_path(path).is_dir():
        raise SourceError(f"{key}: this is a folder. Name its files, for example {path.rstrip('/')}/*.csv.")
    return [path]


def fingerprint(uri: str) -> str:
    """BLAKE2b-128 of a file's content.

    Raises:
        SourceError: when it cannot be read.
    """
    state = hashlib.blake2b(digest_size=16)
    with _opened(uri) as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _opened(uri: str) -> BinaryIO:
    try:
        return storage.open_input(uri)
    except OSError as error:
        raise SourceError(f"{uri} was to be read: {error}. Check the path and its permissions.") from error


def read_records(file: SourceFile, max_record_bytes: int) -> Iterator[Record | Reject]:
    """All records of a file, in order, good ones and rejects.

    Raises:
        SourceError: when the file is empty, lacks the text column, or is not of its format.
    """
    kind = file.source.resolved_format
    if kind == "parquet":
        yield from _read_parquet(file, max_record_bytes)
        return
    with _opened(file.uri) as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise SourceError(f"{file.uri} is UTF-16, not UTF-8. Save it as UTF-8.")
        stream.seek(0)
        if kind == "csv":
            yield from _read_csv(file, stream, max_record_bytes)
        elif kind == "jsonl":
            yield from _read_jsonl(file, stream, max_record_bytes)
        else:
            yield from _read_txt(stream, max_record_bytes)


def _checked(line: int, data: bytes, max_record_bytes: int) -> Record | Reject:
    """A record from its bytes, or why it is none."""
    if len(data) > max_record_bytes:
        return Reject(line, f"over-long: more than {max_record_bytes} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject(line, f"invalid UTF-8: {error.reason} at byte {error.start} of the field")
    return _checked_text(line, text)


def _checked_text(line: int, text: str) -> Record | Reject:
    if "\0" in text:
        return Reject(line, "NUL character")
    if not text.strip():
        return Reject(line, "empty text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return Reject(line, "invalid UTF-8: a lone surrogate")
    return Record(line, text)


def _column(file: SourceFile, wanted: str, found: list[str]) -> int:
    if wanted not in found:
        key = "label" if wanted == file.source.label and wanted != file.source.text else "text"
        raise SourceError(
            f"{file.uri}: the {key} column {wanted!r} was asked for, the columns are "
            f"{', '.join(repr(name) for name in found[:50])}. Set data.sources…{key} to one of them."
        )
    return found.index(wanted)


def _read_csv(file: SourceFile, stream: BinaryIO, max_record_bytes: int) -> Iterator[Record | Reject]:
    records = read_csv_records(stream, max_record_bytes)
    header = next(records, None)
    if header is None:
        raise SourceError(f"{file.uri}: the CSV is empty, not even a header. Give it a header line and records.")
    if isinstance(header, BrokenRecord):
        raise SourceError(f"{file.uri}, line {header.line}: the header cannot be read ({header.reason}). Repair it.")
    try:
        names = [name.decode("utf-8").strip() for name in header.fields]
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file.uri}, line {header.line}: the header is not UTF-8. Save the file as UTF-8."
        ) from error
    column = _column(file, file.source.text, names)
    if file.source.label is not None:
        _column(file, file.source.label, names)
    empty = True
    for record in records:
        empty = False
        if isinstance(record, CsvRecord):
            yield _checked(record.line, record.fields[column], max_record_bytes)
        else:
            yield Reject(record.line, record.reason)
    if empty:
        raise SourceError(f"{file.uri}: the CSV holds a header and no records. Add records, or remove the source.")


def _bounded_lines(stream: BinaryIO, max_record_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends, blank ones left out, one over the limit cut just behind it."""
    number = 0
    while line := stream.readline(max_record_bytes + 3):
        number += 1
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(_BLOCK)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.rstrip(b"\r\n")
        if line:
            yield number, line


def _read_txt(stream: BinaryIO, max_record_bytes: int) -> Iterator[Record | Reject]:
    for number, line in _bounded_lines(stream, max_record_bytes):
        yield _checked(number, line, max_record_bytes)


def _read_jsonl(file: SourceFile, stream: BinaryIO, max_record_bytes: int) -> Iterator[Record | Reject]:
    seen: dict[str, None] = {}
    objects = with_key = 0
    for number, line in _bounded_lines(stream, max_record_bytes):
        if len(line) > max_record_bytes:
            yield Reject(number, f"over-long: more than {max_record_bytes} bytes")
            continue
        try:
            value: Any = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Reject(number, f"invalid UTF-8: {error.reason} at byte {error.start}")
            continue
        except (ValueError, RecursionError) as error:
            yield Reject(number, f"not JSON: {error}"[:200])
            continue
        if not isinstance(value, dict):
            yield Reject(number, "not a JSON object")
            continue
        objects += 1
        if file.source.text not in value:
            if len(seen) < 50:
                seen.update(dict.fromkeys(value))
            yield Reject(number, f"no key {file.source.text!r}")
            continue
        with_key += 1
        text = value[file.source.text]
        if not isinstance(text, str):
            yield Reject(number, f"the text is {type(text).__name__}, not a string")
        else:
            yield _checked_text(number, text)
    if objects and not with_key:
        _column(file, file.source.text, list(seen))


def _read_parquet(file: SourceFile, max_record_bytes: int) -> Iterator[Record | Reject]:
    with _opened(file.uri) as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream)
            names = list(parquet.schema_arrow.names)
            _column(file, file.source.text, names)
            if file.source.label is not None:
                _column(file, file.source.label, names)
            kind = parquet.schema_arrow.field(file.source.text).type
            value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
                raise SourceError(f"{file.uri}: column {file.source.text!r} is {kind}, not text. Name a text column.")
            number = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=[file.source.text]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is None:
                        yield Reject(number, "empty text")
                    elif len(text) * 4 > max_record_bytes and len(text.encode()) > max_record_bytes:
                        yield Reject(number, f"over-long: more than {max_record_bytes} bytes")
                    else:
                        yield _checked_text(number, text)
        except pa.ArrowException as error:
            raise SourceError(f"{file.uri} is not a readable Parquet file: {error}. Write it again.") from error
