"""A client's connections: calls to the control plane and reads from data workers, each under a deadline.

Owns channels, the token, the threads that wait for workers and the translation of transport failures into the errors of
this folder. Refuses to retry: whether to ask again, and whom, is the stream's decision.
"""

import json
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as flight

from data_service import control_pb2 as pb
from data_service import control_pb2_grpc as pb_grpc
from data_service.access import DataAccess
from data_service.bearer import CHANNEL_OPTIONS, bearer_metadata
from data_service.errors import (
    ConfigError,
    CursorMismatchError,
    DataError,
    DataUnavailableError,
    EmptySplitError,
    ShardCorruptError,
)
from data_service.members import KnownMembers, Member, MembersAnswer
from data_service.memory import Blocks, keep_freed_memory
from data_service.signs import AT_HAND, NOT_AT_HAND, PING, PING_AFTER, store_silence

__all__ = ["Connections", "NotAtHandError", "TokenRefusedError", "WorkerFailedError"]

_LOG = logging.getLogger(__name__)
_CONTROL_TIMEOUT_S = 1.0
_WARM_TIMEOUT_S = 2.0
_MAX_WARM = 64
_MAX_THREADS = 256
"""A worker that stands still holds a thread for each read that was begun and given up, until the read's deadline."""
_MAX_PING_THREADS = 64
_CLOSE_S = 1.0
_CONNECTIONS = 2
"""To each worker, taken in turn: one thread reads from a connection, and what it reads takes another to unpack."""
_FLIGHT_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
"""Quick to reconnect, straight to the address whatever proxy is set, and a new client means a new connection."""
_ERRORS_BY_KIND: dict[str, type[DataError]] = {
    "ShardCorruptError": ShardCorruptError,
    "CursorMismatchError": CursorMismatchError,
}


class WorkerFailedError(DataUnavailableError):
    """One worker gave no answer; another may."""


class TokenRefusedError(DataError):
    """A worker does not take the token: it may be another run's."""


class NotAtHandError(DataError):
    """A worker would have to ask the store, and was asked not to."""


def _named_error(error: Any) -> tuple[str | None, str]:
    """The kind and message that a worker packed into an error, if any."""
    try:
        value = json.loads(error.extra_info)
        return str(value["kind"]), str(value["message"])
    except (ValueError, KeyError, TypeError):
        return None, str(error)


def _failure(error: Exception) -> WorkerFailedError:
    """A failure of the transport in few words: what gRPC adds for its developers is left out."""
    return WorkerFailedError(f"{type(error).__name__}: {str(error).partition('. gRPC client')[0][:300]}")


