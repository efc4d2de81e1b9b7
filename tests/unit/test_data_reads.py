"""Whom a client asks and when it asks another: hedges, loads and ends, under a clock of the test."""

from dataclasses import replace

import numpy as np
import pytest

from data_service.access import DataAccess
from data_service.connections import NotAtHandError
from data_service.delivery import Wanted
from data_service.errors import (
    CursorMismatchError,
    DataError,
    DataStalledError,
    DataUnavailableError,
    ShardCorruptError,
)
from data_service.reads import TicketRead
from data_service.ticket import Ticket
from tests.helpers.data_runs import TOKEN, small_order
from tests.helpers.members import NAMES, Clock, answer, known, member, names
from tests.helpers.plans import hand_made

PLAN = hand_made([("a", 0, 1000, 64)], seq_len=32, seed=1, dataset="made-up")
ACCESS = DataAccess(("a:1",), TOKEN, small_order(), "made-up", hedge_s=0.3, read_stall_s=3.0, stalled_s=20.0)


class Asked:
    """A read of rows that w1 owns, and what it asked of whom."""

    def __init__(self, view, clock, access=ACCESS, members=NAMES):
        self.clock, self.view = clock, view
        self.attempts, self.pings = [], []
        rows = np.arange(8)
        wanted = Wanted(rows * 0, rows.astype(np.uint32), rows.astype(np.uint64), rows)
        ticket = Ticket(PLAN, 5, 6, (0, 8), members, 1)
        self.read = TicketRead(
            ticket, wanted, access, view, lambda _, attempt: self.attempts.append(attempt), self.ping, clock()
        )

    def ping(self, member):
        signs = self.view.signs
        if signs.begin_ping(member.worker_id, 0.075):
            signs.sent(member.worker_id)
            self.pings.append(member.worker_id)

    def pong(self, worker_id, store_silent_s=None):
        """The answer to the ping that is on its way."""
        self.view.lives(worker_id, store_silent_s)
        self.view.signs.ended(worker_id)

    def lacks(self, number):
        """What the attempt of this number asks for is not at hand there."""
        self.view.lives(self.names[number])
        self.read.failed(self.attempts[number], NotAtHandError("a shard is not at hand"))

    def until(self, seconds):
        """Let time pass, looking whenever the read wants to be looked at."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            due = self.read.watch(self.clock.now)
            assert due > self.clock.now
            self.clock.now = min(due, end)
        self.read.watch(self.clock.now)

    @property
    def names(self):
        return [one.member.worker_id for one in self.attempts]


def test_a_silent_worker_is_pinged_and_then_others_asked_for_what_they_have():
    clock = Clock()
    view = known(clock, answer(*map(member, NAMES)))
    asked = Asked(view, clock)
    asked.until(0.07)
    assert (asked.names, asked.pings) == (["w1"], [])
    asked.until(0.02)
    assert (asked.names, asked.pings) == (["w1"], ["w1"])
    asked.until(0.23)
    assert len(asked.names) == 2
    assert [one.at_hand for one in asked.attempts] == [False, True]
    assert names(view.trusted()) == list(NAMES), "it may only be late"
    asked.until(0.32)
    assert names(view.trusted()) == ["w0", "w2", "w3"]
    assert len(asked.names) == len(set(asked.names)) == 3
    asked.until(2.0)
    assert len(asked.names) == 3, "at most three are asked at a time"
    asked.read.finish(asked.attempts[2])
    assert all(one.over for one in asked.attempts)


def test_another_loads_the_shards_of_a_worker_once_that_was_silent_for_twice_as_long():
    clock = Clock()
    asked = Asked(known(clock, answer(*map(member, NAMES))), clock)
    asked.until(0.31)
    asked.lacks(1)
    asked.until(0.28)
    assert len(asked.names) == 2, "one that has it is asked, and no third"
    asked.until(0.1)
    assert asked.names == ["w1", asked.names[1], asked.names[1]]
    assert not asked.attempts[2].at_hand
    asked.until(1.0)
    assert [one.at_hand for one in asked.attempts] == [False, True, False, True], "that one is silent too"


def test_an_answer_to_a_ping_keeps_others_from_loading():
    clock = Clock()
    asked = Asked(known(clock, answer(*map(member, NAMES))), clock)
    asked.until(0.31)
    asked.lacks(1)
    asked.until(0.25)
    asked.pong("w1")
    asked.until(0.3)
    asked.pong("w1")
    asked.until(0.3)
    assert len(asked.names) == 2
    assert asked.pings.count("w1") == 3


def test_a_member_that_lacks_the_shards_is_asked_in_full_when_the_owner_fails():
    clock = Clock()
    asked = Asked(known(clock, answer(member("w0"), member("w1"))), clock, members=("w0", "w1"))
    asked.until(0.31)
    asked.lacks(1)
    asked.read.failed(asked.attempts[0], DataUnavailableError("gone"))
    asked.until(0.01)
    assert asked.names == ["w1", "w0", "w0"]
    assert not asked.attempts[2].at_hand


def test_a_worker_that_answers_pings_is_at_work_and_is_waited_for():
    clock = Clock()
    asked = Asked(known(clock, answer(*map(member, NAMES))), clock)
    for _ in range(18):
        asked.until(0.16)
        asked.pong("w1")
    assert asked.names == ["w1"]
    assert asked.pings == ["w1"] * 18
    asked.until(0.16)
    assert len(asked.names) == 2, "an answer is due within read_stall_s all the same"
    assert asked.attempts[0].over
    assert not asked.attempts[1].at_hand


def test_a_worker_that_loads_is_waited_for_as_long_as_bytes_come():
    clock = Clock()
    asked = Asked(known(clock, answer(*map(member, NAMES))), clock, replace(ACCESS, stalled_s=60.0))
    for _ in range(25):
        asked.until(0.2)
        asked.pong("w1", store_silent_s=0.1)
    assert asked.names == ["w1"]
    for number in range(14):
        asked.until(0.2)
        asked.pong("w1", store_silent_s=0.3 + 0.2 * number)
    assert asked.names == ["w1"]
    asked.until(0.2)
    assert len(asked.names) == 2, "nothing came for read_stall_s"


def test_a_worker_that_loads_for_a_third_of_the_time_for_all_is_given_up():
    clock = Clock()
    view = known(clock, answer(*map(member, NAMES)))
    asked = Asked(view, clock)
    began = clock()
    while len(asked.names) < 2:
        assert clock() < began + 10
        asked.until(0.2)
        asked.pong("w1", store_silent_s=0.1)
    assert clock() - began == pytest.approx(20 / 3, abs=0.3)
    assert names(view.trusted()) == ["w0", "w2", "w3"]


def test_a_client_that_was_late_itself_judges_nobody():
    clock = Clock()
    asked = Asked(known(clock, answer(*map(member, NAMES))), clock)
    asked.until(0.16)
    assert asked.pings == ["w1"]
    clock.now += 30.0  # the process stood still; nobody may be asked, nor the read be ended
    asked.read.watch(clock())
    asked.pong("w1")
    asked.read.failed(asked.attempts[0], DataUnavailableError("its deadline was over"))
    assert asked.names == ["w1"]
    with pytest.raises(DataStalledError):
        asked.until(0.2)


def test_tickets_of_one_owner_go_to_the_same_other():
    clock, second = Clock(), set()
    view = known(clock, answer(*map(member, NAMES)))
    for _ in range(8):
        asked = Asked(view, clock)
        asked.read.watch(clock())
        asked.read.failed(asked.attempts[0], DataUnavailableError("gone"))
        asked.read.watch(clock())
        second.add(asked.names[-1])
        view.served("w1")
    assert len(second) == 1


def test_a_late_sign_of_life_ends_a_doubt_that_silence_made_and_no_other():
    clock = Clock()
    view = known(clock, answer(*map(member, NAMES)))
    asked = Asked(view, clock)
    asked.until(0.65)
    assert names(view.trusted()) == ["w0", "w2", "w3"]
    asked.pong("w1")
    assert names(view.trusted()) == list(NAMES)
    asked.read.failed(asked.attempts[0], DataUnavailableError("its storage hangs"))
    assert names(view.trusted()) == ["w0", "w2", "w3"]
    asked.pong("w1")
    assert names(view.trusted()) == ["w0", "w2", "w3"]


def test_failures_go_round_and_end_when_nobody_answered_in_time():
    clock = Clock()
    view = known(clock, answer(*map(member, NAMES)))
    asked = Asked(view, clock)
    began = clock()

    def run():
        while True:
            due = asked.read.watch(clock())
            for attempt in asked.attempts:
                if not attempt.over:
                    clock.now += 0.5
                    asked.read.failed(attempt, DataUnavailableError(f"{attempt.member.worker_id} is gone"))
                    break
            else:
                clock.now = due

    with pytest.raises(DataStalledError, match=r"batches 5 to 5 .* 20\.0 s \(data\.service\.stalled_s\).*w\d is gone"):
        run()
    assert clock() - began == pytest.approx(20.0, abs=0.6)
    assert asked.names[0] == "w1"
    rounds = [tuple(sorted(asked.names[at : at + 4])) for at in range(0, len(asked.names) - 3, 4)]
    assert set(rounds) == {NAMES}, "each round asks everybody once"
    assert asked.attempts[0].timeout_s > 3.0


def test_a_worker_that_joins_later_answers_an_old_ticket():
    clock = Clock()
    view = known(clock, answer(member("w1")))
    asked = Asked(view, clock, members=("w0", "w1"))
    asked.until(0.4)
    assert asked.names == ["w1"]
    view.take(answer(member("w1"), member("w9")))
    asked.until(0.4)
    assert asked.names == ["w1", "w9"]


def test_damage_is_told_once_all_that_live_found_it():
    clock = Clock()
    view = known(clock, answer(member("w0"), member("w1"), member("w2")))
    asked = Asked(view, clock)

    def end(number, error):
        asked.read.watch(clock())
        asked.read.failed(asked.attempts[number], error)

    end(0, ShardCorruptError("train-00001.arrow in w1"))
    end(1, DataUnavailableError("gone"))
    gone = asked.attempts[1].member.worker_id
    end(2, ShardCorruptError("train-00001.arrow in the other"))
    asked.read.watch(clock())
    asked.until(0.15)
    assert asked.names[3:] == [gone], "the one that failed may still have it whole"
    asked.read.failed(asked.attempts[3], DataUnavailableError("gone"))
    view.take(answer(*(member(name, name != gone) for name in ("w0", "w1", "w2"))))
    with pytest.raises(ShardCorruptError, match=r"train-00001\.arrow in"):
        asked.until(1.0)


def test_a_refusal_is_told_once_all_that_live_refused():
    clock, reports = Clock(), []
    view = known(clock, answer(member("w0"), member("w1", alive=False)), reports=reports)
    asked = Asked(view, clock, members=("w0", "w1"))
    asked.read.watch(clock())
    asked.read.failed(asked.attempts[0], CursorMismatchError("another run's"))
    asked.read.watch(clock())
    assert sorted(asked.names) == ["w0", "w1"]
    first = asked.attempts[0].member.worker_id
    asked.read.failed(asked.attempts[1], DataUnavailableError("gone"))
    view.take(answer(member(first, alive=False), member(asked.attempts[1].member.worker_id)))
    asked.until(0.15)
    assert len(asked.names) == 3, "one that refused, and lives no more, decides nothing"
    assert asked.names[2] != first
    asked.read.failed(asked.attempts[2], DataError("refused a ticket"))
    with pytest.raises(DataError, match="refused a ticket"):
        asked.until(1.0)


def test_nobody_living_is_waited_for_whoever_refused():
    clock = Clock()
    view = known(clock, answer(member("w0", alive=False)))
    asked = Asked(view, clock, members=("v9", "w0"))
    asked.read.watch(clock())
    asked.read.failed(asked.attempts[0], DataError("refused the token"))
    asked.until(10.0)
    view.take(answer(member("w0", alive=False), member("w1")))
    asked.until(0.2)
    assert asked.names == ["w0", "w1"]


def test_an_unknown_service_is_named_as_such():
    clock = Clock()
    asked = Asked(known(clock, answer()), clock)
    with pytest.raises(DataStalledError, match="no data worker is registered"):
        asked.until(21.0)
