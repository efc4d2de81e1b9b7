"""Part files as bytes: where they lie, their checksums, and reading slices of them verified.

A part is one safetensors file that one rank of one attempt wrote; `trainer.checkpoint` gives its values meaning. No
torch here, so that a controller can verify a checkpoint.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from zlib_ng.zlib_ng import crc32  # the same CRC-32 as zlib's, at three times the speed

from data_service import storage
from trainer.errors import CheckpointCorruptError
from trainer.fragments import BYTES_PER_ELEMENT, Kind, Range, intersect

__all__ = [
    "CHUNK_BYTES",
    "PartReceipt",
    "Slice",
    "StoredRange",
    "checksums",
    "in_order",
    "part_file",
    "group_slices",
    "plan_slices",
    "read_slices",
    "step_folder",
]

CHUNK_BYTES = 4 << 20
"""Bytes under one checksum. Part of the format: changing it needs a new manifest version."""

_CHUNK_ELEMENTS = CHUNK_BYTES // BYTES_PER_ELEMENT
_SLICE_CHUNKS = 2
"""Most chunks of a slice."""
_READ_BYTES = _SLICE_CHUNKS * CHUNK_BYTES
"""Most bytes that are read at once into one buffer."""
_GAP_BYTES = 256 << 10
"""Bytes between two slices that are cheaper to read than to skip with another request to an object store."""
_READERS = 4
"""Buffers in flight."""

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class StoredRange:
    """One fragment inside a part file."""

    name: str
    kind: Kind
    start: int
    numel: int
    offset: int
    """Of its first byte in the file."""
    crcs: tuple[int, ...]
    """CRC-32 of each `CHUNK_BYTES` of its bytes, so that a slice of it is verified without reading all of it."""

    @property
    def range(self) -> Range:
        """Where the values belong."""
        return Range(self.name, self.kind, self.start, self.numel)


@dataclass(frozen=True)
class PartReceipt:
    """What a rank says of the part it has written."""

    step: int
    attempt: int
    rank: int
    file: str
    """Path below the step's folder, such as `attempt_3/rank_00000.safetensors`."""
    num_bytes: int
    ranges: tuple[StoredRange, ...]


@dataclass(frozen=True)
class Slice:
    """Whole chunks of one stored range, and the elements of them that are asked for."""

    file: str
    """Path below the step's folder."""
    stored: StoredRange
    first_chunk: int
    num_chunks: int
    wanted: Range

    @property
    def begin(self) -> int:
        """First byte in the file."""
        return self.stored.offset + self.first_chunk * CHUNK_BYTES

    @property
    def end(self) -> int:
        """One past the last byte in the file."""
        last = (self.first_chunk + self.num_chunks) * CHUNK_BYTES
        return self.stored.offset + min(last, self.stored.numel * BYTES_PER_ELEMENT)


def step_folder(step: int) -> str:
    """Name of a step's folder: `step_00000400`."""
    return f"step_{step:08d}"


def part_file(attempt: int, rank: int) -> str:
    """Path of a rank's part below the step's folder."""
    return f"attempt_{attempt}/rank_{rank:05d}.safetensors"


def checksums(data: memoryview) -> tuple[int, ...]:
    """CRC-32 of each chunk of a range's bytes."""
    return tuple(crc32(data[begin : begin + CHUNK_BYTES]) for begin in range(0, len(data), CHUNK_BYTES))


def plan_slices(file: str, stored: StoredRange, wanted: Range) -> Iterator[Slice]:
    """What to read of one stored range to get the wanted elements; slices of bounded size that share no element."""
    common = intersect(stored.range, wanted)
    if common is None:
        return
    first = (common.start - stored.start) // _CHUNK_ELEMENTS
    last = (common.stop - 1 - stored.start) // _CHUNK_ELEMENTS
    for chunk in range(first, last + 1, _SLICE_CHUNKS):
        num_chunks = min(_SLICE_CHUNKS, last + 1 - chunk)
        start = max(common.start, stored.start + chunk * _CHUNK_ELEMENTS)
        stop = min(common.stop, stored.start + (chunk + num_chunks) * _CHUNK_ELEMENTS)
        yield Slice(file, stored, chunk, num_chunks, Range(stored.name, stored.kind, start, stop - start))


def group_slices(slices: Iterable[Slice]) -> Iterator[list[Slice]]:
    """Slices that lie close together in one file, to be read at once; sorted by file and place."""
    group: list[Slice] = []
    for part in sorted(slices, key=lambda one: (one.file, one.begin)):
        near = group and part.file == group[-1].file and part.begin - group[-1].end <= _GAP_BYTES
        if group and not (near and part.end - group[0].begin <= _READ_BYTES):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def read_slices(step_uri: str, group: list[Slice]) -> list[memoryview]:
    """The wanted bytes of each slice of a group, by one read; all chunks that they touch are verified.

    Returns:
        Writable views of one buffer.

    Raises:
        CheckpointCorruptError: the file is gone or too short, or a checksum differs.
    """
    uri = storage.join(step_uri, group[0].file)
    begin, end = group[0].begin, max(part.end for part in group)
    try:
        data = _read(uri, begin, end - begin)
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{uri} is gone, but its manifest names it. Resume from another step.") from error
    return [_verified(uri, part, data[part.begin - begin : part.end - begin]) for part in group]


def _read(uri: str, begin: int, length: int) -> memoryview:
    """A range of a file in a buffer of its own, shorter where the file ends."""
    if not storage.is_local(uri):
        return memoryview(bytearray(storage.read_range(uri, begin, length)))
    # unlike memory of the allocator it goes back to the system as soon as it is dropped
    buffer = memoryview(mmap.mmap(-1, length))
    with storage.local_path(uri).open("rb", buffering=0) as file:
        file.seek(begin)
        filled = 0
        while filled < length and (count := file.readinto(buffer[filled:])):
            filled += count
    return buffer[:filled]


def _verified(uri: str, part: Slice, data: memoryview) -> memoryview:
    """The wanted bytes out of a slice's chunks."""
    stored = part.stored
    expected = stored.crcs[part.first_chunk : part.first_chunk + part.num_chunks]
    if len(data) != part.end - part.begin or checksums(data) != expected:
        raise CheckpointCorruptError(
            f"{uri}: {stored.kind} of {stored.name} from element {stored.start} does not match its checksum "
            f"({len(data)} of {part.end - part.begin} bytes read at {part.begin}). Resume from another step."
        )
    first = (part.wanted.start - stored.start) * BYTES_PER_ELEMENT - part.first_chunk * CHUNK_BYTES
    return data[first : first + part.wanted.numel * BYTES_PER_ELEMENT]


def in_order(action: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
    """Results of `action` in the order of the items, a few computed ahead in threads; memory stays bounded."""
    pending = iter(items)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="checkpoint-read") as pool:
        ahead: list[Future[ResultT]] = [pool.submit(action, item) for item in islice(pending, _READERS)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead.extend(pool.submit(action, item) for item in islice(pending, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
