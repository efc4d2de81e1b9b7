"""The order of rows: a pure keyed function of (plan, step), with no array of an epoch anywhere.

    step index ─ skips ─▶ global batch ─ slots ─▶ samples ─ mixture ─▶ (source, index) ─ its parts ─▶ (part, index)
    ─ epochs of the part ─▶ (epoch, place) ─ windows of shards, permuted ─▶ row id

For each epoch of a part its shards are permuted, then cut into windows of at most `window_shards` shards, all of nearly
one length, and the rows inside a window are permuted again. Both permutations are keyed: an alternating Feistel network
over Z_a x Z_b with a·b just above the size, walked until it lands inside the domain (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002). So finding any row costs the same at the first and at the 10^11-th row, and
nothing has to be rebuilt or stored on resume.

Owns the permutations and their composition. Refuses to know ranks: a rank takes slots of a global batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data_service.mixture import MAX_SAMPLES, counts_before, descend
from data_service.plan import PART_SHIFT, Plan

__all__ = ["BatchRows", "mix", "permute", "rows_of_batch", "rows_of_batches", "shards_of"]

_ROUNDS = 8
_FACTORS_TRIED = 16
_C1, _C2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ONE, _HALF = np.uint64(1), np.uint64(32)
_U64 = npt.NDArray[np.uint64]
_I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchRows:
    """Rows of a range of steps, batch after batch, slots ascending; n of them."""

    batch: npt.NDArray[np.uint64]
    """[n]: the step index that consumes the row."""
    slot: npt.NDArray[np.uint32]
    """[n]: its place in the global batch."""
    row_id: npt.NDArray[np.uint64]
    """[n]"""


@dataclass(frozen=True)
class _Tables:
    """What a plan's order needs, as arrays; P parts, those of one source together (`part` maps back to plan.parts)."""

    part: _I64
    """[P]"""
    row_sums: _U64
    """[P+1]: prefix sums of num_rows."""
    source_low: _I64
    """[sources]: first of the source's parts."""
    source_high: _I64
    num_rows: _U64
    """[P], like all below."""
    shard_rows: _U64
    num_shards: _U64
    num_windows: _U64
    segment_begins: _U64
    """[G]: first sample of each segment."""
    segment_sums: tuple[_U64, ...]
    segment_bases: tuple[_U64, ...]
    """Samples that each source has given before the segment; uint64 [sources]."""


