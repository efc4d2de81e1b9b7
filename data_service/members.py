"""Which data workers a client may ask: what the control plane last said, and what the client saw itself.

A thread asks the control plane about once a second, and at once after a failure. Reads only ever look at the last
answer, so they go on while the control plane is silent, stopped or new and not yet settled.

A client's doubts decide whom it asks first, and not whose a shard is: shards are divided by what the control plane
says, so that all clients divide alike, and a worker that was late for once does not have its shards loaded by others.

Owns the view and the client's own suspicions. Refuses to open connections to workers.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data_service.errors import DataError
from data_service.signs import Signs

__all__ = ["Member", "KnownMembers", "MembersAnswer"]

_LOG = logging.getLogger(__name__)
REFRESH_S = 1.0
_SOONEST_S = 0.1
_FIRST_DOUBT_S = 1.0
_LONGEST_DOUBT_S = 30.0
_MAX_REPORTS = 256


@dataclass(frozen=True)
class Member:
    """One data worker."""

    worker_id: str
    address: str
    alive: bool
    """As far as the control plane knows."""


@dataclass(frozen=True)
class MembersAnswer:
    """What the control plane says."""

    members: tuple[Member, ...]
    settled: bool
    """Whether workers that it does not name are gone; otherwise it may have begun just now."""


@dataclass
class _Doubt:
    """Failures of a worker in a row, and until when it is asked only if there is no other."""

    strikes: int
    since: float
    until: float
    silent: bool
    """It only gave no sign of life: any sign ends the doubt."""

    def holds(self, now: float) -> bool:
        return self.since <= now < self.until


class KnownMembers:
    """The known members. Thread-safe; nothing here waits for the control plane but `wait`."""

    def __init__(
        self,
        fetch: Callable[[], MembersAnswer],
        report: Callable[[str, str], None],
        joined: Callable[[Sequence[Member]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the view; `start` begins to ask.

        Args:
            fetch: asks the control plane for the members; raises DataError.
            report: tells it that a worker (id) failed, and why; raises DataError.
            joined: called in the view's thread with members that were not known before.
            clock: seconds, for doubts.
        """
        self._fetch = fetch
        self._report = report
        self._joined = joined
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._known: tuple[Member, ...] = ()
        self._doubts: dict[str, _Doubt] = {}
        self.signs = Signs(clock)
        """What was heard of each worker."""
        self._reports: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._silence: str | None = None
        self._thread = threading.Thread(target=self._run, name="data-members", daemon=True)

    def start(self) -> None:
        """Begin to ask the control plane."""
        self._thread.start()

    def known(self) -> tuple[Member, ...]:
        """All members, sorted by id, those that are not alive included."""
        return self._known

    def owners(self) -> tuple[Member, ...]:
        """The members that shards are divided among, sorted by id: those alive for the control plane, or else all."""
        known = self._known
        return tuple(one for one in known if one.alive) or known

    def trusted(self) -> tuple[Member, ...]:
        """The members to ask first, sorted by id: alive and not in doubt, or else the least bad."""
        with self._lock:
            now = self._clock()
            sure = [one for one in self._known if not self._in_doubt(one, now)]
            alive = [one for one in self._known if one.alive]
            best = [one for one in sure if one.alive] or alive or sure
            return tuple(best) or self._known

    @property
    def silence(self) -> str | None:
        """Why the control plane gave no answer when it was asked last; None when it did."""
        return self._silence

    def wait(self, timeout_s: float) -> None:
        """Return when a member is known, or after a time."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._known) or self._closed.is_set(), timeout_s)

    def failed(
        self, member: Member, reason: str, kind: Literal["failed", "hangs", "silent"] = "failed", after_s: float = 0.0
    ) -> None:
        """A read of this worker failed: ask others first for a while.

        Args:
            member: the worker.
            reason: for messages.
            kind: `failed` is told to the control plane; `hangs` is not, for its process answers; `silent` neither, for
                nothing failed: it gives no sign of life, and any sign ends the doubt.
            after_s: when the doubt begins.
        """
        with self._lock:
            doubt, now = self._doubts.get(member.worker_id), self._clock()
            # Reads that were in flight together fail together: that is one strike.
            if doubt is not None and now < doubt.until and (kind == "silent" or not doubt.silent):
                return
            strikes = 0 if doubt is None else doubt.strikes
            since = now + after_s
            until = since + min(_LONGEST_DOUBT_S, _FIRST_DOUBT_S * 2.0**strikes)
            self._doubts[member.worker_id] = _Doubt(strikes + 1, since, until, kind == "silent")
            if kind == "failed" and self._reports.qsize() < _MAX_REPORTS:
                self._reports.put((member.worker_id, reason))
        # It may quote anything, and a log takes no lone surrogate.
        said = reason.encode("utf-8", "backslashreplace").decode()
        if kind == "silent":
            _LOG.info("data worker %s: %s. Asking another too.", member.address, said)
            return
        _LOG.warning("data worker %s failed: %s. Asking others first.", member.address, said)
        self._wake.set()

    def served(self, worker_id: str) -> None:
        """A read of this worker succeeded."""
        self.signs.heard(worker_id)
        if worker_id in self._doubts:
            with self._lock:
                self._doubts.pop(worker_id, None)

    def lives(self, worker_id: str, store_silent_s: float | None = None) -> None:
        """This worker's process answers, whatever its reads do; see `signs.pong` for what it may say."""
        self.signs.heard(worker_id, store_silent_s)
        with self._lock:
            doubt = self._doubts.get(worker_id)
            if doubt is not None and doubt.silent:
                del self._doubts[worker_id]

    def close(self) -> None:
        """End the thread; it may be in a call for a moment longer."""
        self._closed.set()
        self._wake.set()
        with self._changed:
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, behind `close`."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def take(self, answer: MembersAnswer) -> None:
        """Believe the control plane, but for what it may not know yet."""
        found = {one.worker_id: one for one in answer.members}
        with self._changed:
            before = {one.worker_id: one for one in self._known}
            if not answer.settled:
                # A worker that registered anew under the same address replaces the one known there.
                taken = {one.address for one in answer.members}
                found |= {key: one for key, one in before.items() if key not in found and one.address not in taken}
            elif not found:
                # A control plane that lost all its workers knows less than we do: they may well answer.
                found = {key: replace(one, alive=False) for key, one in before.items()}
            self._known = tuple(found[key] for key in sorted(found))
            for key in [key for key in self._doubts if key not in found]:
                del self._doubts[key]
            self.signs.forget(set(found))
            self._changed.notify_all()
        if new := [one for one in self._known if one.worker_id not in before]:
            self._joined(new)

    def _in_doubt(self, member: Member, now: float) -> bool:
        doubt = self._doubts.get(member.worker_id)
        return doubt is not None and doubt.holds(now)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.clear()
            try:
                while not self._reports.empty():
                    self._report(*self._reports.get())
                self.take(self._fetch())
                self._silence = None
            except DataError as error:
                if self._silence is None and not self._closed.is_set():
                    _LOG.warning("%s Going on with the %d workers known from before.", error, len(self._known))
                self._silence = str(error)
            except Exception as error:  # a thread that ends would leave the view as it is for good
                if self._silence is None:
                    _LOG.exception("asking for the data workers failed. Going on with those known from before.")
                self._silence = f"{type(error).__name__}: {error}"
            if self._closed.wait(_SOONEST_S):
                return
            self._wake.wait(REFRESH_S - _SOONEST_S)
