"""A client's connections: calls to the control plane and reads from data workers, each under a deadline.

Owns channels, the token and the translation of transport failures into the errors of this folder. Refuses to retry:
whether to ask again, and whom, is the stream's decision.
"""

import json
import logging
import threading
import uuid
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as flight

from data_service import control_pb2 as pb
from data_service import control_pb2_grpc as pb_grpc
from data_service.access import DataAccess
from data_service.control import CHANNEL_OPTIONS, bearer_metadata
from data_service.errors import (
    ConfigError,
    CursorMismatchError,
    DataError,
    DataUnavailableError,
    ShardCorruptError,
)
from data_service.ticket import Ticket

__all__ = ["Connections", "WorkerFailedError"]

_LOG = logging.getLogger(__name__)
_REPORT_TIMEOUT_S = 0.5
_MAX_KNOWN = 64
_ERRORS_BY_KIND: dict[str, type[DataError]] = {
    "ShardCorruptError": ShardCorruptError,
    "CursorMismatchError": CursorMismatchError,
}


class WorkerFailedError(DataUnavailableError):
    """One worker gave no answer; another may."""


def _named_error(error: Any) -> tuple[str | None, str]:
    """The kind and message that a worker packed into an error, if any."""
    try:
        value = json.loads(error.extra_info)
        return str(value["kind"]), str(value["message"])
    except (ValueError, KeyError, TypeError):
        return None, str(error)


class Connections:
    """To the control planes and to any number of workers. Thread-safe."""

    def __init__(self, access: DataAccess) -> None:
        self._access = access
        self._channels = [grpc.insecure_channel(address, options=CHANNEL_OPTIONS) for address in access.control]
        self._stubs = [pb_grpc.DataControlStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]
        self._client_id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._flights: dict[str, Any] = {}
        self._known: list[str] = []

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """One call to the first control plane that answers.

        Raises:
            DataUnavailableError: when none answers.
            ConfigError: when what was asked for cannot be had.
            DataError: when the call was refused.
        """
        reasons = []
        for address, stub in zip(self._access.control, self._stubs, strict=True):
            try:
                return getattr(stub, method)(request, timeout=timeout_s, metadata=bearer_metadata(self._access.token))
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
                if code == grpc.StatusCode.FAILED_PRECONDITION:
                    raise ConfigError(str(details)) from error
                if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise DataError(f"the control plane {address} refused {method}: {code.name}, {details}.") from error
                reasons.append(f"{address}: {code.name}, {details}")
        raise DataUnavailableError(
            f"the data service's control plane was asked for {method}, none answers ({'; '.join(reasons)}). "
            "Check that it runs and that this machine reaches it."
        )

    def plan_json(self, split: str) -> str:
        """The plan of a split, as the control plane says it."""
        return str(self.call("GetPlan", pb.GetPlanRequest(split=split), self._access.read_stall_s).plan_json)

    def addresses(self, ticket: Ticket, exclude: set[str], timeout_s: float) -> list[str]:
        """Workers to try, best first, from the control plane, or those known from before while it does not answer."""
        request = pb.RouteRequest(
            split=ticket.plan.split,
            first_batch=ticket.first,
            last_batch=ticket.last,
            exclude=sorted(exclude),
            client_id=self._client_id,
        )
        try:
            found = list(self.call("Route", request, timeout_s).addresses)
        except DataUnavailableError as error:
            with self._lock:
                known = [address for address in self._known if address not in exclude]
            _LOG.warning("%s Going on with the %d workers known from before.", error, len(known))
            return known
        with self._lock:
            self._known = (found + [address for address in self._known if address not in found])[:_MAX_KNOWN]
        return found

    def report_failure(self, address: str, reason: str) -> None:
        """Tell the control plane that a worker failed, and forget the connection to it."""
        with self._lock:
            self._flights.pop(address, None)
        try:
            report = pb.ReportFailureRequest(address=address, reason=reason[:500])
            self.call("ReportFailure", report, _REPORT_TIMEOUT_S)
        except DataUnavailableError as error:
            _LOG.warning("data worker %s failed and could not be reported: %s", address, error)

    def read(self, address: str, ticket: Ticket, timeout_s: float) -> list[Any]:
        """All record batches of a ticket, from one worker.

        Raises:
            WorkerFailedError: when it does not answer in time or went away.
            ShardCorruptError: when it cannot read a shard.
            DataError: when it refused the token or the ticket.
        """
        with self._lock:
            connection = self._flights.get(address)
            if connection is None:
                connection = self._flights[address] = flight.FlightClient(
                    f"grpc://{address}", generic_options=[("grpc.enable_http_proxy", 0)]
                )
        options = flight.FlightCallOptions(
            timeout=timeout_s, headers=[(b"authorization", f"Bearer {self._access.token}".encode())]
        )
        try:
            reader = connection.do_get(flight.Ticket(ticket.to_bytes()), options)
            return [chunk.data for chunk in reader]
        except flight.FlightUnauthenticatedError as error:
            raise DataError(f"data worker {address} refused the token: UNAUTHENTICATED.") from error
        except flight.FlightError as error:
            kind, message = _named_error(error)
            if kind is None:
                raise WorkerFailedError(f"{type(error).__name__}: {str(error)[:300]}") from error
            if kind == DataUnavailableError.__name__:
                raise WorkerFailedError(message) from error
            if kind in _ERRORS_BY_KIND:
                raise _ERRORS_BY_KIND[kind](f"data worker {address}: {message}") from error
            raise DataError(f"data worker {address} refused a ticket: {message}") from error
        except (pa.ArrowException, OSError) as error:
            raise WorkerFailedError(f"{type(error).__name__}: {str(error)[:300]}") from error

    def close(self) -> None:
        """Close every connection; calls in flight fail."""
        for channel in self._channels:
            channel.close()
        with self._lock:
            flights, self._flights = list(self._flights.values()), {}
        for connection in flights:
            connection.close()
