"""What the data service measures: names, units and meaning, and the counters of a data worker.

Call sites use these names and invent none.
"""

import threading
from dataclasses import dataclass, replace

__all__ = ["METRICS", "Metric", "WorkerCounters", "WorkerMetrics"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity."""

    name: str
    unit: str
    tags: tuple[str, ...]
    meaning: str


METRICS = (
    Metric("data/wait_s", "s", ("rank",), "time a step waited for its batch"),
    Metric("data_tickets_total", "1", ("worker",), "tickets answered"),
    Metric("data_rows_total", "1", ("worker",), "rows sent"),
    Metric("data_sent_bytes_total", "bytes", ("worker",), "bytes of row columns sent"),
    Metric("data_shards_read_total", "1", ("worker",), "shards read from storage"),
    Metric("data_read_bytes_total", "bytes", ("worker",), "bytes of shards read from storage"),
    Metric("data_errors_total", "1", ("worker",), "tickets refused or failed"),
)


@dataclass(frozen=True)
class WorkerCounters:
    """Totals of a data worker since it started; fields as in METRICS."""

    tickets: int = 0
    rows: int = 0
    bytes_sent: int = 0
    shards_read: int = 0
    bytes_read: int = 0
    errors: int = 0


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
