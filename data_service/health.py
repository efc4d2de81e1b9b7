"""`grpc.health.v1` with a bound on how many watch at one time.

Probes carry no token, so anybody who reaches the port may ask. A check costs nothing that lasts; a watch stays, and
grpcio 1.85 counts none against `maximum_concurrent_rpcs`.
"""

import threading
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

__all__ = ["MAX_WATCHES", "BoundedHealth"]

MAX_WATCHES = 64
"""Health may be watched by so many calls at one time; more get RESOURCE_EXHAUSTED."""


class BoundedHealth(health.HealthServicer):  # type: ignore[misc]
    """Tells health by name; a watch of a name that it does not know is refused with NOT_FOUND, like a check."""

    def __init__(self) -> None:
        super().__init__()
        self._watch_lock = threading.Lock()
        self._num_watches = 0

    def Watch(self, request: Any, context: Any, send_response_callback: Callable[[Any], None] | None = None) -> None:
        """Send the health of a name now and whenever it changes."""
        if super().Check(request, context).status == health_pb2.HealthCheckResponse.UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, "the health of this name is not told here")
        with self._watch_lock:
            refused = self._num_watches >= MAX_WATCHES
            self._num_watches += not refused
        if refused:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHES} calls watch this health already: use Check"
            )
        if not context.add_callback(self._leave):
            self._leave()  # the caller has gone already
            context.abort(grpc.StatusCode.CANCELLED, "the call has ended")
        super().Watch(request, context, send_response_callback)

    def _on_close_callback(self, send_response_callback: Callable[[Any], None], service: str) -> Callable[[], None]:
        """Forget a watch that ended, in a thread of its own.

        grpcio 1.85 calls this in the thread that also completes sends. It wants the lock that `set` holds while it
        waits for a send to complete: a caller that left in the middle of a change would stop the server for good.
        """
        forget = super()._on_close_callback(send_response_callback, service)
        return lambda: threading.Thread(target=forget, name="data-health-forget", daemon=True).start()

    def _leave(self) -> None:
        with self._watch_lock:
            self._num_watches -= 1
