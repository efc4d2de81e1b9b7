"""Asynchronous saves: the values of the moment, one in flight, and no failure that goes unheard."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from data_service import storage
from tests.helpers.written_parts import cut, expected, fragments_of, make_state
from trainer import saver as saver_module
from trainer.checkpoint import load_ranges, write_part
from trainer.errors import SaveFailedError
from trainer.fragments import Fragment
from trainer.manifest import PartReceipt, commit, newest_complete
from trainer.parts import part_file, step_folder
from trainer.protocol import PartReport
from trainer.saver import CheckpointSaver

SHAPES = {"embedding.weight": (13, 8), "blocks.0.norm.weight": (8,), "blocks.0.up.weight": (24, 8)}
(WHOLE,) = cut(SHAPES, 1, None)
CPU = torch.device("cpu")


class HeldBack:
    """Stands in for `write_part` and writes only when it is told to."""

    def __init__(self) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, *arguments: object) -> PartReceipt:
        self.begun.set()
        assert self.may_go_on.wait(30)
        return write_part(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def reports() -> list[PartReport]:
    return []


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> HeldBack:
    found = HeldBack()
    monkeypatch.setattr(saver_module, "write_part", found)
    return found


def live(step: int) -> list[Fragment]:
    return fragments_of(WHOLE, SHAPES, step)


def overwrite(fragments: Sequence[Fragment]) -> None:
    for fragment in fragments:
        fragment.data.fill_(torch.nan)


def test_the_values_of_the_moment_are_written(tmp_path: Path, reports: list[PartReport], held_back: HeldBack) -> None:
    uri = str(tmp_path / "a")
    saver = CheckpointSaver(uri, 1, 0, CPU, reports.append)
    saver.reserve(sum(one.numel for one in WHOLE))
    fragments = live(5)
    saver.save(5, fragments, make_state(SHAPES, 5))
    assert held_back.begun.wait(30)
    overwrite(fragments)
    assert reports == [], "reported before it was durable"
    held_back.may_go_on.set()
    saver.wait()
    (report,) = reports
    assert 0 < report.write_s < report.total_s
    assert report.state is not None
    manifest = commit(uri, 5, 1, [report.receipt], report.state)
    for fragment in load_ranges(uri, manifest, WHOLE):
        whole = expected(fragment.name, fragment.kind, torch.Size(SHAPES[fragment.name]).numel(), 5)
        assert torch.equal(fragment.data, whole[fragment.start : fragment.start + fragment.numel])
    plain = str(tmp_path / "b")
    assert write_part(plain, 5, 1, 0, live(5)) == report.receipt
    file = f"{step_folder(5)}/{part_file(1, 0)}"
    assert Path(plain, file).read_bytes() == Path(uri, file).read_bytes()
    saver.close()


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, reports: list[PartReport], held_back: HeldBack) -> None:
    saver = CheckpointSaver(str(tmp_path), 1, 0, CPU, reports.append)
    saver.save(1, live(1), None)
    saver.check()  # does not wait
    second = threading.Thread(target=saver.save, args=(2, live(2), None))
    second.start()
    assert held_back.begun.wait(30)
    second.join(0.1)
    assert second.is_alive(), "two saves in flight would share the host memory"
    held_back.may_go_on.set()
    second.join(30)
    assert not second.is_alive()
    saver.wait()
    assert [report.step for report in reports] == [1, 2]
    assert reports[1].write_s >= 0.1, "waiting for the save before is standing still"
    saver.close()


def test_without_a_thread_a_save_is_durable_on_return(tmp_path: Path, reports: list[PartReport]) -> None:
    saver = CheckpointSaver(str(tmp_path), 3, 0, CPU, reports.append, asynchronous=False)
    saver.save(7, live(7), make_state(SHAPES, 7))
    (report,) = reports
    assert report.write_s == report.total_s > 0
    commit(str(tmp_path), 7, 3, [report.receipt], make_state(SHAPES, 7))
    found, _ = newest_complete(str(tmp_path))
    assert found is not None
    assert found.step == 7


@pytest.mark.parametrize("end", ["check", "wait", "save"])
def test_a_full_disk_is_heard_of(
    tmp_path: Path, reports: list[PartReport], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    def full(*_: object) -> PartReceipt:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver_module, "write_part", full)
    saver = CheckpointSaver(str(tmp_path), 1, 0, CPU, reports.append)
    saver.save(1, live(1), None)
    ends: dict[str, Callable[[], None]] = {
        "check": saver.check,
        "wait": saver.wait,
        "save": lambda: saver.save(2, live(2), None),
    }
    assert saver._in_flight is not None
    saver._in_flight.exception(30)
    with pytest.raises(OSError, match="No space left"):
        ends[end]()
    assert reports == []
    saver.close()


def test_what_a_store_refuses_is_retried_by_the_run(
    tmp_path: Path, reports: list[PartReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"memory://{tmp_path.name}/checkpoints"

    def broken(*_: object) -> PartReceipt:
        raise OSError("writing failed 5 times")

    monkeypatch.setattr(saver_module, "write_part", broken)
    saver = CheckpointSaver(uri, 1, 2, CPU, reports.append)
    saver.save(40, live(40), None)
    with pytest.raises(SaveFailedError, match=r"Rank 2 could not write its part of step 40.*5 times") as raised:
        saver.wait()
    assert raised.value.retryable
    saver.close()
    assert not storage.exists(uri)


def test_a_save_that_hangs_ends_the_rank(
    tmp_path: Path, reports: list[PartReport], held_back: HeldBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "_LONGEST_PAUSE_S", 0.05)
    saver = CheckpointSaver(str(tmp_path), 1, 0, CPU, reports.append)
    saver.save(9, live(9), None)
    with pytest.raises(SaveFailedError, match=r"waited 0 s for its part of step 9"):
        saver.wait()
    held_back.may_go_on.set()
    saver.close()


def test_a_save_that_others_wait_for_ends_before_their_patience(
    tmp_path: Path, reports: list[PartReport], held_back: HeldBack
) -> None:
    saver = CheckpointSaver(str(tmp_path), 1, 3, CPU, reports.append, collective_timeout_s=2.0)
    saver.save(9, live(9), None)
    began = time.monotonic()
    with pytest.raises(SaveFailedError, match=r"Rank 3.*step 9") as raised:
        saver.save(10, live(10), None)
    assert 1.4 < time.monotonic() - began < 1.9
    for named in (str(tmp_path), "train.collective_timeout_s=2", "train.checkpoint.every"):
        assert named in str(raised.value)
    threading.Timer(1.0, held_back.may_go_on.set).start()
    saver.wait(apart=True)
    assert [report.step for report in reports] == [9]
    saver.close()
