"""A data worker's word to the control planes: it joins, lives and leaves.

Owns registration and the heartbeat threads, one for each control plane. Refuses to know tickets and shards.
"""

import logging
import threading
from collections.abc import Sequence

import grpc

from data_service import control_pb2 as pb
from data_service import control_pb2_grpc as pb_grpc
from data_service.bearer import CHANNEL_OPTIONS, bearer_metadata
from data_service.errors import ConfigError
from data_service.membership import HEARTBEAT_S
from data_service.metrics import WorkerMetrics

__all__ = ["Heartbeat"]

_LOG = logging.getLogger(__name__)
_TIMEOUT_S = 5.0
_LEAVE_TIMEOUT_S = 0.5
_REFUSALS = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
)


class _Link:
    """To one control plane."""

    def __init__(self, address: str, token: str, registration: pb.RegisterRequest, metrics: WorkerMetrics) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.DataControlStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = bearer_metadata(token)
        self._registration = registration
        self._metrics = metrics
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="data-worker-heartbeat", daemon=True)

    def register(self) -> None:
        self._stub.Register(self._registration, timeout=_TIMEOUT_S, metadata=self._metadata)

    def start(self) -> None:
        self._thread.start()

    def _beat(self) -> None:
        """Tell every second that this worker lives; register again where it is not known."""
        failing = False
        while not self._stopping.wait(HEARTBEAT_S):
            request = pb.HeartbeatRequest(
                worker_id=self._registration.worker_id, counters=pb.WorkerCounters(**vars(self._metrics.totals()))
            )
            try:
                if not self._stub.Heartbeat(request, timeout=_TIMEOUT_S, metadata=self._metadata).known:
                    self.register()
                failing = False
            except grpc.RpcError as error:
                if not failing and not self._stopping.is_set():
                    _LOG.warning("the control plane %s does not take this worker: %s", self.address, error.details())
                failing = True

    def leave(self) -> None:
        """Stop beating and say so; nobody may hear it."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_TIMEOUT_S + 1.0)
        request = pb.LeaveRequest(worker_id=self._registration.worker_id)
        try:
            self._stub.Leave(request, timeout=_LEAVE_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            _LOG.debug("the control plane %s was not told that this worker leaves: %s", self.address, error.details())
        self._channel.close()

    def close(self) -> None:
        self._channel.close()


class Heartbeat:
    """Keeps one worker registered with every control plane."""

    def __init__(
        self, control: Sequence[str], token: str, registration: pb.RegisterRequest, metrics: WorkerMetrics
    ) -> None:
        self._links = [_Link(address, token, registration, metrics) for address in control]

    def start(self) -> None:
        """Register everywhere; a control plane that does not answer is told as soon as it does.

        Raises:
            ConfigError: when a control plane refuses this worker.
        """
        for link in self._links:
            try:
                link.register()
            except grpc.RpcError as error:
                if error.code() in _REFUSALS:
                    for one in self._links:
                        one.close()
                    raise ConfigError(
                        f"a data worker cannot join {link.address}: {error.code().name}, {error.details()}."
                    ) from error
                _LOG.warning("the control plane %s does not answer yet: %s", link.address, error.details())
        for link in self._links:
            link.start()

    def stop(self) -> None:
        """Leave every control plane."""
        for link in self._links:
            link.leave()
