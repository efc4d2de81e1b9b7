"""One stream of batch slices, read ahead within credits from all owners of its shards at the same time.

    credits ─▶ ranges of batches ─ order, owners ─▶ one ticket per owner ─ reads ─▶ checked rows ─▶ slices in order

A thread keeps at most `run_ahead` global batches asked for or ready, several ranges of them at once. Each range's rows
are computed once; nothing is asked for that the consumer has not made room for. What becomes of one ticket is decided
in `reads`, what arrives is checked in `delivery`.

Owns the thread, its buffer and the cutting into ranges and tickets.
"""

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from data_service.access import DataAccess
from data_service.connections import Connections
from data_service.delivery import RangeArrays, Wanted
from data_service.errors import DataError, DataStalledError, DataUnavailableError, DeliveryError
from data_service.order_blocks import owned_rows
from data_service.plan import Plan
from data_service.reads import Attempt, TicketRead, stalled_error
from data_service.schema import BatchSlice
from data_service.ticket import (
    MAX_MEMBERS,
    MAX_TICKET_BATCHES,
    MAX_TICKET_ROWS,
    MAX_TICKET_TOKENS,
    Ticket,
)

__all__ = ["Stream", "shape_of_range"]

_OWNER_TOKENS = 1 << 22
"""Tokens that a range asks of one owner: four messages of 2 MiB (of uint16), which a worker gathers at once."""
_RANGES_AHEAD = 4
_MAX_READS = 32
_PAUSE_S = 0.1
_LONGEST_WAIT_S = 1.0


@dataclass(eq=False)
class _Range:
    """Consecutive global batches on their way."""

    first: int
    last: int
    arrays: RangeArrays
    missing: int
    """Pieces and tickets that are not in place yet."""


@dataclass(frozen=True)
class _Piece:
    """Slots of a range that are asked for together."""

    range: _Range
    slots: tuple[int, int]


