"""The ticket of a read: which plan, which global batches, which of their slots.

Owns its JSON form and its limits. A ticket asks for little (a few MiB), so a worker can answer it whole, a deadline can
cover it, and a client that stops reading leaves nothing running.
"""

import json
from dataclasses import dataclass

from data_service.plan import Plan

__all__ = ["MAX_TICKET_BATCHES", "MAX_TICKET_BYTES", "MAX_TICKET_ROWS", "MAX_TICKET_TOKENS", "Ticket"]

MAX_TICKET_BATCHES = 1024
"""Each batch costs a permutation, however few of its slots are asked for. data.service.run_ahead is at most this."""
MAX_TICKET_BYTES = 4096
MAX_TICKET_ROWS = 65_536
MAX_TICKET_TOKENS = 2**25
TICKET_VERSION = 1


@dataclass(frozen=True)
class Ticket:
    """Slots [slots[0], slots[1]) of each of the global batches [first, last)."""

    plan: Plan
    first: int
    last: int
    slots: tuple[int, int]

    def __post_init__(self) -> None:
        """Check ranges and size."""
        if not 0 <= self.first < self.last < 2**62:
            raise ValueError(f"ticket: batches [{self.first}, {self.last}) are no range.")
        if not 0 <= self.slots[0] < self.slots[1] <= self.plan.global_batch:
            raise ValueError(f"ticket: slots {self.slots} are no range within {self.plan.global_batch} rows.")
        if self.last - self.first > MAX_TICKET_BATCHES:
            raise ValueError(
                f"ticket: {self.last - self.first} batches are too many for one ticket ({MAX_TICKET_BATCHES})."
            )
        rows = (self.last - self.first) * (self.slots[1] - self.slots[0])
        if rows > MAX_TICKET_ROWS or (self.plan.seq_len + 1) * rows > MAX_TICKET_TOKENS:
            raise ValueError(
                f"ticket: {rows} rows of {self.plan.seq_len + 1} tokens are too many for one ticket "
                f"({MAX_TICKET_ROWS} rows, {MAX_TICKET_TOKENS} tokens)."
            )

    def to_bytes(self) -> bytes:
        """The ticket as it travels."""
        return json.dumps(
            {
                "v": TICKET_VERSION,
                "plan": json.loads(self.plan.to_json()),
                "first": self.first,
                "last": self.last,
                "slots": list(self.slots),
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Ticket":
        """Read a ticket from the network.

        Raises:
            ValueError: when it is not one, or asks for too much.
            CursorMismatchError: when its plan is of another version.
        """
        if len(data) > MAX_TICKET_BYTES:
            raise ValueError(f"ticket: {len(data)} bytes, at most {MAX_TICKET_BYTES}.")
        try:
            value = json.loads(data.decode())
        except RecursionError as error:
            raise ValueError("ticket: nested too deeply.") from error
        if not isinstance(value, dict) or set(value) != {"v", "plan", "first", "last", "slots"}:
            raise ValueError("ticket: its keys differ.")
        numbers = [value["v"], value["first"], value["last"]]
        slots = value["slots"]
        if not isinstance(slots, list) or len(slots) != 2 or any(type(number) is not int for number in numbers + slots):
            raise ValueError("ticket: numbers are not integers.")
        if value["v"] != TICKET_VERSION:
            raise ValueError(f"ticket: version {value['v']}, not {TICKET_VERSION}.")
        return cls(
            plan=Plan.from_object(value["plan"]), first=value["first"], last=value["last"], slots=(slots[0], slots[1])
        )
