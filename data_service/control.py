"""The control plane: a gRPC server that knows which workers live and makes plans.

It keeps membership in memory and nothing else: workers register again when it restarts, plans follow from the manifest
and from what the caller asks for, and no progress is stored. So one control plane serves any number of runs over one
dataset. Every call but `grpc.health.v1` needs the bearer token; server reflection is one of those calls.

Health is told, and may be watched, for `""` and `stormjib.data.v2.DataControl`, which serve, and for
`stormjib.data.v2.DataWorkers`, which serves while at least one data worker is alive.

Owns the calls of `control.proto`. Refuses to carry batches.
"""

import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from data_service import control_pb2 as pb
from data_service import control_pb2_grpc as pb_grpc
from data_service.bearer import BearerToken
from data_service.errors import ConfigError, EmptySplitError
from data_service.health import BoundedHealth
from data_service.manifest import SPLITS, DatasetManifest, read_manifest
from data_service.membership import HEARTBEAT_S, Membership
from data_service.metrics import ControlMetrics, MetricsServer, WorkerCounters
from data_service.plan import OrderSpec, Split
from data_service.planning import make_plan

__all__ = ["MAX_ORDER_BYTES", "WORKERS_HEALTH", "ControlServer"]

_LOG = logging.getLogger(__name__)

MAX_ORDER_BYTES = 65_536
_MAX_MESSAGE_BYTES = 1 << 18
_MAX_CALLS = 4096
"""Calls at one time; more are refused. Watched health is bounded by `health.MAX_WATCHES`: grpcio does not count it."""
_MAX_PLANS = 64
_HEALTH_EVERY_S = 0.5
_HEALTH_PREFIX = "/grpc.health.v1.Health/"
_SERVICE = pb.DESCRIPTOR.services_by_name["DataControl"].full_name
WORKERS_HEALTH = _SERVICE.replace("DataControl", "DataWorkers")
_WORKER_ID = re.compile(r"[\x21-\x7e]{1,64}")
_ADDRESS = re.compile(r"[A-Za-z0-9._:\[\]-]{1,253}:[0-9]{1,5}")


def _parsing_itself(handler: Any) -> Any:
    """A handler that parses what it is sent itself, and says INVALID_ARGUMENT to what is no such message.

    grpcio 1.85 answers such bytes with INTERNAL, and loses about 16 KiB each time.
    """
    if handler is None:
        return None
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    name = next(kind for kind in kinds if getattr(handler, kind) is not None)
    behaviour, parse = getattr(handler, name), handler.request_deserializer

    def message(data: bytes, context: Any) -> Any:
        try:
            return parse(data)
        except DecodeError:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this is no such message")

    @wraps(behaviour)  # its attributes tell grpcio how to call it
    def parsed(sent: Any, context: Any, *rest: Any, **named: Any) -> Any:
        if handler.request_streaming:
            return behaviour((message(data, context) for data in sent), context, *rest, **named)
        return behaviour(message(sent, context), context, *rest, **named)

    return handler._replace(request_deserializer=None, **{name: parsed})


