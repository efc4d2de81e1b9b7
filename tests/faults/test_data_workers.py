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
  steps: 4000
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


@pytest.mark.timeout(240)
def test_killed_data_workers_are_replaced_and_no_rank_notices(tmp_path: Path) -> None:
    file = write_run(tmp_path, train=TRAIN)
    with running("train", file, "train.steps=400") as run:
        for step in (10, 60):
            run.until_step(step)
            services = len(run.events("data_service_ready"))
            os.kill(workers(run)[0], signal.SIGKILL)
            run.until_event("data_service_ready", count=services + 1)
        assert run.wait() == 0, run.output[-4000:]
        assert len(run.events("attempt_started")) == 1, "the ranks were restarted"
        assert len(run.events("data_worker_lost")) == 2
        hashes = [record["sample_hash"] for record in step_records(run.folder).values()]
        assert len(set(hashes)) == len(hashes) == 400


@pytest.mark.timeout(240)
def test_a_killed_control_plane_comes_back_and_no_rank_notices(tmp_path: Path) -> None:
    file = write_run(tmp_path, train=TRAIN)
    with running("train", file, "train.steps=600") as run:
        run.until_step(10)
        before = workers(run)
        os.kill(service(run, "control")[0], signal.SIGKILL)
        run.until_event("data_service_ready", count=2)
        run.until_step(200)
        # The workers have registered with the new control plane: with one of them gone it still names the other.
        os.kill(before[0], signal.SIGKILL)
        run.until_event("data_service_ready", count=3)
        assert set(workers(run)) & set(before) == {before[1]}, "a worker that answered was replaced"
        assert service(run, "control"), "the control plane is not told of"
        assert run.wait() == 0, run.output[-4000:]
        assert len(run.events("attempt_started")) == 1, "the ranks were restarted"
        assert not run.events("rank_lost")
        assert len(step_records(run.folder)) == 600


@pytest.mark.timeout(120)
@pytest.mark.parametrize("role", ["worker", "control"])
def test_a_frozen_process_of_the_service_stops_no_run_and_changes_no_batch(tmp_path: Path, role: str) -> None:
    file = write_run(tmp_path, train=TRAIN)
    with running("train", file, "train.steps=300") as run:
        run.until_step(20)
        with frozen(service(run, role)[:1]):
            began = run.folder.history().last_step
            run.until_step(began + 100, deadline_s=STALLED_S)
        assert run.wait() == 0, run.output[-4000:]
        assert len(run.events("attempt_started")) == 1, "the ranks were restarted"
        assert not run.events("rank_lost")
        records = step_records(run.folder)
    config = load_config(file)
    manifest = read_manifest(config.dataset_uri)
    audit = SampleAudit(config.dataset_uri, train_plan(config, manifest), manifest, cache_bytes=1 << 20)
    try:
        assert {step: record["sample_hash"] for step, record in records.items()} == {
            step: audit.expected(step - 1) for step in range(1, 301)
        }
    finally:
        audit.close()
