"""The control plane over real gRPC: plans, health, reflection, metrics, and the workers that join it."""

import json
import threading
import urllib.error
import urllib.request
from dataclasses import asdict, replace

import grpc
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
from data_service.planning import make_plan
from data_service.server import DataWorker
from data_service.ticket import Ticket
from tests.helpers.data_runs import GLOBAL_BATCH, TOKEN, small_order
from tests.helpers.flight_calls import raw_control, raw_worker
from tests.helpers.waiting import until
from tests.helpers.written_datasets import stream_dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("stream") / "d")


@pytest.fixture(scope="module")
def plan(written):
    return make_plan(written.manifest, "train", small_order())


@pytest.fixture
def control(written):
    server = ControlServer(written.uri, TOKEN)
    try:
        with raw_control(server.start()) as raw:
            yield raw
    finally:
        server.stop()


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
