"""Work items that are done once: their files in the work folder, and a record of each item that is finished.

A record is written behind the files of its item and names their sizes and checksums. When a preparation that was
killed is taken up again, an item whose record and files are whole is not done again; others are, from the start. Since
the checksums are looked at, nothing needs to be synced: what a lost machine left half-written is found.

Owns these records. Refuses to know what an item does.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_service import storage
from data_service.shards import checksum

__all__ = ["WorkFiles", "arrays_of", "arrays_to_bytes", "do_once", "write_quickly"]

Result = dict[str, Any]
"""What an item tells of its work: values that JSON keeps as they are."""


class WorkFiles:
    """The files that an item writes."""

    def __init__(self, work_uri: str) -> None:
        self.written: dict[str, list[int | str]] = {}
        """Path in the work folder → size and checksum."""
        self._work_uri = work_uri

    def write(self, path: str, data: bytes) -> None:
        """Write a file of the work folder, replacing one that is there."""
        write_quickly(storage.join(self._work_uri, path), data)
        self.written[path] = [len(data), checksum(data).hex()]


def write_quickly(uri: str, data: bytes) -> None:
    """As `storage.write_bytes`, without waiting for the disk."""
    if not storage.is_local(uri):
        storage.write_bytes(uri, data)
        return
    path = storage.local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write that found no room does not say where
            error.filename = str(path)
        raise


def do_once(work_uri: str, name: str, work: Callable[[WorkFiles], Result]) -> Result:
    """The result of an item: as it was recorded, when its files are whole; else of doing it.

    Args:
        work_uri: the work folder.
        name: of the item, unique in the folder; the record is `NAME.done`.
        work: does it, writing its files through what it is given.
    """
    record_uri = storage.join(work_uri, f"{name}.done")
    found = _recorded(work_uri, record_uri)
    if found is not None:
        return found
    files = WorkFiles(work_uri)
    result = work(files)
    record = json.dumps({"files": files.written, "result": result}, ensure_ascii=False)
    write_quickly(record_uri, record.encode())
    # Through JSON, so that a result is the same when it is made as when it is found.
    done: Result = json.loads(record)["result"]
    return done


def _recorded(work_uri: str, record_uri: str) -> Result | None:
    try:
        record = json.loads(storage.read_bytes(record_uri))
        for path, (size, digest) in record["files"].items():
            data = storage.read_bytes(storage.join(work_uri, path))
            if len(data) != size or checksum(data).hex() != digest:
                return None
        result: Result = record["result"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return result


def arrays_to_bytes(arrays: dict[str, npt.NDArray[np.generic]]) -> bytes:
    """Flat arrays as one Arrow IPC file of one row."""
    columns, names = [], []
    for name, array in arrays.items():
        kind = pa.from_numpy_dtype(array.dtype)
        values = pa.Array.from_buffers(kind, array.size, [None, pa.py_buffer(np.ascontiguousarray(array))])
        offsets = pa.py_buffer(np.array([0, array.size], dtype="<i8"))
        columns.append(pa.Array.from_buffers(pa.large_list(kind), 1, [None, offsets], children=[values]))
        names.append(name)
    batch = pa.RecordBatch.from_arrays(columns, names=names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def arrays_of(uri: str, names: Iterable[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    """The inverse of `arrays_to_bytes`; of a file on this machine only the pages that are used are read.

    Args:
        uri: the file.
        names: arrays wanted; None for all.
    """
    local = storage.is_local(uri)
    source = pa.memory_map(str(storage.local_path(uri))) if local else pa.BufferReader(storage.read_bytes(uri))
    batch = pa.ipc.open_file(source).get_batch(0)
    wanted = batch.schema.names if names is None else [name for name in names if name in batch.schema.names]
    arrays = {}
    for name in wanted:
        values = batch.column(name).flatten()
        data = values.buffers()[1]
        dtype = values.type.to_pandas_dtype()
        arrays[name] = np.zeros(0, dtype) if data is None else np.frombuffer(data, dtype, count=len(values))
    return arrays
