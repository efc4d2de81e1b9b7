"""What callers without a token can make the data service hold is bounded; a start that failed leaves nothing behind."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from data_service import metrics as metrics_module
from data_service.control import WORKERS_HEALTH, ControlServer
from data_service.health import MAX_WATCHES, BoundedHealth
from tests.helpers.data_runs import TOKEN
from tests.helpers.flight_calls import raw_control
from tests.helpers.waiting import until
from tests.helpers.written_datasets import stream_dataset
from tests.unit.test_data_control import health_of, scrape


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("stream") / "d")


def watch(channel, name=""):
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=name), timeout=60)


def test_a_control_plane_that_got_its_port_at_the_second_start_serves(written):
    first = ControlServer(written.uri, TOKEN)
    address = first.start()
    second = ControlServer(written.uri, TOKEN, port=int(address.rpartition(":")[2]))
    try:
        with pytest.raises(OSError, match="listen"):
            second.start()
        first.stop()
        assert second.start() == address
        with raw_control(address, None) as raw:
            assert health_of(raw.channel, "") == health_pb2.HealthCheckResponse.SERVING
            assert health_of(raw.channel, WORKERS_HEALTH) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert second._watch.is_alive(), "nobody tells the workers' health"
    finally:
        first.stop()
        second.stop()


def test_callers_that_leave_while_health_changes_stop_nothing():
    told = BoundedHealth()
    server = grpc.server(ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(told, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    status = health_pb2.HealthCheckResponse
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for _ in range(10):
                told.set("", status.SERVING)
                held = [watch(channel) for _ in range(MAX_WATCHES // 2)]
                assert {next(one).status for one in held} == {status.SERVING}
                for one in held:
                    one.cancel()
                change = threading.Thread(target=told.set, args=("", status.NOT_SERVING), daemon=True)
                change.start()
                change.join(20)
                assert not change.is_alive(), "the change of health waits for callers that left"
                assert health_of(channel, "") == status.NOT_SERVING
    finally:
        server.stop(0)


def test_only_so_many_watch_health_at_one_time(written):
    control = ControlServer(written.uri, TOKEN)
    address = control.start()
    status = health_pb2.HealthCheckResponse
    try:
        with raw_control(address, None) as raw:
            held = [watch(raw.channel) for _ in range(MAX_WATCHES)]
            assert [next(one).status for one in held] == [status.SERVING] * MAX_WATCHES
            for _ in range(20):
                with pytest.raises(grpc.RpcError) as caught:
                    next(watch(raw.channel))
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert health_of(raw.channel, "") == status.SERVING
            for one in held[:5]:
                one.cancel()

            def room():
                with contextlib.suppress(grpc.RpcError):
                    again = watch(raw.channel)
                    held.append(again)
                    return next(again).status == status.SERVING
                return False

            until(room, "those who left make room")
            with pytest.raises(grpc.RpcError) as caught:
                next(watch(raw.channel, "elsewhere"))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            for one in held:
                one.cancel()
    finally:
        control.stop()


def test_metrics_hold_few_connections_and_none_for_long(written, monkeypatch):
    monkeypatch.setattr(metrics_module, "_REQUEST_TIMEOUT_S", 1.5)
    control = ControlServer(written.uri, TOKEN, metrics_port=0)
    control.start()
    host, _, port = control.metrics_address.rpartition(":")

    def knock():
        return socket.create_connection((host, int(port)), timeout=5)

    try:
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(knock()) for _ in range(16)]
            for one in silent:
                one.sendall(b"GET /healthz HTTP/1.1\r\n")
            until(lambda: len(control._metrics_server._server._open) == 16, "all are accepted")
            refused = stack.enter_context(knock())
            began = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                assert refused.recv(1) == b""
            assert time.monotonic() - began < 1.0, "the seventeenth waits"
            for second in range(12):  # one that drips does not hold its place either
                with contextlib.suppress(OSError):
                    silent[0].sendall(b"x: %d\r\n" % second)
                time.sleep(0.25)
            until(lambda: not control._metrics_server._server._open, "those that take long are cut")
            assert scrape(control.metrics_address, None, "/healthz") == "ok\n"
    finally:
        control.stop()
