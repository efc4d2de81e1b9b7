"""Checkpoints on a real S3 server: uploads beside training, races of commits, attempts that were shut out."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_service import storage, upload
from tests.helpers.s3_faults import Fault, FaultProxy
from tests.helpers.written_parts import commit_whole, cut, expected, fragments_of, make_state, write_parts
from trainer.checkpoint import load_ranges
from trainer.errors import CommitLostError, SaveFailedError
from trainer.fences import raise_fence
from trainer.manifest import commit, list_complete, newest_complete, read_manifest, verify
from trainer.protocol import PartReport
from trainer.retention import prune
from trainer.saver import CheckpointSaver

SHAPES = {"embedding.weight": (64, 16), "blocks.0.up.weight": (96, 16)}
LARGE = {"embedding.weight": (1100, 1024)}  # 13 MB of parts
CPU = torch.device("cpu")


@pytest.fixture
def uri(proxy: FaultProxy, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}/checkpoints"


def test_a_part_is_uploaded_beside_training_and_a_piece_that_fails_alone_is_sent_again(
    uri: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_PIECE_BYTES", 5 << 20)
    proxy.faults = [Fault("error", "partNumber=2", "PUT"), Fault("reset", "partNumber=3", "PUT")]
    (whole,) = cut(LARGE, 1, None)
    reports: list[PartReport] = []
    saver = CheckpointSaver(uri, 1, 0, CPU, reports.append)
    live = fragments_of(whole, LARGE, 50)
    saver.save(50, live, make_state(LARGE, 50))
    for fragment in live:
        fragment.data.zero_()
    saver.wait()
    saver.close()
    (report,) = reports
    assert report.state is not None
    found = commit(uri, 50, 1, [report.receipt], report.state)
    for fragment in load_ranges(uri, found, whole):
        values = expected(fragment.name, fragment.kind, 1100 * 1024, 50)
        assert torch.equal(fragment.data, values[fragment.start : fragment.start + fragment.numel])
    sent = [request.path.partition("partNumber=")[2].partition("&")[0] for request in proxy.asked("PUT", "partNumber=")]
    assert {number: sent.count(number) for number in sorted(sent)} == {"1": 1, "2": 2, "3": 2}


def test_an_upload_whose_last_answer_is_lost_is_whole(
    uri: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_PIECE_BYTES", 5 << 20)
    data = random.Random(1).randbytes(11 << 20)
    proxy.faults = [Fault("swallow", "uploadId=", "POST")]
    storage.write_bytes(f"{uri}/large", data)
    assert storage.read_bytes(f"{uri}/large") == data


def test_an_upload_that_was_not_finished_is_not_taken_for_an_object_of_the_same_size(
    uri: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_PIECE_BYTES", 5 << 20)
    old, new = random.Random(1).randbytes(11 << 20), random.Random(2).randbytes(11 << 20)
    storage.write_bytes(f"{uri}/large", old)
    proxy.faults = [Fault("error", "uploadId=", "POST", times=-1)]
    with pytest.raises(OSError, match="5 times"):
        storage.write_bytes(f"{uri}/large", new)
    assert proxy.asked("DELETE", "uploadId="), "its pieces were left behind"
    proxy.faults = [Fault("swallow", "uploadId=", "POST")]
    assert storage.read_bytes(f"{uri}/large") == old
    storage.write_bytes(f"{uri}/large", new)
    assert storage.read_bytes(f"{uri}/large") == new


def test_a_store_that_stays_broken_ends_the_save_and_nothing_of_it_exists(uri: str, proxy: FaultProxy) -> None:
    commit_whole(uri, 10, 1, SHAPES, num_ranks=1)
    (whole,) = cut(SHAPES, 1, None)
    reports: list[PartReport] = []
    saver = CheckpointSaver(uri, 1, 0, CPU, reports.append)
    proxy.faults = [Fault("error", "rank_00000", "PUT", times=-1)]
    saver.save(20, fragments_of(whole, SHAPES, 20), make_state(SHAPES, 20))
    with pytest.raises(SaveFailedError, match=r"part of step 20.*5 times") as raised:
        saver.wait()
    assert raised.value.retryable
    saver.close()
    proxy.faults = []
    assert reports == []
    found, _ = newest_complete(uri)
    assert found is not None
    assert found.step == 10


def _together(actions: list[Callable[[], None]]) -> None:
    start = threading.Barrier(len(actions))

    def go(action: Callable[[], None]) -> None:
        start.wait(30)
        action()

    threads = [threading.Thread(target=go, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_of_racing_commits_one_wins_and_stays(uri: str) -> None:
    for step in (1, 2, 3):
        receipts = {attempt: write_parts(uri, step, attempt, SHAPES) for attempt in (1, 2, 3)}
        outcomes: dict[int, str] = {}

        def race(attempt: int, step: int = step, receipts: dict = receipts, outcomes: dict = outcomes) -> None:  # type: ignore[type-arg]
            try:
                commit(uri, step, attempt, receipts[attempt], make_state(SHAPES, step, dp=2))
                outcomes[attempt] = "won"
            except CommitLostError:
                outcomes[attempt] = "lost"

        _together([lambda attempt=attempt: race(attempt) for attempt in receipts])  # type: ignore[misc]
        assert sorted(outcomes.values()) == ["lost", "lost", "won"]
        assert outcomes[read_manifest(uri, step).attempt] == "won"
        verify(uri, step)


def test_an_attempt_that_was_shut_out_never_commits(uri: str) -> None:
    """An old controller commits while a new one takes over, at every order of the two that threads give."""
    newest = 0
    outcomes = {"before": 0, "shut out": 0}
    for turn in range(5):
        old, new = 2 * turn + 1, 2 * turn + 2
        step = newest + 10
        receipts = write_parts(uri, step, old, SHAPES)
        went_on_from: list[int] = []
        lost: list[CommitLostError] = []

        def commit_late(
            step: int = step,
            old: int = old,
            receipts: list = receipts,
            lost: list = lost,  # type: ignore[type-arg]
        ) -> None:
            try:
                commit(uri, step, old, receipts, make_state(SHAPES, step, dp=2))
            except CommitLostError as error:
                lost.append(error)

        def take_over(new: int = new, went_on_from: list[int] = went_on_from) -> None:
            found, _ = newest_complete(uri, deep=False)
            went_on_from.append(0 if found is None else found.step)
            raise_fence(uri, new, went_on_from[0])

        _together([commit_late, take_over])
        (start,) = went_on_from
        found, _ = newest_complete(uri)
        assert (0 if found is None else found.step) == start, "the run went on from elsewhere than it did"
        if start == step:
            outcomes["before"] += 1
            assert not lost
        else:
            outcomes["shut out"] += 1
            assert step not in list_complete(uri)
            again = commit_whole(uri, step, new, SHAPES, num_ranks=1)  # whatever the old one left there
            assert read_manifest(uri, step) == again
            with pytest.raises(CommitLostError):
                commit(uri, step, old, receipts, make_state(SHAPES, step, dp=2))
            assert read_manifest(uri, step) == again
        newest = step
        prune(uri, {newest}, newest=newest)
    assert outcomes["shut out"], outcomes


def test_a_commit_in_the_middle_of_a_take_over_does_not_count(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old controller has looked, finds nothing against it, and puts its manifest after the new one's mark."""
    commit_whole(uri, 10, 1, SHAPES)
    receipts = write_parts(uri, 20, 1, SHAPES)
    put = storage.put_if_absent

    def slow_put(where: str, data: bytes) -> bool:
        raise_fence(uri, 2, 10)
        return put(where, data)

    monkeypatch.setattr(storage, "put_if_absent", slow_put)
    with pytest.raises(CommitLostError, match=r"attempt 2 has gone on from step 10"):
        commit(uri, 20, 1, receipts, make_state(SHAPES, 20, dp=2))
    monkeypatch.setattr(storage, "put_if_absent", put)
    assert storage.exists(f"{uri}/step_00000020/manifest.json")
    assert list_complete(uri) == [10]
    found, skipped = newest_complete(uri)
    assert found is not None
    assert (found.step, [one.step for one in skipped]) == (10, [20])
    assert "behind the back of attempt 2" in skipped[0].reason
    again = commit_whole(uri, 20, 2, SHAPES)
    assert newest_complete(uri) == (again, [])
