"""Tickets: what they hold, whose rows they ask for, and what they refuse; and what a rank needs to read."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_service.access import DataAccess
from data_service.plan import MAX_PLAN_BYTES, OrderSpec
from data_service.ticket import MAX_TICKET_BYTES, Ticket
from tests.helpers.plans import hand_made

PLAN = hand_made([("a", 0, 101, 10), ("b", 0, 64, 10)], segments=[(0, [2, 1]), (9, [1, 1])], skip=[(3, 5)])


class TestTicket:
    """Tickets: limits, and rows by owner."""

    MEMBERS = ("w-a", "w-b", "w-c")

    def test_it_travels(self):
        for ticket in (Ticket(PLAN, 0, 3, (2, 8)), Ticket(PLAN, 5, 6, (0, 8), self.MEMBERS, 2)):
            again = Ticket.from_bytes(ticket.to_bytes())
            assert again == ticket
            assert again.to_bytes() == ticket.to_bytes()
        # Plans that come again are parsed once.
        assert Ticket.from_bytes(ticket.to_bytes()).plan is again.plan

    def test_members_divide_its_rows(self):
        whole = Ticket(PLAN, 2, 40, (1, 7)).rows()
        parts = [Ticket(PLAN, 2, 40, (1, 7), self.MEMBERS, member).rows() for member in range(3)]
        assert min(part.row_id.size for part in parts) > 0
        together = sorted(
            (batch, slot, row)
            for part in parts
            for batch, slot, row in zip(part.batch.tolist(), part.slot.tolist(), part.row_id.tolist(), strict=True)
        )
        assert together == list(zip(whole.batch.tolist(), whole.slot.tolist(), whole.row_id.tolist(), strict=True))
        assert Ticket(PLAN, 2, 40, (1, 7), ("alone",), 0).rows().row_id.tolist() == whole.row_id.tolist()

    @pytest.mark.parametrize(
        "changes",
        [{"v": 1}, {"v": 2.0}, {"first": -1}, {"first": 3}, {"last": 2**62}, {"last": 1025}, {"slots": [0, 9]},
         {"slots": [-1, 3]}, {"slots": [3, 3]}, {"slots": [1]}, {"slots": "ab"}, {"slots": [0, True]}, {"first": "0"},
         {"members": "abc"}, {"members": [1]}, {"members": ["b", "a"]}, {"members": ["a", "a"]}, {"members": [""]},
         {"members": ["x" * 65]}, {"members": [f"{n:03}" for n in range(257)]}, {"member": 1}, {"member": -1},
         {"members": ["a"], "member": 1}, {"member": None}, {"plan": None}, {"plan": []}, {"more": 1}],
    )  # fmt: skip
    def test_what_is_no_ticket_is_refused(self, changes):
        value = json.loads(Ticket(PLAN, 0, 3, (0, 8)).to_bytes()) | changes
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            Ticket.from_bytes(json.dumps(value).encode())
        assert len(str(caught.value)) <= 600

    @given(st.binary(max_size=60))
    def test_bytes_that_are_no_ticket_are_refused(self, data):
        with pytest.raises(ValueError):  # noqa: PT011
            Ticket.from_bytes(data)

    def test_it_asks_for_little(self):
        large = hand_made([("a", 0, 10**9, 1000)], global_batch=2**20, seq_len=1023)
        assert Ticket(large, 0, 1, (5, 2**15 + 5)).rows().row_id.size == 2**15
        for batches, slots in ((1, 2**15 + 1), (2, 2**15), (1025, 1)):
            with pytest.raises(ValueError, match="too many for one ticket"):
                Ticket(large, 0, batches, (0, slots))
        with pytest.raises(ValueError, match="at most"):
            Ticket.from_bytes(b" " * (MAX_TICKET_BYTES + 1))
        with pytest.raises(ValueError, match="nested too deeply"):
            Ticket.from_bytes(b"[" * 60_000)
        members = tuple(f"{number:064}" for number in range(256))
        assert len(Ticket(PLAN, 0, 1, (0, 1), members, 5).to_bytes()) < MAX_TICKET_BYTES - MAX_PLAN_BYTES


def test_access_travels_and_refuses_what_cannot_work():
    access = DataAccess(("h:1", "h:2"), "secret", OrderSpec(1, 100, 8, 4, skip=((1, 2),)), "d", run_ahead=7)
    assert DataAccess.from_json(access.to_json()) == access
    assert "secret" not in repr(access)
    for changes in ({"control": ()}, {"run_ahead": 0}, {"hedge_s": 0.0}, {"stalled_s": -1.0}):
        with pytest.raises(ValueError, match="DataAccess"):
            replace(access, **changes)
