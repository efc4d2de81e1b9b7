"""Reading the sources once: rejects to a list, kept documents to a spool of chunks, the split decided.

    sources ─ readers ─▶ duplicates out ─▶ chunks (Arrow: text, hash; ~1 MiB of text each)
                 └─ rejects.jsonl

A document is held out when the hash of its text is below a bound, so the split follows the text and not its place.
Memory holds a digest per document (none without deduplication) and one chunk.

Owns deduplication, the split and the limit on rejects. Refuses to go on when too many records are bad.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_service import storage
from data_service.config import DataConfig
from data_service.errors import SourceError
from data_service.readers import Reject, SourceFile, read_records
from data_service.shards import SourceInfo

__all__ = ["REJECTS_FILE", "PrepareProgress", "Spool", "check_rejects", "read_chunk", "read_sources"]

REJECTS_FILE = "rejects.jsonl"
_CHUNK_BYTES = 1 << 20
_HASH_RANGE = 2**64


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is."""

    stage: Literal["read", "tokenizer", "encode"]
    done: int
    """Source files read, or chunks encoded."""
    total: int
    num_records: int
    num_rejects: int


@dataclass(frozen=True)
class Spool:
    """What reading left behind."""

    chunks: list[str]
    sources: tuple[SourceInfo, ...]
    num_records: int
    num_duplicates: int
    reject_reasons: dict[str, int]
    eval_below: int
    """A document whose hash is below this is held out."""

    @property
    def num_rejects(self) -> int:
        """Records left out."""
        return sum(self.reject_reasons.values())


def read_sources(
    config: DataConfig,
    files: list[SourceFile],
    digests: list[str],
    dataset_uri: str,
    work_uri: str,
    report: Callable[[PrepareProgress], None],
) -> Spool:
    """Read every file once, into the work folder: rejects to `rejects.jsonl`, kept documents to the spool."""
    seen: set[bytes] = set()
    smallest, largest = _HASH_RANGE, -1
    reasons: Counter[str] = Counter()
    sources: list[SourceInfo] = []
    num_records = num_duplicates = 0
    spool = _SpoolWriter(work_uri)
    rejects_uri = storage.join(work_uri, REJECTS_FILE)
    with storage.publish(rejects_uri) as rejects:
        for number, file in enumerate(files):
            report(PrepareProgress("read", number, len(files), num_records, sum(reasons.values())))
            before, rejects_before = num_records, sum(reasons.values())
            for record in read_records(file, config.rejects.max_record_bytes):
                num_records += 1
                if isinstance(record, Reject):
                    reasons[record.reason.partition(":")[0]] += 1
                    line = {"file": file.uri, "line": record.line, "reason": record.reason}
                    rejects.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                    continue
                digest = _text_hash(record.text)
                if config.split.deduplicate:
                    if digest in seen:
                        num_duplicates += 1
                        continue
                    seen.add(digest)
                value = int.from_bytes(digest[:8], "little")
                smallest, largest = min(smallest, value), max(largest, value)
                spool.add(record.text, value)
            sources.append(
                SourceInfo(
                    file=file.uri,
                    digest=digests[number],
                    num_records=num_records - before,
                    num_rejects=sum(reasons.values()) - rejects_before,
                )
            )
    spool.close()
    report(PrepareProgress("read", len(files), len(files), num_records, sum(reasons.values())))
    check_rejects(config, num_records, dict(reasons), dataset_uri)
    if largest < 0:
        raise SourceError(
            f"{', '.join(file.uri for file in files[:5])}: {num_records} records were read and none holds text. "
            "Add text, or name another column in data.sources."
        )
    return Spool(
        chunks=spool.uris,
        sources=tuple(sources),
        num_records=num_records,
        num_duplicates=num_duplicates,
        reject_reasons=dict(sorted(reasons.items())),
        eval_below=_eval_below(config.split.eval, smallest, largest),
    )


def _text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def check_rejects(config: DataConfig, num_records: int, reasons: dict[str, int], dataset_uri: str) -> None:
    """Raise SourceError when more than `data.rejects.max_fraction` of the records were left out."""
    num_rejects = sum(reasons.values())
    if num_rejects > config.rejects.max_fraction * num_records:
        causes = ", ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items()))
        raise SourceError(
            f"data.rejects.max_fraction={config.rejects.max_fraction}: {num_rejects} of {num_records} records are bad "
            f"({causes}); {storage.join(dataset_uri, REJECTS_FILE)} names file, line and reason of each. "
            "Repair the source or raise the limit."
        )


def _eval_below(share: float, smallest: int, largest: int) -> int:
    """The hash below which a document is held out, given the smallest and the largest hash.

    A small corpus may have no document below `share`, or all: then the one with the smallest hash is held out, or the
    one with the largest is kept, so that both parts have at least one.
    """
    if share == 0.0:
        return 0
    if smallest == largest:
        raise SourceError(
            f"data.split.eval={share}: the sources hold one distinct document, which cannot be both trained on and "
            "held out. Add text, or set data.split.eval=0."
        )
    return min(max(int(share * _HASH_RANGE), smallest + 1), largest)


class _SpoolWriter:
    """Collects documents into Arrow files of about _CHUNK_BYTES of text."""

    def __init__(self, work_uri: str) -> None:
        self.uris: list[str] = []
        self._work_uri = work_uri
        self._texts: list[str] = []
        self._hashes: list[int] = []
        self._size = 0

    def add(self, text: str, value: int) -> None:
        self._texts.append(text)
        self._hashes.append(value)
        self._size += len(text) if text.isascii() else len(text) * 3
        if self._size >= _CHUNK_BYTES:
            self.close()

    def close(self) -> None:
        if not self._texts:
            return
        table = pa.table(
            {"text": pa.array(self._texts, pa.large_string()), "hash": pa.array(self._hashes, pa.uint64())}
        )
        uri = storage.join(self._work_uri, f"chunk-{len(self.uris):06d}.arrow")
        with storage.publish(uri) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        self.uris.append(uri)
        self._texts, self._hashes, self._size = [], [], 0


def read_chunk(uri: str) -> tuple[list[str], npt.NDArray[np.uint64]]:
    """The texts of a chunk and their hashes, uint64 [n]."""
    table = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(uri))).read_all()
    return table.column("text").to_pylist(), table.column("hash").to_numpy()