class _TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token, health checks excepted (probes of an orchestrator carry none)."""

    def __init__(self, token: str, metrics: ControlMetrics) -> None:
        self._token = BearerToken(token)

        def refuse(_request: object, context: Any) -> None:
            metrics.add(refused=1)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is missing or wrong")

        self._refuse_unary = grpc.unary_unary_rpc_method_handler(refuse)
        self._refuse_stream = grpc.stream_stream_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        handler = _parsing_itself(continuation(handler_call_details))
        if handler_call_details.method.startswith(_HEALTH_PREFIX):
            return handler
        if self._token.accepts(dict(handler_call_details.invocation_metadata).get("authorization")):
            return handler
        return self._refuse_stream if handler is not None and handler.request_streaming else self._refuse_unary


class _Servicer(pb_grpc.DataControlServicer):
    """The calls of `control.proto`."""

    def __init__(self, manifest: DatasetManifest, membership: Membership, metrics: ControlMetrics) -> None:
        self._manifest = manifest
        self._membership = membership
        self._metrics = metrics
        self._plan_json = lru_cache(_MAX_PLANS)(self._make_plan_json)

    def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        if not _WORKER_ID.fullmatch(request.worker_id) or not _ADDRESS.fullmatch(request.address):
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "worker_id (1 to 64 visible characters) and address (host:port)"
            )
        self._check_dataset(request.dataset_digest, "the worker serves", context)
        try:
            self._membership.register(request.worker_id, request.address)
        except ValueError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return pb.RegisterResponse(heartbeat_s=HEARTBEAT_S)

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        told = request.counters
        counters = WorkerCounters(
            told.tickets, told.rows, told.bytes_sent, told.shards_read, told.bytes_read, told.errors
        )
        return pb.HeartbeatResponse(known=self._membership.heartbeat(request.worker_id, counters))

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        self._membership.leave(request.worker_id)
        return pb.LeaveResponse()

    def Members(self, request: pb.MembersRequest, context: Any) -> pb.MembersResponse:
        view = self._membership.view()
        return pb.MembersResponse(
            epoch=view.epoch,
            version=view.version,
            settled=view.settled,
            members=[pb.Member(worker_id=key, address=address, alive=alive) for key, address, alive in view.members],
        )

    def GetPlan(self, request: pb.GetPlanRequest, context: Any) -> pb.GetPlanResponse:
        if request.split not in SPLITS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "split is neither train nor eval")
        if len(request.order_json) > MAX_ORDER_BYTES:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"order_json has more than {MAX_ORDER_BYTES} characters")
        self._check_dataset(request.dataset_digest, "the run reads", context)
        try:
            plan_json = self._plan_json(request.split, request.order_json)
        except EmptySplitError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except ConfigError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except (ValueError, ArithmeticError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:500])
        self._metrics.add(plans=1)
        return pb.GetPlanResponse(plan_json=plan_json)

    def ReportFailure(self, request: pb.ReportFailureRequest, context: Any) -> pb.ReportFailureResponse:
        if self._membership.report_failure(request.worker_id):
            self._metrics.add(failures=1)
            _LOG.warning("a client gave up data worker %s: %.500r", request.worker_id, request.reason)
        return pb.ReportFailureResponse()

    def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        return pb.StatsResponse(
            dataset_digest=self._manifest.digest,
            workers=[
                pb.WorkerStats(
                    worker_id=state.worker_id,
                    address=state.address,
                    alive=alive,
                    seconds_since_heartbeat=since_s,
                    failures=state.failures,
                    counters=pb.WorkerCounters(**vars(state.counters)),
                )
                for state, alive, since_s in self._membership.states()
            ],
        )

    def _make_plan_json(self, split: str, order_json: str) -> str:
        return make_plan(self._manifest, cast(Split, split), OrderSpec.from_json(order_json)).to_json()

    def _check_dataset(self, digest: str, who: str, context: Any) -> None:
        if digest != self._manifest.digest:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{who} dataset {digest[:64]!r}, this service has {self._manifest.digest!r}: start one with "
                "that --digest, or name the service of that dataset",
            )


class ControlServer:
    """The control plane of one dataset."""

    def __init__(
        self,
        dataset_uri: str,
        token: str,
        *,
        dataset_digest: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        metrics_port: int | range | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            dataset_uri: the prepared dataset.
            token: what callers must show.
            dataset_digest: which of its generations; the newest by default.
            host: where to listen; callers reach it there.
            port: 0 takes a free one.
            metrics_port: of Prometheus metrics; 0 takes a free one, a range its first free one, None serves none.
        """
        self._dataset_uri = dataset_uri
        self._token = token
        self._dataset_digest = dataset_digest
        self._host = host
        self._port = port
        self._metrics_port = metrics_port
        self._server: Any = None
        self._pool: ThreadPoolExecutor | None = None
        self._health = BoundedHealth()
        self._stopping = threading.Event()
        self._watch: threading.Thread | None = None
        self._metrics_server: MetricsServer | None = None

    @property
    def metrics_address(self) -> str | None:
        """`host:port` of the metrics while they are served."""
        return None if self._metrics_server is None else self._metrics_server.address

    def start(self) -> str:
        """Serve, and return `host:port`.

        Raises:
            ConfigError: when there is no dataset.
            OSError: when a port is taken.
        """
        manifest = read_manifest(self._dataset_uri, self._dataset_digest)
        self._health, self._stopping = BoundedHealth(), threading.Event()  # a start that failed has ended those it had
        membership = Membership()

        def count() -> tuple[int, int]:
            alive = [one[2] for one in membership.view().members]
            return sum(alive), len(alive) - sum(alive)

        metrics = ControlMetrics(count)
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="data-control")
        self._server = grpc.server(
            self._pool,
            interceptors=(_TokenInterceptor(self._token, metrics),),
            options=(("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        servicer = _Servicer(manifest, membership, metrics)
        pb_grpc.add_DataControlServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        try:
            port = self._server.add_insecure_port(f"{self._host}:{self._port}")
            if self._metrics_port is not None:
                self._metrics_server = MetricsServer(metrics.registry, self._token, self._host, self._metrics_port)
        except (RuntimeError, OSError) as error:
            self.stop()
            raise OSError(f"the control plane cannot listen on {self._host}:{self._port}: {error}.") from error
        self._server.start()
        for name in ("", _SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._health.set(WORKERS_HEALTH, health_pb2.HealthCheckResponse.NOT_SERVING)
        told = (count, self._health, self._stopping)
        self._watch = threading.Thread(target=_tell_health, args=told, name="data-health", daemon=True)
        self._watch.start()
        return f"{self._host}:{port}"

    def stop(self) -> None:
        """Stop serving; calls in flight get half a second. May be called again."""
        self._stopping.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        self._health.enter_graceful_shutdown()
        if self._metrics_server is not None:
            self._metrics_server.stop()
            self._metrics_server = None
        if self._server is not None:
            self._server.stop(0.5).wait()
            self._server = None
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None


def _tell_health(count: Callable[[], tuple[int, int]], told: BoundedHealth, stopping: threading.Event) -> None:
    """Set the workers' health when it changes."""
    before = False
    while not stopping.wait(_HEALTH_EVERY_S):
        now = count()[0] > 0
        if now != before:
            status = health_pb2.HealthCheckResponse
            told.set(WORKERS_HEALTH, status.SERVING if now else status.NOT_SERVING)
            before = now
