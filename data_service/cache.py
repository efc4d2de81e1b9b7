"""Shards by their index entries, each brought here once however many threads ask.

A dataset on a file system is read in place: its shards are mapped into memory. Shards of a remote one are downloaded
into a `DiskCache`, verified there, and mapped from it. A checksum is verified when a file is first opened, and again
when the file is another than the one that was verified. Mappings are bounded too: the least recently used are let go.

Owns single loading, deadlines and the retry of damaged downloads. Refuses to hand out a shard that failed its checksum:
the error goes to everyone who waited, nothing is kept, and the next request reads again.
"""

import logging
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from data_service import storage
from data_service.disk_cache import DiskCache
from data_service.errors import DataUnavailableError, ShardCorruptError
from data_service.metrics import WorkerMetrics
from data_service.shards import Shard, ShardEntry, open_shard, shard_file, verify_bytes

__all__ = ["ShardCache"]

_LOG = logging.getLogger(__name__)
_PARALLEL_READS = 8
_PARALLEL_PREFETCHES = 2
_MAX_PREFETCHES = 64
_READ_DEADLINE_S = 60.0
_DOWNLOADS = 3
"""A download that does not fit its checksum is tried so often: the damage may have happened on the way."""
_BACKOFF_S = 0.1
_MAPPED_BYTES = 2 << 30
_MAX_MAPPED = 4096
_MAX_VERIFIED = 65_536

_Key = tuple[str, int]


