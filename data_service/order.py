"""The order of rows: a pure keyed function of (plan, step), with no array of an epoch anywhere.

    step index ─ skips ─▶ global batch ─ slots ─▶ samples ─ mixture ─▶ (source, index) ─ its parts ─▶ (part, index)
    ─ epochs of the part ─▶ (epoch, place) ─ windows of shards, permuted ─▶ row id

For each epoch of a part its shards are permuted, then cut into windows of at most `window_shards` shards, all of nearly
one length, and the rows inside a window are permuted again. Both permutations are keyed: an alternating Feistel network
over Z_a x Z_b with a·b just above the size, walked until it lands inside the domain (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002). So finding any row costs the same at the first and at the 10^11-th row, and
nothing has to be rebuilt or stored on resume.

Owns the keys and the composition; `row_kernel` evaluates it for many rows at once. Refuses to know ranks: a rank takes
slots of a global batch.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data_service.mixture import MAX_SAMPLES, counts_before, descend
from data_service.plan import PART_SHIFT, Plan
from data_service.row_kernel import ROUNDS, Permutation, Stretch, Stretches, order

__all__ = ["BatchRows", "keyed_permutation", "rows_of_batch", "rows_of_batches", "shards_of"]

_FACTORS_TRIED = 16
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
        segment_begins=np.array(begins, dtype=np.uint64),
        segment_sums=tuple(sums),
        segment_bases=tuple(bases),
    )


def _prefix_sums(weights: Sequence[int]) -> _U64:
    sums: _U64 = np.cumsum([0, *weights], dtype=np.uint64)
    return sums


@lru_cache(maxsize=1 << 14)
def _round_keys(plan: Plan, part: int, purpose: str, *numbers: int) -> tuple[int, ...]:
    """Keys of one permutation of one part."""
    named = plan.parts[part]
    text = "\0".join(
        ["stormjib.order", str(plan.version), plan.dataset_digest, plan.split, str(plan.seed)]
        + [named.source, str(named.generation), purpose, *(str(number) for number in numbers)]
    )
    digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))


def keyed_permutation(size: int, keys: tuple[int, ...]) -> Permutation:
    """The permutation of 0 … size-1 with these keys: a and b near the root of the size, a·b little above it."""
    root = max(int(math.sqrt(float(size))), 1)
    a = min(range(root, root + _FACTORS_TRIED), key=lambda tried: tried * -(-size // tried))
    return Permutation(size, a, -(-size // a), keys)


@lru_cache(maxsize=1 << 12)
def _stretch(plan: Plan, leaf: int, index: int, epoch: int, window: int) -> Stretch:
    """The rows of one window of shards of part `index` in one epoch."""
    part = plan.parts[index]
    count, per_shard = part.num_shards, part.rows_per_shard
    windows = -(-count // plan.window_shards)
    missing = count * per_shard - part.num_rows
    short = _short_slot(plan, index, epoch)
    low, high = window * count // windows, (window + 1) * count // windows
    begin = low * per_shard - (missing if short < low else 0)
    end = high * per_shard - (missing if short < high else 0)
    cut = (short + 1) * per_shard - missing - begin if low <= short < high else end - begin
    return Stretch(
        leaf=leaf,
        first=epoch * part.num_rows + begin,
        rows=keyed_permutation(end - begin, _round_keys(plan, index, "rows", epoch, window)),
        cut=cut,
        missing=missing,
        shard_rows=per_shard,
        low=low,
        short_slot=short,
        shards=keyed_permutation(max(count - 1, 1), _round_keys(plan, index, "shards", epoch)),
        last_shard=count - 1,
        base=index << PART_SHIFT,
    )


def _short_slot(plan: Plan, index: int, epoch: int) -> int:
    """Where a part's last shard, which may be short, lies among the permuted ones."""
    return _round_keys(plan, index, "last", epoch)[0] % plan.parts[index].num_shards


def _stretch_of(plan: Plan, leaf: int, index: int, sample: int) -> Stretch:
    """The stretch that holds one sample of part `index`."""
    part = plan.parts[index]
    count, per_shard = part.num_shards, part.rows_per_shard
    epoch, place = divmod(sample, part.num_rows)
    missing = count * per_shard - part.num_rows
    cut = (_short_slot(plan, index, epoch) + 1) * per_shard - missing
    slot = (place if place < cut else place + missing) // per_shard
    windows = -(-count // plan.window_shards)
    return _stretch(plan, leaf, index, epoch, ((slot + 1) * windows - 1) // count)


def _rows_of_parts(plan: Plan, tables: _Tables, leaf: _I64, index: _U64) -> _U64:
    """Row ids of the `index`-th samples of parts, where `leaf` is a place in `tables.part`; uint64 [n]."""
    rows = np.empty(index.size, np.uint64)
    known = Stretches(tables.part.size)
    done = 0
    while (done := order(leaf, index, known, rows, done)) < rows.size:
        number = int(leaf[done])
        known.add(_stretch_of(plan, number, int(tables.part[number]), int(index[done])))
    return rows


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
