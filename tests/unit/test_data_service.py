"""The servers of the data service over real gRPC and Flight: right rows for any member, nothing wrong handed on."""

import json
import random
import threading
import time
import urllib.error
import urllib.request
from dataclasses import asdict, replace

import grpc
import numpy as np
import psutil
import pyarrow.flight as flight
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from data_service import control_pb2 as pb
from data_service.control import WORKERS_HEALTH, ControlServer
from data_service.errors import ConfigError
from data_service.membership import FORGET_AFTER_S, SETTLE_S, SUSPECT_AFTER_S, Membership
from data_service.metrics import WorkerCounters
from data_service.order import rows_of_batch
from data_service.plan import OrderSpec
from data_service.planning import make_plan
from data_service.server import PING, DataWorker
from data_service.ticket import MAX_TICKET_BYTES, Ticket
from tests.helpers.data_runs import GLOBAL_BATCH, TOKEN, running_service, small_order
from tests.helpers.flight_calls import raw_control, raw_worker
from tests.helpers.waiting import until
from tests.helpers.written_datasets import WrittenPart, random_documents, stream_dataset, write_dataset

MEMBERS = ("a", "b", "c")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("stream") / "d")


@pytest.fixture(scope="module")
def plan(written):
    return make_plan(written.manifest, "train", small_order())


@pytest.fixture(scope="module")
def service(written):
    with running_service(written.uri, small_order()) as running:
        yield running


@pytest.fixture
def worker(service):
    with raw_worker(service.workers[0]) as raw:
        yield raw


@pytest.fixture
def control(service):
    with raw_control(service.control) as raw:
        yield raw


def chats(folder):
    """A dataset of document rows with answers and classes."""
    draw = np.random.default_rng(5)
    documents = random_documents(3, 6000, longest=33)
    part = WrittenPart(
        "chats",
        documents,
        labels=draw.integers(-1, 2, len(documents)).tolist(),
        answers=[draw.integers(0, 2, one.size).astype(bool) for one in documents],
    )
    held_out = replace(part, documents=documents[:9], labels=part.labels[:9], answers=part.answers[:9])
    return write_dataset(
        folder, {"train": [part], "eval": [held_out]}, rows="document", seq_len=32, labels=("x", "y"), loss_masks=True
    )


def assert_rows(table, written, plan, ticket):
    """Each row of an answer is the one that the plan has there, byte for byte; returns (batch, slot) of each."""
    places = list(zip(table["batch"].to_pylist(), table["slot"].to_pylist(), strict=True))
    wanted = {step: rows_of_batch(plan, step).tolist() for step in range(ticket.first, ticket.last)}
    columns = table.to_pydict()
    for at, (batch, slot) in enumerate(places):
        row_id = wanted[batch][slot]
        row = written.row(plan, row_id)
        assert columns["row_id"][at] == row_id
        assert columns["length"][at] == row.length
        assert columns["row_crc"][at] == row.crc
        np.testing.assert_array_equal(columns["tokens"][at], row.tokens)
        np.testing.assert_array_equal(columns["starts"][at], row.starts)
        assert columns.get("answer_bits", [b""] * len(places))[at] == row.answer_bits
        assert columns.get("label", [None] * len(places))[at] == row.label
    return places


def test_the_members_tickets_give_every_row_once_and_each_as_it_was_written(written, plan, worker):
    # Behind the end of the first epoch, so that rows of two epochs are among them.
    first = plan.num_batches - 3
    whole = Ticket(plan, first, first + 6, (1, GLOBAL_BATCH))
    expected = assert_rows(worker.table(whole), written, plan, whole)
    assert expected == [(batch, slot) for batch in range(first, first + 6) for slot in range(1, GLOBAL_BATCH)]
    shares = [replace(whole, members=MEMBERS, member=member) for member in range(3)]
    found = [assert_rows(worker.table(share), written, plan, share) for share in shares]
    assert sorted(place for share in found for place in share) == expected
    assert all(share == sorted(share) and share for share in found)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_of_documents_carry_their_answers_and_classes(tmp_path, split):
    written = chats(tmp_path / "d")
    order = small_order()
    plan = make_plan(written.manifest, split, order)
    with running_service(written.uri, order) as service, raw_worker(service.workers[0]) as worker:
        ticket = Ticket(plan, 0, plan.num_batches, (0, GLOBAL_BATCH))
        places = assert_rows(worker.table(ticket), written, plan, ticket)
    assert len(places) == (plan.num_rows if split == "eval" else plan.num_batches * GLOBAL_BATCH)