def shape_of_range(seq_len: int, num_slots: int, num_workers: int, most: int) -> tuple[int, int]:
    """How much is asked for at a time.

    Args:
        seq_len: tokens of a row, less one.
        num_slots: slots that are read of each batch, >= 1.
        num_workers: who share the range.
        most: batches that there is room for, >= 1.

    Returns:
        Batches of the next range, and the slots of each that one ticket may ask for; both at least 1.
    """
    rows = max(1, min(MAX_TICKET_ROWS, MAX_TICKET_TOKENS // (seq_len + 1)))
    wanted = max(1, _OWNER_TOKENS * max(1, num_workers) // (num_slots * (seq_len + 1)))
    batches = min(wanted, most, rows, MAX_TICKET_BATCHES)
    return batches, rows // batches


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
        self._next = start
        self._stop = stop
        self._slots = slots
        self._end_slot = min(slots[1], plan.global_batch)
        self._ready: queue.SimpleQueue[BatchSlice | BaseException] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[tuple[TicketRead, Attempt, list[object] | Exception] | None] = (
            queue.SimpleQueue()
        )
        self._credits = threading.Lock()
        self._free = access.run_ahead
        self._starved_of = 0
        self._closing = threading.Event()
        self._ranges: deque[_Range] = deque()
        self._pieces: deque[_Piece] = deque()
        self._reads: dict[TicketRead, _Range] = {}
        self._batches_at_once = 1
        self._alone_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="data-stream", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def next(self) -> BatchSlice:
        """The next slice; blocks, at most a little longer than `stalled_s`.

        Raises:
            DataError: of the kind that ended the stream, or because it was closed.
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
            enough = 0 < self._starved_of <= self._free
            if enough:
                self._starved_of = 0
        if enough:
            self._events.put(None)
        return item

    def close(self) -> None:
        """Let the thread end, and whoever waits in `next`; the thread does so at its next step."""
        self._closing.set()
        self._events.put(None)
        self._ready.put(DataError("a batch was asked for, the data client was closed meanwhile."))

    def _run(self) -> None:
        try:
            while not self._closing.is_set() and (self._next < self._stop or self._ranges):
                wait_s = self._advance(time.monotonic())
                self._take_events(wait_s)
                while self._ranges and not self._ranges[0].missing:
                    for one in self._ranges.popleft().arrays.slices():
                        self._ready.put(one)
        except BaseException as error:  # handed to the consumer, who raises it
            if not self._closing.is_set():
                self._ready.put(error)
        finally:
            for read in self._reads:
                read.cancel()

    def _advance(self, now: float) -> float:
        """Ask for all that there is room for; returns how long nothing else is due, in seconds."""
        while self._open_range():
            continue
        while self._pieces and len(self._reads) < _MAX_READS:
            if not self._ask_for(self._pieces[0], now):
                return _PAUSE_S
            self._pieces.popleft()
        if self._ranges and not self._ranges[0].missing:
            return 0.0
        due = now + _LONGEST_WAIT_S
        for read in self._reads:
            due = min(due, read.watch(now))
        return max(0.0, due - now)

    def _open_range(self) -> bool:
        """Take credits for the next range; False when there is none left, or no room."""
        if self._next >= self._stop:
            return False
        most = min(max(1, self._access.run_ahead // _RANGES_AHEAD), self._batches_at_once, self._stop - self._next)
        workers = len(self._connections.members.owners())
        count, rows = shape_of_range(self._plan.seq_len, max(1, self._end_slot - self._slots[0]), workers, most)
        with self._credits:
            if self._free < count:
                self._starved_of = count
                return False
            self._free -= count
        # The first batch is to come soon, so a stream begins with a short range.
        self._batches_at_once = min(2 * self._batches_at_once, MAX_TICKET_BATCHES)
        first, last = self._next, self._next + count
        self._next = last
        begins = range(self._slots[0], self._end_slot, rows)
        opened = _Range(
            first, last, RangeArrays(self._plan, first, last, self._slots, self._connections.blocks), len(begins)
        )
        self._pieces.extend(_Piece(opened, (one, min(one + rows, self._end_slot))) for one in begins)
        self._ranges.append(opened)
        return True

    def _ask_for(self, piece: _Piece, now: float) -> bool:
        """Cut a piece into one ticket per owner of its shards; False while no worker is known.

        Raises:
            DataStalledError: when none became known for `stalled_s`.
        """
        plan, into = self._plan, piece.range
        members = self._connections.members.owners()[:MAX_MEMBERS]
        if not members:
            self._alone_since = now if self._alone_since is None else self._alone_since
            if now - self._alone_since >= self._access.stalled_s:
                silence = self._connections.members.silence
                reason = "no data worker is registered" + ("" if silence is None else f"; {silence}")
                raise stalled_error(Ticket(plan, into.first, into.last, piece.slots), self._access, reason)
            return False
        self._alone_since = None
        names = tuple(one.worker_id for one in members) if len(members) > 1 else ()
        rows, owner = owned_rows(plan, into.first, into.last, piece.slots, names)
        place = into.arrays.places(rows.batch, rows.slot)
        into.missing -= 1
        for number in np.flatnonzero(np.bincount(owner)).tolist():
            mine = np.flatnonzero(owner == number)
            wanted = Wanted(rows.batch[mine], rows.slot[mine], rows.row_id[mine], place[mine])
            self._read(into, Ticket(plan, into.first, into.last, piece.slots, names, number), wanted, now)
        return True

    def _read(self, into: _Range, ticket: Ticket, wanted: Wanted, now: float) -> None:
        connections = self._connections
        read = TicketRead(ticket, wanted, self._access, connections.members, self._ask, connections.probe, now)
        self._reads[read] = into
        into.missing += 1

    def _ask(self, read: TicketRead, attempt: Attempt) -> None:
        """Begin an attempt in a thread of the connections."""

        def job() -> None:
            member, members = attempt.member, self._connections.members
            try:
                if attempt.over:
                    return
                answer: list[object] | Exception = self._connections.read(
                    member.address, read.payload, attempt.timeout_s, lambda: attempt.over, at_hand=attempt.at_hand
                )
                members.served(member.worker_id)
            except Exception as error:  # told to the stream's thread, which decides
                if isinstance(error, DataError) and not isinstance(error, DataUnavailableError):
                    members.lives(member.worker_id)
                answer = error
            self._events.put((read, attempt, answer))

        self._connections.background(job)

    def _take_events(self, wait_s: float) -> None:
        """Take what happened since, waiting for the first event."""
        try:
            event = self._events.get(timeout=wait_s) if wait_s > 0 else self._events.get_nowait()
            while True:
                if event is not None:
                    self._take(*event)
                event = self._events.get_nowait()
        except queue.Empty:
            return

    def _take(self, read: TicketRead, attempt: Attempt, what: list[object] | Exception) -> None:
        if read.done:
            return
        elif isinstance(what, DataError):
            if isinstance(what, DataUnavailableError):
                self._connections.forget(attempt.member.address)
            read.failed(attempt, what)
        elif isinstance(what, Exception):
            raise what
        else:
            into = self._reads[read]
            try:
                into.arrays.take(read.wanted, attempt.member.address, what)
            except DeliveryError as error:
                read.failed(attempt, error)
                return
            read.finish(attempt)
            into.missing -= 1
            del self._reads[read]