@lru_cache(maxsize=64)
def _tables(plan: Plan) -> _Tables:
    part = [index for _, indices in plan.sources for index in indices]
    parts = [plan.parts[index] for index in part]
    ends = np.cumsum([len(indices) for _, indices in plan.sources])
    begins, sums, bases = [], [], []
    base = [0] * plan.num_sources
    for number, segment in enumerate(plan.segments):
        begin = segment.first_batch * plan.global_batch
        if begin >= MAX_SAMPLES:
            break
        begins.append(begin)
        sums.append(_prefix_sums(segment.weights))
        bases.append(np.array(base, dtype=np.uint64))
        if number + 1 < len(plan.segments):
            length = plan.segments[number + 1].first_batch * plan.global_batch - begin
            base = [old + new for old, new in zip(base, counts_before(segment.weights, length), strict=True)]
    return _Tables(
        part=np.array(part, dtype=np.int64),
        row_sums=_prefix_sums([one.num_rows for one in parts]),
        source_low=np.concatenate([[0], ends[:-1]]).astype(np.int64),
        source_high=ends.astype(np.int64),
        num_rows=np.array([one.num_rows for one in parts], dtype=np.uint64),
        shard_rows=np.array([one.rows_per_shard for one in parts], dtype=np.uint64),
        num_shards=np.array([one.num_shards for one in parts], dtype=np.uint64),
        num_windows=np.array([-(-one.num_shards // plan.window_shards) for one in parts], dtype=np.uint64),
        segment_begins=np.array(begins, dtype=np.uint64),
        segment_sums=tuple(sums),
        segment_bases=tuple(bases),
    )


def _prefix_sums(weights: Sequence[int]) -> _U64:
    sums: _U64 = np.cumsum([0, *weights], dtype=np.uint64)
    return sums


@lru_cache(maxsize=1 << 14)
def _round_keys(plan: Plan, part: int, purpose: str, *numbers: int) -> _U64:
    """Keys of one permutation of one part; uint64 [_ROUNDS], shared: not to be written to."""
    named = plan.parts[part]
    text = "\0".join(
        ["stormjib.order", str(plan.version), plan.dataset_digest, plan.split, str(plan.seed)]
        + [named.source, str(named.generation), purpose, *(str(number) for number in numbers)]
    )
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def mix(values: _U64) -> _U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _C1
    values = (values ^ (values >> np.uint64(27))) * _C2
    return values ^ (values >> np.uint64(31))


def _factors(sizes: _U64) -> tuple[_U64, _U64]:
    """For each size a and b near its square root with a·b at least the size, and little more."""
    root = np.sqrt(sizes.astype(np.float64)).astype(np.uint64)
    tried = np.maximum(root, _ONE)[:, None] + np.arange(_FACTORS_TRIED, dtype=np.uint64)
    others = (sizes[:, None] + tried - _ONE) // tried
    best = np.argmin(tried * others - sizes[:, None], axis=1)[:, None]
    return np.take_along_axis(tried, best, axis=1)[:, 0], np.take_along_axis(others, best, axis=1)[:, 0]


def _shift(values: _U64, size: _U64, other: _U64, key: _U64) -> _U64:
    """The sum of values and f(other, key) modulo size, where f is a pseudorandom number below size."""
    noise = other + key
    noise ^= noise >> np.uint64(30)
    noise *= _C1
    noise ^= noise >> np.uint64(27)
    noise *= _C2
    noise >>= _HALF
    noise *= size
    noise >>= _HALF
    noise += values
    # Below 2·size: the difference wraps around to a huge number where nothing is to be taken off.
    result: _U64 = np.minimum(noise, noise - size)
    return result


def permute(values: _U64, which: _I64, sizes: _U64, keys: _U64) -> _U64:
    """Keyed permutations of 0 … size-1, evaluated at `values`.

    Args:
        values: uint64 [n], each below the size of its domain.
        which: int64 [n], the domain that each value is of.
        sizes: uint64 [d], 1 … 2^62.
        keys: uint64 [d, _ROUNDS].

    Returns:
        uint64 [n]: below the size, and distinct for distinct values of one domain.
    """
    columns = np.concatenate([np.stack([sizes, *_factors(sizes)]), keys.T])
    result, todo = values, None
    while True:
        walk = result if todo is None else result[todo]
        # One domain broadcasts, which spares a gather of each column.
        size, a, b, *rounds = columns if sizes.size == 1 else columns[:, which if todo is None else which[todo]]
        left, right = np.divmod(walk, b)
        for number in range(0, _ROUNDS, 2):
            left = _shift(left, a, right, rounds[number])
            right = _shift(right, b, left, rounds[number + 1])
        walk = left * b + right
        outside = np.flatnonzero(walk >= size)
        if todo is None:
            result, todo = walk, outside
        else:
            result[todo] = walk
            todo = todo[outside]
        if not todo.size:
            break
    return result


def _distinct(*columns: npt.NDArray[np.integer]) -> tuple[_I64, _I64]:
    """Groups of equal tuples: the index of the first of each group [d], and the group of each [n]."""
    count = columns[0].size
    which = np.zeros(count, dtype=np.int64)
    groups = 1
    for column in columns:
        values = (column - column.min()).astype(np.int64)
        span = int(values.max()) + 1
        if span > 4 * count + 1024:
            values = np.unique(values, return_inverse=True)[1]
            span = int(values.max()) + 1
        which = which * span + values
        present = np.flatnonzero(np.bincount(which, minlength=1)) if groups * span <= 4 * count + 1024 else None
        if present is None:
            present, which = np.unique(which, return_inverse=True)
        else:
            place = np.zeros(groups * span, dtype=np.int64)
            place[present] = np.arange(present.size)
            which = place[which]
        groups = present.size
    first = np.empty(groups, dtype=np.int64)
    first[which[::-1]] = np.arange(count - 1, -1, -1)
    return first, which


def _rows_of_parts(plan: Plan, tables: _Tables, leaf: _I64, index: _U64) -> _U64:
    """Row ids of the `index`-th samples of parts, where `leaf` is a place in `tables.part`; uint64 [n]."""
    epoch, place = np.divmod(index, tables.num_rows[leaf])
    # Per (part, epoch): where the part's short last shard lies among the permuted ones.
    first, epochs = _distinct(leaf, epoch)
    owner, number = leaf[first], epoch[first]
    count, windows, per_shard = tables.num_shards[owner], tables.num_windows[owner], tables.shard_rows[owner]
    missing = count * per_shard - tables.num_rows[owner]
    named = list(zip(tables.part[owner].tolist(), number.tolist(), strict=True))
    short = np.array([_round_keys(plan, part, "last", e)[0] for part, e in named], dtype=np.uint64) % count
    cut = (short + _ONE) * per_shard - missing
    shard_keys = np.stack([_round_keys(plan, part, "shards", e) for part, e in named])

    slot = np.where(place < cut[epochs], place, place + missing[epochs]) // per_shard[epochs]
    window = ((slot + _ONE) * windows[epochs] - _ONE) // count[epochs]
    # Per (part, epoch, window): where it begins, and the permutation of its rows.
    first, inside = _distinct(epochs, window)
    group, number = epochs[first], window[first]
    low = number * count[group] // windows[group]
    high = (number + _ONE) * count[group] // windows[group]
    lost = missing[group]
    begin = low * per_shard[group] - np.where(short[group] < low, lost, np.uint64(0))
    end = high * per_shard[group] - np.where(short[group] < high, lost, np.uint64(0))
    holds_short = (low <= short[group]) & (short[group] < high)
    local_cut = np.where(holds_short, cut[group] - begin, end - begin)
    row_keys = np.stack(
        [
            _round_keys(plan, named[g][0], "rows", named[g][1], w)
            for g, w in zip(group.tolist(), number.tolist(), strict=True)
        ]
    )

    at = permute(place - begin[inside], inside, end - begin, row_keys)
    at = np.where(at < local_cut[inside], at, at + missing[epochs])
    step, offset = np.divmod(at, per_shard[epochs])
    slot = low[inside] + step
    # Per (part, epoch, slot): its shard. The short one has its slot; the others are permuted over the rest.
    first, slots = _distinct(epochs, slot)
    group, wanted = epochs[first], slot[first]
    others = np.maximum(count - _ONE, _ONE)
    moved = np.minimum(wanted - (wanted > short[group]), others[group] - _ONE)
    shard = permute(moved, group, others, shard_keys)
    shard = np.where(wanted == short[group], count[group] - _ONE, shard)
    row: _U64 = tables.part[leaf].astype(np.uint64) << np.uint64(PART_SHIFT)
    return row | shard[slots] * per_shard[epochs] + offset


def _rows_of_samples(plan: Plan, samples: _U64) -> _U64:
    """Row ids of samples of a train plan; uint64 [n]."""
    tables = _tables(plan)
    leaf = np.empty(samples.size, dtype=np.int64)
    index = np.empty(samples.size, dtype=np.uint64)
    segments = np.searchsorted(tables.segment_begins, samples, side="right") - 1
    for segment in range(int(segments.min()), int(segments.max()) + 1):
        chosen = segments == segment
        local = samples[chosen] - tables.segment_begins[segment]
        low = np.zeros(local.size, dtype=np.int64)
        source, given = descend(tables.segment_sums[segment], low, low + plan.num_sources, local)
        given += tables.segment_bases[segment][source]
        leaf[chosen], index[chosen] = descend(
            tables.row_sums, tables.source_low[source], tables.source_high[source], given
        )
    return _rows_of_parts(plan, tables, leaf, index)


def _batches_at(plan: Plan, steps: _U64) -> _U64:
    """`Plan.batch_at` of each step; uint64 [n]."""
    before = [0]
    thresholds = []
    for first, end in plan.skip:
        thresholds.append(first - before[-1])
        before.append(before[-1] + end - first)
    passed = np.searchsorted(np.array(thresholds, dtype=np.uint64), steps, side="right")
    batches: _U64 = steps + np.array(before, dtype=np.uint64)[passed]
    return batches


def rows_of_batches(plan: Plan, first: int, last: int, slots: tuple[int, int] | None = None) -> BatchRows:
    """The rows of the steps [first, last), or of some of their slots, in global order.

    A train plan goes on without end: in each source an epoch follows the other, also inside a batch. An eval plan gives
    its rows once, in file order: its last batch is short, and behind it there are none.

    Args:
        plan: the plan.
        first: a step index, from 0.
        last: the step index behind the last.
        slots: the first slot and the one behind the last, by default all. Time and memory grow with the slots that are
            asked for, whatever the batch holds.

    Raises:
        ValueError: when the range or the slots are none, or lie behind sample 2^62.
    """
    low, high = (0, plan.global_batch) if slots is None else slots
    if not 0 <= first <= last:
        raise ValueError(f"steps [{first}, {last}) are no range.")
    if not 0 <= low <= high <= plan.global_batch:
        raise ValueError(f"slots [{low}, {high}) are no range within {plan.global_batch} rows.")
    if last > first and (plan.batch_at(last - 1) + 1) * plan.global_batch > MAX_SAMPLES:
        raise ValueError(f"steps [{first}, {last}) of {plan.global_batch} rows lie behind sample 2^62.")
    steps = np.arange(first, last, dtype=np.uint64)
    slot = np.tile(np.arange(low, high, dtype=np.uint32), steps.size)
    batch = np.repeat(steps, high - low)
    samples = np.repeat(_batches_at(plan, steps) * np.uint64(plan.global_batch), high - low) + slot.astype(np.uint64)
    if plan.shuffle:
        return BatchRows(batch, slot, _rows_of_samples(plan, samples) if samples.size else samples)
    present = samples < plan.num_rows
    sums = _prefix_sums([part.num_rows for part in plan.parts])
    part = np.searchsorted(sums, samples[present], side="right") - 1
    row_id = part.astype(np.uint64) << np.uint64(PART_SHIFT) | (samples[present] - sums[part])
    return BatchRows(batch[present], slot[present], row_id)


def rows_of_batch(plan: Plan, step: int, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint64]:
    """The rows of one step's slots [first, last), in global order; see `rows_of_batches`. uint64 [slots]."""
    return rows_of_batches(plan, step, step + 1, (first, plan.global_batch if last is None else last)).row_id


def shards_of(plan: Plan, row_ids: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
    """The part of each row (index in plan.parts), and the number of its shard in the part; uint32 [n], uint64 [n]."""
    part = (row_ids >> np.uint64(PART_SHIFT)).astype(np.uint32)
    shard_rows = np.array([one.rows_per_shard for one in plan.parts], dtype=np.uint64)
    return part, (row_ids & np.uint64((1 << PART_SHIFT) - 1)) // shard_rows[part]
