"""Asking a remote store early for the shards that a worker will need.

The order of rows is a function, and a ticket holds it: so a worker knows which shards the batches a little further on
take their rows from, and which of those are its own. Where shuffling goes on to the next window, they are on this
machine's disk by the time the first ticket asks for them.

Owns how far it looks ahead. Refuses to answer for anything: what it did not bring, or could not, the ticket brings.
"""

import logging
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from data_service.cache import ShardCache
from data_service.errors import StormjibError
from data_service.manifest import DatasetManifest
from data_service.order import rows_of_batch, shards_of
from data_service.ownership import owners_of_rows
from data_service.plan import Plan
from data_service.shards import ShardEntry, ShardIndex
from data_service.ticket import Ticket

__all__ = ["Prefetch", "entries_of"]

_LOG = logging.getLogger(__name__)
AHEAD_BATCHES = 16
"""How far behind the end of a ticket it looks."""
EVERY_BATCHES = 4
"""It looks at one batch out of so many; the rows of a few batches lie in all shards of their windows."""
_MAX_ROWS = 4096
_MAX_WAITING = 16
_KEPT = 256


def entries_of(
    manifest: DatasetManifest, index: ShardIndex, plan: Plan, row_ids: npt.NDArray[np.uint64]
) -> list[ShardEntry]:
    """The shards that rows lie in, each once.

    Raises:
        ShardCorruptError: when the index is damaged.
    """
    first = {(part.source, part.generation): part.first_shard for part in manifest.splits[plan.split]}
    bases = np.array([first[part.source, part.generation] for part in plan.parts], dtype=np.uint64)
    part, shard = shards_of(plan, row_ids)
    return [index.entry(plan.split, number) for number in np.unique(bases[part] + shard).tolist()]


class Prefetch:
    """Looks ahead of tickets, in a thread of its own."""

    def __init__(self, manifest: DatasetManifest, index: ShardIndex, cache: ShardCache) -> None:
        self._manifest = manifest
        self._index = index
        self._cache = cache
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._waiting = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shard-look-ahead")

    def note(self, ticket: Ticket) -> None:
        """A ticket is being answered: look at a batch behind it, unless one of the same stretch was looked at."""
        if not self._cache.remote or not ticket.plan.shuffle:
            return
        step = (ticket.last + AHEAD_BATCHES) // EVERY_BATCHES * EVERY_BATCHES
        key = (ticket.plan.digest, ticket.members, ticket.member, step)
        with self._lock:
            if key in self._seen or self._waiting >= _MAX_WAITING:
                return
            self._seen[key] = None
            if len(self._seen) > _KEPT:
                self._seen.popitem(last=False)
            self._waiting += 1
        self._pool.submit(self._look, ticket, step)

    def fetch(self, plan: Plan, row_ids: npt.NDArray[np.uint64]) -> None:
        """Open all shards that rows lie in, so that reading the rows cannot fail.

        Raises:
            ShardCorruptError: naming the shard.
            DataUnavailableError: naming the shard, when the storage gives no answer.
        """
        self._cache.get(entries_of(self._manifest, self._index, plan, row_ids))

    def at_hand(self, plan: Plan, row_ids: npt.NDArray[np.uint64]) -> bool:
        """Whether reading rows asks nothing more of the store: their shards are here, or on their way.

        Raises:
            ShardCorruptError: when the index is damaged.
        """
        if not self._cache.remote:
            return True
        return all(map(self._cache.at_hand, entries_of(self._manifest, self._index, plan, row_ids)))

    def _look(self, ticket: Ticket, step: int) -> None:
        plan = ticket.plan
        try:
            rows = rows_of_batch(plan, step, 0, min(plan.global_batch, _MAX_ROWS))
            if ticket.members:
                rows = rows[owners_of_rows(plan, ticket.members, rows) == ticket.member]
            self._cache.prefetch(entries_of(self._manifest, self._index, plan, rows))
        except (StormjibError, OSError) as error:
            _LOG.debug("no look ahead at step %d: %s", step, error)
        finally:
            with self._lock:
                self._waiting -= 1

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
