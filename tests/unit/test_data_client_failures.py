"""The client where workers refuse, find damage or go, where nobody answers, and where it is closed."""

import itertools
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow.flight as flight
import pytest

from data_service.client import DataClient
from data_service.connections import Connections
from data_service.errors import (
    ConfigError,
    CursorMismatchError,
    DataError,
    DataStalledError,
    DataUnavailableError,
    ShardCorruptError,
)
from data_service.order import shards_of
from data_service.rows import ShardRows
from data_service.stream import Stream, shape_of_range
from data_service.ticket import MAX_TICKET_BATCHES, Ticket
from tests.helpers.data_runs import GLOBAL_BATCH, read_hashes, running_service, small_order
from tests.helpers.plans import hand_made
from tests.helpers.written_datasets import WrittenPart, random_documents, stream_dataset, write_dataset

PLAN = hand_made([("a", 0, 1000, 64)], seq_len=32, seed=1, dataset="made-up")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def service(dataset):
    with running_service(dataset.uri, small_order(), (ShardRows, ShardRows, ShardRows)) as running:
        yield running


class Damaged(ShardRows):
    """Finds every shard damaged."""

    def read(self, plan, row_ids):
        raise ShardCorruptError("shards/train-00000.arrow was asked for, it is damaged.")


def test_rows_that_one_worker_finds_damaged_come_from_another(dataset):
    with running_service(dataset.uri, small_order(), (Damaged, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        assert read_hashes(client, 0, 12, 2) == [dataset.hash_of_step(plan, step) for step in range(12)]
        client.close()


def test_rows_that_all_workers_find_damaged_end_the_stream(dataset):
    with running_service(dataset.uri, small_order(), (Damaged, Damaged)) as service:
        client = DataClient(service.access())
        with pytest.raises(ShardCorruptError, match=r"data worker .*train-00000\.arrow"):
            next(client.stream("train", 0, 1, (0, 1)))
        client.close()


def test_a_corrupt_shard_is_named_and_never_served(tmp_path):
    dataset = stream_dataset(tmp_path / "d", tokens=(12_000,))
    shard = tmp_path / "d" / "shards" / "train-00002.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    delivered = []
    with running_service(dataset.uri, small_order(), (ShardRows, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")

        def drain():
            for batch in client.stream("train", 0, plan.num_batches, (0, GLOBAL_BATCH)):
                delivered.extend(batch.row_id.tolist())

        with pytest.raises(ShardCorruptError, match=r"train-00002\.arrow"):
            drain()
        client.close()
    _, shards = shards_of(plan, np.array(delivered, dtype=np.uint64))
    assert 2 not in shards.tolist()


class Unavailable(ShardRows):
    """Its storage gives no answer."""

    def read(self, plan, row_ids):
        raise DataUnavailableError("the storage gave no answer")


def test_a_worker_without_storage_is_left_for_another(dataset):
    with running_service(dataset.uri, small_order(), (Unavailable, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        assert read_hashes(client, 0, 12, 1) == [dataset.hash_of_step(plan, step) for step in range(12)]
        client.close()


def test_strangers_and_other_datasets_are_refused(service):
    stranger = DataClient(replace(service.access(), token="wrong"))
    with pytest.raises(DataError, match="UNAUTHENTICATED"):
        stranger.plan("train")
    stranger.close()
    elsewhere = DataClient(replace(service.access(), dataset_digest="0" * 32))
    with pytest.raises(ConfigError, match="0" * 32):
        elsewhere.plan("train")
    elsewhere.close()


def test_a_split_without_rows_and_a_service_without_workers_say_so(tmp_path):
    part = WrittenPart("source", random_documents(1, 3000))
    dataset = write_dataset(tmp_path / "d", {"train": [part]})
    with running_service(dataset.uri, small_order(), ()) as service:
        client = DataClient(service.access(stalled_s=0.6))
        with pytest.raises(ConfigError, match=r"eval split.*data\.split\.eval"):
            client.plan("eval")
        with pytest.raises(DataStalledError, match="no data worker is registered"):
            next(client.stream("train", 0, 1, (0, 1)))
        client.close()


def test_a_control_plane_that_is_away_is_waited_for_and_the_next_one_asked(dataset, service):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    access = service.access(stalled_s=1.0)
    alone = DataClient(replace(access, control=(nobody,)))
    began = time.monotonic()
    with pytest.raises(DataUnavailableError, match="none answers"):
        alone.plan("train")
    assert 0.9 < time.monotonic() - began < 11
    alone.close()
    client = DataClient(replace(access, control=(nobody, service.control), stalled_s=20.0))
    assert read_hashes(client, 0, 2, 1) == [dataset.hash_of_step(client.plan("train"), step) for step in range(2)]
    client.close()


def test_closing_ends_the_threads_and_a_blocked_reader(dataset):
    go_on, ended = threading.Event(), []

    class Stuck(ShardRows):
        """Its storage hangs."""

        def read(self, plan, row_ids):
            go_on.wait(60)
            return super().read(plan, row_ids)

    with running_service(dataset.uri, small_order(), (Stuck,)) as service:
        before = set(threading.enumerate())
        client = DataClient(service.access(run_ahead=2, read_stall_s=20.0, stalled_s=60.0))
        stream = client.stream("train", 0, 1000, (0, GLOBAL_BATCH))

        def read():
            with pytest.raises(DataError, match="client was closed"):
                next(stream)
            ended.append(True)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.5)
        assert reader.is_alive()
        client.close()
        reader.join(10)
        go_on.set()
        assert ended, "the reader was left in next"
        reader.join()
        deadline = time.monotonic() + 10
        threads = ("data-stream", "data-read", "data-members")
        while left := [one for one in threading.enumerate() if one.name.startswith(threads) and one not in before]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)


def test_a_closed_client_begins_no_stream(dataset, service):
    client = DataClient(service.access())
    stream = client.stream("train", 0, 10, (0, GLOBAL_BATCH))
    client.close()
    with pytest.raises(DataError, match="closed"):
        next(stream)


def refusing(error):
    """A row source of another run's worker: it refuses every ticket."""

    class Refusing(ShardRows):
        def read(self, plan, row_ids):
            raise error

    return Refusing


STRANGER = refusing(flight.FlightUnauthenticatedError("the bearer token is missing or wrong"))
OTHER_PLAN = refusing(CursorMismatchError("the plan is of another dataset"))
OTHER_TICKET = refusing(ValueError("the ticket is of another version"))


@pytest.mark.parametrize("source", [STRANGER, OTHER_PLAN, OTHER_TICKET])
def test_a_worker_that_refuses_is_left_for_another(dataset, source):
    with running_service(dataset.uri, small_order(), (source, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        assert read_hashes(client, 0, 12, 2) == [dataset.hash_of_step(plan, step) for step in range(12)]
        client.close()


@pytest.mark.parametrize(
    ("sources", "kind", "message"),
    [
        ((STRANGER,), DataError, "refused the token: UNAUTHENTICATED"),
        ((STRANGER, STRANGER), DataError, "refused the token: UNAUTHENTICATED"),
        ((STRANGER, OTHER_TICKET), DataError, "refused a ticket: .*another version"),
        ((OTHER_TICKET, OTHER_PLAN, STRANGER), CursorMismatchError, "another dataset"),
        ((OTHER_PLAN, Damaged, STRANGER), ShardCorruptError, r"train-00000\.arrow"),
    ],
)
def test_refusals_of_all_end_the_stream_with_the_one_that_says_most(dataset, sources, kind, message):
    with running_service(dataset.uri, small_order(), sources) as service:
        client = DataClient(service.access(stalled_s=60.0))
        began = time.monotonic()
        with pytest.raises(kind, match=message):
            next(client.stream("train", 0, 1, (0, 1)))
        assert time.monotonic() - began < 30, "waited for nothing"
        client.close()


def test_connections_to_addresses_of_no_member_are_let_go(service):
    connections = Connections(service.access())
    connections.members.wait(10)
    for address in ("127.0.0.1:1", *service.workers):
        connections.ping(address, 5.0)
    deadline = time.monotonic() + 10
    while "127.0.0.1:1" in connections._flights:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert set(connections._flights) == set(service.workers)
    connections.close()


def test_a_reason_that_is_no_text_reaches_the_control_plane(service, monkeypatch):
    connections = Connections(service.access())
    connections.members.wait(10)
    reported, call = threading.Event(), connections.call

    def watched(method, *args):
        call(method, *args)
        if method == "ReportFailure":
            reported.set()

    monkeypatch.setattr(connections, "call", lambda *args: watched(*args) or call(*args))
    connections.members.failed(connections.members.known()[0], "its answer was \ud800, which is no text")
    assert reported.wait(10)
    connections.close()


def test_every_range_can_be_asked_for():
    for seq_len, slots, workers, most in itertools.product(
        (2, 1024, 2**18 - 1, 10**6, 2**24 - 1), (1, 2, 100, 70_000, 2**20), (0, 1, 32, 256), (1, 3, 256, 10**6)
    ):
        batches, rows = shape_of_range(seq_len, slots, workers, most)
        plan = replace(PLAN, seq_len=seq_len, global_batch=2**20)
        assert 1 <= batches <= most
        Ticket(plan, 0, batches, (0, rows))  # refuses what is too much, or nothing


def test_a_long_stream_grows_its_ranges_to_a_bound(dataset, service):
    client = DataClient(service.access())
    connections = Connections(service.access())
    stream = Stream(connections, service.access(), client.plan("train"), 0, 40, (0, 1))
    stream.start()
    assert [stream.next().index for _ in range(40)] == list(range(40))
    assert stream._batches_at_once <= MAX_TICKET_BATCHES
    stream.close()
    connections.close()
    client.close()
