"""kill -9 at random points of asynchronous saves: the newest complete step always loads, and holds the right values."""

import math
import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from tests.helpers.written_parts import cut, expected, fragments_of, make_state
from trainer.checkpoint import load_ranges
from trainer.fences import raise_fence
from trainer.fragments import KINDS, Range
from trainer.manifest import commit, list_complete, newest_complete
from trainer.protocol import PartReport
from trainer.retention import kept_steps, prune
from trainer.saver import CheckpointSaver

SHAPES = {"embedding.weight": (64, 32), "blocks.0.norm.weight": (32,), "blocks.0.up.weight": (128, 32)}
RANKS = 2
LONGEST_SAVE_S = 0.02


def _save_forever(uri: str, attempt: int, step: int, said: Connection) -> None:
    """What ranks and controller do at each save, in one process; says when it begins and when it has committed.

    The state is overwritten while it is saved, as training would.
    """
    torch.set_num_threads(1)
    raise_fence(uri, attempt, step)
    reports: SimpleQueue[PartReport] = SimpleQueue()
    ranges = cut(SHAPES, RANKS, None)
    savers = [CheckpointSaver(uri, attempt, rank, torch.device("cpu"), reports.put) for rank in range(RANKS)]
    while True:
        step += 1
        said.send(("begun", step))
        for rank, saver in enumerate(savers):
            live = fragments_of(ranges[rank], SHAPES, step)
            saver.save(step, live, make_state(SHAPES, step, dp=RANKS) if rank == 0 else None)
            for fragment in live:
                fragment.data.fill_(torch.nan)
        parts = [reports.get(timeout=60) for _ in savers]
        (state,) = [part.state for part in parts if part.state is not None]
        commit(uri, step, attempt, [part.receipt for part in parts], state)
        said.send(("committed", step))
        prune(uri, kept_steps(list_complete(uri), {}, keep_last=2, keep_best=0), newest=step)


def _kill_at_random_points(uri: str, num_kills: int) -> dict[str, int]:
    """Kill savers; returns how often a kill left the newest step half-written, and how often it left it whole."""
    draws = random.Random(20)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.test_trainer_kill"])
    outcomes = {"half-written": 0, "whole": 0}
    newest = 0
    for attempt in range(1, num_kills + 1):
        heard, said = context.Pipe(duplex=False)
        process = context.Process(target=_save_forever, args=(uri, attempt, newest, said))
        process.start()
        said.close()
        committed = newest
        saves_before_the_kill = draws.randrange(4)
        deadline_s = time.monotonic() + 60
        while True:
            assert heard.poll(max(0.0, deadline_s - time.monotonic())), "the saver says nothing"
            word, step = heard.recv()
            if word == "committed":
                committed = step
            elif saves_before_the_kill == 0:
                break
            else:
                saves_before_the_kill -= 1
        kill_at_s = time.monotonic() + draws.random() * LONGEST_SAVE_S
        while time.monotonic() < kill_at_s and process.is_alive():
            pass
        process.kill()
        process.join(60)
        assert process.exitcode == -9
        while heard.poll():
            try:
                word, step = heard.recv()
            except EOFError:
                break
            committed = step if word == "committed" else committed

        manifest, skipped = newest_complete(uri)
        if manifest is None:
            assert committed == 0, "what was committed is gone"
        else:
            assert manifest.step >= committed, "what was committed is gone"
            wanted = [Range(name, kind, 0, math.prod(shape)) for name, shape in SHAPES.items() for kind in KINDS]
            held = {(one.name, one.kind): torch.full((one.numel,), torch.nan) for one in wanted}
            for fragment in load_ranges(uri, manifest, wanted):
                held[fragment.name, fragment.kind][fragment.start : fragment.start + fragment.numel] = fragment.data
            for one in wanted:
                assert torch.equal(held[one.name, one.kind], expected(one.name, one.kind, one.numel, manifest.step))
        assert all("no manifest.json" in one.reason for one in skipped), skipped
        outcomes["half-written" if skipped else "whole"] += 1
        newest = 0 if manifest is None else manifest.step
    return outcomes


@pytest.mark.timeout(240)
def test_killed_savers_leave_the_newest_complete_step_loadable(tmp_path: Path) -> None:
    outcomes = _kill_at_random_points(str(tmp_path / "checkpoints"), 100)
    assert min(outcomes.values()) > 0, f"the kills did not hit both sides of a commit: {outcomes}"


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_thousand_killed_savers(tmp_path: Path) -> None:
    outcomes = _kill_at_random_points(str(tmp_path / "checkpoints"), 1000)
    assert min(outcomes.values()) > 50, outcomes
