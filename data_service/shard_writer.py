"""Shards of one part (one source in one split): documents in order are cut into files of equal size.

    encode/…/*.arrow ─ stream: every S tokens, and one more │ document, packed: every shard_rows rows ─▶ shards/…

Shards that were finished before a kill are kept; those behind them are cut again, which costs little beside encoding.

Owns where a shard ends. Knows nothing of the other parts: numbers in the dataset are given when all are there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_service.chunks import Chunk
from data_service.config import RowKind
from data_service.encode import EncodedDocuments, read_encoded
from data_service.packing import Packer, Rows
from data_service.shards import Shard, checksum, encode_shard
from data_service.work_items import Result, WorkFiles, do_once

__all__ = ["PartItem", "PartShards", "WrittenShard", "cut_stream", "shard_path", "write_part"]


@dataclass(frozen=True)
class PartItem:
    """A part to write."""

    work_uri: str
    split: str
    source: int
    """Place of the source in the preparation."""
    chunks: tuple[Chunk, ...]
    rows: RowKind
    row_tokens: int
    shard_tokens: int
    shard_rows: int
    truncate: bool
    with_answers: bool
    with_labels: bool


@dataclass(frozen=True)
class WrittenShard:
    """A shard as the index will speak of it."""

    num_tokens: int
    """Without the repeated one."""
    num_rows: int
    num_bytes: int
    checksum: bytes


@dataclass(frozen=True)
class PartShards:
    """What was written of a part."""

    num_documents: int
    num_tokens: int
    num_rows: int
    num_truncated: int
    shards: tuple[WrittenShard, ...]


def shard_path(split: str, source: int, number: int) -> str:
    """Where a shard of a part lies in the work folder."""
    return f"shards/{split}-{source:04d}/{number:05d}.arrow"


def write_part(item: PartItem) -> PartShards:
    """Write the shards of a part into the work folder."""
    result = do_once(item.work_uri, f"shards/{item.split}-{item.source:04d}", lambda files: _write(item, files))
    shards = tuple(
        WrittenShard(num_tokens, num_rows, num_bytes, bytes.fromhex(digest))
        for num_tokens, num_rows, num_bytes, digest in result["shards"]
    )
    return PartShards(
        result["num_documents"], result["num_tokens"], result["num_rows"], result["num_truncated"], shards
    )


@dataclass
class _Totals:
    num_documents: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    num_truncated: int = 0


def _write(item: PartItem, files: WorkFiles) -> Result:
    totals = _Totals()
    documents = (read_encoded(item.work_uri, chunk, item.split) for chunk in item.chunks)
    shards = _stream(item, documents, totals) if item.rows == "stream" else _rows(item, documents, totals)
    written = []
    for number, (shard, num_tokens) in enumerate(shards):
        path = shard_path(item.split, item.source, number)

        def write(own: WorkFiles, shard: Shard = shard, path: str = path) -> Result:
            data = encode_shard(shard)
            own.write(path, data)
            return {"num_bytes": len(data), "checksum": checksum(data).hex()}

        done = do_once(item.work_uri, path.removesuffix(".arrow"), write)
        files.written[path] = [done["num_bytes"], done["checksum"]]
        num_rows = 0 if shard.row_offsets is None else shard.row_offsets.size - 1
        written.append((num_tokens, num_rows, done["num_bytes"], done["checksum"]))
    return {**vars(totals), "shards": written}


def _stream(item: PartItem, documents: Iterator[EncodedDocuments], totals: _Totals) -> Iterator[tuple[Shard, int]]:
    def counted() -> Iterator[EncodedDocuments]:
        for one in documents:
            totals.num_documents += one.lengths.size
            totals.num_tokens += one.tokens.size
            yield one

    yield from cut_stream(counted(), item.shard_tokens)


def cut_stream(documents: Iterator[EncodedDocuments], shard_tokens: int) -> Iterator[tuple[Shard, int]]:
    """Shards of concatenated documents, each with its tokens but the repeated one.

    Each holds `shard_tokens` tokens and the first of the next shard; the last holds what is left.
    """
    held: npt.NDArray[np.unsignedinteger] | None = None
    starts: list[npt.NDArray[np.int64]] = []
    filled = 0
    for one in documents:
        if held is None:
            held = np.empty(shard_tokens + 1, dtype=one.tokens.dtype)
        begins = np.cumsum(one.lengths, dtype=np.int64) - one.lengths
        place = 0
        while place < one.tokens.size:
            count = min(one.tokens.size - place, held.size - filled)
            held[filled : filled + count] = one.tokens[place : place + count]
            low, high = np.searchsorted(begins, [place, place + count])
            starts.append(begins[low:high] - place + filled)
            filled += count
            place += count
            if filled == held.size:
                here = np.concatenate(starts)
                yield Shard(tokens=held.copy(), starts=here.astype(np.uint32)), shard_tokens
                held[0] = held[-1]
                starts = [here[here == shard_tokens] - shard_tokens]
                filled = 1
    if held is not None and filled:
        yield Shard(tokens=held[:filled].copy(), starts=np.concatenate(starts).astype(np.uint32)), filled


def _rows(item: PartItem, documents: Iterator[EncodedDocuments], totals: _Totals) -> Iterator[tuple[Shard, int]]:
    """Shards of `shard_rows` rows."""
    assert item.rows != "stream"
    packer = Packer(
        item.row_tokens,
        item.rows,
        truncate=item.truncate,
        with_answers=item.with_answers,
        with_labels=item.with_labels,
    )
    waiting: list[Rows] = []
    num_waiting = 0
    for made in _made(packer, documents):
        waiting.append(made)
        num_waiting += made.num_rows
        if num_waiting >= item.shard_rows:
            rows = Rows.concatenate(waiting)
            first = 0
            while num_waiting - first >= item.shard_rows:
                yield _shard_of(rows.slice(first, first + item.shard_rows))
                first += item.shard_rows
            waiting = [rows.slice(first, num_waiting)] if first < num_waiting else []
            num_waiting -= first
    if waiting:
        yield _shard_of(Rows.concatenate(waiting))
    totals.num_documents = packer.num_documents
    totals.num_tokens = packer.num_tokens
    totals.num_rows = packer.num_rows
    totals.num_truncated = packer.num_truncated


def _made(packer: Packer, documents: Iterator[EncodedDocuments]) -> Iterator[Rows]:
    for one in documents:
        yield from packer.add(one.tokens, one.lengths, answers=one.answers, labels=one.labels)
    yield from packer.close()


def _shard_of(rows: Rows) -> tuple[Shard, int]:
    bits = None if rows.answers is None else np.packbits(rows.answers, bitorder="little")
    shard = Shard(rows.tokens, rows.starts, rows.row_offsets, bits, rows.labels)
    return shard, rows.tokens.size
