"""What a client knows of the data workers: members, owners and doubts, under a clock of the test."""

import time

from data_service.errors import DataUnavailableError
from data_service.members import KnownMembers, Member
from tests.helpers.members import NAMES, Clock, answer, known, member, names


def test_members_are_those_that_the_control_plane_names():
    view = known(Clock(), answer(member("w1"), member("w0")), answer(member("w2"), member("w1", alive=False)))
    assert names(view.known()) == ["w1", "w2"]
    assert names(view.trusted()) == ["w2"]


def test_a_new_control_plane_makes_no_worker_unknown():
    view = known(Clock(), answer(member("w0"), member("w1")), answer(settled=False))
    assert names(view.trusted()) == ["w0", "w1"]
    view.take(answer(Member("w2", "w0:1", True), settled=False))
    assert names(view.trusted()) == ["w1", "w2"], "a worker started again at an address replaces the one before"
    view.take(answer(member("w2")))
    assert names(view.trusted()) == ["w2"]
    view.take(answer())
    assert names(view.trusted()) == ["w2"], "the last worker is asked rather than none"


def test_a_worker_that_failed_is_avoided_for_longer_each_time_until_it_serves():
    clock = Clock()
    view = known(clock, answer(*map(member, NAMES)))
    for seconds in (1.0, 2.0, 4.0):
        view.failed(member("w1"), "gone")
        view.failed(member("w1"), "gone, as seen by a second read")
        clock.now += seconds - 0.01
        assert names(view.trusted()) == ["w0", "w2", "w3"]
        clock.now += 0.02
        assert names(view.trusted()) == list(NAMES)
    view.failed(member("w1"), "gone")
    view.served("w1")
    assert names(view.trusted()) == list(NAMES)
    view.failed(member("w1"), "gone")
    clock.now += 1.01
    assert names(view.trusted()) == list(NAMES), "the count began anew"
    for one in NAMES:
        view.failed(member(one), "gone")
    assert names(view.trusted()) == list(NAMES), "with all in doubt, all are asked"


def test_shards_are_divided_by_what_the_control_plane_says_whatever_a_client_doubts():
    reports = []
    view = known(Clock(), answer(member("w0"), member("w1"), member("w2", alive=False)), reports=reports)
    view.failed(member("w0"), "gone")
    assert names(view.trusted()) == ["w1"]
    assert names(view.owners()) == ["w0", "w1"]
    view.take(answer(member("w0", alive=False), member("w2", alive=False)))
    assert names(view.owners()) == ["w0", "w2"], "with none alive, all"


def test_only_a_failure_is_told_to_the_control_plane():
    view = known(Clock(), answer(*map(member, NAMES)))
    view.failed(member("w0"), "no sign of life", "silent", 0.3)
    view.failed(member("w1"), "it hangs", "hangs")
    assert view._reports.empty()
    assert names(view.trusted()) == ["w0", "w2", "w3"], "a doubt by silence begins later"
    view.failed(member("w0"), "gone")
    assert view._reports.get_nowait() == ("w0", "gone")
    assert names(view.trusted()) == ["w2", "w3"]
    view.lives("w0")
    assert names(view.trusted()) == ["w2", "w3"], "what failed is no silence"


def test_the_view_is_refreshed_at_once_after_a_failure_and_survives_silence():
    asked, reports, joined = [], [], []
    answers = [answer(member("w0")), DataUnavailableError("silent"), answer(member("w0"), member("w1"))]

    def fetch():
        asked.append(time.monotonic())
        one = answers[min(len(asked), len(answers)) - 1]
        if isinstance(one, Exception):
            raise one
        return one

    view = KnownMembers(fetch, lambda *report: reports.append(report), lambda new: joined.extend(names(new)))
    view.start()
    view.wait(5.0)
    assert names(view.known()) == ["w0"]
    began = time.monotonic()
    view.failed(member("w0"), "gone")
    while len(asked) < 2:
        assert time.monotonic() - began < 10, "no refresh"
        time.sleep(0.005)
    while view.silence is None:
        assert time.monotonic() - began < 10
        time.sleep(0.005)
    assert names(view.known()) == ["w0"]
    assert reports == [("w0", "gone")]
    while len(view.known()) < 2:
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    assert joined == ["w0", "w1"]
    assert view.silence is None
    view.close()
    view.join(5.0)
    asked_before = len(asked)
    time.sleep(1.1)
    assert len(asked) == asked_before


def test_the_view_goes_on_whatever_a_refresh_or_a_report_raises(caplog):
    answers = [answer(member("w0")), ValueError("no such field"), answer(member("w0"), member("w1"))]

    def fetch():
        one = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(one, Exception):
            raise one
        return one

    def report(worker_id, reason):
        raise UnicodeEncodeError("utf-8", reason, 0, 1, "no text")

    view = KnownMembers(fetch, report, lambda new: None)
    view.start()
    view.wait(10.0)
    view.failed(member("w0"), "gone")
    began = time.monotonic()
    while len(view.known()) < 2:
        assert time.monotonic() - began < 10, "the view stands still"
        time.sleep(0.01)
    assert "asking for the data workers failed" in caplog.text
    view.close()
    view.join(5.0)
