"""Members of a data service as a client knows them, under a clock of the test."""

from data_service.members import KnownMembers, Member, MembersAnswer

NAMES = ("w0", "w1", "w2", "w3")


def member(name, alive=True):
    return Member(name, f"{name}:1", alive)


def answer(*members, settled=True):
    return MembersAnswer(members, settled)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def known(clock, *answers, reports=None):
    """Members that were told `answers`, one after the other, without a thread."""
    view = KnownMembers(lambda: answer(), lambda *report: reports.append(report), lambda new: None, clock)
    for one in answers:
        view.take(one)
    return view


def names(members):
    return [one.worker_id for one in members]
