"""Rows cut from kept blocks are those of the order, for any sequence of ranges."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_service.mixture import MAX_SAMPLES
from data_service.order import rows_of_batches
from data_service.order_blocks import owned_rows
from data_service.ownership import owners_of_rows
from tests.helpers.plans import hand_made

PARTS = [("a", 0, 900, 64), ("b", 0, 301, 64), ("a", 1, 77, 64)]


def check(plan, first, last, slots, members):
    rows, owner = owned_rows(plan, first, last, slots, members)
    wanted = rows_of_batches(plan, first, last, slots)
    for name in ("batch", "slot", "row_id"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(wanted, name))
    np.testing.assert_array_equal(owner, owners_of_rows(plan, members, wanted.row_id))
    return wanted.row_id.size


@pytest.mark.parametrize("split", ["train", "eval"])
def test_any_range_is_that_of_the_order(split):
    train = {"segments": ((0, (2, 1)), (40, (0, 5))), "skip": ((7, 9), (300, 1000))} if split == "train" else {}
    plan = hand_made(PARTS, global_batch=24, split=split, **train)
    draw = random.Random(4)
    total = 0
    for _ in range(300):
        low = draw.randrange(24)
        slots = (low, draw.randint(low + 1, 24))
        first = draw.choice((0, draw.randrange(80), draw.randrange(5000)))
        last = first + draw.choice((1, 1, 3, 17, 400))
        members = draw.choice(((), ("w1",), ("w1", "w2"), ("w1", "w2", "w3")))
        total += check(plan, first, last, slots, members)
    assert total > 1000


def test_threads_that_share_blocks_get_the_same_rows():
    plan = hand_made(PARTS, global_batch=16)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(check, plan, first, first + 5, (0, 16), ("w1", "w2")) for first in range(400)]
        assert sum(job.result() for job in jobs) == 400 * 5 * 16


def test_what_others_hold_too_cannot_be_written_to():
    rows, owner = owned_rows(hand_made(PARTS), 0, 4, (0, 8), ("w1", "w2"))
    for array in (rows.batch, rows.slot, rows.row_id, owner):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_steps_behind_the_last_sample_are_refused_and_those_before_it_are_not():
    plan = hand_made(PARTS, global_batch=2**24)
    last = MAX_SAMPLES // 2**24
    assert check(plan, last - 1, last, (5, 9), ("w1", "w2")) == 4
    with pytest.raises(ValueError, match="2\\^62"):
        owned_rows(plan, last, last + 1, (5, 9), ())
