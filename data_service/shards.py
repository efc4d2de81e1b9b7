"""Shard files and the index of a prepared dataset: their bytes, their names, and reading them with checksums.

A shard is an uncompressed Arrow IPC file of one record batch with ONE row, whose list columns are the arrays of
`Shard`; so a file on this machine is read in place, without a copy. In a stream dataset shard k of a part ends with the
first token of shard k + 1, so that no row leaves its shard. The index lists the shards of the training split in the
order of their numbers, then those of the evaluation split, in pages of INDEX_PAGE entries, each named by its digest in
the manifest.

Owns these formats. Refuses to hand out bytes whose checksum differs. Rows, caches and what a manifest says are the
business of others.
"""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_service import storage
from data_service.errors import DataError, ShardCorruptError
from data_service.manifest import INDEX_PAGE, SPLITS, DatasetManifest, index_file, read_manifest

__all__ = [
    "MAX_SHARD_TOKENS",
    "Shard",
    "ShardEntry",
    "ShardIndex",
    "checksum",
    "encode_index_page",
    "encode_shard",
    "index_pages",
    "load_shard",
    "open_shard",
    "read_tokens",
    "shard_file",
    "verify_bytes",
]

MAX_SHARD_TOKENS = 2**31
"""Places in a shard are uint32."""
_PAGES_KEPT = 64
_ADVICE = "Prepare the dataset again, which restores it."

_COLUMNS: dict[str, tuple[str, ...]] = {
    "tokens": ("<u2", "<u4"),
    "starts": ("<u4",),
    "row_offsets": ("<u8",),
    "answer_bits": ("|u1",),
    "labels": ("<i4",),
}
"""Columns of a shard in order, with the dtypes that each may have; the last three only where they apply."""

_INDEX_SCHEMA = pa.schema(
    [
        pa.field("num_tokens", pa.uint64(), nullable=False),
        pa.field("num_rows", pa.uint64(), nullable=False),
        pa.field("num_bytes", pa.uint64(), nullable=False),
        pa.field("checksum", pa.binary(16), nullable=False),
    ]
)


@dataclass(frozen=True)
class Shard:
    """The content of a shard; views over the file's bytes where it was read."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[N], uint16 or uint32; in a stream dataset the next shard's first token is the last, but in a part's last one."""
    starts: npt.NDArray[np.uint32]
    """[D], ascending: places in `tokens` where a document begins."""
    row_offsets: npt.NDArray[np.uint64] | None = None
    """[n+1]: row i is tokens[row_offsets[i]:row_offsets[i+1]]; None in a stream dataset."""
    answer_bits: npt.NDArray[np.uint8] | None = None
    """[ceil(N/8)] bitmap over `tokens`, least significant bit first: this token counts as a label (chats)."""
    labels: npt.NDArray[np.int32] | None = None
    """[n]: class of the row, -1 where there is none."""

    @property
    def num_bytes(self) -> int:
        """Bytes that its arrays take."""
        return sum(array.nbytes for array in vars(self).values() if array is not None)


@dataclass(frozen=True)
class ShardEntry:
    """What the index says of a shard."""

    split: str
    number: int
    num_tokens: int
    """The repeated token at the end of a stream shard is not counted."""
    num_rows: int
    """0 in a stream dataset."""
    num_bytes: int
    checksum: bytes
    """BLAKE2b-128 of the file."""


def shard_file(split: str, number: int) -> str:
    """Path of a shard inside its dataset."""
    return f"shards/{split}-{number:05d}.arrow"


def checksum(data: "bytes | memoryview") -> bytes:
    """BLAKE2b-128 of a file's bytes; lets other threads run meanwhile."""
    return hashlib.blake2b(data, digest_size=16).digest()


def encode_shard(shard: Shard) -> bytes:
    """The bytes of a shard file; equal for equal content.

    Raises:
        ValueError: when an array is of another dtype, or there are too many tokens for uint32 places.
    """
    if shard.tokens.size > MAX_SHARD_TOKENS:
        raise ValueError(f"a shard of {shard.tokens.size} tokens is too long: at most {MAX_SHARD_TOKENS}.")
    columns, fields = [], []
    for name, dtypes in _COLUMNS.items():
        array: npt.NDArray[np.generic] | None = getattr(shard, name)
        if array is None:
            continue
        if array.dtype.str not in dtypes or array.ndim != 1:
            raise ValueError(f"shard.{name} is {array.dtype}{array.shape}, it must be one of {dtypes}, flat.")
        kind = pa.from_numpy_dtype(array.dtype)
        values = pa.Array.from_buffers(kind, array.size, [None, pa.py_buffer(np.ascontiguousarray(array))])
        field = pa.field(name, pa.large_list(pa.field("item", kind, nullable=False)), nullable=False)
        offsets = pa.py_buffer(np.array([0, array.size], dtype="<i8"))
        columns.append(pa.Array.from_buffers(field.type, 1, [None, offsets], children=[values]))
        fields.append(field)
    return _ipc_bytes(pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields)))


