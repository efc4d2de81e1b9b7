"""What ranks wait when a process of the data service is killed or stopped."""

import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.data_fleet import Fleet, Reader, fleet, stopped
from tests.helpers.data_runs import GLOBAL_BATCH, small_order
from tests.helpers.written_datasets import stream_dataset

__all__ = ["measure_failover"]

STEP_S = 0.02
WATCHED_S = 1.5


def _kill(running: Fleet, draw: random.Random) -> None:
    running.kill_worker(draw.choice(running.workers))
    running.start_worker()


def _stop(running: Fleet, draw: random.Random) -> None:
    with stopped(draw.choice(running.workers)):
        time.sleep(draw.uniform(0.5, 2.0))


def _stop_control(running: Fleet, draw: random.Random) -> None:
    with stopped(running.control):
        time.sleep(draw.uniform(0.5, 2.0))


EVENTS = {"worker killed": _kill, "worker stopped": _stop, "control stopped": _stop_control}


def measure_failover(folder: Path, num_events: int) -> dict[str, Any]:
    """The longest wait after each of `num_events` events of every kind, three workers, two ranks at 20 ms a step."""
    draw = random.Random(1)
    found: dict[str, Any] = {}
    with fleet(stream_dataset(folder / "failover", tokens=(20_000,)), 3) as running:
        access = running.access(small_order())
        half = GLOBAL_BATCH // 2
        readers = [Reader(access, slots, STEP_S) for slots in ((0, half), (half, GLOBAL_BATCH))]
        for name, event in EVENTS.items():
            waits = []
            for _ in range(num_events):
                for reader in readers:
                    reader.until(len(reader.slices) + 20)
                began = time.monotonic()
                event(running, draw)
                time.sleep(max(0.0, began + WATCHED_S - time.monotonic()))
                waits.append(max(reader.longest_wait(began) for reader in readers))
            found[name] = {"p50_s": float(np.quantile(waits, 0.5)), "max_s": max(waits)}
        for reader in readers:
            reader.end()
    return found
