"""The data worker: an Arrow Flight server that answers tickets from shards.

It is stateless: a ticket holds the plan, so any worker can answer any ticket at any time, and a dead one is replaced by
asking another. A ticket is answered whole: rows are gathered and verified first, errors become the call's status, then
the batches go out as one native stream without Python in the way.

Owns the Flight server, its token check and the heartbeat to the control plane. Refuses tickets that are malformed, too
large or of another dataset.
"""

import hmac
import json
import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from data_service import control_pb2 as pb
from data_service import control_pb2_grpc as pb_grpc
from data_service.cache import ShardCache
from data_service.control import CHANNEL_OPTIONS, HEARTBEAT_S, bearer_metadata
from data_service.errors import ConfigError, CursorMismatchError, DataError
from data_service.metrics import WorkerMetrics
from data_service.order import rows_of_batch
from data_service.plan import Plan, rows_per_shard_of
from data_service.rows import ShardRows
from data_service.schema import block_to_batch, wire_schema
from data_service.shards import DatasetManifest, ShardEntry, read_index, read_manifest
from data_service.ticket import Ticket

__all__ = ["DataWorker", "ShardRowsFactory"]

_LOG = logging.getLogger(__name__)
_MESSAGE_BYTES = 1 << 20
_REGISTER_TIMEOUT_S = 5.0

ShardRowsFactory = Callable[[DatasetManifest, Mapping[str, Sequence[ShardEntry]], ShardCache], ShardRows]
"""Makes the strategy that turns row ids into rows."""


class _NoMiddleware(flight.ServerMiddleware):  # type: ignore[misc]
    """A call that passed the token check."""


class _TokenMiddleware(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses calls without the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str]]) -> _NoMiddleware:
        for name, values in headers.items():
            if name.lower() == "authorization" and values:
                if hmac.compare_digest(str(values[0]).encode("utf-8", "replace"), self._expected):
                    return _NoMiddleware()
        raise flight.FlightUnauthenticatedError("the bearer token is missing or wrong")


class _FlightServer(flight.FlightServerBase):  # type: ignore[misc]
    """DoGet of tickets."""

    def __init__(self, location: str, token: str, manifest: DatasetManifest, rows: ShardRows, metrics: WorkerMetrics):
        super().__init__(location, middleware={"token": _TokenMiddleware(token)})
        self._manifest = manifest
        self._rows = rows
        self._metrics = metrics

    def do_get(self, context: Any, ticket: Any) -> Any:
        try:
            return self._answer(Ticket.from_bytes(ticket.ticket))
        except DataError as error:
            self._metrics.add(errors=1)
            extra = json.dumps({"kind": type(error).__name__, "message": str(error)}).encode()
            raise flight.FlightServerError(str(error), extra) from error
        except (ValueError, OverflowError) as error:
            self._metrics.add(errors=1)
            raise flight.FlightServerError(
                f"the ticket is refused: {error}", json.dumps({"kind": "ValueError", "message": str(error)}).encode()
            ) from error

    def _check_plan(self, plan: Plan) -> None:
        if plan.dataset_digest != self._manifest.digest:
            raise CursorMismatchError(
                f"the ticket is for dataset {plan.dataset_digest[:64]}, this worker serves {self._manifest.digest}."
            )
        info = self._manifest.splits[plan.split]
        if plan.num_tokens != info.num_tokens or plan.rows_per_shard != rows_per_shard_of(info, plan.seq_len):
            raise ValueError(
                f"plan.num_tokens={plan.num_tokens} or plan.rows_per_shard={plan.rows_per_shard} is not that of the "
                f"{plan.split} split."
            )

    def _answer(self, ticket: Ticket) -> Any:
        plan = ticket.plan
        self._check_plan(plan)
        first, last = ticket.slots
        rows = [rows_of_batch(plan, batch, first, last) for batch in range(ticket.first, ticket.last)]
        batches = np.repeat(np.arange(ticket.first, ticket.last, dtype=np.uint64), [ids.size for ids in rows])
        slots = np.concatenate([np.arange(first, first + ids.size, dtype=np.uint32) for ids in rows])
        row_ids = np.concatenate(rows)
        schema = wire_schema(plan.seq_len, self._manifest.dtype)
        per_message = max(1, _MESSAGE_BYTES // ((plan.seq_len + 1) * self._manifest.dtype.itemsize))
        messages = []
        for start in range(0, row_ids.size, per_message):
            part = slice(start, start + per_message)
            block = self._rows.read(plan, row_ids[part])
            messages.append(block_to_batch(block, batches[part], slots[part], schema))
        self._metrics.add(tickets=1, rows=int(row_ids.size), bytes_sent=sum(message.nbytes for message in messages))
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, messages))


