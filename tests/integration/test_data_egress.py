"""How often shards leave an object store where the store is slow, workers are short of processor time, or one hangs."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_service import storage
from data_service.client import DataClient
from tests.helpers.data_fleet import Fleet, fleet, stopped
from tests.helpers.data_runs import GLOBAL_BATCH, hash_of, small_order
from tests.helpers.s3_faults import Fault, FaultProxy
from tests.helpers.written_datasets import WrittenDataset, stream_dataset

NUM_WORKERS = 3
NUM_RANKS = 4


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> WrittenDataset:
    return stream_dataset(tmp_path_factory.mktemp("data") / "d", tokens=(12_000,), shard_tokens=1024)


@pytest.fixture
def running(
    local: WrittenDataset, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    """Workers in processes of their own over a copy of the dataset on S3, none of which has a shard yet."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    uri = f"s3://bucket/{tmp_path.name}/dataset"
    for name in storage.list_tree(local.uri):
        storage.write_bytes(f"{uri}/{name}", storage.read_bytes(f"{local.uri}/{name}"))
    with fleet(WrittenDataset(uri, local.manifest, local.parts), NUM_WORKERS) as found:
        proxy.clear()
        yield found


def read_epoch(running: Fleet, **bounds: float) -> float:
    """Read an epoch as ranks do, each with a client of its own; returns the longest wait for a batch, in seconds."""
    access = running.access(small_order(), **bounds)
    share = GLOBAL_BATCH // NUM_RANKS
    found: list[list[object]] = [[] for _ in range(NUM_RANKS)]
    waits: list[float] = []

    def read(rank: int) -> None:
        client = DataClient(access)
        try:
            stream = client.stream("train", 0, client.plan("train").num_batches, (rank * share, (rank + 1) * share))
            began = time.monotonic()
            for one in stream:
                waits.append(time.monotonic() - began)
                found[rank].append(one)
                began = time.monotonic()
        except Exception as error:  # told below
            found[rank].append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(NUM_RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = DataClient(access)
    plan = client.plan("train")
    client.close()
    for slices in found:
        assert not isinstance(slices[-1], Exception), slices[-1]
        assert len(slices) == plan.num_batches
    for step in range(plan.num_batches):
        assert hash_of([slices[step] for slices in found]) == running.dataset.hash_of_step(plan, step)
    return max(waits)


def loads(proxy: FaultProxy) -> Counter[str]:
    """How often each shard of the train split was asked of the store."""
    return Counter(one.path.partition("?")[0].rpartition("/")[2] for one in proxy.asked("GET", "/shards/train-"))


def check_once(proxy: FaultProxy, dataset: WrittenDataset) -> None:
    asked = loads(proxy)
    assert len(asked) == sum(part.num_shards for part in dataset.manifest.splits["train"])
    assert set(asked.values()) == {1}, asked


def test_a_store_that_is_slower_than_a_read_may_be_silent_gives_each_shard_once(running, proxy):
    proxy.faults = [Fault("slow", "/shards/train-", times=-1, seconds=2.5)]
    read_epoch(running, hedge_s=0.3, read_stall_s=1.0, stalled_s=60.0)
    check_once(proxy, running.dataset)


def test_workers_that_are_short_of_processor_time_load_each_shard_once(running, proxy):
    """Each stands still for longer than `hedge_s`, and for less than twice that, while ranks wait for its shards."""
    ended = threading.Event()

    def stand_still() -> None:
        for _ in range(2):
            for worker in running.workers:
                with stopped(worker):
                    ended.wait(1.4)
                ended.wait(0.3)

    disturbing = threading.Thread(target=stand_still)
    disturbing.start()
    try:
        read_epoch(running, hedge_s=1.0, read_stall_s=10.0, stalled_s=60.0)
    finally:
        ended.set()
        disturbing.join()
    check_once(proxy, running.dataset)


def test_a_load_that_hangs_is_left_to_one_other_worker(running, proxy):
    proxy.faults = [Fault("stall", "/shards/train-00004")]
    longest_s = read_epoch(running, hedge_s=0.3, read_stall_s=1.5, stalled_s=60.0)
    asked = loads(proxy)
    assert asked.pop("train-00004.arrow") == 2
    assert set(asked.values()) <= {1, 2}, asked
    assert 1.4 < longest_s < 8, "the store's own deadline for a silent answer is 15 s"


def test_shards_of_a_worker_that_stands_still_are_loaded_by_others(running, proxy):
    with stopped(running.workers[0]):
        longest_s = read_epoch(running, hedge_s=0.3, read_stall_s=10.0, stalled_s=60.0)
    assert longest_s < 5, "the others were asked only when a read was given up"
    assert loads(proxy)
