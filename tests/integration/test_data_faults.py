"""Data workers and control planes in processes of their own, killed and stopped under running readers."""

import random
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from data_service.client import DataClient
from data_service.errors import DataStalledError
from tests.helpers.data_fleet import Fleet, Reader, fleet, kill, stopped
from tests.helpers.data_runs import GLOBAL_BATCH, hash_of, read_hashes, small_order
from tests.helpers.written_datasets import stream_dataset

NUM_WORKERS = 3
STEP_S = 0.02
WATCHED_S = 1.5
"""How long the readers are watched after an event began."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("data") / "d", tokens=(20_000, 9000))


def kill_a_worker(running: Fleet, draw: random.Random) -> None:
    running.kill_worker(draw.choice(running.workers))
    time.sleep(draw.uniform(0.2, 1.0))
    running.start_worker()


def stop_a_worker(running: Fleet, draw: random.Random) -> None:
    with stopped(draw.choice(running.workers)):
        time.sleep(draw.uniform(0.3, 4.0))


def stop_two_workers(running: Fleet, draw: random.Random) -> None:
    first, second = draw.sample(running.workers, 2)
    with stopped(first), stopped(second):
        time.sleep(draw.uniform(0.3, 3.0))


def stop_the_control_plane(running: Fleet, draw: random.Random) -> None:
    with stopped(running.control):
        time.sleep(draw.uniform(0.3, 6.0))


def kill_the_control_plane(running: Fleet, draw: random.Random) -> None:
    kill(running.control)
    time.sleep(draw.uniform(0.0, 2.0))
    running.start_control()


def kill_a_worker_without_control_plane(running: Fleet, draw: random.Random) -> None:
    with stopped(running.control):
        time.sleep(draw.uniform(0.0, 1.0))
        running.kill_worker(draw.choice(running.workers))
        time.sleep(draw.uniform(0.2, 1.0))
    running.start_worker()


EVENTS: tuple[Callable[[Fleet, random.Random], None], ...] = (
    kill_a_worker,
    stop_a_worker,
    stop_the_control_plane,
    kill_the_control_plane,
    kill_a_worker_without_control_plane,
    stop_two_workers,
)


def check_events(dataset, events, seed):
    """Let events happen under two readers; returns the longest wait that each caused, in seconds."""
    draw = random.Random(seed)
    with fleet(dataset, NUM_WORKERS) as running:
        access = running.access(small_order(), read_stall_s=2.0, stalled_s=30.0)
        half = GLOBAL_BATCH // 2
        readers = [Reader(access, slots, STEP_S) for slots in ((0, half), (half, GLOBAL_BATCH))]
        waits = []
        for event in events:
            for reader in readers:
                reader.until(len(reader.slices) + 10)
            began = time.monotonic()
            event(running, draw)
            time.sleep(max(0.0, began + WATCHED_S - time.monotonic()))
            waits.append(max(reader.longest_wait(began) for reader in readers))
        for reader in readers:
            reader.end()
        client = DataClient(access)
        plan = client.plan("train")
        client.close()
        count = min(len(reader.slices) for reader in readers)
        assert count > 20 * len(events)
        for step in range(count):
            slices = [reader.slices[step] for reader in readers]
            assert [one.index for one in slices] == [step, step]
            assert hash_of(slices) == dataset.hash_of_step(plan, step)
    return np.array(waits)


@pytest.mark.timeout(240)
def test_no_event_changes_a_batch_or_makes_a_reader_hang(dataset):
    waits = check_events(dataset, EVENTS, seed=1)
    assert max(waits) < 10, waits  # the long test below holds it to a second


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_two_hundred_events_change_no_batch(dataset):
    draw = random.Random(20)
    events = [draw.choice(EVENTS) for _ in range(200)]
    waits = check_events(dataset, events, seed=2)
    sys.stdout.write(
        f"added wait of 200 events, s: p50 {np.quantile(waits, 0.5):.3f}, p99 {np.quantile(waits, 0.99):.3f}\n"
    )
    assert np.quantile(waits, 0.99) < 1.0, sorted(waits.tolist())[-10:]


def test_every_worker_killed_and_one_started_again(dataset):
    with fleet(dataset, 1) as running:
        client = DataClient(running.access(small_order(), run_ahead=1, read_stall_s=2.0, stalled_s=30.0))
        plan = client.plan("train")
        stream = client.stream("train", 0, 40, (0, GLOBAL_BATCH))
        hashes = []
        for _ in range(4):
            hashes += [hash_of([next(stream)]) for _ in range(10)]
            running.kill_worker(running.workers[0])
            running.start_worker()
        client.close()
    assert hashes == [dataset.hash_of_step(plan, step) for step in range(40)]


def test_reading_goes_on_without_a_control_plane_and_new_clients_with_the_next(dataset):
    with fleet(dataset, 2) as running:
        client = DataClient(running.access(small_order(), run_ahead=1))
        plan = client.plan("train")
        stream = client.stream("train", 0, 300, (0, GLOBAL_BATCH))
        assert hash_of([next(stream)]) == dataset.hash_of_step(plan, 0)
        kill(running.control)
        began = time.monotonic()
        for step in range(1, 200):
            assert hash_of([next(stream)]) == dataset.hash_of_step(plan, step)
        # A second without the control plane at the least, so that a refresh of the members failed in between.
        time.sleep(max(0.0, began + 1.5 - time.monotonic()))
        running.start_control()
        for step in range(200, 300):
            assert hash_of([next(stream)]) == dataset.hash_of_step(plan, step)
        client.close()
        # Workers register again by themselves, so a new client finds them.
        newcomer = DataClient(running.access(small_order(), stalled_s=30.0))
        assert read_hashes(newcomer, 0, 3, 2) == [dataset.hash_of_step(plan, step) for step in range(3)]
        newcomer.close()


def test_all_workers_stopped_is_a_stall_within_its_deadline(dataset):
    with fleet(dataset, 2) as running:
        client = DataClient(running.access(small_order(), run_ahead=1, read_stall_s=0.5, stalled_s=3.0))
        stream = client.stream("train", 0, 1000, (0, GLOBAL_BATCH))
        next(stream)

        def drain():
            for _ in stream:
                pass

        with stopped(running.workers[0]), stopped(running.workers[1]):
            began = time.monotonic()
            with pytest.raises(DataStalledError, match=r"within 3\.0 s \(data\.service\.stalled_s\)"):
                drain()
            assert 2.0 < time.monotonic() - began < 13.0
        client.close()