class _Threads:
    """Daemon threads for calls that block, made as they are needed, at most `limit`.

    A worker that is stopped holds a thread until its call's deadline; the others go on. The thread that became free
    last is taken first: its memory is warm.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._idle: list[queue.SimpleQueue[Callable[[], None] | None]] = []
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job in some thread; nothing happens once closed. Jobs do not raise."""
        with self._lock:
            if self._closed:
                return
            if self._idle:
                self._idle.pop().put(job)
            elif len(self._threads) < self._limit:
                name = f"{self._name}-{len(self._threads)}"
                thread = threading.Thread(target=self._run, args=(job,), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                self._waiting.append(job)

    def _run(self, first: Callable[[], None]) -> None:
        inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        job: Callable[[], None] | None = first
        while job is not None:
            job()
            with self._lock:
                if self._closed:
                    return
                job = self._waiting.popleft() if self._waiting else None
                if job is None:
                    self._idle.append(inbox)
            if job is None:
                job = inbox.get()

    def close(self, timeout_s: float) -> None:
        """End the threads; one that is in a call ends behind it."""
        with self._lock:
            self._closed = True
            for inbox in self._idle:
                inbox.put(None)
        for thread in self._threads:
            thread.join(timeout_s / len(self._threads))


class Connections:
    """To the control planes and to any number of workers. Thread-safe."""

    def __init__(self, access: DataAccess) -> None:
        self._access = access
        self._channels = [grpc.insecure_channel(address, options=CHANNEL_OPTIONS) for address in access.control]
        self._stubs = [pb_grpc.DataControlStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._closed = False
        self._flights: dict[str, deque[Any]] = {}
        self._threads = _Threads(_MAX_THREADS, "data-read")
        self._pings = _Threads(_MAX_PING_THREADS, "data-ping")
        self.blocks = Blocks()
        """Memory of the batches that streams fill."""
        keep_freed_memory()
        self.members = KnownMembers(self._fetch_members, self._report_failure, self._warm)
        """Who may be asked."""
        self.members.start()

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """One call to the first control plane that answers.

        Raises:
            DataUnavailableError: when none answers.
            EmptySplitError: when a plan was asked for, and the split holds no row.
            ConfigError: when what was asked for cannot be had.
            DataError: when the call was refused.
        """
        reasons = []
        for address, stub in zip(self._access.control, self._stubs, strict=True):
            try:
                return getattr(stub, method)(request, timeout=timeout_s, metadata=bearer_metadata(self._access.token))
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
                if code == grpc.StatusCode.NOT_FOUND:
                    raise EmptySplitError(str(details)) from error
                if code == grpc.StatusCode.FAILED_PRECONDITION:
                    raise ConfigError(str(details)) from error
                if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise DataError(f"the control plane {address} refused {method}: {code.name}, {details}.") from error
                reasons.append(f"{address}: {code.name}, {details}")
            except ValueError as error:  # grpc's word for a channel that was closed meanwhile
                if not self._closed:
                    raise
                raise DataUnavailableError("the connection to the control plane was closed.") from error
        raise DataUnavailableError(
            f"the data service's control plane was asked for {method}, none answers ({'; '.join(reasons)}). "
            "Check that it runs and that this machine reaches it."
        )

    def plan_json(self, split: str) -> str:
        """The plan of a split for the order that this client was given, as the control plane says it."""
        access = self._access
        request = pb.GetPlanRequest(
            split=split, order_json=access.order.to_json(), dataset_digest=access.dataset_digest
        )
        return str(self.call("GetPlan", request, access.read_stall_s).plan_json)

    def _fetch_members(self) -> MembersAnswer:
        self._drop_strangers()
        answer = self.call("Members", pb.MembersRequest(), _CONTROL_TIMEOUT_S)
        members = tuple(Member(one.worker_id, one.address, one.alive) for one in answer.members)
        return MembersAnswer(members, answer.settled)

    def _drop_strangers(self) -> None:
        """Let go of the connections to addresses that no member has any more; a call in flight still ends."""
        addresses = {one.address for one in self.members.known()}
        with self._lock:
            dropped = [self._flights.pop(one) for one in list(self._flights) if one not in addresses]
        del dropped  # the last reference closes a connection, which is not done under the lock

    def _report_failure(self, worker_id: str, reason: str) -> None:
        # A reason may quote anything, and protobuf takes no lone surrogate.
        text = reason[:500].encode("utf-8", "replace").decode()
        self.call("ReportFailure", pb.ReportFailureRequest(worker_id=worker_id, reason=text), _CONTROL_TIMEOUT_S)

    def _warm(self, members: Sequence[Member]) -> None:
        """Connect to new members before the first read needs them."""
        for member in [one for one in members if one.alive][:_MAX_WARM]:
            self._pings.submit(lambda address=member.address: (self.ping(address, _WARM_TIMEOUT_S), None)[1])  # type: ignore[misc]

    def background(self, job: Callable[[], object]) -> None:
        """Run a job that blocks, and does not raise, in a thread of its own."""
        self._threads.submit(lambda: (job(), None)[1])

    def probe(self, member: Member) -> None:
        """Ping a worker in a thread of its own, unless that was done just now; `members` hears of it."""
        signs = self.members.signs
        if not signs.begin_ping(member.worker_id, self._access.hedge_s * PING_AFTER):
            return

        def job() -> None:
            try:
                signs.sent(member.worker_id)
                answer = self.ping(member.address, self._access.read_stall_s)
                if answer is not None:
                    self.members.lives(member.worker_id, store_silence(answer))
            finally:
                signs.ended(member.worker_id)

        self._pings.submit(job)

    def ping(self, address: str, timeout_s: float) -> bytes | None:
        """What a worker's process says, if it answers at all; None where it does not."""
        try:
            action = flight.Action(PING, b"")
            parts = list(self._flight(address).do_action(action, self._options(timeout_s)))
            return b"".join(one.body.to_pybytes() for one in parts)
        except (flight.FlightTimedOutError, flight.FlightUnavailableError, flight.FlightCancelledError, OSError):
            return None
        except (flight.FlightError, pa.ArrowException):
            return b""

    def forget(self, address: str) -> None:
        """Connect anew the next time that a worker is asked."""
        with self._lock:
            self._flights.pop(address, None)

    def _flight(self, address: str) -> Any:
        with self._lock:
            connections = self._flights.get(address)
            if connections is None:
                connections = self._flights[address] = deque(
                    flight.FlightClient(f"grpc://{address}", generic_options=_FLIGHT_OPTIONS)
                    for _ in range(_CONNECTIONS)
                )
            connections.rotate()
            return connections[0]

    def _options(self, timeout_s: float, *, at_hand: bool = False) -> Any:
        headers = [(b"authorization", f"Bearer {self._access.token}".encode())]
        if at_hand:
            headers.append((AT_HAND.encode(), b"1"))
        return flight.FlightCallOptions(timeout=timeout_s, headers=headers)

    def read(
        self,
        address: str,
        ticket: bytes,
        timeout_s: float,
        unwanted: Callable[[], bool] = lambda: False,
        *,
        at_hand: bool = False,
    ) -> list[Any]:
        """All record batches of a ticket, from one worker.

        Args:
            address: `host:port` of the worker.
            ticket: as it travels.
            timeout_s: deadline of the whole call.
            unwanted: asked now and then; when true, the rest is cancelled.
            at_hand: only where nothing must be asked of the store for it.

        Raises:
            NotAtHandError: when something must.
            WorkerFailedError: when it does not answer in time or went away, or the answer became unwanted.
            ShardCorruptError: when it cannot read a shard.
            TokenRefusedError: when it refused the token.
            DataError: when it refused the ticket.
        """
        try:
            reader = self._flight(address).do_get(flight.Ticket(ticket), self._options(timeout_s, at_hand=at_hand))
            batches = []
            for chunk in reader:
                batches.append(chunk.data)
                if unwanted():
                    reader.cancel()
                    raise WorkerFailedError("another worker was faster")
            return batches
        except flight.FlightUnauthenticatedError as error:
            raise TokenRefusedError(f"data worker {address} refused the token: UNAUTHENTICATED.") from error
        except flight.FlightError as error:
            kind, message = _named_error(error)
            if kind is None:
                raise _failure(error) from error
            if kind == NOT_AT_HAND:
                raise NotAtHandError(message) from error
            if kind == DataUnavailableError.__name__:
                raise WorkerFailedError(message) from error
            if kind in _ERRORS_BY_KIND:
                raise _ERRORS_BY_KIND[kind](f"data worker {address}: {message}") from error
            raise DataError(f"data worker {address} refused a ticket: {message}") from error
        except (pa.ArrowException, OSError) as error:
            raise _failure(error) from error

    def close(self) -> None:
        """Close every connection; calls in flight fail or end by their deadline."""
        self._closed = True
        self.members.close()
        for channel in self._channels:
            channel.close()
        self._threads.close(_CLOSE_S)
        self._pings.close(_CLOSE_S)
        self.members.join(_CLOSE_S)
        with self._lock:
            flights, self._flights = [one for each in self._flights.values() for one in each], {}
        for connection in flights:
            connection.close()
