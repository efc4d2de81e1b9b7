"""What a rank reads its data with: the plan of a split, and streams of its slots of each global batch.

Owns the public face of the client; `stream`, `reads`, `members`, `connections` and `delivery` do the work. It knows
addresses and a token, never a dataset path.
"""

import threading
import time
from collections.abc import Iterator
from typing import Literal

from data_service.access import DataAccess
from data_service.connections import Connections
from data_service.errors import DataError, DataUnavailableError
from data_service.plan import Plan
from data_service.schema import NO_ROW, BatchSlice
from data_service.stream import Stream

__all__ = ["NO_ROW", "BatchSlice", "DataClient"]

_PAUSE_S = 0.1


class DataClient:
    """Reads batches from the data service. Thread-safe; one per rank is enough."""

    def __init__(self, access: DataAccess) -> None:
        self._access = access
        self._connections = Connections(access)
        self._lock = threading.Lock()
        self._plans: dict[str, Plan] = {}
        self._streams: set[Stream] = set()
        self._closed = threading.Event()

    def plan(self, split: Literal["train", "eval"]) -> Plan:
        """The plan of a split for the order in `DataAccess`; asked for once, waiting up to `stalled_s` for an answer.

        Raises:
            EmptySplitError: when the split holds no rows.
            ConfigError: when the service holds another dataset, or cannot put this one in such an order.
            CursorMismatchError: when the service makes plans of another version.
            DataUnavailableError: when no control plane answers in time.
        """
        with self._lock:
            if split in self._plans:
                return self._plans[split]
        deadline = time.monotonic() + self._access.stalled_s
        while True:
            try:
                plan = Plan.from_json(self._connections.plan_json(split))
                break
            except DataUnavailableError:
                if time.monotonic() >= deadline or self._closed.wait(_PAUSE_S):
                    raise
        with self._lock:
            return self._plans.setdefault(split, plan)

    def stream(
        self, split: Literal["train", "eval"], start: int, stop: int, slots: tuple[int, int]
    ) -> Iterator[BatchSlice]:
        """Slots [slots[0], slots[1]) of the global batches of the step indices [start, stop), in order.

        Reading runs ahead in a thread, from the first `next` until the iterator is exhausted or closed. Slots at or
        past the global batch, and slots past the tail of an eval plan, come as masked rows.

        Raises:
            ValueError: for an empty range of slots, or steps that the plan does not have.
            DataStalledError: when no worker delivered a batch for `stalled_s`.
            DeliveryError: when every worker delivered other rows than the plan's.
            ShardCorruptError: when no worker can read a shard that is needed.
            DataError: when every worker refuses to answer, or the client is closed.
        """
        plan = self.plan(split)
        if not 0 <= start <= stop or (not plan.shuffle and stop > plan.num_batches):
            raise ValueError(
                f"steps [{start}, {stop}) of the {split} plan were asked for, it has {plan.num_batches} batches."
            )
        if not 0 <= slots[0] < slots[1]:
            raise ValueError(f"slots {slots} are no range.")
        return self._iterate(Stream(self._connections, self._access, plan, start, stop, slots), stop - start)

    def _iterate(self, stream: Stream, count: int) -> Iterator[BatchSlice]:
        with self._lock:
            if self._closed.is_set():
                raise DataError("a stream of batches was asked for, the data client is closed.")
            self._streams.add(stream)
        stream.start()
        try:
            for _ in range(count):
                yield stream.next()
        finally:
            stream.close()
            with self._lock:
                self._streams.discard(stream)

    def close(self) -> None:
        """End all streams and connections; a reader that waits for a batch gets a DataError."""
        self._closed.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        self._connections.close()
