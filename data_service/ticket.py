"""The ticket of a read: which plan, which steps, which of their slots, and which of the cluster's members answers.

Owns its JSON form, its limits and what it asks for. A ticket asks for little (a few MiB), so a worker can answer it
whole, a deadline can cover it, and a client that stops reading leaves nothing running. It says all: any worker can
answer any ticket, with the same rows.
"""

import json
from dataclasses import dataclass
from functools import lru_cache

from data_service.order import BatchRows
from data_service.order_blocks import owned_rows
from data_service.plan import MAX_PLAN_BYTES, Plan

__all__ = [
    "MAX_MEMBERS",
    "MAX_MEMBER_CHARS",
    "MAX_TICKET_BATCHES",
    "MAX_TICKET_BYTES",
    "MAX_TICKET_ROWS",
    "MAX_TICKET_TOKENS",
    "Ticket",
]

MAX_TICKET_BATCHES = 1024
"""data.service.run_ahead is at most this."""
MAX_TICKET_ROWS = 65_536
"""Before the rows of other members are left out."""
MAX_TICKET_TOKENS = 2**25
MAX_MEMBERS = 256
MAX_MEMBER_CHARS = 64
MAX_TICKET_BYTES = MAX_PLAN_BYTES + 2**15
"""A plan, and as many members as there may be."""
TICKET_VERSION = 2


@dataclass(frozen=True)
class Ticket:
    """Rows of slots [slots[0], slots[1]) of each of the steps [first, last) whose shard is owned by one member."""

    plan: Plan
    first: int
    last: int
    slots: tuple[int, int]
    members: tuple[str, ...] = ()
    """Worker ids, sorted, each once; none, and member 0, for all rows."""
    member: int = 0
    """Index in `members`."""

    def __post_init__(self) -> None:
        """Check ranges and size.

        Raises:
            ValueError: for a ticket that is none, or asks for too much.
        """
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
        if len(self.members) > MAX_MEMBERS or not all(1 <= len(one) <= MAX_MEMBER_CHARS for one in self.members):
            raise ValueError(f"ticket: at most {MAX_MEMBERS} members with names of 1 to {MAX_MEMBER_CHARS} characters.")
        if any(a >= b for a, b in zip(self.members, self.members[1:], strict=False)):
            raise ValueError("ticket: members are not sorted, or one comes twice.")
        if not 0 <= self.member < max(1, len(self.members)):
            raise ValueError(f"ticket: member {self.member} is none of {len(self.members)}.")

    def rows(self) -> BatchRows:
        """The rows that it asks for, batch after batch, slots ascending.

        Raises:
            ValueError: when its steps lie behind the last that can be numbered.
        """
        rows, owner = owned_rows(self.plan, self.first, self.last, self.slots, self.members)
        if len(self.members) <= 1:
            return rows
        ours = owner == self.member
        return BatchRows(rows.batch[ours], rows.slot[ours], rows.row_id[ours])

    def to_bytes(self) -> bytes:
        """The ticket as it travels: JSON in ASCII."""
        rest = {
            "v": TICKET_VERSION,
            "first": self.first,
            "last": self.last,
            "slots": self.slots,
            "members": self.members,
            "member": self.member,
        }
        return f'{{"plan":{self.plan.to_json()},{json.dumps(rest, separators=(",", ":"))[1:]}'.encode()

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
        if not isinstance(value, dict) or set(value) != {"v", "plan", "first", "last", "slots", "members", "member"}:
            raise ValueError("ticket: its keys differ.")
        slots, members = value["slots"], value["members"]
        if not isinstance(slots, list) or len(slots) != 2 or not isinstance(members, list):
            raise ValueError("ticket: slots are two numbers, members a list.")
        if any(
            type(number) is not int for number in (value["v"], value["first"], value["last"], value["member"], *slots)
        ):
            raise ValueError("ticket: numbers are not integers.")
        if any(type(member) is not str for member in members):
            raise ValueError("ticket: members are not names.")
        if value["v"] != TICKET_VERSION:
            raise ValueError(f"ticket: version {value['v']}, not {TICKET_VERSION}.")
        # Plans come again in every ticket of a run: parse and check each once.
        plan = _plan_of(json.dumps(value["plan"], sort_keys=True, separators=(",", ":")))
        return cls(plan, value["first"], value["last"], (slots[0], slots[1]), tuple(members), value["member"])


@lru_cache(maxsize=64)
def _plan_of(text: str) -> Plan:
    return Plan.from_json(text)
