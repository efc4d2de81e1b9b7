"""Signs of life: what a worker says to a ping, and what a client has heard of each worker.

    worker: pong(how long the store has been silent) ──▶ client: Signs ──▶ is it at work? does its load go on?

Owns the words of both sides and the client's memory of them. Refuses to judge: that is the reads' affair.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["AT_HAND", "NOT_AT_HAND", "PING", "PING_AFTER", "Signs", "pong", "store_silence"]

PING = "ping"
"""The Flight action that a data worker answers at once, whatever else it does."""
PING_AFTER = 0.25
"""A worker is pinged once a read has waited for this part of hedge_s; the rest is its time to answer under load."""
AT_HAND = "stormjib-at-hand"
"""The header of a read that is to be answered only where nothing must be asked of the store for it."""
NOT_AT_HAND = "NotAtHand"
"""The kind of the error that such a read ends with otherwise."""


def pong(store_silent_s: float | None) -> bytes:
    """The answer to a ping.

    Args:
        store_silent_s: for how long no byte came of a shard that a ticket waits for; None where none waits.
    """
    return json.dumps({} if store_silent_s is None else {"store_silent_s": round(store_silent_s, 3)}).encode()


def store_silence(answer: bytes) -> float | None:
    """What `pong` was given; None too where the answer does not say."""
    try:
        return max(0.0, float(json.loads(answer)["store_silent_s"]))
    except (ValueError, KeyError, TypeError):
        return None


@dataclass
class _Worker:
    """What was heard of one worker, in seconds of the clock."""

    pinging: bool = False
    pinged: float = float("-inf")
    """When it was pinged last."""
    silent_since: float | None = None
    """The first ping behind its last sign of life."""
    store_heard: float | None = None
    """When bytes of the shards that it loads came last."""


class Signs:
    """What was heard of the workers. Thread-safe; the threads that hear something write it down themselves."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._workers: dict[str, _Worker] = {}

    def begin_ping(self, worker_id: str, gap_s: float) -> bool:
        """Whether to ping a worker now: no ping is on its way, and none went off within `gap_s`."""
        with self._lock:
            worker = self._workers.setdefault(worker_id, _Worker())
            if worker.pinging or self._clock() < worker.pinged + gap_s:
                return False
            worker.pinging = True
            return True

    def sent(self, worker_id: str) -> None:
        """A ping goes off now: its worker's silence, if it is any, counts from here."""
        with self._lock:
            worker = self._workers.setdefault(worker_id, _Worker())
            worker.pinged = self._clock()
            if worker.silent_since is None:
                worker.silent_since = worker.pinged

    def ended(self, worker_id: str) -> None:
        """A ping came back, or was given up."""
        with self._lock:
            self._workers.setdefault(worker_id, _Worker()).pinging = False

    def heard(self, worker_id: str, store_silent_s: float | None = None) -> None:
        """A worker answered, whatever it said."""
        with self._lock:
            worker = self._workers.setdefault(worker_id, _Worker())
            worker.silent_since = None
            if store_silent_s is not None:
                worker.store_heard = self._clock() - store_silent_s

    def forget(self, worker_ids: set[str]) -> None:
        """Remember these workers only."""
        with self._lock:
            self._workers = {key: one for key, one in self._workers.items() if key in worker_ids}

    def silent_since(self, worker_id: str) -> float | None:
        """Since when pings are not answered; None where nothing is open."""
        worker = self._workers.get(worker_id)
        return None if worker is None else worker.silent_since

    def store_heard(self, worker_id: str) -> float | None:
        """When the shards that a worker loads last moved on, as far as it was asked."""
        worker = self._workers.get(worker_id)
        return None if worker is None else worker.store_heard
