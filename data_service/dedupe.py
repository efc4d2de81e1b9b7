"""Duplicates: the first document of each hash stays, in the order of the sources; all memory is that of one partition.

    runs (sorted hashes of half a million documents each) ─ by prefix ─▶ dup/p-NNNN.drops   places that go, per run
                  hashes.bin of earlier generations ──────┘          └─▶ dup/p-NNNN.hashes  hashes that stay, sorted
    dup/p-*.drops ─ by run ─▶ drops/…      dup/p-*.hashes ─▶ hashes.bin beside the dataset

A partition is a prefix of the hash; there are as many as keep each at about half a million documents.

Owns this search. Knows nothing of texts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_service import storage
from data_service.chunks import Chunk
from data_service.hash_files import HASH, MAX_BITS, PLACED_HASH, HashFile, hashes_file, write_hashes
from data_service.mapping import Mapper
from data_service.spool import Spool, run_uri
from data_service.work_items import Result, WorkFiles, do_once

__all__ = ["Duplicates", "find_duplicates", "kept_of"]


@dataclass(frozen=True)
class Duplicates:
    """Documents that go."""

    dropped: dict[tuple[int, int], int]
    """(file, run) → how many, for runs that lose any."""

    @property
    def by_file(self) -> Counter[int]:
        """How many each file loses."""
        counts: Counter[int] = Counter()
        for (file, _), count in self.dropped.items():
            counts[file] += count
        return counts

    @property
    def total(self) -> int:
        """Documents that go."""
        return sum(self.dropped.values())

    def touch(self, chunk: Chunk) -> bool:
        """Whether the run of a chunk loses any."""
        return (chunk.file, chunk.run) in self.dropped


@dataclass(frozen=True)
class _Partition:
    """A prefix of the hash to search."""

    work_uri: str
    bits: int
    number: int
    runs: tuple[tuple[int, int], ...]
    """(file, run), in global order."""
    earlier: tuple[str, ...]
    """Files of hashes of the generations before."""


@dataclass(frozen=True)
class _Partitioned:
    """What a partition found."""

    kept: int
    dropped: int


@dataclass(frozen=True)
class _Run:
    """A run whose places are to be collected from all partitions."""

    work_uri: str
    bits: int
    num_runs: int
    place: int
    """Of the run among all runs."""
    file: int
    run: int


def find_duplicates(
    work_uri: str,
    spool: Spool,
    earlier: Sequence[str],
    generation: int,
    partition_documents: int,
    mapper: Mapper,
    tell: Callable[[float], None] = lambda share: None,
) -> Duplicates:
    """Find the documents that go, and write the hashes of those that stay to `hashes_file(generation)`.

    Args:
        work_uri: the work folder, with the runs of the spool.
        spool: what was read.
        earlier: files of hashes of the generations before.
        generation: the one being prepared.
        partition_documents: documents of a partition, about.
        mapper: runs partitions.
        tell: called with the share that is done.
    """
    runs = tuple((file.number, run) for file in spool.files for run in range(len(file.runs)))
    bits = min(MAX_BITS, max(0, -(-spool.num_documents // partition_documents) - 1).bit_length())
    partitions = [_Partition(work_uri, bits, number, runs, tuple(earlier)) for number in range(2**bits)]
    found: list[_Partitioned] = []
    for one in mapper(_search, partitions):
        found.append(one)
        tell(len(found) / len(partitions))
    _write_kept(work_uri, found, hashes_file(generation))
    if not any(one.dropped for one in found):
        return Duplicates({})
    collected = mapper(_collect, [_Run(work_uri, bits, len(runs), place, *run) for place, run in enumerate(runs)])
    return Duplicates({run: count for run, count in zip(runs, collected, strict=True) if count})


def _write_kept(work_uri: str, found: Sequence[_Partitioned], name: str) -> None:
    def parts() -> Iterator[npt.NDArray[np.void]]:
        for number in range(len(found)):
            data = storage.read_bytes(storage.join(work_uri, f"dup/p-{number:04d}.hashes"))
            yield np.frombuffer(data, HASH)

    with storage.publish(storage.join(work_uri, name)) as target:
        write_hashes(target, sum(one.kept for one in found), parts)


def _search(partition: _Partition) -> _Partitioned:
    """Find the duplicates of one prefix."""
    name = f"dup/p-{partition.number:04d}"

    def work(files: WorkFiles) -> Result:
        parts = []
        for file, run in partition.runs:
            records = HashFile(run_uri(partition.work_uri, file, run), PLACED_HASH)
            parts.append(records.prefix(partition.bits, partition.number))
        high = np.concatenate([part["high"] for part in parts])
        low = np.concatenate([part["low"] for part in parts])
        order = np.lexsort((low, high))  # stable: of equal hashes the first in global order comes first
        high, low = high[order], low[order]
        again = np.zeros(high.size, dtype=np.bool_)
        again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        known = again.copy()
        for uri in partition.earlier:
            known |= _among(high, low, HashFile(uri, HASH).prefix(partition.bits, partition.number))
        kept = np.empty(int((~known).sum()), dtype=HASH)
        kept["high"], kept["low"] = high[~known], low[~known]
        dropped = np.zeros(high.size, dtype=np.bool_)
        dropped[order] = known
        bounds = np.cumsum([0, *(part.size for part in parts)])
        places = [
            np.sort(part["place"][dropped[begin:end]])
            for part, begin, end in zip(parts, bounds, bounds[1:], strict=False)
        ]
        offsets = np.cumsum([0, *(place.size for place in places)]).astype("<u8")
        files.write(f"{name}.hashes", kept.tobytes())
        files.write(f"{name}.drops", offsets.tobytes() + np.concatenate(places).astype("<u4").tobytes())
        return {"kept": kept.size, "dropped": int(offsets[-1])}

    return _Partitioned(**do_once(partition.work_uri, name, work))


def _among(
    high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64], records: npt.NDArray[np.void]
) -> npt.NDArray[np.bool_]:
    """Which hashes are among sorted records."""
    found = np.zeros(high.size, dtype=np.bool_)
    others = np.ascontiguousarray(records["high"])
    first = np.searchsorted(others, high)
    # Equal first halves are met about never twice; the loop ends when no record with the first half is left.
    open_ones = np.flatnonzero(first < others.size)
    step = 0
    while open_ones.size:
        at = first[open_ones] + step
        at = np.minimum(at, others.size - 1)
        same = (others[at] == high[open_ones]) & (first[open_ones] + step < others.size)
        open_ones, at = open_ones[same], at[same]
        found[open_ones] |= records["low"][at] == low[open_ones]
        step += 1
    return found


def _drops_path(file: int, run: int) -> str:
    return f"drops/{file:05d}-{run:05d}"


def _collect(run: _Run) -> int:
    """Join what all partitions drop of one run."""
    name = _drops_path(run.file, run.run)

    def work(files: WorkFiles) -> Result:
        places = [np.zeros(0, "<u4")]
        for number in range(2**run.bits):
            uri = storage.join(run.work_uri, f"dup/p-{number:04d}.drops")
            begin, end = np.frombuffer(storage.read_range(uri, 8 * run.place, 16), "<u8").tolist()
            if end > begin:
                data = storage.read_range(uri, 8 * (run.num_runs + 1) + 4 * begin, 4 * (end - begin))
                places.append(np.frombuffer(data, "<u4"))
        joined = np.sort(np.concatenate(places))
        files.write(f"{name}.bin", joined.tobytes())
        return {"count": joined.size}

    count: int = do_once(run.work_uri, name, work)["count"]
    return count


def kept_of(work_uri: str, chunk: Chunk) -> npt.NDArray[np.bool_]:
    """Which documents of a chunk stay, bool [n]; for chunks of runs that lose any."""
    data = storage.read_bytes(storage.join(work_uri, f"{_drops_path(chunk.file, chunk.run)}.bin"))
    places = np.frombuffer(data, "<u4")
    low, high = np.searchsorted(places, [chunk.first, chunk.first + chunk.num_documents])
    keep = np.ones(chunk.num_documents, dtype=np.bool_)
    keep[places[low:high].astype(np.int64) - chunk.first] = False
    return keep