def test_an_answer_travels_in_messages_of_about_a_mebibyte(written, worker):
    plan = make_plan(written.manifest, "train", small_order(global_batch=32_768))
    messages = worker.batches(Ticket(plan, 3, 5, (0, 30_000)))
    assert sum(message.num_rows for message in messages) == 60_000
    sizes = [message.num_rows * 33 * 2 for message in messages]
    assert len(sizes) == 4
    assert all(0.99 * 2**20 < size <= 2**20 for size in sizes[:-1])
    slots = np.concatenate([message["slot"].to_numpy() for message in messages])
    np.testing.assert_array_equal(slots, np.tile(np.arange(30_000), 2))


def test_a_member_without_rows_answers_with_none(plan, worker):
    shares = [Ticket(plan, 5, 6, (0, 1), MEMBERS, member) for member in range(3)]
    assert sorted(worker.table(share).num_rows for share in shares) == [0, 0, 1]


def test_a_ticket_for_one_slot_of_a_huge_batch_costs_one_row(written, worker):
    plan = make_plan(written.manifest, "train", small_order(global_batch=2**30))
    started = time.monotonic()
    assert worker.table(Ticket(plan, 5, 6, (2**29, 2**29 + 1))).num_rows == 1
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("damage", ["bit", "gone", "short"])
def test_a_damaged_shard_is_named_and_never_served(tmp_path, damage):
    written = stream_dataset(tmp_path / "d")
    plan = make_plan(written.manifest, "train", small_order())
    shard = tmp_path / "d" / "shards" / "train-00002.arrow"
    data = bytearray(shard.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "short":
        shard.write_bytes(data[: len(data) // 2])
    else:
        shard.unlink()
    per_shard = plan.parts[0].rows_per_shard
    bad, served = 0, set()
    with running_service(written.uri, small_order()) as service, raw_worker(service.workers[0]) as worker:
        for step in range(plan.num_batches):
            ids = rows_of_batch(plan, step)
            try:
                served.update(worker.table(Ticket(plan, step, step + 1, (0, GLOBAL_BATCH)))["row_id"].to_pylist())
            except flight.FlightServerError as error:
                told = json.loads(error.extra_info)
                assert told["kind"] == "ShardCorruptError"
                assert "train-00002.arrow" in told["message"]
                assert any(row // per_shard == 2 for row in ids.tolist())
                bad += 1
    assert bad > 0
    assert served
    assert not [row for row in served if row >> 48 == 0 and row // per_shard == 2]


def test_callers_without_the_token_are_unauthenticated_on_both_planes(service, plan):
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    for token in (None, "wrong"):
        with raw_control(service.control, token) as control:
            for method, request in (
                ("GetPlan", pb.GetPlanRequest(split="train")),
                ("Members", pb.MembersRequest()),
                ("Stats", pb.StatsRequest()),
                ("Register", pb.RegisterRequest(worker_id="x", address="y:1")),
                ("Heartbeat", pb.HeartbeatRequest(worker_id="x")),
                ("Leave", pb.LeaveRequest(worker_id="x")),
                ("ReportFailure", pb.ReportFailureRequest(worker_id="x")),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    control(method, request)
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            asking = reflection_pb2_grpc.ServerReflectionStub(control.channel).ServerReflectionInfo
            with pytest.raises(grpc.RpcError) as caught:
                list(asking(iter([listing]), timeout=5, metadata=control.metadata))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with raw_worker(service.workers[0], token) as worker:
            for call in (
                lambda worker=worker: worker.table(Ticket(plan, 0, 1, (0, 1))),
                lambda worker=worker: list(worker.client.do_action(flight.Action(PING, b""), worker.options)),
                lambda worker=worker: list(worker.client.list_flights(options=worker.options)),
                lambda worker=worker: worker.client.get_flight_info(
                    flight.FlightDescriptor.for_command(b"x"), worker.options
                ),
            ):
                with pytest.raises(flight.FlightUnauthenticatedError):
                    call()


def test_bad_tickets_are_refused_and_the_worker_lives(plan, worker):
    good = json.loads(Ticket(plan, 0, 1, (0, 1)).to_bytes())
    of_plan = good["plan"]
    part = of_plan["parts"][0]
    bad = [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[" * 3000,
        b"x" * (MAX_TICKET_BYTES + 1),
        *(
            json.dumps({**good, **change}).encode()
            for change in (
                {"first": -1},
                {"last": 0},
                {"last": 10**9},
                {"first": 2**62 - 1, "last": 2**62},
                {"slots": [0, GLOBAL_BATCH + 1]},
                {"slots": [True, 2]},
                {"v": 1},
                {"member": 1},
                {"members": ["b", "a"]},
                {"members": ["a", "a"]},
                {"members": [str(number).zfill(9) for number in range(257)]},
                {"extra": 1},
                *(
                    {"plan": {**of_plan, **plan_change}}
                    for plan_change in (
                        {"dataset_digest": "other"},
                        {"seq_len": 10**9},
                        {"seq_len": 31},
                        {"version": 9},
                        {"window_shards": 2**61},
                        {"rows": "document"},
                        {"loss_masks": True},
                        {"num_labels": 3},
                        {"parts": [{**part, "num_rows": 1}]},
                        {"parts": of_plan["parts"][::-1]},
                        {"parts": [{**part, "rows_per_shard": 2**31}, *of_plan["parts"][1:]]},
                        {"segments": []},
                    )
                ),
            )
        ),
    ]
    for ticket in bad:
        with pytest.raises(flight.FlightServerError) as caught:
            worker.table(ticket)
        assert json.loads(caught.value.extra_info)["kind"] in ("ValueError", "CursorMismatchError")
    with pytest.raises(flight.FlightServerError, match="is none of this worker's"):
        list(worker.client.do_action(flight.Action("other", b""), worker.options))
    assert list(worker.client.do_action(flight.Action(PING, b""), worker.options)) == []
    assert worker.table(Ticket(plan, 0, 1, (0, 1))).num_rows == 1


def test_one_control_plane_makes_the_plans_of_many_runs(written, control):
    digest = written.manifest.digest
    orders = [small_order(), replace(small_order(), seed=8), small_order(seq_len=64, global_batch=3)]
    for order in orders * 2:
        for split in ("train", "eval"):
            request = pb.GetPlanRequest(split=split, order_json=order.to_json(), dataset_digest=digest)
            assert control("GetPlan", request).plan_json == make_plan(written.manifest, split, order).to_json()

    def changed(**fields):
        return json.dumps({**asdict(orders[0]), **fields})

    for code, change in {
        grpc.StatusCode.FAILED_PRECONDITION: [
            {"dataset_digest": "other"},
            {"order_json": changed(weights=[[0, [["source0", 1.0], ["elsewhere", 1.0]]]])},
        ],
        grpc.StatusCode.INVALID_ARGUMENT: [
            {"split": "test"},
            {"order_json": ""},
            {"order_json": "[" * 60_000},
            {"order_json": " " * 70_000},
            {"order_json": changed(seed=-1)},
            {"order_json": changed(seq_len=0)},
            {"order_json": changed(temperature=0.0)},
            {"order_json": changed(temperature=float("nan"))},
            {"order_json": changed(weights=[[0, [["source0", -1.0], ["source1", 0.5]]]])},
            {"order_json": changed(weights=[[0, [["source0", float("inf")], ["source1", 0.5]]]])},
            {"order_json": changed(extra=1)},
        ],
    }.items():
        for one in change:
            good = {"split": "train", "order_json": orders[0].to_json(), "dataset_digest": digest}
            with pytest.raises(grpc.RpcError) as caught:
                control("GetPlan", pb.GetPlanRequest(**{**good, **one}))
            assert caught.value.code() == code, one


def test_a_plan_of_another_generation_is_asked_of_another_service(written):
    with pytest.raises(ConfigError, match="0123"):
        ControlServer(written.uri, TOKEN, dataset_digest="0123").start()
    with pytest.raises(ConfigError, match="0123"):
        DataWorker(written.uri, "127.0.0.1:1", TOKEN, dataset_digest="0123").start()


def health_of(channel, name):
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status


def test_health_is_told_and_watched_by_name_without_the_token(written):
    status = health_pb2.HealthCheckResponse
    seen = []
    control = ControlServer(written.uri, TOKEN)
    address = control.start()
    try:
        with raw_control(address, None) as raw:
            assert health_of(raw.channel, "") == status.SERVING
            assert health_of(raw.channel, "stormjib.data.v2.DataControl") == status.SERVING
            assert health_of(raw.channel, WORKERS_HEALTH) == status.NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                health_of(raw.channel, "elsewhere")
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            request = health_pb2.HealthCheckRequest(service=WORKERS_HEALTH)
            watch = health_pb2_grpc.HealthStub(raw.channel).Watch(request, timeout=30)

            def follow():
                try:
                    seen.extend(answer.status for answer in watch)
                except grpc.RpcError:
                    pass

            thread = threading.Thread(target=follow)
            thread.start()
            worker = DataWorker(written.uri, address, TOKEN)
            worker.start()
            until(lambda: len(seen) == 2, "the worker is seen")
            worker.stop()
            until(lambda: len(seen) == 3, "the worker's end is seen")
            watch.cancel()
            thread.join(5)
    finally:
        control.stop()
    assert seen[:3] == [status.NOT_SERVING, status.SERVING, status.NOT_SERVING]


def test_reflection_describes_the_calls(control):
    stub = reflection_pb2_grpc.ServerReflectionStub(control.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="stormjib.data.v2.DataControl"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests), timeout=5, metadata=control.metadata)
    assert {"stormjib.data.v2.DataControl", "grpc.health.v1.Health"} <= {
        one.name for one in listed.list_services_response.service
    }
    assert any(b"GetPlanRequest" in one for one in described.file_descriptor_response.file_descriptor_proto)


def scrape(address, token=TOKEN, path="/metrics"):
    request = urllib.request.Request(f"http://{address}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=5) as answer:
        return answer.read().decode()


def samples(text):
    return {
        (one.name, *sorted(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_prometheus_reads_the_metrics_of_both_with_the_token_only(written, plan):
    control = ControlServer(written.uri, TOKEN, metrics_port=0)
    address = control.start()
    data_worker = DataWorker(written.uri, address, TOKEN, metrics_port=0)
    try:
        with raw_worker(data_worker.start()) as worker:
            worker.table(Ticket(plan, 0, 2, (0, GLOBAL_BATCH)))
            worker.table(Ticket(plan, 2, 3, (0, 3)))
            with pytest.raises(flight.FlightServerError):
                worker.table(b"")
        found = samples(scrape(data_worker.metrics_address))
        assert found["stormjib_data_worker_tickets_total",] == 2
        assert found["stormjib_data_worker_rows_total",] == 2 * GLOBAL_BATCH + 3
        assert found["stormjib_data_worker_sent_bytes_total",] > (2 * GLOBAL_BATCH + 3) * 33 * 2
        assert found["stormjib_data_worker_errors_total",] == 1
        assert found["stormjib_data_worker_read_shards_total",] > 1
        assert found["stormjib_data_worker_read_bytes_total",] > 4096
        assert found["stormjib_data_worker_answer_seconds_count",] == 2
        assert 0 < found["stormjib_data_worker_answer_seconds_sum",] < 20
        with raw_control(address) as raw:
            request = pb.GetPlanRequest(
                split="train", order_json=small_order().to_json(), dataset_digest=written.manifest.digest
            )
            raw("GetPlan", request)
            raw("ReportFailure", pb.ReportFailureRequest(worker_id=data_worker.worker_id, reason="a test"))
        with raw_control(address, "wrong") as raw, pytest.raises(grpc.RpcError):
            raw("Stats", pb.StatsRequest())
        found = samples(scrape(control.metrics_address))
        assert found["stormjib_data_control_plans_total",] == 1
        assert found["stormjib_data_control_failures_total",] == 1
        assert found["stormjib_data_control_refused_total",] == 1
        by_state = [found["stormjib_data_control_workers", ("state", state)] for state in ("alive", "suspect")]
        assert sum(by_state) == 1
        for where in (control.metrics_address, data_worker.metrics_address):
            assert scrape(where, None, "/healthz") == "ok\n"
            for token, path, code in ((None, "/metrics", 401), ("wrong", "/metrics", 401), (TOKEN, "/other", 404)):
                with pytest.raises(urllib.error.HTTPError) as caught:
                    scrape(where, token, path)
                assert caught.value.code == code
                caught.value.close()
    finally:
        data_worker.stop()
        control.stop()


def connections_to(address):
    """Established TCP connections of this process to an address."""
    port = int(address.rpartition(":")[2])
    found = psutil.Process().net_connections("tcp")
    return [one for one in found if one.raddr and one.raddr.port == port and one.status == psutil.CONN_ESTABLISHED]


def test_a_worker_that_does_not_belong_is_refused_and_keeps_nothing_open(written, tmp_path):
    other = stream_dataset(tmp_path / "d", seed=2)
    control = ControlServer(written.uri, TOKEN)
    address = control.start()
    try:
        for worker, reason in (
            (DataWorker(other.uri, address, TOKEN), other.manifest.digest),
            (DataWorker(written.uri, address, "another-token"), "UNAUTHENTICATED"),
            (DataWorker(written.uri, f"127.0.0.1:1,{address}", "another-token"), "UNAUTHENTICATED"),
        ):
            with pytest.raises(ConfigError, match="cannot join") as caught:
                worker.start()
            assert reason in str(caught.value)
            assert caught.value.exit_code == 2
            until(lambda: not connections_to(address), "the connections to the control plane are closed")
    finally:
        control.stop()


def members_of(control):
    return {one.worker_id: one.alive for one in control("Members", pb.MembersRequest()).members}


def test_workers_join_every_control_plane_come_back_to_a_new_one_and_leave(written):
    controls = [ControlServer(written.uri, TOKEN) for _ in range(2)]
    addresses = [control.start() for control in controls]
    worker = DataWorker(written.uri, ",".join(addresses), TOKEN)
    worker.start()
    try:
        with raw_control(addresses[0]) as first, raw_control(addresses[1]) as second:
            assert members_of(first) == members_of(second) == {worker.worker_id: True}
            before = first("Members", pb.MembersRequest())
            first("ReportFailure", pb.ReportFailureRequest(worker_id=worker.worker_id, reason="a test"))
            failed = first("Members", pb.MembersRequest())
            assert [one.alive for one in failed.members] == [False]
            assert failed.version > before.version
            until(lambda: members_of(first) == {worker.worker_id: True}, "the next heartbeat")

            controls[0].stop()
            port = int(addresses[0].rpartition(":")[2])
            controls[0] = ControlServer(written.uri, TOKEN, port=port)
            controls[0].start()
            again = first("Members", pb.MembersRequest())
            assert again.epoch != before.epoch
            assert not again.settled
            until(lambda: members_of(first) == {worker.worker_id: True}, "the worker registers again")
            until(lambda: first("Members", pb.MembersRequest()).settled, "the control plane is settled")

            worker.stop()
            assert members_of(first) == members_of(second) == {}
    finally:
        worker.stop()
        for control in controls:
            control.stop()


def test_ports_that_are_taken_are_named(written):
    control = ControlServer(written.uri, TOKEN)
    port = int(control.start().rpartition(":")[2])
    try:
        for taken in (
            ControlServer(written.uri, TOKEN, port=port),
            ControlServer(written.uri, TOKEN, metrics_port=port),
            DataWorker(written.uri, f"127.0.0.1:{port}", TOKEN, port=port),
            DataWorker(written.uri, f"127.0.0.1:{port}", TOKEN, metrics_port=port),
        ):
            with pytest.raises(OSError, match="listen|in use"):
                taken.start()
    finally:
        control.stop()


def test_membership_knows_the_living():
    now = [100.0]
    members = Membership(clock=lambda: now[0], epoch=7)
    for number in (2, 0, 1):
        members.register(f"w{number}", f"host{number}:1")
    first = members.view()
    assert (first.epoch, first.version, first.settled) == (7, 1, False)
    assert first.members == tuple((f"w{number}", f"host{number}:1", True) for number in range(3))
    assert members.view() == first
    assert not members.report_failure("unknown")
    now[0] += 0.5
    assert members.report_failure("w1")
    assert [alive for _, _, alive in members.view().members] == [True, False, True]
    assert members.view().version == 2
    now[0] += 0.5
    assert members.heartbeat("w1", WorkerCounters(rows=3))
    assert [alive for _, _, alive in members.view().members] == [True, True, True]
    assert members.view().version == 3
    now[0] = 100.0 + SETTLE_S
    assert members.view().settled
    now[0] = 101.0 + SUSPECT_AFTER_S
    assert members.heartbeat("w2", WorkerCounters())
    assert [alive for _, _, alive in members.view().members] == [False, True, True]
    assert [(state.failures, state.counters.rows) for state, _, _ in members.states()] == [(0, 0), (1, 3), (0, 0)]
    members.register("again", "host0:1")
    assert [key for key, _, _ in members.view().members] == ["again", "w1", "w2"]
    members.leave("w1")
    members.leave("unknown")
    assert not members.heartbeat("w1", WorkerCounters())
    now[0] += FORGET_AFTER_S + 1
    assert members.view().members == ()


def test_membership_is_bounded():
    members = Membership(clock=lambda: 0.0)
    for number in range(10_000):
        members.register(f"w{number}", f"host{number}:1")
    with pytest.raises(ValueError, match="10000"):
        members.register("one more", "host:1")
    members.register("w5", "host:1")


def test_many_runs_read_at_once(written, service):
    """Tickets of several orders from several threads, on one worker."""
    orders = [OrderSpec(seed, 32, GLOBAL_BATCH, 3) for seed in range(4)]
    plans = [make_plan(written.manifest, "train", order) for order in orders]
    problems = []

    def read(number):
        draw = random.Random(number)
        try:
            with raw_worker(service.workers[0]) as worker:
                for _ in range(15):
                    plan, first = draw.choice(plans), draw.randrange(200)
                    ticket = Ticket(plan, first, first + 2, (0, 4))
                    assert_rows(worker.table(ticket), written, plan, ticket)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