class ShardCache:
    """Verified shards of one dataset. Thread-safe."""

    def __init__(
        self,
        dataset_uri: str,
        *,
        cache_dir: str | None = None,
        cache_bytes: int = 8 << 30,
        mapped_bytes: int = _MAPPED_BYTES,
        metrics: WorkerMetrics | None = None,
        read_deadline_s: float = _READ_DEADLINE_S,
    ) -> None:
        """Take a sub-folder of the cache where the dataset is remote.

        Args:
            dataset_uri: the prepared dataset.
            cache_dir: where to keep shards of a remote dataset; by default below the temporary folder.
            cache_bytes: most bytes of them.
            mapped_bytes: most bytes of shards that are mapped into memory.
            metrics: counts shards and bytes that were read from the dataset.
            read_deadline_s: how long `get` waits.

        Raises:
            ConfigError: when the cache folder cannot be used.
        """
        self._dataset_uri = dataset_uri
        self._mapped_bytes = mapped_bytes
        self._metrics = metrics or WorkerMetrics()
        self._read_deadline_s = read_deadline_s
        self._lock = threading.Lock()
        self._shards: OrderedDict[_Key, tuple[Shard, ShardEntry]] = OrderedDict()
        self._keys: dict[bytes, _Key] = {}
        """Checksum to key, of the mapped shards."""
        self._num_mapped = 0
        self._loading: dict[_Key, Future[Shard]] = {}
        self._early: set[_Key] = set()
        """Keys in `_loading` that nobody waits for."""
        self._heard: dict[_Key, float] = {}
        """When bytes came last, of the downloads in `_loading` that have begun."""
        self._verified: OrderedDict[_Key, tuple[int, int, int]] = OrderedDict()
        self._disk = None if storage.is_local(dataset_uri) else DiskCache(cache_dir, cache_bytes, self._forget)
        self._pool = ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="shard-read")
        self._prefetch_pool = ThreadPoolExecutor(_PARALLEL_PREFETCHES, thread_name_prefix="shard-prefetch")

    @property
    def remote(self) -> bool:
        """Whether shards are downloaded, so that it pays to ask for them early."""
        return self._disk is not None

    @property
    def num_mapped_bytes(self) -> int:
        """Bytes of shards mapped now."""
        with self._lock:
            return self._num_mapped

    @property
    def store_silent_s(self) -> float | None:
        """For how long nothing came of a download that somebody waits for, of several the longest; None without any."""
        with self._lock:
            heard = [at for key, at in self._heard.items() if key not in self._early]
        return max(0.0, time.monotonic() - min(heard)) if heard else None

    def at_hand(self, entry: ShardEntry) -> bool:
        """Whether a shard needs no download, or is being downloaded."""
        key = (entry.split, entry.number)
        with self._lock:
            known = key in self._shards or key in self._loading
        return known or self._disk is None or self._disk.find(entry.checksum) is not None

    def get(self, entries: Iterable[ShardEntry]) -> dict[_Key, Shard]:
        """Shards by (split, number); those that are not here are read side by side.

        Raises:
            ShardCorruptError: naming the shard.
            DataUnavailableError: naming the shard, when the storage gives no answer in time.
            ConfigError: when the storage refuses this machine.
        """
        found: dict[_Key, Shard] = {}
        waiting: list[tuple[ShardEntry, Future[Shard]]] = []
        with self._lock:
            for entry in entries:
                key = (entry.split, entry.number)
                if key in self._shards:
                    self._shards.move_to_end(key)
                    found[key] = self._shards[key][0]
                    if self._disk is not None:
                        self._disk.find(entry.checksum)  # its file is in use too
                else:
                    waiting.append((entry, self._wanted(key, entry)))
        deadline = time.monotonic() + self._read_deadline_s
        for entry, future in waiting:
            try:
                found[entry.split, entry.number] = future.result(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                # A read may itself end in a TimeoutError of the storage; both are its silence.
                raise DataUnavailableError(
                    f"{shard_file(entry.split, entry.number)} was asked for, {self._dataset_uri} did not give it in "
                    f"{self._read_deadline_s:g} s. Check that the storage answers this machine."
                ) from error
            except CancelledError as error:
                raise DataUnavailableError("a shard was asked for, the data worker stops.") from error
        return found

    def prefetch(self, entries: Iterable[ShardEntry]) -> None:
        """Begin to download shards that will be asked for; does nothing where they are read in place."""
        if self._disk is None:
            return
        with self._lock:
            for entry in entries:
                key = (entry.split, entry.number)
                if key not in self._shards and key not in self._loading and len(self._early) < _MAX_PREFETCHES:
                    self._loading[key] = self._prefetch_pool.submit(self._load, entry)
                    self._early.add(key)

    def _wanted(self, key: _Key, entry: ShardEntry) -> Future[Shard]:
        """The loading of a shard that somebody waits for, begun unless it is on its way. The caller holds the lock."""
        future = self._loading.get(key)
        if future is None or (key in self._early and future.cancel()):
            # A prefetch that has not begun is overtaken.
            future = self._loading[key] = self._pool.submit(self._load, entry)
        self._early.discard(key)
        return future

    def _load(self, entry: ShardEntry) -> Shard:
        key = (entry.split, entry.number)
        try:
            shard = self._read_in_place(entry) if self._disk is None else self._read_cached(self._disk, entry)
        except BaseException:
            with self._lock:
                self._forget_load(key)
            raise
        with self._lock:
            self._forget_load(key)
            self._shards[key] = (shard, entry)
            self._keys[entry.checksum] = key
            self._num_mapped += entry.num_bytes
            while len(self._shards) > 1 and (self._num_mapped > self._mapped_bytes or len(self._shards) > _MAX_MAPPED):
                self._let_go(next(iter(self._shards)))
        return shard

    def _forget_load(self, key: _Key) -> None:
        """A load ended. The caller holds the lock."""
        self._loading.pop(key, None)
        self._heard.pop(key, None)
        self._early.discard(key)

    def _let_go(self, key: _Key) -> None:
        """Drop a mapping. The caller holds the lock."""
        _, entry = self._shards.pop(key)
        self._keys.pop(entry.checksum, None)
        self._num_mapped -= entry.num_bytes

    def _forget(self, checksum: bytes) -> None:
        """A shard's file was removed from the disk: let its space go too."""
        with self._lock:
            if checksum in self._keys:
                self._let_go(self._keys[checksum])

    def _read_in_place(self, entry: ShardEntry) -> Shard:
        name = shard_file(entry.split, entry.number)
        path = storage.local_path(storage.join(self._dataset_uri, name))
        try:
            shard = self._open(path, entry)
        except FileNotFoundError as error:
            raise self._gone(entry) from error
        except OSError as error:
            raise self._unreadable(entry, error) from error
        self._metrics.add(shards_read=1, bytes_read=entry.num_bytes)
        return shard

    def _read_cached(self, disk: DiskCache, entry: ShardEntry) -> Shard:
        path = disk.find(entry.checksum)
        if path is not None:
            try:
                return self._open(path, entry)
            except FileNotFoundError:
                disk.discard(entry.checksum)
            except ShardCorruptError:
                _LOG.warning("%s in the cache is damaged and will be downloaded again", path)
                disk.discard(entry.checksum)
        for attempt in range(1, _DOWNLOADS + 1):
            try:
                return self._download(disk, entry)
            except ShardCorruptError:
                if attempt == _DOWNLOADS:
                    raise
                wait_s = _BACKOFF_S * 2 ** (attempt - 1) * (0.5 + random.random())
                _LOG.warning(
                    "%s came damaged (attempt %d of %d), again in %.1f s",
                    *(shard_file(entry.split, entry.number), attempt, _DOWNLOADS, wait_s),
                )
                time.sleep(wait_s)
        raise AssertionError("unreachable")

    def _download(self, disk: DiskCache, entry: ShardEntry) -> Shard:
        key = (entry.split, entry.number)

        def heard() -> None:
            with self._lock:
                self._heard[key] = time.monotonic()

        heard()
        try:
            data = storage.read_bytes(storage.join(self._dataset_uri, shard_file(*key)), heard)
        except FileNotFoundError as error:
            raise self._gone(entry) from error
        except OSError as error:
            raise self._unreadable(entry, error) from error
        self._metrics.add(shards_read=1, bytes_read=len(data))
        with disk.adding(entry.checksum, data) as path:
            shard = self._open(path, entry)
        self._metrics.set_cache_bytes(disk.num_bytes)
        return shard

    def _open(self, path: Path, entry: ShardEntry) -> Shard:
        """Map a shard's file, verifying it unless this very file was verified before.

        Raises:
            FileNotFoundError: when it is not there.
            ShardCorruptError: when any byte differs.
        """
        stat = os.stat(path)
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        key = (entry.split, entry.number)
        if stat.st_size == 0:  # cannot be mapped
            verify_bytes(self._dataset_uri, entry, b"")
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
        with self._lock:
            known = self._verified.get(key) == version
        if not known:
            verify_bytes(self._dataset_uri, entry, memoryview(content))
        shard = open_shard(content)
        with self._lock:
            self._verified[key] = version
            self._verified.move_to_end(key)
            if len(self._verified) > _MAX_VERIFIED:
                self._verified.popitem(last=False)
        return shard

    def _gone(self, entry: ShardEntry) -> ShardCorruptError:
        name = shard_file(entry.split, entry.number)
        return ShardCorruptError(
            f"{name} was asked for, {storage.join(self._dataset_uri, name)} is gone. Prepare the dataset again, which "
            "restores it."
        )

    def _unreadable(self, entry: ShardEntry, error: OSError) -> DataUnavailableError:
        return DataUnavailableError(
            f"{shard_file(entry.split, entry.number)} was asked for, {self._dataset_uri} did not give it: {error}. "
            "Check that the storage answers this machine."
        )

    def close(self) -> None:
        """Let the reading threads end, and leave the cache folder to the next process."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._prefetch_pool.shutdown(wait=False, cancel_futures=True)
        if self._disk is not None:
            self._disk.close()
