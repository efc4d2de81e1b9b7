"""The order of rows: a pure keyed function of (plan, global batch), with no array of an epoch anywhere.

A split's rows are cut into blocks of `rows_per_shard` rows. For each epoch the blocks are permuted, then cut into
windows of `window_shards` blocks, and the rows inside a window are permuted again. Both permutations are keyed: a
Feistel network on the next even power of two, walked until it lands inside the domain (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002, the cycle-walking cipher). So finding any row costs the same at the first and at
the 10^11-th row, and nothing has to be rebuilt or stored on resume.

Owns the permutations and their composition. Refuses to know ranks: a rank takes slots of a global batch.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from data_service.plan import Plan

__all__ = ["permute", "rows_of_batch"]

_ROUNDS = 8
_U64 = npt.NDArray[np.uint64]


def _round_keys(plan: Plan, purpose: str, *numbers: int) -> _U64:
    """Round keys [_ROUNDS] for one permutation of one plan."""
    text = "/".join(
        ["stormjib.order", str(plan.version), plan.dataset_digest, plan.split, str(plan.seed), purpose]
        + [str(number) for number in numbers]
    )
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest(), dtype="<u8").astype(
        np.uint64
    )


def _mix(value: _U64) -> _U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(values: _U64, size: int, keys: _U64) -> _U64:
    """A keyed permutation of 0 … size-1, evaluated at `values`.

    Args:
        values: uint64 [n], each below `size`.
        size: the domain, up to 2^62.
        keys: uint64 round keys.

    Returns:
        uint64 [n], distinct for distinct values, each below `size`.
    """
    if size <= 1:
        return values.copy()
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    result = values.astype(np.uint64, copy=True)
    todo = np.arange(result.size)
    while todo.size:
        walk = result[todo]
        left, right = walk >> half, walk & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        walk = (left << half) | right
        result[todo] = walk
        todo = todo[walk >= size]
    return result


def _rows_of_window(plan: Plan, epoch: int, window: int, places: npt.NDArray[np.int64], start: int, size: int) -> _U64:
    """Row ids at `places` (positions in the epoch) of a window that begins at `start` and holds `size` rows."""
    block_rows = plan.rows_per_shard
    num_blocks = -(-plan.num_rows // block_rows)
    inside = permute((places - start).astype(np.uint64), size, _round_keys(plan, "rows", epoch, window)).astype(
        np.int64
    )
    window_blocks = min(plan.window_shards, num_blocks)
    first = window * window_blocks
    slots = np.arange(first, min(first + window_blocks, num_blocks), dtype=np.uint64)
    blocks = permute(slots, num_blocks, _round_keys(plan, "blocks", epoch)).astype(np.int64)
    lengths = np.minimum(block_rows, plan.num_rows - blocks * block_rows)
    ends = np.cumsum(lengths)
    slot = np.searchsorted(ends, inside, side="right")
    offset = inside - (ends[slot] - lengths[slot])
    rows: _U64 = (blocks[slot] * block_rows + offset).astype(np.uint64)
    return rows


def _inverse(value: int, size: int, keys: _U64) -> int:
    """The inverse of `permute` at one value: the rounds undone in reverse order, and the same walk."""
    if size <= 1:
        return value
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    walk = np.array([value], dtype=np.uint64)
    while True:
        left, right = walk >> half, walk & mask
        for key in keys[::-1]:
            left, right = right ^ (_mix(left + key) & mask), left
        walk = (left << half) | right
        if walk[0] < size:
            return int(walk[0])


def _rows_of_epoch(plan: Plan, epoch: int, places: npt.NDArray[np.int64]) -> _U64:
    """Row ids at `places` of one epoch of a shuffled plan."""
    num_blocks = -(-plan.num_rows // plan.rows_per_shard)
    missing = num_blocks * plan.rows_per_shard - plan.num_rows
    # The slot in which the last, short block lands.
    short = _inverse(num_blocks - 1, num_blocks, _round_keys(plan, "blocks", epoch)) if missing else num_blocks
    window_blocks = min(plan.window_shards, num_blocks)
    window_rows = window_blocks * plan.rows_per_shard
    short_window = short // window_blocks
    # Windows behind the one with the short block begin `missing` rows early.
    window = places // window_rows
    window = np.where(window >= short_window, (places + missing) // window_rows, window)
    rows = np.empty(places.size, dtype=np.uint64)
    for number in np.unique(window):
        index = int(number)
        start = index * window_rows - (missing if index > short_window else 0)
        end = min(plan.num_rows, (index + 1) * window_rows - (missing if index >= short_window else 0))
        chosen = window == number
        rows[chosen] = _rows_of_window(plan, epoch, index, places[chosen], start, end - start)
    return rows


def rows_of_batch(plan: Plan, batch: int, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint64]:
    """The rows of a global batch, or of its slots [first, last), in global order.

    Sample i = batch · global_batch + j of a train plan is at place i mod num_rows of epoch i div num_rows, so epochs
    follow each other inside a batch where they meet. An eval plan gives its rows once, in file order.

    Args:
        plan: the plan.
        batch: number of the global batch, from 0.
        first: the first slot.
        last: the slot behind the last, by default all to the end of the batch. Time and memory grow with the slots
            that are asked for, whatever the batch holds.

    Returns:
        uint64 [slots] row ids (index of the row in its split); fewer at the end of an eval plan, none past it.

    Raises:
        ValueError: for a negative batch, or slots that the batch does not have.
    """
    if batch < 0:
        raise ValueError(f"global batch {batch} is negative.")
    last = plan.global_batch if last is None else last
    if not 0 <= first <= last <= plan.global_batch:
        raise ValueError(f"slots [{first}, {last}) are no range within {plan.global_batch} rows.")
    start, wanted = batch * plan.global_batch + first, last - first
    if not plan.shuffle:
        return np.arange(min(start, plan.num_rows), min(start + wanted, plan.num_rows), dtype=np.uint64)
    rows = np.empty(wanted, dtype=np.uint64)
    done = 0
    while done < wanted:
        epoch, place = divmod(start + done, plan.num_rows)
        count = min(wanted - done, plan.num_rows - place)
        rows[done : done + count] = _rows_of_epoch(plan, epoch, np.arange(place, place + count, dtype=np.int64))
        done += count
    return rows
