"""The nursery and its ranks as processes, without Ray."""

import os
import queue
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.rank_child import Nursery, RankChild
from tests.helpers.waiting import is_alive, until

Exits = queue.Queue[tuple[RankChild, int]]
DEADLINE_S = 60.0


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery("cpu", 1)
    yield nursery
    nursery.kill()
    until(lambda: nursery.gone, "the nursery ends")


def fork(nursery: Nursery, rank: int, exits: Exits) -> RankChild:
    return nursery.fork(1, rank, on_message=lambda *_: None, on_exit=lambda child, code: exits.put((child, code)))


@pytest.mark.timeout(120)
def test_a_rank_is_forked_named_and_refuses_a_malformed_specification(nursery: Nursery, tmp_path: Path) -> None:
    exits: Exits = queue.Queue()
    child = fork(nursery, 7, exits)
    pid = until(lambda: child.pid, "the rank is forked", DEADLINE_S)
    assert nursery.loaded
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "rank-7\n", "the rank has its name")
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(nursery.pid)
    child.start("{}", tmp_path / "logs" / "rank.log")
    ended, code = exits.get(timeout=DEADLINE_S)
    assert (ended, code) == (child, 2)
    assert child.error is not None
    assert child.error["type"] == "ConfigError"
    assert "malformed specification" in child.error["message"]
    log = (tmp_path / "logs" / "rank.log").read_text()
    assert "malformed specification" in log
    assert list(child.log_tail()) == log.splitlines()[-30:]
    child.stop_after(3)  # nobody is there to hear it, and nothing breaks
    child.kill()


@pytest.mark.timeout(120)
def test_ranks_end_with_their_nursery(nursery: Nursery) -> None:
    exits: Exits = queue.Queue()
    children = [fork(nursery, rank, exits) for rank in range(2)]
    pids = [until(lambda child=child: child.pid, "a rank", DEADLINE_S) for child in children]
    os.kill(nursery.pid, signal.SIGKILL)
    ended = {exits.get(timeout=DEADLINE_S) for _ in children}
    assert ended == {(child, -signal.SIGKILL) for child in children}
    assert all(child.error is not None and child.error["retryable"] for child in children)
    until(lambda: not any(is_alive(pid) for pid in pids), "the ranks end")
    until(lambda: nursery.gone, "the nursery is known to be gone")
    late = fork(nursery, 2, exits)
    assert exits.get(timeout=DEADLINE_S) == (late, 1)


@pytest.mark.timeout(120)
def test_a_rank_killed_before_it_was_forked_never_lives(nursery: Nursery) -> None:
    exits: Exits = queue.Queue()
    child, other = fork(nursery, 0, exits), fork(nursery, 1, exits)
    assert not nursery.loaded
    child.kill()
    assert exits.get(timeout=1.0) == (child, -signal.SIGKILL)
    pid = until(lambda: child.pid, "it is forked all the same", DEADLINE_S)
    until(lambda: not is_alive(pid), "it ends at once")
    until(lambda: other.pid, "its neighbour", DEADLINE_S)
    other.kill()
    assert exits.get(timeout=DEADLINE_S) == (other, -signal.SIGKILL)
