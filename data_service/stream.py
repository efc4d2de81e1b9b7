"""One stream of batch slices: prefetch within credits, failover between workers, and giving up in time.

A thread keeps at most `run_ahead` global batches ready. It asks for little at a time, each request under a deadline; a
worker that fails or stalls is reported and the request goes to another, and since order is a function, it is the same
request. Nothing is asked for that the consumer has not made room for.

Owns the thread, its buffer and the choice of worker. What arrives is checked in `delivery`.
"""

import logging
import queue
import threading
import time

from data_service.access import DataAccess
from data_service.connections import Connections, WorkerFailedError
from data_service.delivery import SliceArrays, place_rows
from data_service.errors import DataStalledError, ShardCorruptError
from data_service.plan import Plan
from data_service.schema import BatchSlice
from data_service.ticket import Ticket

__all__ = ["Stream"]

_LOG = logging.getLogger(__name__)
_TICKET_BYTES = 2 << 20
_SLOWEST_BYTES_PER_S = 2 << 20
_PAUSE_S = 0.1


class Stream:
    """Slots of the global batches [start, stop), read ahead by a thread."""

    def __init__(
        self,
        connections: Connections,
        access: DataAccess,
        plan: Plan,
        start: int,
        stop: int,
        slots: tuple[int, int],
    ) -> None:
        self._connections = connections
        self._access = access
        self._plan = plan
        self._range = (start, stop)
        self._slots = slots
        self._end_slot = min(slots[1], plan.global_batch)
        self._row_bytes = (plan.seq_len + 1) * 4
        self._ready: queue.SimpleQueue[BatchSlice | BaseException] = queue.SimpleQueue()
        self._credits = threading.Condition()
        self._free = access.run_ahead
        self._closing = threading.Event()
        self._preferred: str | None = None
        self._thread = threading.Thread(target=self._run, name="data-stream", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def next(self) -> BatchSlice:
        """The next slice; blocks, at most a little longer than `stalled_s`.

        Raises:
            DataError: of the kind that ended the stream.
        """
        # The thread gives up by itself after stalled_s; the margin only guards against a thread that cannot.
        try:
            item = self._ready.get(timeout=self._access.stalled_s + 2 * self._access.read_stall_s + 5.0)
        except queue.Empty as error:
            raise DataStalledError(
                f"no batch came for {self._access.stalled_s} s (data.service.stalled_s) and the reading thread hangs."
            ) from error
        if isinstance(item, BaseException):
            raise item
        with self._credits:
            self._free += 1
            self._credits.notify()
        return item

    def close(self) -> None:
        """Let the thread end; it does so at its next step, within one request's deadline."""
        self._closing.set()
        with self._credits:
            self._credits.notify()

    def _run(self) -> None:
        try:
            done, stop = self._range
            while done < stop:
                count = self._take_credits(stop - done)
                if self._closing.is_set():
                    return
                arrays = [
                    SliceArrays.masked(self._slots[1] - self._slots[0], self._plan.seq_len + 1) for _ in range(count)
                ]
                for ticket in self._tickets(done, done + count):
                    self._fill(arrays, ticket)
                if self._closing.is_set():
                    return
                for number, one in enumerate(arrays):
                    self._ready.put(one.to_slice(done + number, self._slots))
                done += count
        except BaseException as error:  # handed to the consumer, who raises it
            if not self._closing.is_set():
                self._ready.put(error)

    def _take_credits(self, left: int) -> int:
        """How many batches to read next: what a ticket holds, at most half of the run-ahead; waits until it is free."""
        slots = max(1, self._end_slot - self._slots[0])
        wanted = min(max(1, _TICKET_BYTES // (slots * self._row_bytes)), max(1, self._access.run_ahead // 2), left)
        with self._credits:
            self._credits.wait_for(lambda: self._free >= wanted or self._closing.is_set())
            self._free -= wanted
        return wanted

    def _tickets(self, first: int, last: int) -> list[Ticket]:
        """The requests that cover these batches; none where every slot is masked."""
        per_ticket = max(1, _TICKET_BYTES // (self._row_bytes * (last - first)))
        return [
            Ticket(self._plan, first, last, (begin, min(self._end_slot, begin + per_ticket)))
            for begin in range(self._slots[0], self._end_slot, per_ticket)
        ]

    def _fill(self, arrays: list[SliceArrays], ticket: Ticket) -> None:
        """Read a ticket, asking as many workers as it takes, and put its rows in place."""
        deadline = time.monotonic() + self._access.stalled_s
        rows = (ticket.last - ticket.first) * (ticket.slots[1] - ticket.slots[0])
        patience_s = self._access.read_stall_s + rows * self._row_bytes / _SLOWEST_BYTES_PER_S
        failed: set[str] = set()
        corrupt: dict[str, ShardCorruptError] = {}
        last_failure = "no data worker is registered"
        while not self._closing.is_set():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DataStalledError(
                    f"global batches {ticket.first} to {ticket.last - 1} of the {self._plan.split} split were asked "
                    f"for, no data worker delivered them within {self._access.stalled_s} s (data.service.stalled_s). "
                    f"The last failure: {last_failure}. Check the data workers, or raise the limit."
                )
            address = self._choose(ticket, failed | set(corrupt), min(left_s, self._access.read_stall_s))
            if address is None:
                if corrupt and not failed:
                    raise next(iter(corrupt.values()))
                failed.clear()
                self._closing.wait(min(_PAUSE_S, left_s))
                continue
            try:
                timeout_s = max(0.001, min(patience_s, deadline - time.monotonic()))
                place_rows(arrays, self._slots, ticket, address, self._connections.read(address, ticket, timeout_s))
                self._preferred = address
                return
            except WorkerFailedError as error:
                last_failure = f"{address}: {error}"
                failed.add(address)
                self._give_up(address, error, ticket)
            except ShardCorruptError as error:
                corrupt[address] = error
                self._give_up(address, error, ticket)

    def _choose(self, ticket: Ticket, exclude: set[str], timeout_s: float) -> str | None:
        """The worker to ask: the one that served last, else the control plane's first choice."""
        if self._preferred is not None and self._preferred not in exclude:
            return self._preferred
        return next(iter(self._connections.addresses(ticket, exclude, timeout_s)), None)

    def _give_up(self, address: str, error: Exception, ticket: Ticket) -> None:
        if self._closing.is_set():
            return
        _LOG.warning("data worker %s failed at global batch %d: %s", address, ticket.first, error)
        self._preferred = None
        self._connections.report_failure(address, str(error))