def _ipc_bytes(batch: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _ipc_batch(source: pa.NativeFile) -> pa.RecordBatch:
    reader = pa.ipc.open_file(source)
    if reader.num_record_batches != 1:
        raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches instead of 1")
    return reader.get_batch(0)


def _view(array: pa.Array, dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    """The values of an Arrow array without nulls, over its memory."""
    data = array.buffers()[1]
    if data is None:
        return np.zeros(0, dtype=dtype)
    return np.frombuffer(data, dtype=dtype, count=array.offset + len(array))[array.offset :]


def open_shard(source: "str | Path | bytes | memoryview | pa.Buffer") -> Shard:
    """A shard over a file of this machine, which is mapped into memory, or over its bytes. No checksum is looked at.

    Raises:
        ShardCorruptError: when it is no shard.
        OSError: when the file cannot be read.
    """
    named = isinstance(source, str | Path)
    name = str(source) if named else "a shard"
    try:
        file = pa.memory_map(str(source)) if named else pa.BufferReader(source)
        batch = _ipc_batch(file)
        if batch.num_rows != 1:
            raise pa.ArrowInvalid(f"{batch.num_rows} rows instead of 1")
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        for column_name, column in zip(batch.schema.names, batch.columns, strict=True):
            dtypes = _COLUMNS.get(column_name, ())
            if not pa.types.is_large_list(column.type) or column.null_count:
                raise pa.ArrowInvalid(f"column {column_name} is {column.type}")
            dtype = np.dtype(column.type.value_type.to_pandas_dtype())
            if dtype.str not in dtypes:
                raise pa.ArrowInvalid(f"column {column_name} holds {dtype}")
            values = column.flatten()
            if values.null_count:
                raise pa.ArrowInvalid(f"column {column_name} lacks values")
            arrays[column_name] = _view(values, dtype)
        return Shard(**arrays)  # type: ignore[arg-type]
    except (pa.ArrowInvalid, TypeError, ValueError) as error:
        raise ShardCorruptError(f"{name} was asked for, it is no shard of this format: {error}. {_ADVICE}") from error


def verify_bytes(dataset_uri: str, entry: ShardEntry, data: "bytes | memoryview") -> None:
    """Check the bytes of a shard file against the index.

    Raises:
        ShardCorruptError: naming the shard.
    """
    size, found = memoryview(data).nbytes, checksum(data)
    if size == entry.num_bytes and found == entry.checksum:
        return
    name = shard_file(entry.split, entry.number)
    advice = (
        _ADVICE
        if size != entry.num_bytes
        else f"Its size is right, so that preparing again would not notice: delete the folder {dataset_uri}, or this "
        "file alone, and prepare again."
    )
    raise ShardCorruptError(
        f"{name} was asked for, {storage.join(dataset_uri, name)} holds {size} bytes with checksum {found.hex()} "
        f"instead of {entry.num_bytes} with {entry.checksum.hex()}. {advice}"
    )


def _read_or_corrupt(dataset_uri: str, name: str) -> bytes:
    uri = storage.join(dataset_uri, name)
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise ShardCorruptError(f"{name} was asked for, {uri} is gone. {_ADVICE}") from error


def load_shard(dataset_uri: str, entry: ShardEntry) -> Shard:
    """Read a shard into memory, verifying its checksum before anything else looks at it.

    Raises:
        ShardCorruptError: naming the shard, when it is missing or any byte differs.
    """
    data = _read_or_corrupt(dataset_uri, shard_file(entry.split, entry.number))
    verify_bytes(dataset_uri, entry, data)
    return open_shard(data)


def encode_index_page(entries: Sequence[ShardEntry]) -> bytes:
    """The bytes of one page of the index: at most INDEX_PAGE consecutive entries."""
    columns = [pa.array([getattr(entry, field.name) for entry in entries], type=field.type) for field in _INDEX_SCHEMA]
    return _ipc_bytes(pa.RecordBatch.from_arrays(columns, schema=_INDEX_SCHEMA))


def index_pages(entries: Sequence[ShardEntry]) -> list[bytes]:
    """All pages of the index; the manifest names each by `checksum(page).hex()`.

    Args:
        entries: of both splits.

    Raises:
        ValueError: when a split's numbers are not 0, 1, ….
    """
    ordered = [entry for split in SPLITS for entry in sorted(_of(entries, split), key=lambda one: one.number)]
    for split in SPLITS:
        if [entry.number for entry in ordered if entry.split == split] != list(range(len(_of(entries, split)))):
            raise ValueError(f"shards of the {split} split are not numbered from 0 on without gaps.")
    return [encode_index_page(ordered[begin : begin + INDEX_PAGE]) for begin in range(0, len(ordered), INDEX_PAGE)]


def _of(entries: Sequence[ShardEntry], split: str) -> list[ShardEntry]:
    return [entry for entry in entries if entry.split == split]


class ShardIndex:
    """The index of one generation of a dataset; pages are read when an entry in them is asked for. Thread-safe."""

    def __init__(self, dataset_uri: str, manifest: DatasetManifest) -> None:
        self._dataset_uri = dataset_uri
        self._manifest = manifest
        self._begins: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        total = 0
        for split in SPLITS:
            self._begins[split] = total
            self._counts[split] = sum(part.num_shards for part in manifest.parts(split))
            total += self._counts[split]
        self._lock = threading.Lock()
        self._pages: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._entries: dict[tuple[str, int], ShardEntry] = {}

    def num_shards(self, split: str) -> int:
        """Shards of a split."""
        return self._counts[split]

    def entry(self, split: str, number: int) -> ShardEntry:
        """The entry of a shard.

        Raises:
            IndexError: when the split has no such shard.
            ShardCorruptError: naming the page of the index, when it is missing or any byte differs.
        """
        if not 0 <= number < self._counts[split]:
            raise IndexError(f"shard {number} of the {split} split was asked for, it has {self._counts[split]}.")
        known = self._entries.get((split, number))
        if known is not None:
            return known
        page, place = divmod(self._begins[split] + number, INDEX_PAGE)
        with self._lock:
            batch = self._pages.get(page)
            if batch is not None:
                self._pages.move_to_end(page)
        if batch is None:
            batch = self._read(page)
            with self._lock:
                self._pages[page] = batch
                while len(self._pages) > _PAGES_KEPT:
                    self._pages.popitem(last=False)
        tokens, rows, size, digest = (batch.column(column)[place].as_py() for column in range(4))
        entry = ShardEntry(split, number, tokens, rows, size, digest)
        with self._lock:
            if len(self._entries) >= INDEX_PAGE:
                self._entries.clear()
            self._entries[split, number] = entry
        return entry

    def entries(self, split: str) -> Iterator[ShardEntry]:
        """All entries of a split, in the order of their numbers."""
        for number in range(self._counts[split]):
            yield self.entry(split, number)

    def _read(self, page: int) -> pa.RecordBatch:
        name = index_file(self._manifest.generation, page)
        data = _read_or_corrupt(self._dataset_uri, name)
        wanted, found = self._manifest.index_digests[page], checksum(data).hex()
        if found != wanted:
            raise ShardCorruptError(
                f"{storage.join(self._dataset_uri, name)}: its checksum {found} is not the manifest's {wanted}. The "
                f"index was changed or damaged. {_ADVICE}"
            )
        batch = _ipc_batch(pa.BufferReader(data))
        first = page * INDEX_PAGE
        expected = min(INDEX_PAGE, sum(self._counts.values()) - first)
        if batch.schema != _INDEX_SCHEMA or batch.num_rows != expected:
            raise DataError(
                f"{storage.join(self._dataset_uri, name)} holds {batch.num_rows} entries of {batch.schema.names}, the "
                f"manifest speaks of {expected} of {_INDEX_SCHEMA.names}. Prepare the dataset again."
            )
        return batch


def read_tokens(dataset_uri: str, split: Literal["train", "eval"]) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    """The tokens of a split's newest generation, shard by shard, in order: uint16 or uint32 [N].

    The token that a stream shard repeats from the next one is left out; rows that are fixed at prepare come as they
    lie, so that a document that was cut repeats one token at each cut.
    """
    manifest = read_manifest(dataset_uri)
    for entry in ShardIndex(dataset_uri, manifest).entries(split):
        yield load_shard(dataset_uri, entry).tokens[: entry.num_tokens]
