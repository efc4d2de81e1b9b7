"""The control plane: a gRPC server that knows which workers live, what the plan is and where to read.

It keeps membership in memory and nothing else: workers register again when it restarts, plans follow from the manifest,
and no progress is stored. Every call but `grpc.health.v1` needs the bearer token.

Owns membership and routing. Refuses to carry batches.
"""

import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from data_service import control_pb2 as pb
from data_service import control_pb2_grpc as pb_grpc
from data_service.config import DataConfig
from data_service.errors import ConfigError
from data_service.plan import make_plan
from data_service.shards import DatasetManifest, read_manifest

__all__ = ["CHANNEL_OPTIONS", "ControlServer", "Membership", "bearer_metadata"]

_LOG = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)
"""Of every channel to a control plane: quick to reconnect, and straight to its address whatever proxy is set."""
HEARTBEAT_S = 1.0
SUSPECT_AFTER_S = 5.0
FORGET_AFTER_S = 600.0
_MAX_WORKERS = 10_000
_HEALTH_PREFIX = "/grpc.health.v1.Health/"


def bearer_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that a caller sends with each call."""
    return (("authorization", f"Bearer {token}"),)


@dataclass
class _Member:
    worker_id: str
    address: str
    last_heartbeat: float
    failed_at: float = float("-inf")
    failures: int = 0
    counters: pb.WorkerCounters = field(default_factory=pb.WorkerCounters)


class Membership:
    """Which workers serve, and in which order to try them. Thread-safe; the clock is passed in."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._members: dict[str, _Member] = {}

    def register(self, worker_id: str, address: str) -> None:
        """Add a worker; one that registers again at another address replaces itself."""
        with self._lock:
            now = self._clock()
            stale = [key for key, member in self._members.items() if now - member.last_heartbeat > FORGET_AFTER_S]
            for key in stale + [key for key, member in self._members.items() if member.address == address]:
                self._members.pop(key, None)
            if len(self._members) >= _MAX_WORKERS:
                raise ValueError(f"{_MAX_WORKERS} workers are registered already.")
            self._members[worker_id] = _Member(worker_id, address, now)

    def heartbeat(self, worker_id: str, counters: pb.WorkerCounters) -> bool:
        """Note that a worker lives; False when it is not known and must register."""
        with self._lock:
            member = self._members.get(worker_id)
            if member is None:
                return False
            member.last_heartbeat = self._clock()
            member.counters = counters
            return True

    def report_failure(self, address: str) -> None:
        """Try this worker last until it sends another heartbeat."""
        with self._lock:
            for member in self._members.values():
                if member.address == address:
                    member.failed_at = self._clock()
                    member.failures += 1

    def _suspect(self, member: _Member, now: float) -> bool:
        return now - member.last_heartbeat > SUSPECT_AFTER_S or member.failed_at >= member.last_heartbeat

    def route(self, key: str, exclude: Iterable[str]) -> list[str]:
        """Addresses to try in turn: live workers in an order that `key` decides (rendezvous hashing), then suspects."""
        left_out = frozenset(exclude)
        with self._lock:
            now = self._clock()
            candidates = [
                (
                    self._suspect(member, now),
                    hashlib.blake2b(f"{key}/{member.address}".encode(), digest_size=8).digest(),
                    member.address,
                )
                for member in self._members.values()
                if member.address not in left_out
            ]
        return [address for _, _, address in sorted(candidates)]

    def stats(self) -> list[pb.WorkerStats]:
        """One entry per worker, sorted by address."""
        with self._lock:
            now = self._clock()
            return [
                pb.WorkerStats(
                    worker_id=member.worker_id,
                    address=member.address,
                    alive=not self._suspect(member, now),
                    seconds_since_heartbeat=now - member.last_heartbeat,
                    failures=member.failures,
                    counters=member.counters,
                )
                for member in sorted(self._members.values(), key=lambda member: member.address)
            ]


class _TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token, health checks excepted (probes of an orchestrator carry none)."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

        def refuse(_request: object, context: Any) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is missing or wrong")

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        if handler_call_details.method.startswith(_HEALTH_PREFIX):
            return continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self._expected):
            return self._refusal
        return continuation(handler_call_details)


class _Servicer(pb_grpc.DataControlServicer):
    """The calls of `control.proto`."""

    def __init__(
        self, manifest: DatasetManifest, seed: int, config: DataConfig, global_batch: int, membership: Membership
    ) -> None:
        self._manifest = manifest
        self._seed = seed
        self._config = config
        self._global_batch = global_batch
        self._membership = membership

    def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        if not request.worker_id or not request.address or len(request.worker_id) + len(request.address) > 1000:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "worker_id and address are needed, at most 1000 bytes")
        if request.dataset_digest != self._manifest.digest:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the worker serves dataset {request.dataset_digest[:64]}, this is {self._manifest.digest}",
            )
        try:
            self._membership.register(request.worker_id, request.address)
        except ValueError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return pb.RegisterResponse(heartbeat_s=HEARTBEAT_S)

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        return pb.HeartbeatResponse(known=self._membership.heartbeat(request.worker_id, request.counters))

    def GetPlan(self, request: pb.GetPlanRequest, context: Any) -> pb.GetPlanResponse:
        if request.split not in ("train", "eval"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "split is neither train nor eval")
        try:
            plan = make_plan(
                self._manifest,
                cast('Literal["train", "eval"]', request.split),
                self._seed,
                self._config.seq_len,
                self._global_batch,
                self._config.shuffle_window_shards,
            )
        except ConfigError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.GetPlanResponse(plan_json=plan.to_json())

    def Route(self, request: pb.RouteRequest, context: Any) -> pb.RouteResponse:
        return pb.RouteResponse(addresses=self._membership.route(request.client_id, request.exclude))

    def ReportFailure(self, request: pb.ReportFailureRequest, context: Any) -> pb.ReportFailureResponse:
        _LOG.warning("a client gave up data worker %s: %s", request.address[:200], request.reason[:500])
        self._membership.report_failure(request.address)
        return pb.ReportFailureResponse()

    def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        return pb.StatsResponse(dataset_digest=self._manifest.digest, workers=self._membership.stats())


class ControlServer:
    """The control plane of one dataset and one run."""

    def __init__(
        self,
        dataset_uri: str,
        seed: int,
        config: DataConfig,
        global_batch: int,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._dataset_uri = dataset_uri
        self._seed = seed
        self._config = config
        self._global_batch = global_batch
        self._token = token
        self._host = host
        self._port = port
        self._server: Any = None
        self._pool: ThreadPoolExecutor | None = None
        self._health = health.HealthServicer()

    def start(self) -> str:
        """Serve, and return `host:port`.

        Raises:
            ConfigError: when there is no dataset.
            OSError: when the port is taken.
        """
        manifest = read_manifest(self._dataset_uri)
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="data-control")
        self._server = grpc.server(
            self._pool,
            interceptors=(_TokenInterceptor(self._token),),
            options=(("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 20)),
        )
        servicer = _Servicer(manifest, self._seed, self._config, self._global_batch, Membership())
        pb_grpc.add_DataControlServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise OSError(f"the control plane cannot listen on {self._host}:{self._port}: {error}.") from error
        self._server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return f"{self._host}:{port}"

    def stop(self) -> None:
        """Stop serving; calls in flight get half a second."""
        self._health.enter_graceful_shutdown()
        if self._server is not None:
            self._server.stop(0.5).wait()
            self._server = None
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None
