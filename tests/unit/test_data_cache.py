"""Shards in place and in the disk cache: each read once, bounded, verified, and inherited by the next process."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_service import control_pb2 as pb
from data_service.cache import ShardCache
from data_service.control import ControlServer
from data_service.errors import ConfigError, DataUnavailableError, ShardCorruptError
from data_service.manifest import read_manifest
from data_service.metrics import WorkerMetrics
from data_service.order import rows_of_batch
from data_service.ownership import owners_of_rows
from data_service.planning import make_plan
from data_service.prefetch import AHEAD_BATCHES, EVERY_BATCHES, Prefetch, entries_of
from data_service.server import DataWorker
from data_service.shards import ShardIndex, load_shard
from data_service.ticket import Ticket
from tests.helpers.data_runs import TOKEN, small_order
from tests.helpers.flight_calls import raw_control, raw_worker
from tests.helpers.waiting import until
from tests.helpers.written_datasets import stream_dataset

NUMBERS = itertools.count()


class Store(MemoryFileSystem):
    """An object store in this process that counts reads, and waits or damages where it is told to."""

    protocol = "countedmem"
    reads: dict[str, int] = {}
    gate: threading.Event | None = None
    damaged: dict[str, int] = {}
    """File name to how many reads of it come damaged."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("countedmem://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        name = path.rpartition("/")[2]
        Store.reads[name] = Store.reads.get(name, 0) + 1
        if Store.gate is not None and "train-" in name:
            Store.gate.wait(30)
        data = super().cat_file(path, start, end, **kwargs)
        if Store.damaged.get(name, 0) > 0:
            Store.damaged[name] -= 1
            return data[: len(data) // 2]
        return data


@pytest.fixture(scope="module", autouse=True)
def registered():
    fsspec.register_implementation("countedmem", Store, clobber=True)


@pytest.fixture
def written(tmp_path):
    return stream_dataset(tmp_path / "d")


@pytest.fixture
def remote(written):
    """The dataset in a store, and its entries of the training split."""
    uri = f"countedmem://data{next(NUMBERS)}"
    for file in Path(written.uri).rglob("*.*"):
        fsspec.filesystem("memory").pipe_file(f"{written_uri(uri)}/{file.relative_to(written.uri)}", file.read_bytes())
    Store.reads, Store.gate, Store.damaged = {}, None, {}
    yield uri, list(ShardIndex(uri, read_manifest(uri)).entries("train"))
    if Store.gate is not None:
        Store.gate.set()
        Store.gate = None


def shard_reads():
    return {name: count for name, count in Store.reads.items() if name.startswith("train-")}


def assert_shards(found, entries, uri):
    """The arrays are those that a plain read of the files gives."""
    assert set(found) == {(entry.split, entry.number) for entry in entries}
    for entry in entries:
        plain = load_shard(uri, entry)
        shard = found[entry.split, entry.number]
        np.testing.assert_array_equal(shard.tokens, plain.tokens)
        np.testing.assert_array_equal(shard.starts, plain.starts)


def files_in(folder):
    return sorted(path for path in folder.rglob("*.arrow"))


def test_a_local_dataset_is_read_in_place(written, tmp_path):
    entries = list(ShardIndex(written.uri, written.manifest).entries("train"))
    metrics = WorkerMetrics()
    cache = ShardCache(written.uri, cache_dir=str(tmp_path / "cache"), metrics=metrics)
    assert not cache.remote
    for _ in range(2):
        assert_shards(cache.get(entries), entries, written.uri)
    assert metrics.totals().shards_read == len(entries)
    assert metrics.totals().bytes_read == sum(entry.num_bytes for entry in entries)
    assert not (tmp_path / "cache").exists()
    tokens = cache.get(entries[:1])["train", 0].tokens
    assert not tokens.flags.writeable
    assert not tokens.flags.owndata, "the tokens were copied"
    cache.close()


def test_few_shards_stay_mapped_and_a_file_is_verified_again_only_when_it_changed(written):
    entries = list(ShardIndex(written.uri, written.manifest).entries("train"))
    limit = max(entry.num_bytes for entry in entries) * 2
    cache = ShardCache(written.uri, mapped_bytes=limit)
    for entry in entries * 2:
        cache.get([entry])
        assert cache.num_mapped_bytes <= limit
    victim = entries[1]
    path = Path(written.uri) / "shards" / "train-00001.arrow"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(victim.num_bytes // 2)
        byte = file.read(1)[0]
        file.seek(victim.num_bytes // 2)
        file.write(bytes([byte ^ 1]))
    # With its old time back it is, as far as anybody can tell, the file that was verified.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cache.get([victim])
    os.utime(path)
    cache.get([entries[3]])
    cache.get([entries[4]])
    with pytest.raises(ShardCorruptError, match=r"train-00001\.arrow"):
        cache.get([victim])
    cache.close()


def test_threads_that_ask_for_one_shard_share_one_read(remote, tmp_path):
    uri, entries = remote
    Store.gate = threading.Event()
    cache = ShardCache(uri, cache_dir=str(tmp_path / "cache"))
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.get(entries[:3]))) for _ in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: len(shard_reads()) == 3, "the reads have begun")
    time.sleep(0.05)
    Store.gate.set()
    for thread in threads:
        thread.join(20)
    assert len(found) == 12
    assert shard_reads() == {f"train-{number:05d}.arrow": 1 for number in range(3)}
    assert_shards(found[7], entries[:3], uri)
    cache.close()


