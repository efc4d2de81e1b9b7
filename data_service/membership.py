"""Which data workers serve: kept in memory from their heartbeats, and lost with the process without harm.

Owns who is alive. Refuses to know plans, tickets or the network; the clock is passed in.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from data_service.metrics import WorkerCounters

__all__ = ["FORGET_AFTER_S", "HEARTBEAT_S", "SETTLE_S", "SUSPECT_AFTER_S", "MemberState", "MemberView", "Membership"]

HEARTBEAT_S = 1.0
SUSPECT_AFTER_S = 5.0
"""A worker without a heartbeat for this long is not alive."""
FORGET_AFTER_S = 600.0
"""A worker without a heartbeat for this long is forgotten."""
SETTLE_S = 3.0
"""A control plane that started so recently may not have heard of every worker."""
_MAX_WORKERS = 10_000


@dataclass
class MemberState:
    """A worker as it was last heard of."""

    worker_id: str
    address: str
    last_heartbeat: float
    failed_at: float = float("-inf")
    failures: int = 0
    counters: WorkerCounters = field(default_factory=WorkerCounters)

    def alive(self, now: float) -> bool:
        """Whether heartbeats come, and none of its clients gave it up since the last one."""
        return now - self.last_heartbeat <= SUSPECT_AFTER_S and self.failed_at < self.last_heartbeat


@dataclass(frozen=True)
class MemberView:
    """The workers at one moment."""

    epoch: int
    """Which life of the control plane this is."""
    version: int
    """Counts the changes of `members` in this life."""
    settled: bool
    """Whether every worker that lives has had the time to register."""
    members: tuple[tuple[str, str, bool], ...]
    """(worker id, address, alive), sorted by id."""


class Membership:
    """Which workers serve. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, epoch: int | None = None) -> None:
        self._clock = clock
        self._started = clock()
        self._epoch = time.time_ns() if epoch is None else epoch
        self._lock = threading.Lock()
        self._members: dict[str, MemberState] = {}
        self._version = 0
        self._last: tuple[tuple[str, str, bool], ...] = ()

    def register(self, worker_id: str, address: str) -> None:
        """Add a worker; it takes the place of one of the same id or address.

        Raises:
            ValueError: when there are too many.
        """
        with self._lock:
            now = self._clock()
            self._forget(now)
            for key in [key for key, member in self._members.items() if member.address == address]:
                del self._members[key]
            if len(self._members) >= _MAX_WORKERS and worker_id not in self._members:
                raise ValueError(f"{_MAX_WORKERS} workers are registered already.")
            self._members[worker_id] = MemberState(worker_id, address, now)

    def heartbeat(self, worker_id: str, counters: WorkerCounters) -> bool:
        """Note that a worker lives; False when it is not known and must register."""
        with self._lock:
            member = self._members.get(worker_id)
            if member is None:
                return False
            member.last_heartbeat = self._clock()
            member.counters = counters
            return True

    def leave(self, worker_id: str) -> None:
        """Forget a worker that stops; one that is not known is well too."""
        with self._lock:
            self._members.pop(worker_id, None)

    def report_failure(self, worker_id: str) -> bool:
        """Take a worker for dead until its next heartbeat; False when it is not known."""
        with self._lock:
            member = self._members.get(worker_id)
            if member is None:
                return False
            member.failed_at = self._clock()
            member.failures += 1
            return True

    def view(self) -> MemberView:
        """The workers now."""
        with self._lock:
            now = self._clock()
            self._forget(now)
            members = tuple(
                (member.worker_id, member.address, member.alive(now))
                for member in sorted(self._members.values(), key=lambda member: member.worker_id)
            )
            if members != self._last:
                self._version, self._last = self._version + 1, members
            return MemberView(self._epoch, self._version, now - self._started >= SETTLE_S, members)

    def states(self) -> list[tuple[MemberState, bool, float]]:
        """(state, alive, seconds since its heartbeat) of each worker, sorted by address."""
        with self._lock:
            now = self._clock()
            return [
                (member, member.alive(now), now - member.last_heartbeat)
                for member in sorted(self._members.values(), key=lambda member: member.address)
            ]

    def _forget(self, now: float) -> None:
        for key in [key for key, member in self._members.items() if now - member.last_heartbeat > FORGET_AFTER_S]:
            del self._members[key]
