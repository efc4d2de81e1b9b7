"""The data worker: an Arrow Flight server that answers tickets from shards.

It is stateless: a ticket holds the plan, so any worker can answer any ticket at any time, and a dead one is replaced by
asking another. Before the first message leaves, the ticket was checked and every shard that it needs was opened and
verified, so that errors become the call's status; then each message is gathered as the one before it has gone out.

Owns the Flight server and its token check. Refuses tickets that are malformed, too large or of another dataset.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from data_service import control_pb2 as pb
from data_service.bearer import BearerToken
from data_service.cache import ShardCache
from data_service.errors import StormjibError
from data_service.heartbeat import Heartbeat
from data_service.manifest import DatasetManifest, read_manifest
from data_service.memory import keep_freed_memory
from data_service.metrics import MetricsServer, WorkerMetrics
from data_service.order import BatchRows
from data_service.plan import Plan
from data_service.planning import check_plan
from data_service.prefetch import Prefetch
from data_service.rows import ShardRows
from data_service.schema import block_to_batch, wire_schema
from data_service.shards import ShardIndex
from data_service.signs import AT_HAND, NOT_AT_HAND, PING, pong
from data_service.ticket import Ticket

__all__ = ["MESSAGE_BYTES", "DataWorker", "ShardRowsFactory"]

_LOG = logging.getLogger(__name__)
MESSAGE_BYTES = 2 << 20
"""Most tokens' bytes of a message."""
_MESSAGES_AT_ONCE = 4
"""Gathered together: each shard that rows lie in costs a fixed time, and a window has many."""
_KEPT_PLANS = 64

ShardRowsFactory = Callable[[DatasetManifest, ShardIndex, ShardCache], ShardRows]
"""Makes the strategy that turns row ids into rows."""


class _Call(flight.ServerMiddleware):  # type: ignore[misc]
    """A call that passed the token check."""

    def __init__(self, *, at_hand: bool) -> None:
        self.at_hand = at_hand
        """It is to be answered only where nothing must be asked of the store for it."""


class _NotAtHand(Exception):  # noqa: N818 - no error: its caller asks again
    """A call asked for what is at hand, and something is not."""