class DataWorker:
    """One data worker."""

    def __init__(
        self,
        dataset_uri: str,
        control_address: str,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        cache_bytes: int = 1 << 30,
        row_source: ShardRowsFactory = ShardRows,
    ) -> None:
        self._dataset_uri = dataset_uri
        self._control_address = control_address
        self._token = token
        self._host = host
        self._port = port
        self._cache_bytes = cache_bytes
        self._row_source = row_source
        self._worker_id = uuid.uuid4().hex
        self._metrics = WorkerMetrics()
        self._stopping = threading.Event()
        self._server: _FlightServer | None = None
        self._cache: ShardCache | None = None
        self._heartbeat: threading.Thread | None = None

    def start(self) -> str:
        """Serve, register with the control plane, and return `host:port`.

        Raises:
            ConfigError: when there is no dataset, or the control plane is of another one.
            ShardCorruptError: when the index of shards is damaged.
        """
        manifest = read_manifest(self._dataset_uri)
        self._cache = ShardCache(self._dataset_uri, self._cache_bytes, self._metrics)
        rows = self._row_source(manifest, read_index(self._dataset_uri, manifest), self._cache)
        location = f"grpc://{self._host}:{self._port}"
        self._server = _FlightServer(location, self._token, manifest, rows, self._metrics)
        address = f"{self._host}:{self._server.port}"
        channel = grpc.insecure_channel(self._control_address, options=CHANNEL_OPTIONS)
        stub = pb_grpc.DataControlStub(channel)  # type: ignore[no-untyped-call]
        registration = pb.RegisterRequest(worker_id=self._worker_id, address=address, dataset_digest=manifest.digest)
        try:
            self._register(stub, registration)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                channel.close()
                self._close()
                raise ConfigError(f"a data worker cannot join {self._control_address}: {error.details()}.") from error
            _LOG.warning("the control plane %s does not answer yet: %s", self._control_address, error.details())
        self._heartbeat = threading.Thread(
            target=self._beat, args=(channel, stub, registration), name="data-worker-heartbeat", daemon=True
        )
        self._heartbeat.start()
        return address

    def _register(self, stub: Any, registration: pb.RegisterRequest) -> None:
        stub.Register(registration, timeout=_REGISTER_TIMEOUT_S, metadata=bearer_metadata(self._token))

    def _beat(self, channel: Any, stub: Any, registration: pb.RegisterRequest) -> None:
        """Tell the control plane every second that this worker lives; register again where it does not know it."""
        failing = False
        while not self._stopping.wait(HEARTBEAT_S):
            totals = self._metrics.totals()
            counters = pb.WorkerCounters(
                tickets=totals.tickets,
                rows=totals.rows,
                bytes_sent=totals.bytes_sent,
                shards_read=totals.shards_read,
                bytes_read=totals.bytes_read,
                errors=totals.errors,
            )
            try:
                answer = stub.Heartbeat(
                    pb.HeartbeatRequest(worker_id=self._worker_id, counters=counters),
                    timeout=_REGISTER_TIMEOUT_S,
                    metadata=bearer_metadata(self._token),
                )
                if not answer.known:
                    self._register(stub, registration)
                failing = False
            except grpc.RpcError as error:
                if not failing:
                    _LOG.warning("the control plane %s does not answer: %s", self._control_address, error.details())
                failing = True
        channel.close()

    def stop(self) -> None:
        """Stop serving."""
        self._stopping.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
            self._heartbeat = None
        self._close()

    def _close(self) -> None:
        """End the server and the reading threads."""
        if self._server is not None:
            self._server.shutdown()
            self._server = None
        if self._cache is not None:
            self._cache.close()
            self._cache = None
