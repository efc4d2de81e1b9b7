"""Part files as bytes: where they lie, their checksums, and reading slices of them verified.

A part is one safetensors file that one rank of one attempt wrote; `trainer.checkpoint` gives its values meaning. No
torch here, so that a controller can verify a checkpoint.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

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
    "plan_slices",
    "read_slice",
    "step_folder",
]

CHUNK_BYTES = 4 << 20
"""Bytes under one checksum. Part of the format: changing it needs a new manifest version."""

_CHUNK_ELEMENTS = CHUNK_BYTES // BYTES_PER_ELEMENT
_SLICE_CHUNKS = 4
"""Most chunks that are read at once into one buffer."""
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


def step_folder(step: int) -> str:
    """Name of a step's folder: `step_00000400`."""
    return f"step_{step:08d}"


def part_file(attempt: int, rank: int) -> str:
    """Path of a rank's part below the step's folder."""
    return f"attempt_{attempt}/rank_{rank:05d}.safetensors"


def checksums(data: memoryview) -> tuple[int, ...]:
    """CRC-32 of each chunk of a range's bytes."""
    return tuple(zlib.crc32(data[begin : begin + CHUNK_BYTES]) for begin in range(0, len(data), CHUNK_BYTES))


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


def read_slice(step_uri: str, part: Slice) -> memoryview:
    """The wanted bytes of a slice; all chunks that it touches are verified.

    Raises:
        CheckpointCorruptError: the file is gone or too short, or a checksum differs.
    """
    stored = part.stored
    begin = part.first_chunk * CHUNK_BYTES
    length = min(part.num_chunks * CHUNK_BYTES, stored.numel * BYTES_PER_ELEMENT - begin)
    uri = storage.join(step_uri, part.file)
    try:
        data = memoryview(storage.read_range(uri, stored.offset + begin, length))
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{uri} is gone, but its manifest names it. Resume from another step.") from error
    expected = stored.crcs[part.first_chunk : part.first_chunk + part.num_chunks]
    if len(data) != length or checksums(data) != expected:
        raise CheckpointCorruptError(
            f"{uri}: {stored.kind} of {stored.name} from element {stored.start} does not match its checksum "
            f"({len(data)} of {length} bytes read at {stored.offset + begin}). Resume from another step."
        )
    skipped = (part.wanted.start - stored.start) * BYTES_PER_ELEMENT - begin
    return data[skipped : skipped + part.wanted.numel * BYTES_PER_ELEMENT]


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