class _TokenMiddleware(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses calls without the token."""

    def __init__(self, token: str) -> None:
        self._token = BearerToken(token)

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> _Call:
        for name, values in headers.items():
            if name.lower() == "authorization" and values and self._token.accepts(values[0]):
                return _Call(at_hand=AT_HAND in headers)
        raise flight.FlightUnauthenticatedError("the bearer token is missing or wrong")


class _FlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """DoGet of tickets."""

    def __init__(
        self,
        location: str,
        token: str,
        worker_id: str,
        manifest: DatasetManifest,
        rows: ShardRows,
        cache: ShardCache,
        prefetch: Prefetch,
        metrics: WorkerMetrics,
    ):
        super().__init__(location, middleware={"token": _TokenMiddleware(token)})
        self._worker_id = worker_id
        self._cache = cache
        self._manifest = manifest
        self._rows = rows
        self._prefetch = prefetch
        self._metrics = metrics
        self._check_plan = lru_cache(_KEPT_PLANS)(partial(check_plan, manifest=manifest))

    def do_get(self, context: Any, ticket: Any) -> Any:
        arrived = time.perf_counter()
        try:
            answer = self._answer(Ticket.from_bytes(ticket.ticket), context.get_middleware("token").at_hand)
        except _NotAtHand as error:
            extra = json.dumps({"kind": NOT_AT_HAND, "message": "a shard is not at hand"}).encode()
            raise flight.FlightServerError("a shard is not at hand", extra) from error
        except StormjibError as error:
            self._metrics.add(errors=1)
            extra = json.dumps({"kind": type(error).__name__, "message": str(error)}).encode()
            raise flight.FlightServerError(str(error), extra) from error
        except (ValueError, OverflowError) as error:
            self._metrics.add(errors=1)
            raise flight.FlightServerError(
                f"the ticket is refused: {error}", json.dumps({"kind": "ValueError", "message": str(error)}).encode()
            ) from error
        self._metrics.answer_s.observe(time.perf_counter() - arrived)
        return answer

    def do_action(self, context: Any, action: Any) -> list[Any]:
        """`ping`: see `pong`, at once, whatever else this worker does."""
        if action.type != PING:
            raise flight.FlightServerError(f"the action {action.type[:64]!r} is none of this worker's.")
        return [flight.Result(pa.py_buffer(pong(self._cache.store_silent_s)))]

    def _answer(self, ticket: Ticket, at_hand: bool) -> Any:
        plan = ticket.plan
        self._check_plan(plan)
        rows = ticket.rows()
        if at_hand and not self._prefetch.at_hand(plan, rows.row_id):
            raise _NotAtHand
        if not ticket.members or ticket.members[ticket.member] == self._worker_id:
            self._prefetch.note(ticket)  # what the owner of these shards needs next is not for others to load
        schema = wire_schema(plan, self._manifest.dtype)
        per_message = max(1, MESSAGE_BYTES // ((plan.seq_len + 1) * self._manifest.dtype.itemsize))
        count = int(rows.row_id.size)
        whole = count <= _MESSAGES_AT_ONCE * per_message
        if not whole:
            self._prefetch.fetch(plan, rows.row_id)
        messages = self._messages(plan, rows, schema, per_message)
        first = next(messages, None)
        self._metrics.add(tickets=1, rows=count)
        if whole:
            ready = [] if first is None else [first, *messages]
            return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, ready))

        def chained() -> Iterator[pa.RecordBatch]:
            yield first
            yield from messages

        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, chained()))

    def _messages(self, plan: Plan, rows: BatchRows, schema: pa.Schema, per_message: int) -> Iterator[pa.RecordBatch]:
        at_once = per_message * _MESSAGES_AT_ONCE
        for start in range(0, rows.row_id.size, at_once):
            part = slice(start, start + at_once)
            block = self._rows.read(plan, rows.row_id[part])
            gathered = block_to_batch(block, rows.batch[part], rows.slot[part], schema)
            self._metrics.add(bytes_sent=gathered.nbytes)
            for place in range(0, gathered.num_rows, per_message):
                yield gathered.slice(place, per_message)


class DataWorker:
    """One data worker."""

    def __init__(
        self,
        dataset_uri: str,
        control_address: str,
        token: str,
        *,
        dataset_digest: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        cache_dir: str | None = None,
        cache_bytes: int = 8 << 30,
        metrics_port: int | range | None = None,
        row_source: ShardRowsFactory = ShardRows,
    ) -> None:
        """Nothing is started yet.

        Args:
            dataset_uri: the prepared dataset.
            control_address: `host:port` of the control plane, or of several with commas between.
            token: what callers must show, and what this worker shows the control plane.
            dataset_digest: which of the dataset's generations; the newest by default.
            host: where to listen; clients reach it there.
            port: 0 takes a free one.
            cache_dir: where to keep shards of a remote dataset; by default below the temporary folder.
            cache_bytes: most bytes of them.
            metrics_port: of Prometheus metrics; 0 takes a free one, a range its first free one, None serves none.
            row_source: turns row ids into rows.
        """
        self._dataset_uri = dataset_uri
        self._control = control_address.split(",")
        self._token = token
        self._dataset_digest = dataset_digest
        self._host = host
        self._port = port
        self._cache_dir = cache_dir
        self._cache_bytes = cache_bytes
        self._metrics_port = metrics_port
        self._row_source = row_source
        self.worker_id = uuid.uuid4().hex
        self._metrics = WorkerMetrics()
        self._lock = threading.Lock()
        self._server: _FlightServer | None = None
        self._cache: ShardCache | None = None
        self._prefetch: Prefetch | None = None
        self._heartbeat: Heartbeat | None = None
        self._metrics_server: MetricsServer | None = None

    @property
    def metrics_address(self) -> str | None:
        """`host:port` of the metrics while they are served."""
        return None if self._metrics_server is None else self._metrics_server.address

    def start(self) -> str:
        """Serve, register with the control plane, and return `host:port`.

        Raises:
            ConfigError: when there is no dataset, or the control plane refuses this worker.
            ShardCorruptError: when the index of shards is damaged.
            OSError: when a port is taken.
        """
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> str:
        keep_freed_memory()
        manifest = read_manifest(self._dataset_uri, self._dataset_digest)
        self._cache = ShardCache(
            self._dataset_uri, cache_dir=self._cache_dir, cache_bytes=self._cache_bytes, metrics=self._metrics
        )
        index = ShardIndex(self._dataset_uri, manifest)
        rows = self._row_source(manifest, index, self._cache)
        self._prefetch = Prefetch(manifest, index, self._cache)
        location = f"grpc://{self._host}:{self._port}"
        try:
            self._server = _FlightServer(
                location, self._token, self.worker_id, manifest, rows, self._cache, self._prefetch, self._metrics
            )
        except pa.ArrowException as error:
            raise OSError(f"the data worker cannot listen on {self._host}:{self._port}: {error}.") from error
        if self._metrics_port is not None:
            self._metrics_server = MetricsServer(self._metrics.registry, self._token, self._host, self._metrics_port)
        address = f"{self._host}:{self._server.port}"
        registration = pb.RegisterRequest(worker_id=self.worker_id, address=address, dataset_digest=manifest.digest)
        heartbeat = Heartbeat(self._control, self._token, registration, self._metrics)
        heartbeat.start()
        self._heartbeat = heartbeat
        return address

    def stop(self) -> None:
        """Leave the control plane, then stop serving. May be called again."""
        with self._lock:
            heartbeat, self._heartbeat = self._heartbeat, None
            metrics, self._metrics_server = self._metrics_server, None
            server, self._server = self._server, None
            prefetch, self._prefetch = self._prefetch, None
            cache, self._cache = self._cache, None
        if heartbeat is not None:
            heartbeat.stop()
        if metrics is not None:
            metrics.stop()
        if server is not None:
            server.shutdown()
        if prefetch is not None:
            prefetch.close()
        if cache is not None:
            cache.close()
