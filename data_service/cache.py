"""Shards in memory, up to a limit of bytes, each read once however many threads ask.

Owns eviction (least recently used) and concurrent loading. Refuses to keep a shard that failed its checksum: the error
goes to everyone who waited, and the next request reads again.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from data_service.errors import DataUnavailableError
from data_service.metrics import WorkerMetrics
from data_service.shards import Shard, ShardEntry, load_shard, shard_file

__all__ = ["ShardCache"]

_PARALLEL_READS = 8
_READ_DEADLINE_S = 120.0


class ShardCache:
    """Verified shards of one dataset."""

    def __init__(
        self,
        dataset_uri: str,
        limit_bytes: int,
        metrics: WorkerMetrics,
        read_deadline_s: float = _READ_DEADLINE_S,
    ) -> None:
        self._read_deadline_s = read_deadline_s
        self._dataset_uri = dataset_uri
        self._limit_bytes = limit_bytes
        self._metrics = metrics
        self._lock = threading.Lock()
        self._shards: OrderedDict[tuple[str, int], Shard] = OrderedDict()
        self._loading: dict[tuple[str, int], Future[Shard]] = {}
        self._num_bytes = 0
        self._pool = ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="shard-read")

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return self._num_bytes

    def get(self, entries: Iterable[ShardEntry]) -> dict[int, Shard]:
        """Shards by number; those that are not here are read side by side.

        Raises:
            ShardCorruptError: naming the shard.
            DataUnavailableError: naming the shard, when the storage gives no answer in time.
        """
        deadline = time.monotonic() + self._read_deadline_s
        found: dict[int, Shard] = {}
        waiting: list[tuple[ShardEntry, Future[Shard]]] = []
        with self._lock:
            for entry in entries:
                key = (entry.split, entry.number)
                if key in self._shards:
                    self._shards.move_to_end(key)
                    found[entry.number] = self._shards[key]
                    continue
                if key not in self._loading:
                    self._loading[key] = self._pool.submit(self._load, entry)
                waiting.append((entry, self._loading[key]))
        for entry, future in waiting:
            try:
                found[entry.number] = future.result(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                # A read may itself end in a TimeoutError of the storage; both are its silence.
                raise DataUnavailableError(
                    f"{shard_file(entry.split, entry.number)} was asked for, {self._dataset_uri} did not give it in "
                    f"{self._read_deadline_s:g} s. Check that the storage answers this machine."
                ) from error
        return found

    def _load(self, entry: ShardEntry) -> Shard:
        key = (entry.split, entry.number)
        try:
            shard = load_shard(self._dataset_uri, entry)
        except BaseException:
            with self._lock:
                del self._loading[key]
            raise
        self._metrics.add(shards_read=1, bytes_read=entry.num_bytes)
        with self._lock:
            del self._loading[key]
            if shard.num_bytes <= self._limit_bytes:
                self._shards[key] = shard
                self._num_bytes += shard.num_bytes
                while self._num_bytes > self._limit_bytes:
                    _, old = self._shards.popitem(last=False)
                    self._num_bytes -= old.num_bytes
        return shard

    def close(self) -> None:
        """Let the reading threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
