"""Records of Parquet files and of Arrow IPC files (Feather version 2) and streams.

A row group is read in small batches of the wanted columns, page by page, so that neither long texts nor large row
groups fill the memory; an Arrow file is read by its record batches. Texts are taken as bytes and decoded one by one:
neither format checks that strings are UTF-8, and one that is not costs its own row.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from data_service.errors import SourceError
from data_service.records import Record, Reject, chat_record, label_of, text_record
from data_service.source_files import SourceFile, Tell, open_source, untold

__all__ = ["read_arrow", "read_parquet"]

_BATCH_BYTES = 16 << 20
"""Text that is held as Python objects at a time, unless a single record is longer."""
_BATCH_ROWS = 1024
_REPEATED_ROWS = 64
"""Rows at a time of a column that is stored as a dictionary, whose size says nothing of its rows'."""
_NAMES_SHOWN = 50


def read_parquet(file: SourceFile, max_record_bytes: int, tell: Tell = untold) -> Iterator[Record | Reject]:
    """All rows of a Parquet file, in order.

    Raises:
        SourceError: when it is not Parquet, is damaged, or lacks a column of the right type.
    """
    with open_source(file, tell) as stream:
        try:
            # Without the buffer size a column of a row group would be read as a whole.
            parquet = pa.parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            wanted = _check_columns(file, parquet.schema_arrow)
            number = 0
            for group in range(parquet.metadata.num_row_groups):
                rows = _rows_at_a_time(parquet.metadata.row_group(group), wanted)
                for batch in parquet.iter_batches(
                    batch_size=rows, row_groups=[group], columns=wanted, use_threads=False
                ):
                    columns = {name: _checked(batch.column(name)) for name in wanted}
                    yield from _of_columns(file, columns, number, max_record_bytes)
                    number += batch.num_rows
        except pa.ArrowException as error:
            raise SourceError(f"{file.uri} is not a readable Parquet file: {error}. Write it again.") from error


def _rows_at_a_time(group: Any, wanted: list[str]) -> int:
    """Rows of a row group whose wanted columns take about _BATCH_BYTES."""
    size, limit = 0, _BATCH_ROWS
    num_rows: int = group.num_rows
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema.partition(".")[0] in wanted:
            size += column.total_uncompressed_size
            if column.has_dictionary_page:
                limit = _REPEATED_ROWS
    per_row: int = size // max(1, num_rows) + 1
    return max(1, min(limit, _BATCH_BYTES // per_row))


def read_arrow(file: SourceFile, max_record_bytes: int, tell: Tell = untold) -> Iterator[Record | Reject]:
    """All rows of an Arrow IPC file or stream, in order.

    Raises:
        SourceError: when it is neither, is damaged, or lacks a column of the right type.
    """
    with open_source(file, tell) as stream:
        try:
            number = 0
            for batch in _batches(file, stream):
                columns = {name: _checked(batch.column(name)) for name in batch.schema.names}
                is_repeated = any(pa.types.is_dictionary(column.type) for column in columns.values())
                per_row = batch.get_total_buffer_size() // max(1, batch.num_rows) + 1
                rows = max(1, min(_REPEATED_ROWS if is_repeated else _BATCH_ROWS, _BATCH_BYTES // per_row))
                for start in range(0, batch.num_rows, rows):
                    part = {name: column.slice(start, rows) for name, column in columns.items()}
                    yield from _of_columns(file, part, number + start, max_record_bytes)
                number += batch.num_rows
        except pa.ArrowException as error:
            raise SourceError(f"{file.uri} is not a readable Arrow file: {error}. Write it again.") from error


def _batches(file: SourceFile, stream: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Record batches with the wanted columns alone, checked so that no offset in them leads astray."""
    magic = stream.read(8)
    stream.seek(0)
    if magic.startswith(b"FEA1"):
        raise SourceError(f"{file.uri} is Feather version 1, which is not read. Write it as version 2.")
    if magic.startswith(b"ARROW1"):
        source = pa.ipc.open_file(stream)
        wanted = _check_columns(file, source.schema)
        batches = (source.get_batch(number) for number in range(source.num_record_batches))
    else:
        source = pa.ipc.open_stream(stream)
        wanted = _check_columns(file, source.schema)
        batches = iter(source)
    for batch in batches:
        yield batch.select(wanted)


def _check_columns(file: SourceFile, schema: pa.Schema) -> list[str]:
    """Names of the columns to read, of a type that can be.

    Raises:
        SourceError: when one is not there, there twice, or of another type.
    """
    source = file.source
    checks = (
        [("messages", _is_chat, "text or a list of {role, content}")]
        if source.messages is not None
        else [("text", _is_text, "text")]
    )
    if source.label is not None:
        checks.append(("label", _is_label, "text, integers or truth values"))
    wanted = []
    for setting, fits, what in checks:
        name = getattr(source, setting)
        if schema.names.count(name) != 1:
            times = "not among" if name not in schema.names else "more than once among"
            raise SourceError(
                f"{file.uri}: {file.key(setting)}={name} was asked for, it is {times} the columns "
                f"{', '.join(repr(one) for one in schema.names[:_NAMES_SHOWN])}. Set {file.key(setting)} to one of "
                "them."
            )
        kind = schema.field(name).type
        if not fits(kind):
            raise SourceError(
                f"{file.uri}: {file.key(setting)}={name} is a column of {kind}, not of {what}. Name another column."
            )
        wanted.append(name)
    return wanted


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_label(kind: pa.DataType) -> bool:
    plain = _plain(kind)
    return _is_text(kind) or bool(pa.types.is_integer(plain) or pa.types.is_boolean(plain))


def _is_chat(kind: pa.DataType) -> bool:
    if _is_text(kind):
        return True
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type.fields}
    return all(name in fields and _is_text(fields[name]) for name in ("role", "content"))


def _undecoded(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in place of strings, all the way down, and nothing of a message but role and content."""
    if _is_text(kind):
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_undecoded(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _undecoded(field.type)) for field in kind.fields])
    return _plain(kind)


def _checked(column: pa.Array) -> pa.Array:
    """The column with bytes for strings. Raises ArrowInvalid where its buffers or indices lead astray."""
    if pa.types.is_dictionary(column.type):
        column.indices.validate(full=True)
        return pa.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary))
    column = column.cast(_undecoded(column.type))
    column.validate(full=True)
    return column


def _values(column: pa.Array) -> list[Any]:
    """Checked values as Python objects, strings as bytes."""
    return list((column.dictionary_decode() if pa.types.is_dictionary(column.type) else column).to_pylist())


def _of_columns(
    file: SourceFile, columns: dict[str, pa.Array], before: int, max_record_bytes: int
) -> Iterator[Record | Reject]:
    """The records of some rows, the first of which has the number `before` + 1; `columns` are checked."""
    source = file.source
    is_chat = source.messages is not None
    values = _values(columns[source.messages if source.messages is not None else source.text])
    labels = None if source.label is None else _values(columns[source.label])
    label: str | None = None
    for place, value in enumerate(values):
        number = before + place + 1
        if labels is not None:
            try:
                label = label_of(labels[place])
            except ValueError as error:
                yield Reject(number, str(error))
                continue
        if value is None:
            yield Reject(number, "bad messages: none" if is_chat else "empty text")
        elif is_chat:
            yield chat_record(number, value, max_record_bytes, label)
        else:
            yield text_record(number, value, max_record_bytes, label)
