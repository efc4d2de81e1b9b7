"""The data service of a real run: its processes killed and frozen from outside."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.run_data import train_plan
from data_service.audit import SampleAudit
from data_service.manifest import read_manifest
from tests.helpers.runs import RunProcess, running, step_records, write_run

STALLED_S = 20.0
"""`data.service.stalled_s` of the run file."""
TRAIN = """
  parallel: {dp: 2, pp: 1}
  steps: 100000
  eval: {every: 100000, max_batches: 2}
  checkpoint: {every: 1000}
"""


def service(run: RunProcess, role: str) -> list[int]:
    return [int(item["pid"]) for item in run.events("data_service_ready")[-1]["workers"] if item["role"] == role]


def workers(run: RunProcess) -> list[int]:
    return service(run, "worker")


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue


@pytest.mark.timeout(240)
def test_with_every_data_worker_frozen_a_run_ends_within_its_deadline(tmp_path: Path) -> None:
    file = write_run(tmp_path, train=TRAIN)
    with running("train", file) as run:
        run.until_step(5)
        pids = workers(run)
        assert len(pids) == 2
        with frozen(pids):
            began = time.monotonic()
            assert run.wait(STALLED_S + 60) == 1, run.output[-4000:]
            seconds = time.monotonic() - began
        assert seconds < STALLED_S + 40
        ended = run.events("run_ended")[-1]
        assert ended["state"] == "failed"
        assert "no data worker" in ended["error"].lower() or "stalled" in ended["error"].lower(), ended
        lost = run.events("rank_lost")
        assert lost
        assert "Traceback" not in run.output


def go_on(run: RunProcess, steps: int, deadline_s: float = 120.0) -> None:
    run.until_step(run.folder.history().last_step + steps, deadline_s)


def replaced(run: RunProcess, pid: int) -> None:
    """Kill a process of the service, and wait until the service is told of anew (with those that have started)."""
    services = len(run.events("data_service_ready"))
    os.kill(pid, signal.SIGKILL)
    run.until_event("data_service_ready", count=services + 1)


def kill_control_plane(run: RunProcess) -> None:
    before = workers(run)
    replaced(run, service(run, "control")[0])
    go_on(run, 150)
    # The workers have registered with the new control plane: with one of them gone it still names the other.
    replaced(run, before[0])
    assert set(workers(run)) & set(before) == {before[1]}, "a worker that answered was replaced"
    assert service(run, "control"), "the control plane is not told of"


def kill_workers(run: RunProcess) -> None:
    lost = len(run.events("data_worker_lost"))
    for _ in range(2):
        go_on(run, 50)
        replaced(run, workers(run)[0])
    assert len(run.events("data_worker_lost")) == lost + 2


def freeze(run: RunProcess, role: str) -> None:
    go_on(run, 20)
    with frozen(service(run, role)[:1]):
        go_on(run, 100, STALLED_S)


@pytest.mark.timeout(300)
def test_processes_of_the_service_are_killed_and_frozen_and_no_rank_notices(tmp_path: Path) -> None:
    """One run stands all of it, which is harder than a run for each event, and quicker."""
    file = write_run(tmp_path, train=TRAIN)
    with running("train", file) as run:
        run.until_step(10)
        kill_control_plane(run)
        kill_workers(run)
        freeze(run, "worker")
        freeze(run, "control")
        run.process.send_signal(signal.SIGINT)
        assert run.wait(60) == 130, run.output[-4000:]
        assert len(run.events("attempt_started")) == 1, "the ranks were restarted"
        assert not run.events("rank_lost")
        records = step_records(run.folder)
    config = load_config(file)
    manifest = read_manifest(config.dataset_uri)
    audit = SampleAudit(config.dataset_uri, train_plan(config, manifest), manifest, cache_bytes=1 << 20)
    try:
        assert {step: record["sample_hash"] for step, record in records.items()} == {
            step: audit.expected(step - 1) for step in range(1, len(records) + 1)
        }
    finally:
        audit.close()
    assert len({record["sample_hash"] for record in records.values()}) == len(records) > 450