def test_the_disk_holds_no_more_than_its_limit_and_keeps_what_is_used(remote, tmp_path):
    uri, entries = remote
    metrics = WorkerMetrics()
    limit = sum(sorted(entry.num_bytes for entry in entries)[-3:])
    cache = ShardCache(uri, cache_dir=str(tmp_path / "cache"), cache_bytes=limit, metrics=metrics)
    hot, others = entries[0], entries[1:]
    for entry in others * 2:
        found = cache.get([hot, entry])
        assert_shards(found, [hot, entry], written_uri(uri))
        assert sum(path.stat().st_size for path in files_in(tmp_path / "cache")) <= limit
        assert cache.num_mapped_bytes <= limit, "a file that was removed is still mapped"
    assert shard_reads()["train-00000.arrow"] == 1
    assert {count for name, count in shard_reads().items() if name != "train-00000.arrow"} == {2}
    total = hot.num_bytes + 2 * sum(entry.num_bytes for entry in others)
    assert (metrics.totals().shards_read, metrics.totals().bytes_read) == (1 + 2 * len(others), total)
    cache.close()


def written_uri(uri):
    """The same store through another protocol, which is not counted."""
    return uri.replace("countedmem", "memory")


def test_a_shard_larger_than_the_limit_is_served_all_the_same(remote, tmp_path):
    uri, entries = remote
    cache = ShardCache(uri, cache_dir=str(tmp_path / "cache"), cache_bytes=1)
    for entry in entries[:3]:
        assert_shards(cache.get([entry]), [entry], written_uri(uri))
        assert len(files_in(tmp_path / "cache")) == 1
    cache.close()


def test_the_next_process_takes_the_files_over_and_trusts_none_of_them(remote, tmp_path):
    uri, entries = remote
    folder = tmp_path / "cache"
    cache = ShardCache(uri, cache_dir=str(folder))
    cache.get(entries)
    cache.close()
    files = files_in(folder)
    assert len(files) == len(entries)
    damaged = folder / "worker-0000" / f"{entries[2].checksum.hex()}.arrow"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    empty = folder / "worker-0000" / f"{entries[3].checksum.hex()}.arrow"
    empty.write_bytes(b"")
    unfinished = folder / "worker-0000" / f".{'0' * 32}.arrow.01234567.tmp"
    unfinished.write_bytes(b"half")
    Store.reads = {}
    cache = ShardCache(uri, cache_dir=str(folder))
    assert_shards(cache.get(entries), entries, written_uri(uri))
    assert shard_reads() == {"train-00002.arrow": 1, "train-00003.arrow": 1}
    assert not unfinished.exists()
    cache.close()
    smaller = ShardCache(uri, cache_dir=str(folder), cache_bytes=entries[0].num_bytes)
    assert sum(path.stat().st_size for path in files_in(folder)) <= entries[0].num_bytes
    smaller.close()


