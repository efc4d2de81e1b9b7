"""One ticket on its way: whom to ask, whom else when that takes long, and when to give up.

    asked ──answer──▶ done
      │ silent for a quarter of hedge_s: is its process there at all?    yes: it is at work, wait on
      │ silent for hedge_s: ask the next member too, the first good answer counts
      │ failed, refused, or no answer for read_stall_s: ask the next member
      ├ every member that lives refused, or found damage: that error
      ▼ nobody answered for stalled_s: DataStalledError

Every member can answer every ticket; the owner of its shards comes first, then the others in an order that the ticket
decides. Owns these decisions for one ticket. The clock is passed in; asking is done by the caller's functions.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from data_service.access import DataAccess
from data_service.connections import TokenRefusedError
from data_service.delivery import Wanted
from data_service.errors import (
    CursorMismatchError,
    DataError,
    DataStalledError,
    DataUnavailableError,
    ShardCorruptError,
)
from data_service.members import KnownMembers, Member
from data_service.ticket import Ticket

__all__ = ["Attempt", "TicketRead", "stalled_error"]

_LOG = logging.getLogger(__name__)
_MAX_AT_ONCE = 3
_SLOWEST_BYTES_PER_S = 2 << 20
_PAUSE_S = 0.1
_PING_AFTER = 0.25
"""Of hedge_s: the rest is the time that a worker under load has to answer."""


@dataclass(eq=False)
class Attempt:
    """One member asked for the ticket."""

    member: Member
    timeout_s: float
    """The deadline of the call."""
    since: float
    """When it was asked, or last seen to be at work."""
    pinged: bool = False
    over: bool = False
    """It failed, or is not needed any more."""


class TicketRead:
    """The state of one ticket. Used by one thread."""

    def __init__(
        self,
        ticket: Ticket,
        wanted: Wanted,
        access: DataAccess,
        members: KnownMembers,
        ask: Callable[["TicketRead", Attempt], None],
        ping: Callable[["TicketRead", Attempt], None],
        now: float,
    ) -> None:
        """Begin; the first member is asked by the first `watch`.

        Args:
            ticket: what to ask for.
            wanted: its rows.
            access: deadlines.
            members: who may be asked.
            ask: begins an attempt; its end is told by `failed`, or by `finish`.
            ping: asks whether an attempt's process answers, told by `alive`.
            now: seconds.
        """
        self.ticket = ticket
        self.payload = ticket.to_bytes()
        self.wanted = wanted
        self._access = access
        self._members = members
        self._ask = ask
        self._ping = ping
        self._began = now
        self._pause_until = now
        self._attempts: list[Attempt] = []
        self._failed: set[str] = set()
        self._refused: dict[str, DataError] = {}
        self._last_failure = "no data worker answered"
        self.done = False

    def watch(self, now: float) -> float:
        """Do what is due; returns when to look again.

        Raises:
            DataStalledError: when nobody answered for `stalled_s`.
            ShardCorruptError: when every member that lives found the same rows damaged, or refused the ticket.
            DataError: when every member that lives refused the ticket.
        """
        deadline = self._began + self._access.stalled_s
        if now >= deadline:
            self.cancel()
            if damage := [one for one in self._refused.values() if isinstance(one, ShardCorruptError)]:
                raise damage[0]
            raise stalled_error(self.ticket, self._access, self._last_failure)
        if now < self._pause_until:
            return min(self._pause_until, deadline)
        running = [one for one in self._attempts if not one.over]
        if not running:
            if not self._ask_next(now):
                self._end_round(now)
                return min(self._pause_until, deadline)
            return min(now + self._access.hedge_s * _PING_AFTER, deadline)
        newest, hedge_s = running[-1], self._access.hedge_s
        if now >= newest.since + hedge_s:
            self._members.failed(newest.member, f"no answer for {hedge_s} s", silent=True)
            if len(running) >= _MAX_AT_ONCE or not self._ask_next(now):
                newest.since, newest.pinged = now, False
            return min(now + hedge_s * _PING_AFTER, deadline)
        if now >= newest.since + hedge_s * _PING_AFTER and not newest.pinged:
            newest.pinged = True
            self._ping(self, newest)
        return min(newest.since + (hedge_s if newest.pinged else hedge_s * _PING_AFTER), deadline)

    def alive(self, attempt: Attempt, now: float) -> None:
        """The process of an attempt answers: it is slow, not gone."""
        self._members.lives(attempt.member.worker_id)
        attempt.since, attempt.pinged = now, False

    def failed(self, attempt: Attempt, error: DataError) -> None:
        """An attempt ended without an answer."""
        if attempt.over:
            return
        attempt.over = True
        member = attempt.member
        if isinstance(error, DataUnavailableError):
            self._failed.add(member.worker_id)
        else:
            self._refused[member.worker_id] = error
        if isinstance(error, ShardCorruptError):
            _LOG.warning("%s Asking another data worker.", error)
        else:
            self._last_failure = f"{member.address}: {error}"
            self._members.failed(member, str(error))

    def finish(self, attempt: Attempt) -> None:
        """An attempt brought the answer; the others are not needed."""
        self.done = True
        self.cancel()

    def cancel(self) -> None:
        """Nothing is wanted any more."""
        for one in self._attempts:
            one.over = True

    def _ask_next(self, now: float) -> bool:
        """Ask the best member that was not asked in this round; False when there is none."""
        tried = {one.member.worker_id for one in self._attempts if not one.over} | self._failed | set(self._refused)
        candidates = [one for one in self._members.known() if one.worker_id not in tried]
        if not candidates:
            return False
        trusted = {one.worker_id for one in self._members.trusted()}
        member = min(candidates, key=lambda one: (one.worker_id not in trusted, self._rank(one)))
        rows = self.wanted.row_id.size
        patience_s = self._access.read_stall_s + rows * (self.ticket.plan.seq_len + 1) * 4 / _SLOWEST_BYTES_PER_S
        left_s = self._began + self._access.stalled_s - now
        self._attempts = [one for one in self._attempts if not one.over]
        self._attempts.append(Attempt(member, max(0.001, min(patience_s, left_s)), now))
        self._ask(self, self._attempts[-1])
        return True

    def _rank(self, member: Member) -> bytes:
        """The owner first, then rendezvous order."""
        ticket = self.ticket
        if ticket.members and ticket.members[ticket.member] == member.worker_id:
            return b""
        key = f"{ticket.plan.digest}/{ticket.first}/{ticket.slots[0]}/{ticket.member}/{member.worker_id}"
        return hashlib.blake2b(key.encode(), digest_size=8).digest()

    def _end_round(self, now: float) -> None:
        """Everybody was asked: give up where all that live refused, else begin again after a pause."""
        known = self._members.known()
        living = [one.worker_id for one in known if one.alive]
        if living and all(one in self._refused for one in living):
            raise min((self._refused[one] for one in living), key=_distance)
        if not known:
            self._last_failure = "no data worker is registered"
        self._failed.clear()
        self._pause_until = now + _PAUSE_S


def _distance(error: DataError) -> int:
    """How little a refusal says about the data: another run's worker refuses the token, or the ticket."""
    kinds = (ShardCorruptError, CursorMismatchError)
    for number, kind in enumerate(kinds):
        if isinstance(error, kind):
            return number
    return len(kinds) + isinstance(error, TokenRefusedError)


def stalled_error(ticket: Ticket, access: DataAccess, last_failure: str) -> DataStalledError:
    """The end of a stream that nobody served."""
    return DataStalledError(
        f"global batches {ticket.first} to {ticket.last - 1} of the {ticket.plan.split} split were asked for, no data "
        f"worker delivered them within {access.stalled_s} s (data.service.stalled_s). The last failure: "
        f"{last_failure}. Check the data workers, or raise the limit."
    )
