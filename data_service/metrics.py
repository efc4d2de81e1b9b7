"""What the data service counts: declared here, told to the control plane in heartbeats, and served to Prometheus.

    stormjib_data_worker_tickets_total            tickets answered
    stormjib_data_worker_rows_total               rows sent
    stormjib_data_worker_sent_bytes_total         bytes of row columns sent
    stormjib_data_worker_read_shards_total        shards read from the dataset's store
    stormjib_data_worker_read_bytes_total         bytes of them
    stormjib_data_worker_errors_total             tickets refused or failed
    stormjib_data_worker_cache_bytes              bytes of shards in the cache folder
    stormjib_data_worker_answer_seconds           histogram: from a ticket's arrival to its first message
    stormjib_data_control_workers{state}          workers by state, `alive` or `suspect`
    stormjib_data_control_plans_total             plans given out
    stormjib_data_control_failures_total          workers that clients gave up
    stormjib_data_control_refused_total           calls without the token

Owns names and meaning, and the HTTP endpoint. Refuses to answer a scrape without the token.
"""

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from data_service.bearer import BearerToken

__all__ = ["ControlMetrics", "MetricsServer", "WorkerCounters", "WorkerMetrics"]

_LOG = logging.getLogger(__name__)
_ANSWER_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_REQUEST_TIMEOUT_S = 5.0
"""A scrape takes no longer than this; then its connection is cut."""
_MAX_SCRAPES = 16
"""Connections at one time; more are closed at once."""


@dataclass
class WorkerCounters:
    """Totals of a data worker since it started."""

    tickets: int = 0
    """Tickets answered."""
    rows: int = 0
    """Rows sent."""
    bytes_sent: int = 0
    """Bytes of row columns sent."""
    shards_read: int = 0
    """Shards read from the dataset's store."""
    bytes_read: int = 0
    """Bytes of shards read from the dataset's store."""
    errors: int = 0
    """Tickets refused or failed."""


_WORKER_FAMILIES = {
    "tickets": ("stormjib_data_worker_tickets", "Tickets answered."),
    "rows": ("stormjib_data_worker_rows", "Rows sent."),
    "bytes_sent": ("stormjib_data_worker_sent_bytes", "Bytes of row columns sent."),
    "shards_read": ("stormjib_data_worker_read_shards", "Shards read from the dataset's store."),
    "bytes_read": ("stormjib_data_worker_read_bytes", "Bytes of shards read from the dataset's store."),
    "errors": ("stormjib_data_worker_errors", "Tickets refused or failed."),
}


class WorkerMetrics(Collector):
    """Counters of a data worker that several threads may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = WorkerCounters()
        self._cache_bytes = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.answer_s = Histogram(
            "stormjib_data_worker_answer_seconds",
            "From a ticket's arrival to its first message.",
            buckets=_ANSWER_BUCKETS_S,
            registry=self.registry,
        )
        self.registry.register(self)

    def add(
        self,
        *,
        tickets: int = 0,
        rows: int = 0,
        bytes_sent: int = 0,
        shards_read: int = 0,
        bytes_read: int = 0,
        errors: int = 0,
    ) -> None:
        """Add to the totals."""
        with self._lock:
            totals = self._totals
            totals.tickets += tickets
            totals.rows += rows
            totals.bytes_sent += bytes_sent
            totals.shards_read += shards_read
            totals.bytes_read += bytes_read
            totals.errors += errors

    def set_cache_bytes(self, num_bytes: int) -> None:
        """Bytes of shards in the cache folder now."""
        with self._lock:
            self._cache_bytes = num_bytes

    def totals(self) -> WorkerCounters:
        """The totals so far."""
        with self._lock:
            return WorkerCounters(**{one.name: getattr(self._totals, one.name) for one in fields(WorkerCounters)})

    def collect(self) -> Iterator[Metric]:
        """The counters as Prometheus' families."""
        totals = self.totals()
        for name, (family, text) in _WORKER_FAMILIES.items():
            yield CounterMetricFamily(family, text, value=getattr(totals, name))
        yield GaugeMetricFamily(
            "stormjib_data_worker_cache_bytes", "Bytes of shards in the cache folder.", value=self._cache_bytes
        )