def test_processes_of_one_machine_take_sub_folders_of_their_own(remote, tmp_path):
    uri, entries = remote
    caches = [ShardCache(uri, cache_dir=str(tmp_path / "cache")) for _ in range(3)]
    for number, cache in enumerate(caches):
        cache.get(entries[number : number + 1])
    held = sorted(path.parent.name for path in files_in(tmp_path / "cache"))
    assert held == ["worker-0000", "worker-0001", "worker-0002"]
    caches[1].close()
    again = ShardCache(uri, cache_dir=str(tmp_path / "cache"))
    Store.reads = {}
    again.get(entries[1:2])
    assert shard_reads() == {}, "the freed folder's files were not taken over"
    for cache in (caches[0], caches[2], again):
        cache.close()
    old = time.time() - 2 * 86_400
    for lock in (tmp_path / "cache").glob("worker-*/.lock"):
        os.utime(lock, (old, old))
    ShardCache(uri, cache_dir=str(tmp_path / "cache")).close()
    assert [path.parent.name for path in files_in(tmp_path / "cache")] == ["worker-0000"]


def test_a_lock_ends_with_its_process(remote, tmp_path):
    uri, _ = remote
    code = (
        "import os, sys\nfrom data_service.disk_cache import DiskCache\n"
        "held = DiskCache(sys.argv[1], 1 << 20, lambda _: None)\nprint(held.folder.name, flush=True)\nos.abort()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.strip() == "worker-0000"
    ShardCache(uri, cache_dir=str(tmp_path / "cache")).close()


def test_damage_on_the_way_is_retried_and_damage_in_the_store_is_named(remote, tmp_path):
    uri, entries = remote
    cache = ShardCache(uri, cache_dir=str(tmp_path / "cache"))
    Store.damaged = {"train-00000.arrow": 2, "train-00001.arrow": 1000}
    assert_shards(cache.get(entries[:1]), entries[:1], written_uri(uri))
    assert shard_reads() == {"train-00000.arrow": 3}
    for _ in range(2):
        with pytest.raises(ShardCorruptError, match=r"train-00001\.arrow"):
            cache.get(entries[:2])
    assert len(files_in(tmp_path / "cache")) == 1, "a corrupt file was kept"
    Store.damaged = {}
    assert_shards(cache.get(entries[1:2]), entries[1:2], written_uri(uri))
    fsspec.filesystem("memory").rm(f"{written_uri(uri)}/shards/train-00002.arrow")
    with pytest.raises(ShardCorruptError, match=r"train-00002\.arrow.*is gone"):
        cache.get(entries[2:3])
    cache.close()


def test_storage_that_does_not_answer_is_given_up_in_time(remote, tmp_path):
    uri, entries = remote
    Store.gate = threading.Event()
    cache = ShardCache(uri, cache_dir=str(tmp_path / "cache"), read_deadline_s=0.3)
    started = time.monotonic()
    with pytest.raises(DataUnavailableError, match=r"train-00001\.arrow .* in 0\.3 s") as caught:
        cache.get([entries[1]])
    assert time.monotonic() - started < 3
    assert caught.value.retryable
    Store.gate.set()
    until(lambda: len(files_in(tmp_path / "cache")) == 1, "the read that came late is kept")
    cache.get([entries[1]])
    assert shard_reads() == {"train-00001.arrow": 1}
    cache.close()


def test_a_prefetch_that_waits_is_overtaken_by_a_read(remote, tmp_path):
    uri, entries = remote
    Store.gate = threading.Event()
    cache = ShardCache(uri, cache_dir=str(tmp_path / "cache"))
    cache.prefetch(entries)
    until(lambda: len(shard_reads()) == 2, "two prefetches run")
    reader = threading.Thread(target=lambda: cache.get(entries[4:6]))
    reader.start()
    until(lambda: len(shard_reads()) == 4, "the reads do not wait behind the prefetches")
    assert {"train-00004.arrow", "train-00005.arrow"} <= set(shard_reads())
    Store.gate.set()
    reader.join(20)
    until(lambda: len(files_in(tmp_path / "cache")) == len(entries), "all prefetches are done")
    assert set(shard_reads().values()) == {1}
    cache.close()


def test_a_ticket_lets_the_worker_fetch_its_own_shards_of_batches_further_on(remote, tmp_path):
    uri, _ = remote
    manifest = read_manifest(uri)
    plan = make_plan(manifest, "train", small_order())
    index = ShardIndex(uri, manifest)
    cache = ShardCache(uri, cache_dir=str(tmp_path / "cache"))
    prefetch = Prefetch(manifest, index, cache)
    members = ("a", "b")
    prefetch.note(Ticket(plan, 0, EVERY_BATCHES, (0, 4), members, 1))
    rows = rows_of_batch(plan, EVERY_BATCHES + AHEAD_BATCHES)
    mine = rows[owners_of_rows(plan, members, rows) == 1]
    wanted = {f"train-{entry.number:05d}.arrow" for entry in entries_of(manifest, index, plan, mine)}
    until(lambda: set(shard_reads()) == wanted, "the shards are fetched")
    assert 0 < len(wanted) < len({entry.number for entry in entries_of(manifest, index, plan, rows)})
    prefetch.close()
    cache.close()


def test_each_shard_leaves_the_store_once_for_all_workers(remote, tmp_path):
    """An epoch and a half, asked by four ranks of three workers, each for the rows of its own shards."""
    uri, entries = remote
    plan = make_plan(read_manifest(uri), "train", small_order())
    control = ControlServer(uri, TOKEN)
    address = control.start()
    workers = {}
    try:
        for _ in range(3):
            worker = DataWorker(uri, address, TOKEN, cache_dir=str(tmp_path / "cache"))
            workers[worker.worker_id] = (worker, worker.start())
        members = tuple(sorted(workers))
        rows = 0
        with contextlib.ExitStack() as stack:
            raws = [stack.enter_context(raw_worker(workers[member][1])) for member in members]
            steps = range(0, plan.num_batches * 3 // 2, 4)
            for step in steps:
                for rank, (number, raw) in itertools.product(range(4), enumerate(raws)):
                    ticket = Ticket(plan, step, step + 4, (2 * rank, 2 * rank + 2), members, number)
                    rows += raw.table(ticket).num_rows
        assert rows == len(steps) * 4 * plan.global_batch
        assert shard_reads() == {f"train-{entry.number:05d}.arrow": 1 for entry in entries}
        with raw_control(address) as raw:
            until(
                lambda: sum(one.counters.rows for one in raw("Stats", pb.StatsRequest()).workers) == rows,
                "heartbeats carry the counters",
            )
            told = [one.counters for one in raw("Stats", pb.StatsRequest()).workers]
        assert sum(one.bytes_read for one in told) == sum(entry.num_bytes for entry in entries)
    finally:
        for worker, _ in workers.values():
            worker.stop()
        control.stop()


def test_a_cache_folder_that_cannot_be_used_is_named(remote, tmp_path):
    uri, _ = remote
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.service\.cache_dir"):
        ShardCache(uri, cache_dir=str(tmp_path / "file" / "cache"))
