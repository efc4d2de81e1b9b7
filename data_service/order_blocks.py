"""The order for ranges of steps that follow one another: computed in larger blocks, which are kept for the next range.

A permutation costs as much to set up as to evaluate at a thousand rows, and a stream asks for a thousand at a time. So
rows and owners are computed for some thousands of rows, and each range is cut out of those. A client and the workers
that it asks do this alike, and the result is `order.rows_of_batches`, whatever the blocks.

Owns the blocks and how many are kept. Refuses to change what the order is.
"""

import threading
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data_service.mixture import MAX_SAMPLES
from data_service.order import BatchRows, rows_of_batches
from data_service.ownership import owners_of_rows
from data_service.plan import Plan

__all__ = ["owned_rows"]

_BLOCK_ROWS = 4096
_MAX_BLOCK_STEPS = 256
_KEPT_BLOCKS = 128

_Owned = tuple[BatchRows, npt.NDArray[np.uint32]]
_lock = threading.Lock()


def owned_rows(plan: Plan, first: int, last: int, slots: tuple[int, int], members: tuple[str, ...]) -> _Owned:
    """The rows of the steps [first, last), as `order.rows_of_batches` has them, and the index of each one's owner.

    Args:
        plan: the plan.
        first: a step index, from 0.
        last: the step index behind the last.
        slots: the first slot and the one behind the last.
        members: sorted worker ids; with none or one, every owner is 0.

    Returns:
        Arrays that belong to others too: not to be written to. The owners are uint32 [n].

    Raises:
        ValueError: as `rows_of_batches` does.
    """
    count = slots[1] - slots[0]
    steps = max(1, min(_MAX_BLOCK_STEPS, _BLOCK_ROWS // max(1, count)))
    begin, end = first // steps, -(-last // steps)
    if not 0 <= first < last or count * (last - first) >= _BLOCK_ROWS or _beyond(plan, end * steps):
        return _owned(plan, first, last, slots, members)
    # Under one lock, so that ranges that are asked for together compute their block once; it takes a millisecond.
    with _lock:
        blocks = [_block(plan, number, steps, slots, members) for number in range(begin, end)]
    cuts = [np.searchsorted(rows.batch, np.array([first, last], dtype=np.uint64)).tolist() for rows, _ in blocks]
    parts = [
        (rows.batch[low:high], rows.slot[low:high], rows.row_id[low:high], owner[low:high])
        for (rows, owner), (low, high) in zip(blocks, cuts, strict=True)
    ]
    batch, slot, row_id, owner = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    return BatchRows(batch, slot, row_id), owner


def _beyond(plan: Plan, last: int) -> bool:
    """Whether a block that ends there cannot be numbered."""
    return (plan.batch_at(last) + 1) * plan.global_batch > MAX_SAMPLES


@lru_cache(maxsize=_KEPT_BLOCKS)
def _block(plan: Plan, number: int, steps: int, slots: tuple[int, int], members: tuple[str, ...]) -> _Owned:
    return _owned(plan, number * steps, (number + 1) * steps, slots, members)


def _owned(plan: Plan, first: int, last: int, slots: tuple[int, int], members: tuple[str, ...]) -> _Owned:
    rows = rows_of_batches(plan, first, last, slots)
    owner = owners_of_rows(plan, members, rows.row_id)
    for array in (rows.batch, rows.slot, rows.row_id, owner):
        array.setflags(write=False)
    return rows, owner
