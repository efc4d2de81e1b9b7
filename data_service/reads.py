"""One ticket on its way: whom to ask, whom else when that takes long, and when to give up.

    asked ──answer──▶ done
      │ silent for a quarter of hedge_s: is its process there at all?    yes: it is at work, wait on
      │ silent for hedge_s: ask the next member too, for what it has at hand; the first good answer counts
      │ silent for twice hedge_s: ask that member in full, though it must load the shards
      │ failed, refused: ask the next member
      │ no answer for read_stall_s, nor bytes from the store for the shards that it loads: ask the next member
      ├ every member that lives refused, or found damage: that error
      ▼ nobody answered for stalled_s: DataStalledError

Every member can answer every ticket; the owner of its shards comes first, then the others in the same order for all
tickets of that owner, so that what one of them had to load serves the others. Another member that has to load a shard
costs the object store a download, so silence is told from slowness with care: an answer to a ping, late as it may be,
is life; a load goes on while its bytes come; and a client that was late itself judges nobody.

Owns these decisions for one ticket. The clock is passed in; asking is done by the caller's functions.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from data_service.access import DataAccess
from data_service.connections import NotAtHandError, TokenRefusedError, WorkerFailedError
from data_service.delivery import Wanted
from data_service.errors import (
    CursorMismatchError,
    DataError,
    DataStalledError,
    DataUnavailableError,
    DeliveryError,
    ShardCorruptError,
)
from data_service.members import KnownMembers, Member
from data_service.ownership import fallbacks
from data_service.signs import PING_AFTER
from data_service.ticket import Ticket

__all__ = ["Attempt", "TicketRead", "stalled_error"]

_LOG = logging.getLogger(__name__)
_MAX_AT_ONCE = 3
_SLOWEST_BYTES_PER_S = 2 << 20
_PAUSE_S = 0.1
_LOADING_SHARE = 1 / 3
"""Of stalled_s: a worker that loads is waited for this long at most, so that two others may still be asked."""


@dataclass(eq=False)
class Attempt:
    """One member asked for the ticket."""

    member: Member
    timeout_s: float
    """The deadline of the call."""
    patience_s: float
    """How long it may give no answer while nothing is loaded for it."""
    asked: float
    since: float
    """When it was asked, or another was asked beside it."""
    at_hand: bool = False
    """It is to answer only where it need not ask the store."""
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
        ping: Callable[[Member], None],
        now: float,
    ) -> None:
        """Begin; the first member is asked by the first `watch`.

        Args:
            ticket: what to ask for.
            wanted: its rows.
            access: deadlines.
            members: who may be asked.
            ask: begins an attempt; its end is told by `failed`, or by `finish`.
            ping: asks whether a member's process answers; `members.signs` hear of it.
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
        self._lacking: list[Member] = []
        """Members that answer, and would have to load what is asked for."""
        self._due = float("inf")
        self._late = False
        self._last_failure = "no data worker answered"
        self.done = False

    def watch(self, now: float) -> float:
        """Do what is due; returns when to look again.

        Raises:
            DataStalledError: when nobody answered for `stalled_s`.
            ShardCorruptError: when every member that lives found the same rows damaged, or refused the ticket.
            DataError: when every member that lives refused the ticket.
        """
        self._due = self._watch(now)
        return self._due

    def _watch(self, now: float) -> float:
        pause_s = self._access.hedge_s * PING_AFTER
        # One that comes late may have been short of time itself: what was answered meanwhile is to be heard first.
        self._late = not self._late and now > self._due + pause_s
        if self._late:
            return now + pause_s
        deadline = self._began + self._access.stalled_s
        if now >= deadline:
            self.cancel()
            if damage := [one for one in self._refused.values() if isinstance(one, ShardCorruptError)]:
                raise damage[0]
            raise stalled_error(self.ticket, self._access, self._last_failure)
        if now < self._pause_until:
            return min(self._pause_until, deadline)
        for one in self._running():
            if now >= self._gives_up_at(one):
                self.failed(one, WorkerFailedError(f"no answer for {now - one.asked:.1f} s"), hangs=True)
        running = self._running()
        if not running:
            if not self._ask_next(now):
                self._end_round(now)
                return min(self._pause_until, deadline)
            return min(now + pause_s, deadline)
        for one in running:
            if now >= one.since + pause_s:
                self._ping(one.member)
        self._hedge(running, now)
        return min(now + pause_s, deadline, *(max(now + 0.001, self._gives_up_at(one)) for one in running))

    def _running(self) -> list[Attempt]:
        return [one for one in self._attempts if not one.over]

    def _silent_s(self, one: Attempt, since: float, now: float) -> float:
        """For how long an attempt's process has answered no ping, counted from `since` at the earliest."""
        silent_since = self._members.signs.silent_since(one.member.worker_id)
        return 0.0 if silent_since is None else now - max(silent_since, since)

    def _gives_up_at(self, one: Attempt) -> float:
        """When an attempt has hung: its patience behind the last bytes that its worker got from the store."""
        heard = self._members.signs.store_heard(one.member.worker_id)
        longest_s = max(one.patience_s, self._access.stalled_s * _LOADING_SHARE)
        return min(max(one.asked, heard or 0.0) + one.patience_s, one.asked + longest_s)

    def _hedge(self, running: list[Attempt], now: float) -> None:
        """Ask one more member where the last one that was asked gives no sign of life."""
        hedge_s, newest = self._access.hedge_s, running[-1]
        silent_s = hedge_s * (1 - PING_AFTER)
        if self._silent_s(newest, newest.since, now) < silent_s:
            return
        self._members.failed(newest.member, f"no sign of life for {hedge_s} s", "silent", hedge_s)
        if len(running) >= _MAX_AT_ONCE:
            newest.since = now
        elif not self._lacking:
            if not self._ask_next(now, at_hand=True):
                newest.since = now
        elif all(self._silent_s(one, one.asked, now) >= silent_s + hedge_s for one in running if not one.at_hand):
            self._begin(self._lacking.pop(0), now)

    def failed(self, attempt: Attempt, error: DataError, *, hangs: bool = False) -> None:
        """An attempt ended without an answer; or it hangs, and is given up."""
        if attempt.over:
            return
        attempt.over = True
        member = attempt.member
        if isinstance(error, NotAtHandError):
            self._lacking.append(member)
            return
        if isinstance(error, DataUnavailableError):
            self._failed.add(member.worker_id)
        else:
            self._refused[member.worker_id] = error
        if isinstance(error, ShardCorruptError):
            _LOG.warning("%s Asking another data worker.", error)
        else:
            self._last_failure = f"{member.address}: {error}"
            self._members.failed(member, str(error), "hangs" if hangs else "failed")

    def finish(self, attempt: Attempt) -> None:
        """An attempt brought the answer; the others are not needed."""
        self.done = True
        self.cancel()

    def cancel(self) -> None:
        """Nothing is wanted any more."""
        for one in self._attempts:
            one.over = True

    def _ask_next(self, now: float, *, at_hand: bool = False) -> bool:
        """Ask the best member that was not asked in this round; False when there is none."""
        tried = {one.member.worker_id for one in self._running()} | self._failed | set(self._refused)
        candidates = [one for one in self._members.known() if one.worker_id not in tried]
        if not candidates:
            return False
        trusted = {one.worker_id for one in self._members.trusted()}
        order = self._order()
        keys = {one: (one.worker_id not in trusted, order.get(one.worker_id, len(order))) for one in candidates}
        member = min(candidates, key=keys.__getitem__)
        self._begin(member, now, at_hand=at_hand)
        return True

    def _begin(self, member: Member, now: float, *, at_hand: bool = False) -> None:
        rows = self.wanted.row_id.size
        patience_s = self._access.read_stall_s + rows * (self.ticket.plan.seq_len + 1) * 4 / _SLOWEST_BYTES_PER_S
        longest_s = max(patience_s, self._access.stalled_s * _LOADING_SHARE)
        left_s = self._began + self._access.stalled_s - now
        self._lacking = [one for one in self._lacking if one != member]
        self._attempts = self._running()
        self._attempts.append(
            Attempt(member, max(0.001, min(longest_s, left_s)), patience_s, now, now, at_hand=at_hand)
        )
        self._ask(self, self._attempts[-1])

    def _order(self) -> dict[str, int]:
        """Places of the ticket's members: the owner first, then the others in the order of all its tickets."""
        members = self.ticket.members
        if not members:
            return {}
        places = [self.ticket.member, *fallbacks(members, self.ticket.member)]
        return {members[number]: place for place, number in enumerate(places)}

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
    kinds = (ShardCorruptError, DeliveryError, CursorMismatchError)
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
