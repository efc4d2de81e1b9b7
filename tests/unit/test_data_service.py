"""The service over real gRPC and Flight: the same rows for any slicing, and nothing wrong handed on."""

import json
import os
import random
import threading
import time
from dataclasses import replace

import grpc
import numpy as np
import psutil
import pyarrow.flight as flight
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from data_service import control_pb2 as pb
from data_service import control_pb2_grpc as pb_grpc
from data_service.access import DataAccess
from data_service.cache import ShardCache
from data_service.client import NO_ROW, DataClient
from data_service.control import CHANNEL_OPTIONS, Membership
from data_service.errors import (
    ConfigError,
    DataError,
    DataStalledError,
    DataUnavailableError,
    DeliveryError,
    ShardCorruptError,
)
from data_service.hashing import row_crcs, sample_hash
from data_service.metrics import WorkerMetrics
from data_service.order import rows_of_batch
from data_service.prepare import prepare
from data_service.rows import ShardRows
from data_service.schema import RowBlock
from data_service.server import DataWorker
from data_service.shards import read_index, read_manifest, read_tokens
from data_service.ticket import MAX_TICKET_BYTES, Ticket
from tests.helpers.data_runs import (
    GLOBAL_BATCH,
    TOKEN,
    hash_of,
    read_hashes,
    reviews,
    running_service,
    small_config,
    write_csv,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(write_csv(tmp_path_factory.mktemp("corpus") / "reviews.csv", reviews(400)))


@pytest.fixture(scope="module")
def dataset(config, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("dataset"))
    prepare(config, folder)
    return folder


@pytest.fixture(scope="module")
def service(config, dataset):
    with running_service(dataset, config, (ShardRows, ShardRows)) as running:
        yield running


@pytest.fixture
def client(service):
    client = DataClient(service.access())
    yield client
    client.close()


def flight_client(address):
    return flight.FlightClient(f"grpc://{address}", generic_options=[("grpc.enable_http_proxy", 0)])


def expected_rows(dataset, plan, batch):
    """Ids, tokens and valid counts of a global batch, cut from the dataset without the service."""
    manifest = read_manifest(dataset)
    stream = np.concatenate(list(read_tokens(dataset, plan.split)))
    ids = rows_of_batch(plan, batch)
    tokens = np.full((ids.size, plan.seq_len + 1), manifest.eos_id, dtype=manifest.dtype)
    valid = np.zeros(ids.size, dtype=np.uint32)
    for row, start in enumerate((ids * np.uint64(plan.seq_len)).tolist()):
        part = stream[start : start + plan.seq_len + 1]
        tokens[row, : part.size] = part
        valid[row] = min(plan.seq_len, stream.size - 1 - start)
    return ids, tokens, valid


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
def test_any_slicing_gives_the_rows_of_the_plan(dataset, client, dp):
    plan = client.plan("train")
    # Behind the end of the first epoch, so that rows of two epochs and the padded last row are among them.
    start = plan.num_batches - 3
    per_rank = -(-GLOBAL_BATCH // dp)
    ranks = [list(client.stream("train", start, start + 6, (r * per_rank, (r + 1) * per_rank))) for r in range(dp)]
    for number in range(6):
        slices = [rank[number] for rank in ranks]
        assert [one.index for one in slices] == [start + number] * dp
        ids, tokens, valid = expected_rows(dataset, plan, start + number)
        got = {
            name: np.concatenate([getattr(one, name) for one in slices])
            for name in ("row_id", "tokens", "valid_tokens", "row_crc", "rows")
        }
        assert got["tokens"].dtype == np.int32
        np.testing.assert_array_equal(got["row_id"][:GLOBAL_BATCH], ids)
        np.testing.assert_array_equal(got["tokens"][:GLOBAL_BATCH], tokens)
        np.testing.assert_array_equal(got["valid_tokens"][:GLOBAL_BATCH], valid)
        assert hash_of(slices) == sample_hash(ids, row_crcs(tokens, valid))
        assert (got["row_id"][GLOBAL_BATCH:] == NO_ROW).all()
        assert not got["valid_tokens"][GLOBAL_BATCH:].any()
        assert not got["tokens"][GLOBAL_BATCH:].any()
        assert got["rows"].sum() == GLOBAL_BATCH


def test_eval_ends_with_masked_rows_and_counts_every_label(dataset, client):
    plan = client.plan("eval")
    batches = list(client.stream("eval", 0, plan.num_batches, (0, GLOBAL_BATCH)))
    assert sum(int(batch.valid_tokens.sum()) for batch in batches) == plan.num_tokens - 1
    ids = np.concatenate([batch.row_id[batch.rows] for batch in batches])
    np.testing.assert_array_equal(ids, np.arange(plan.num_rows))
    assert 0 < batches[-1].rows.sum() <= GLOBAL_BATCH
    beyond = list(client.stream("eval", 0, plan.num_batches, (GLOBAL_BATCH, GLOBAL_BATCH + 2)))
    assert len(beyond) == plan.num_batches
    assert not any(batch.rows.any() for batch in beyond)
    with pytest.raises(ValueError, match="it has"):
        client.stream("eval", 0, plan.num_batches + 1, (0, 1))


def test_documents_are_numbered_within_a_row(dataset, client):
    eos = read_manifest(dataset).eos_id
    for batch in client.stream("train", 0, 5, (0, GLOBAL_BATCH)):
        inputs = batch.tokens[:, :-1]
        behind_an_end = np.concatenate(
            [batch.doc_starts[:, :1], (inputs[:, :-1] == eos) & (np.arange(1, inputs.shape[1]) < 10**9)], axis=1
        )
        full = batch.valid_tokens == inputs.shape[1]
        np.testing.assert_array_equal(batch.doc_ids[full], np.cumsum(behind_an_end, axis=1)[full])
        assert batch.torch_tokens().dtype.is_floating_point is False
        assert tuple(batch.torch_tokens().shape) == batch.tokens.shape


def test_a_stream_holds_no_more_than_its_credits(dataset, config):
    asked = []

    class Watched(ShardRows):
        def read(self, plan, row_ids):
            asked.append(row_ids.size)
            return super().read(plan, row_ids)

    with running_service(dataset, config, (Watched,)) as service:
        client = DataClient(service.access(run_ahead=3))
        stream = client.stream("train", 0, 100, (0, GLOBAL_BATCH))
        for taken in range(1, 8):
            next(stream)
            assert sum(asked) <= (taken + 3) * GLOBAL_BATCH
        stream.close()
        client.close()


class OtherRow(ShardRows):
    """Says and sends a row that is not the plan's."""

    def read(self, plan, row_ids):
        row_ids = row_ids.copy()
        row_ids[0] = (int(row_ids[0]) + 1) % plan.num_rows
        return super().read(plan, row_ids)


class DamagedRow(ShardRows):
    """Sends other tokens than it counted."""

    def read(self, plan, row_ids):
        block = super().read(plan, row_ids)
        block.tokens[-1, 3] ^= 1
        return block


class LyingRow(ShardRows):
    """Sends other tokens under the right ids, with checksums that fit: nothing in the answer contradicts itself."""

    def read(self, plan, row_ids):
        block = super().read(plan, row_ids)
        block.tokens[:, 3] ^= 1
        return RowBlock(
            block.row_id, block.tokens, block.starts, block.valid_tokens, row_crcs(block.tokens, block.valid_tokens)
        )


@pytest.mark.parametrize("source", [OtherRow, DamagedRow])
def test_a_wrong_row_is_refused_and_named(dataset, config, source):
    with running_service(dataset, config, (source,)) as service:
        client = DataClient(service.access())
        batch, slot = (5, 0) if source is OtherRow else (6, GLOBAL_BATCH - 1)
        row = int(rows_of_batch(client.plan("train"), batch)[slot])
        where = rf"data worker {service.workers[0]}, global batch {batch}, slot {slot}: .*\b{row}\b"
        with pytest.raises(DeliveryError, match=where):
            list(client.stream("train", 5, 7, (0, GLOBAL_BATCH)))
        client.close()


def test_a_consistent_lie_changes_the_hash(dataset, config, client):
    with running_service(dataset, config, (LyingRow,)) as service:
        lied_to = DataClient(service.access())
        lies = read_hashes(lied_to, 0, 3, 1)
        lied_to.close()
    truth = read_hashes(client, 0, 3, 1)
    assert all(lie != true for lie, true in zip(lies, truth, strict=True))


def test_a_corrupt_shard_is_named_and_never_served(config, tmp_path):
    dataset = str(tmp_path / "d")
    prepare(config, dataset)
    shard = tmp_path / "d" / "shards" / "train-00002.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with running_service(dataset, config, (ShardRows, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        delivered = []

        def drain():
            for batch in client.stream("train", 0, plan.num_batches, (0, GLOBAL_BATCH)):
                delivered.extend(batch.row_id.tolist())

        with pytest.raises(ShardCorruptError, match=r"train-00002\.arrow"):
            drain()
        client.close()
    ends = [row * plan.seq_len + plan.seq_len for row in delivered]
    assert not [end for end in ends if 2 * 2048 <= end and end - plan.seq_len < 3 * 2048]


def test_callers_without_the_token_are_unauthenticated_on_both_planes(service, client):
    channel = grpc.insecure_channel(service.control, options=CHANNEL_OPTIONS)
    stub = pb_grpc.DataControlStub(channel)
    for metadata in ((), (("authorization", "Bearer wrong"),)):
        for method, request in (
            (stub.GetPlan, pb.GetPlanRequest(split="train")),
            (stub.Stats, pb.StatsRequest()),
            (stub.Register, pb.RegisterRequest(worker_id="x", address="y")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                method(request, timeout=5, metadata=metadata)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    channel.close()

    ticket = flight.Ticket(Ticket(client.plan("train"), 0, 1, (0, 1)).to_bytes())
    worker = flight_client(service.workers[0])
    for headers in ([], [(b"authorization", b"Bearer wrong")]):
        options = flight.FlightCallOptions(timeout=5, headers=headers)
        with pytest.raises(flight.FlightUnauthenticatedError):
            worker.do_get(ticket, options).read_all()
    worker.close()

    stranger = DataClient(DataAccess((service.control,), "wrong", 4, 2.0, 5.0))
    with pytest.raises(DataError, match="UNAUTHENTICATED"):
        stranger.plan("train")
    stranger.close()


def test_bad_tickets_are_refused_and_the_worker_lives(service, client):
    plan = client.plan("train")
    good = json.loads(Ticket(plan, 0, 1, (0, 1)).to_bytes())
    bad = [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[" * 3000,
        b"x" * (MAX_TICKET_BYTES + 1),
        json.dumps({**good, "first": -1}).encode(),
        json.dumps({**good, "last": 0}).encode(),
        json.dumps({**good, "last": 10**9}).encode(),
        json.dumps({**good, "last": 65_536}).encode(),
        json.dumps({**good, "slots": [0, GLOBAL_BATCH + 1]}).encode(),
        json.dumps({**good, "slots": [True, 2]}).encode(),
        json.dumps({**good, "v": 2}).encode(),
        json.dumps({**good, "plan": {**good["plan"], "dataset_digest": "other"}}).encode(),
        json.dumps({**good, "plan": {**good["plan"], "seq_len": 10**9}}).encode(),
        json.dumps({**good, "plan": {**good["plan"], "num_tokens": 33, "num_rows": 1}}).encode(),
        json.dumps({**good, "plan": {**good["plan"], "version": 9}}).encode(),
        json.dumps({**good, "plan": {**good["plan"], "rows_per_shard": 2**61, "window_shards": 2**61}}).encode(),
    ]
    chance = random.Random(3)
    for _ in range(300):
        damaged = bytearray(json.dumps(good).encode())
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.choice(b'0123456789-{}[]",:ex\x00\xff')
        bad.append(bytes(damaged))
    refused = 0
    worker = flight_client(service.workers[0])
    options = flight.FlightCallOptions(timeout=5, headers=[(b"authorization", f"Bearer {TOKEN}".encode())])
    for number, ticket in enumerate(bad):
        try:
            # A changed digit may leave a ticket that asks for other rows, and is well formed.
            assert worker.do_get(flight.Ticket(ticket), options).read_all().num_rows <= 100
        except flight.FlightServerError:
            refused += 1
        assert number >= 17 or refused == number + 1
    assert refused > 250
    assert worker.do_get(flight.Ticket(json.dumps(good).encode()), options).read_all().num_rows == 1
    worker.close()


def test_a_ticket_for_one_slot_of_a_huge_batch_costs_one_row(service, client):
    plan = replace(client.plan("train"), global_batch=2**32)
    worker = flight_client(service.workers[0])
    options = flight.FlightCallOptions(timeout=2, headers=[(b"authorization", f"Bearer {TOKEN}".encode())])
    ticket = flight.Ticket(Ticket(plan, 5, 6, (2**31, 2**31 + 1)).to_bytes())
    assert worker.do_get(ticket, options).read_all().num_rows == 1
    worker.close()


def connections_to(address):
    """Established TCP connections of this process to an address."""
    port = int(address.rpartition(":")[2])
    found = psutil.Process().net_connections("tcp")
    return [one for one in found if one.raddr and one.raddr.port == port and one.status == psutil.CONN_ESTABLISHED]


def test_a_worker_of_another_dataset_is_refused_and_keeps_nothing_open(dataset, config, tmp_path):
    other = small_config(write_csv(tmp_path / "c.csv", reviews(60)))
    prepare(other, str(tmp_path / "d"))
    with running_service(dataset, config, ()) as service:
        worker = DataWorker(str(tmp_path / "d"), service.control, TOKEN)
        with pytest.raises(ConfigError, match="cannot join") as caught:
            worker.start()
        deadline = time.monotonic() + 5
        while connections_to(service.control):
            assert time.monotonic() < deadline, "the connection to the control plane is still open"
            threading.Event().wait(0.05)
    assert caught.value.exit_code == 2


def test_storage_that_does_not_answer_is_given_up_in_time(config, tmp_path):
    dataset = tmp_path / "d"
    manifest = prepare(config, str(dataset))
    entry = read_index(str(dataset), manifest)["train"][1]
    shard = dataset / "shards" / "train-00001.arrow"
    shard.unlink()
    os.mkfifo(shard)
    cache = ShardCache(str(dataset), 1 << 20, WorkerMetrics(), read_deadline_s=0.3)
    try:
        with pytest.raises(DataUnavailableError, match=r"train-00001\.arrow .* in 0\.3 s") as caught:
            cache.get([entry])
        assert caught.value.retryable
    finally:
        cache.close()
        os.close(os.open(shard, os.O_RDWR | os.O_NONBLOCK))  # lets the reading thread go


def test_a_split_without_rows_and_a_service_without_workers_say_so(tmp_path):
    config = small_config(write_csv(tmp_path / "c.csv", reviews(60)), eval_share=0.0)
    prepare(config, str(tmp_path / "d"))
    with running_service(str(tmp_path / "d"), config, ()) as service:
        client = DataClient(service.access(stalled_s=0.6))
        with pytest.raises(ConfigError, match=r"eval split.*data\.split\.eval"):
            client.plan("eval")
        with pytest.raises(DataStalledError, match="no data worker is registered"):
            next(client.stream("train", 0, 1, (0, 1)))
        client.close()


def test_membership_prefers_the_living():
    now = [0.0]
    members = Membership(clock=lambda: now[0])
    for number in range(4):
        members.register(f"w{number}", f"host{number}:1")
    assert sorted(members.route("client", ())) == [f"host{number}:1" for number in range(4)]
    assert members.route("client", ()) == members.route("client", ())
    assert len({members.route(f"client{number}", ())[0] for number in range(50)}) == 4
    assert "host1:1" not in members.route("client", ["host1:1"])
    best = members.route("client", ())[0]
    now[0] = 1.0
    members.report_failure(best)
    assert members.route("client", ())[-1] == best
    now[0] = 2.0
    assert members.heartbeat(f"w{best[4]}", pb.WorkerCounters(rows=3))
    assert members.route("client", ())[0] == best
    now[0] = 8.0
    for number in range(3):
        members.heartbeat(f"w{number}", pb.WorkerCounters())
    assert members.route("client", ())[-1] == "host3:1"
    assert [worker.alive for worker in members.stats()] == [True, True, True, False]
    assert not members.heartbeat("unknown", pb.WorkerCounters())
    members.register("again", "host3:1")
    assert len(members.stats()) == 4
