"""The counters of a data worker: heartbeats carry them to the control plane, whose Stats call tells them."""

import threading
from dataclasses import dataclass, replace

__all__ = ["WorkerCounters", "WorkerMetrics"]


@dataclass(frozen=True)
class WorkerCounters:
    """Totals of a data worker since it started."""

    tickets: int = 0
    """Tickets answered."""
    rows: int = 0
    """Rows sent."""
    bytes_sent: int = 0
    """Bytes of row columns sent."""
    shards_read: int = 0
    """Shards read from storage."""
    bytes_read: int = 0
    """Bytes of shards read from storage."""
    errors: int = 0
    """Tickets refused or failed."""


class WorkerMetrics:
    """Counters that several threads may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = WorkerCounters()

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
            old = self._totals
            self._totals = replace(
                old,
                tickets=old.tickets + tickets,
                rows=old.rows + rows,
                bytes_sent=old.bytes_sent + bytes_sent,
                shards_read=old.shards_read + shards_read,
                bytes_read=old.bytes_read + bytes_read,
                errors=old.errors + errors,
            )

    def totals(self) -> WorkerCounters:
        """The totals so far."""
        with self._lock:
            return self._totals
