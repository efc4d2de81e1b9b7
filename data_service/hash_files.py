"""Files of sorted document hashes that can be read by prefix.

    header: magic, number of buckets (log2), number of hashes | offsets u64 [buckets + 1] | CRC-32 u32 [buckets]
    records in the order of (high, low[, place]); bucket = the upper bits of `high`

A text's hash is BLAKE2b-128: `high` is its first 8 bytes and `low` its last 8, both little-endian. Two kinds of files:
runs in the work folder, with the place of each document, and `hashes.bin` beside a dataset, against which a later
generation is compared. A prefix is read without the rest of the file, so memory does not grow with the dataset.

Owns this format. Refuses to hand out hashes whose checksum differs.
"""

import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_service import storage
from data_service.errors import ShardCorruptError

__all__ = ["HASH", "MAX_BITS", "PLACED_HASH", "HashFile", "encode_hashes", "hashes_file", "write_hashes"]

HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
PLACED_HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
MAX_BITS = 12
"""At most 4096 buckets: a header of 48 KiB."""
_MAGIC = b"sjhash\x00\x01"
_FIXED = struct.Struct("<8sIIQ")
_BUCKET_HASHES = 1024

_Records = npt.NDArray[np.void]


def hashes_file(generation: int) -> str:
    """Path of a generation's hashes inside its dataset."""
    return "hashes.bin" if generation == 0 else f"hashes.{generation:05d}.bin"


def _bucket_bits(count: int) -> int:
    """Log2 of the number of buckets for so many hashes."""
    return max(0, min(MAX_BITS, (count // _BUCKET_HASHES).bit_length()))


def _header_size(bits: int) -> int:
    buckets = 1 << bits
    return _FIXED.size + 8 * (buckets + 1) + 4 * buckets


def encode_hashes(records: _Records) -> bytes:
    """The bytes of a file of sorted records."""
    return _header([records], records.size, records.dtype) + records.tobytes()


def write_hashes(target: BinaryIO, count: int, parts: Callable[[], Iterable[_Records]]) -> None:
    """Write a file of records that are sorted and come in parts, `count` in all; the parts are read twice."""
    target.write(_header(parts(), count, HASH))
    for part in parts():
        target.write(part.tobytes())


def _header(parts: Iterable[_Records], count: int, dtype: np.dtype[Any]) -> bytes:
    """The head of a file of these records."""
    bits = _bucket_bits(count)
    ends = np.zeros(2**bits, dtype="<u8")
    crcs = [0] * 2**bits
    for part in parts:
        bounds = [*np.searchsorted(part["high"], _first_of_buckets(bits)).tolist(), part.size]
        ends += np.array(bounds[1:], dtype="<u8")
        view = memoryview(part.tobytes())
        for bucket in np.flatnonzero(np.diff(bounds)).tolist():
            begin, end = bounds[bucket] * dtype.itemsize, bounds[bucket + 1] * dtype.itemsize
            crcs[bucket] = zlib.crc32(view[begin:end], crcs[bucket])
    fixed = _FIXED.pack(_MAGIC, bits, dtype.itemsize, count)
    return fixed + bytes(8) + ends.astype("<u8").tobytes() + np.array(crcs, dtype="<u4").tobytes()


def _first_of_buckets(bits: int) -> npt.NDArray[np.uint64]:
    return np.arange(2**bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.zeros(1, np.uint64)


class HashFile:
    """A file of hashes; its header is read once."""

    def __init__(self, uri: str, dtype: np.dtype[Any]) -> None:
        """Open it.

        Args:
            uri: the file.
            dtype: of its records, HASH or PLACED_HASH.

        Raises:
            ShardCorruptError: when it is gone or damaged.
        """
        self._uri = uri
        self._dtype = dtype
        try:
            head = storage.read_range(uri, 0, _header_size(MAX_BITS))
        except FileNotFoundError as error:
            raise self._damaged("it is gone") from error
        try:
            magic, bits, itemsize, count = _FIXED.unpack_from(head)
            self.bits, self.count = int(bits), int(count)
            if magic != _MAGIC or itemsize != dtype.itemsize or self.bits > MAX_BITS:
                raise self._damaged("it is no file of hashes")
            buckets = 2**self.bits
            self._offsets = np.frombuffer(head, "<u8", buckets + 1, _FIXED.size)
            self._crcs = np.frombuffer(head, "<u4", buckets, _FIXED.size + 8 * (buckets + 1))
        except (struct.error, ValueError) as error:
            raise self._damaged("its header is cut off") from error
        descends = (np.diff(self._offsets.view("<i8")) < 0).any()
        if int(self._offsets[0]) or int(self._offsets[-1]) != self.count or descends:
            raise self._damaged("its header is damaged")

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return _header_size(self.bits) + self.count * self._dtype.itemsize

    def _damaged(self, why: str) -> ShardCorruptError:
        return ShardCorruptError(
            f"{self._uri} was asked for, {why}. Delete the file and prepare the dataset as it was, which restores it."
        )

    def prefix(self, bits: int, number: int) -> _Records:
        """The records whose upper `bits` bits of `high` are `number`, in order.

        Raises:
            ShardCorruptError: when a byte differs.
        """
        if bits >= self.bits:
            first = last = number >> (bits - self.bits)
        else:
            first = number << (self.bits - bits)
            last = first + 2 ** (self.bits - bits) - 1
        low, high = int(self._offsets[first]), int(self._offsets[last + 1])
        size = self._dtype.itemsize
        data = storage.read_range(self._uri, _header_size(self.bits) + low * size, (high - low) * size)
        bounds = (self._offsets[first : last + 2].astype(np.int64) - low) * size
        view = memoryview(data)
        for bucket in range(first, last + 1):
            begin, end = int(bounds[bucket - first]), int(bounds[bucket - first + 1])
            if end > len(data) or zlib.crc32(view[begin:end]) != int(self._crcs[bucket]):
                raise self._damaged("its checksum is not the header's")
        records = np.frombuffer(data, self._dtype)
        if bits > self.bits:
            records = records[records["high"] >> np.uint64(64 - bits) == np.uint64(number)]
        return records