class ControlMetrics(Collector):
    """Counters of a control plane that several threads may add to."""

    def __init__(self, workers: Callable[[], tuple[int, int]]) -> None:
        """Count from 0.

        Args:
            workers: tells how many are alive, and how many are not.
        """
        self._workers = workers
        self._lock = threading.Lock()
        self._plans = self._failures = self._refused = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def add(self, *, plans: int = 0, failures: int = 0, refused: int = 0) -> None:
        """Add to the totals."""
        with self._lock:
            self._plans += plans
            self._failures += failures
            self._refused += refused

    def collect(self) -> Iterator[Metric]:
        """The counters as Prometheus' families."""
        alive, suspect = self._workers()
        gauge = GaugeMetricFamily("stormjib_data_control_workers", "Data workers by state.", labels=["state"])
        gauge.add_metric(["alive"], alive)
        gauge.add_metric(["suspect"], suspect)
        yield gauge
        yield CounterMetricFamily("stormjib_data_control_plans", "Plans given out.", value=self._plans)
        yield CounterMetricFamily("stormjib_data_control_failures", "Workers clients gave up.", value=self._failures)
        yield CounterMetricFamily("stormjib_data_control_refused", "Calls without the token.", value=self._refused)


class _HttpServer(ThreadingHTTPServer):
    """Answers scrapes, few at a time and none for long, in threads that end with the process."""

    daemon_threads = True
    request_queue_size = 2 * _MAX_SCRAPES

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, token: BearerToken) -> None:
        self.registry, self.token = registry, token
        self._open: dict[socket.socket, float] = {}
        """Connections that are answered, and when they came on the monotonic clock."""
        self._open_lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without looking the host's name up, which the base class does and may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more; else the base class closes it."""
        with self._open_lock:
            if len(self._open) >= _MAX_SCRAPES:
                return False
            self._open[request] = time.monotonic()
        return True

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, and make room for another."""
        with self._open_lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut connections that take too long, which the timeout of a single read would let drip for ever."""
        with self._open_lock:
            for request, since in self._open.items():
                if time.monotonic() - since > _REQUEST_TIMEOUT_S:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away or was cut is no news; what else goes wrong in a scrape is logged."""
        _LOG.debug("a scrape from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    timeout = _REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._answer(200, b"ok\n")
        elif not self.server.token.accepts(self.headers.get("authorization")):
            self._answer(401, b"the bearer token is missing or wrong\n", ("WWW-Authenticate", "Bearer"))
        elif self.path.partition("?")[0] == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("accept", ""))
            self._answer(200, encode(self.server.registry), ("Content-Type", content_type))
        else:
            self._answer(404, b"ask for /metrics or /healthz\n")

    def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        _LOG.debug(format, *args)  # noqa: G004 - the base class gives the format


class MetricsServer:
    """`/metrics` for Prometheus behind the token, and `/healthz` for probes without one."""

    def __init__(self, registry: CollectorRegistry, token: str, host: str, port: int | range) -> None:
        """Listen at once.

        Args:
            registry: what is served.
            token: what a scrape must show.
            host: where to listen.
            port: 0 takes a free one; of several the first free one.

        Raises:
            OSError: when it is taken, or all of them.
        """
        self._server = _listen(host, range(port, port + 1) if isinstance(port, int) else port, registry, token)
        self._thread = threading.Thread(target=self._server.serve_forever, name="data-metrics", daemon=True)
        self._thread.start()
        self.address = f"{host}:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _listen(host: str, ports: range, registry: CollectorRegistry, token: str) -> _HttpServer:
    reason = None
    for port in ports:
        try:
            return _HttpServer((host, port), registry, BearerToken(token))
        except OSError as error:
            reason = error
            if error.errno != errno.EADDRINUSE:
                break
    where = ports[0] if len(ports) == 1 else f"{ports[0]} to {ports[-1]}"
    raise OSError(f"metrics cannot be served at {host}, port {where}: {reason}.") from reason
