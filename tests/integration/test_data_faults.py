"""Data workers in processes of their own, killed, stopped and replaced under a reading client."""

import os
import signal
import time

import pytest

from data_service.access import DataAccess
from data_service.client import DataClient
from data_service.control import ControlServer
from data_service.errors import DataStalledError
from data_service.prepare import prepare
from tests.helpers.data_runs import (
    GLOBAL_BATCH,
    SEED,
    TOKEN,
    hash_of,
    read_hashes,
    reviews,
    running_service,
    small_config,
    worker_process,
    write_csv,
)

NUM_BATCHES = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(write_csv(tmp_path_factory.mktemp("corpus") / "reviews.csv", reviews(200)))


@pytest.fixture(scope="module")
def dataset(config, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("dataset"))
    prepare(config, folder)
    return folder


@pytest.fixture(scope="module")
def truth(config, dataset):
    with running_service(dataset, config) as service:
        client = DataClient(service.access())
        hashes = read_hashes(client, 0, NUM_BATCHES, 1)
        client.close()
    return hashes


def test_a_killed_worker_changes_no_batch(config, dataset, truth):
    with (
        running_service(dataset, config, ()) as service,
        worker_process(dataset, service.control) as (first, _),
    ):
        client = DataClient(service.access(run_ahead=2))
        stream = client.stream("train", 0, NUM_BATCHES, (0, GLOBAL_BATCH))
        hashes = [hash_of([next(stream)]) for _ in range(10)]
        # The stream stays with the only worker there was, so this kill hits it.
        with worker_process(dataset, service.control) as (_, second):
            assert second
            first.kill()
            first.wait()
            began = time.monotonic()
            hashes += [hash_of([next(stream)]) for _ in range(NUM_BATCHES - 10)]
            assert time.monotonic() - began < 10.0
            assert hashes == truth
            client.close()


def test_every_worker_killed_and_one_started_again(config, dataset, truth):
    with running_service(dataset, config, ()) as service:
        client = DataClient(service.access(run_ahead=1))
        stream = client.stream("train", 0, NUM_BATCHES, (0, GLOBAL_BATCH))
        hashes = []
        for _ in range(4):
            with worker_process(dataset, service.control) as (process, address):
                assert address
                hashes += [hash_of([next(stream)]) for _ in range(NUM_BATCHES // 4)]
                process.kill()
                process.wait()
        assert hashes == truth
        client.close()


def test_a_control_plane_that_goes_away_and_comes_back_stops_nothing(config, dataset, truth):
    control = ControlServer(dataset, SEED, config, GLOBAL_BATCH, TOKEN)
    address = control.start()
    with worker_process(dataset, address) as (_, _), worker_process(dataset, address) as (_, _):
        client = DataClient(DataAccess((address,), TOKEN, 2, 2.0, 20.0))
        stream = client.stream("train", 0, NUM_BATCHES, (0, GLOBAL_BATCH))
        hashes = [hash_of([next(stream)]) for _ in range(10)]
        control.stop()
        hashes += [hash_of([next(stream)]) for _ in range(10)]
        again = ControlServer(dataset, SEED, config, GLOBAL_BATCH, TOKEN, port=int(address.rpartition(":")[2]))
        assert again.start() == address
        hashes += [hash_of([next(stream)]) for _ in range(NUM_BATCHES - 20)]
        assert hashes == truth
        # Workers register again by themselves, so a new client finds them.
        newcomer = DataClient(DataAccess((address,), TOKEN, 2, 2.0, 20.0))
        assert read_hashes(newcomer, 0, 3, 2) == truth[:3]
        newcomer.close()
        client.close()
        again.stop()


def test_one_stopped_worker_is_left_for_another(config, dataset, truth):
    with (
        running_service(dataset, config, ()) as service,
        worker_process(dataset, service.control) as (first, _),
    ):
        client = DataClient(service.access(run_ahead=1, read_stall_s=0.5))
        stream = client.stream("train", 0, NUM_BATCHES, (0, GLOBAL_BATCH))
        hashes = [hash_of([next(stream)]) for _ in range(5)]
        with worker_process(dataset, service.control) as (_, second):
            assert second
            os.kill(first.pid, signal.SIGSTOP)
            began = time.monotonic()
            hashes += [hash_of([next(stream)]) for _ in range(NUM_BATCHES - 5)]
            assert time.monotonic() - began < 10.0
            assert hashes == truth
            client.close()


def test_all_workers_stopped_is_a_stall_within_its_deadline(config, dataset):
    with (
        running_service(dataset, config, ()) as service,
        worker_process(dataset, service.control) as (first, _),
        worker_process(dataset, service.control) as (second, _),
    ):
        client = DataClient(service.access(run_ahead=1, read_stall_s=0.5, stalled_s=3.0))
        stream = client.stream("train", 0, 1000, (0, GLOBAL_BATCH))
        next(stream)
        for process in (first, second):
            os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()

        def drain():
            for _ in stream:
                pass

        with pytest.raises(DataStalledError, match=r"within 3\.0 s \(data\.service\.stalled_s\)"):
            drain()
        assert 2.0 < time.monotonic() - began < 8.0
        client.close()
