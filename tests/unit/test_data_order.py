"""The order of rows: exact, the same for any way of reading it, and that of a slow computation with lists of epochs."""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shuffle_quality import measure, quality_of
from data_service.mixture import MAX_SAMPLES
from data_service.order import keyed_permutation, rows_of_batch, rows_of_batches, shards_of
from data_service.ownership import fallbacks, owners, owners_of_rows
from data_service.plan import Plan, part_of_rows, row_id_of
from data_service.row_kernel import Permutation, Stretch, Stretches, order
from tests.helpers.plans import SlowOrder, hand_made, slow_permutation

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "order_v2.json").read_text())
KEYS = np.arange(1, 9, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def permuted_at(values: np.ndarray, which: np.ndarray, sizes: list[int], keys: np.ndarray) -> np.ndarray:
    """Keyed permutations evaluated at values: each as a stretch of one shard, all of whose rows are permuted."""
    known = Stretches(len(sizes))
    for leaf, size in enumerate(sizes):
        rows = keyed_permutation(size, tuple(keys[leaf].tolist()))
        alone = Permutation(1, 1, 1, rows.keys)
        known.add(Stretch(leaf, 0, rows, size, 0, 2**45, 0, 0, alone, 0, 0))
    found = np.empty(values.size, np.uint64)
    assert order(which.astype(np.int64), values, known, found, 0) == values.size
    return found


def permuted(size: int, keys: np.ndarray = KEYS) -> list[int]:
    values = np.arange(size, dtype=np.uint64)
    return permuted_at(values, np.zeros(size), [size], keys[None]).tolist()


def all_rows(plan: Plan, batches: int) -> list[list[int]]:
    rows = rows_of_batches(plan, 0, batches).row_id.reshape(batches, plan.global_batch)
    return [batch.tolist() for batch in rows]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 97, 1000, 4097])
def test_a_permutation_is_one_and_that_of_the_slow_computation(size):
    found = permuted(size)
    assert sorted(found) == list(range(size))
    assert found == slow_permutation(size, KEYS.tolist())


def test_many_permutations_at_once_are_those_computed_alone():
    sizes = [1, 5, 12, 400, 33]
    keys = np.stack([KEYS + np.uint64(number) for number in range(len(sizes))])
    which = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate([np.arange(size) for size in sizes]).astype(np.uint64)
    shuffle = np.random.default_rng(3).permutation(which.size)
    found = np.empty(which.size, dtype=np.uint64)
    found[shuffle] = permuted_at(values[shuffle], which[shuffle], sizes, keys)
    assert found.tolist() == [value for size, key in zip(sizes, keys, strict=True) for value in permuted(size, key)]


def test_a_permutation_of_a_huge_domain_stays_inside_and_distinct():
    size = 2**44 - 3
    values = np.uint64(size - 1) - np.arange(20_000, dtype=np.uint64)
    found = permuted_at(values, np.zeros(values.size), [size], KEYS[None])
    assert np.unique(found).size == values.size
    assert int(found.max()) < size


PLANS = {
    "one source": hand_made([("a", 0, 103, 10)]),
    "no ragged tail": hand_made([("a", 0, 120, 10)], global_batch=7, window=5),
    "one row": hand_made([("a", 0, 1, 4)], global_batch=3),
    "one shard": hand_made([("a", 0, 30, 100)], window=1),
    "batch over epochs": hand_made([("a", 0, 11, 3)], global_batch=40, window=2),
    "a row a shard": hand_made([("a", 0, 50, 1)], window=4),
    "window above all": hand_made([("a", 0, 61, 7)], window=1000),
    "sources": hand_made([("a", 0, 103, 10), ("b", 0, 57, 7), ("c", 0, 5, 9)], global_batch=9),
    "generations": hand_made(
        [("a", 0, 40, 8), ("b", 0, 21, 8), ("b", 1, 3, 8), ("c", 1, 30, 8), ("a", 2, 25, 8)], global_batch=6
    ),
    "weights": hand_made(
        [("a", 0, 40, 8), ("b", 0, 21, 8), ("b", 1, 5, 8)],
        segments=[(0, [1, 2]), (5, [3, 0]), (9, [0, 1]), (13, [5, 4])],
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_rows_are_those_of_the_slow_computation(name):
    plan = PLANS[name]
    assert all_rows(plan, 40) == SlowOrder(plan).batches(40)


@st.composite
def plans(draw):
    sources = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6))
    parts = [
        (source, number, draw(st.integers(1, 60)), draw(st.integers(1, 20))) for number, source in enumerate(sources)
    ]
    skip, at = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=4)):
        skip.append((at + gap, at + gap + length))
        at += gap + length
    count = len(set(sources))
    weights = st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any)
    segments = [(0, draw(weights))]
    for later in sorted(draw(st.sets(st.integers(1, 30), max_size=3))):
        segments.append((later, draw(weights)))
    return hand_made(
        parts,
        global_batch=draw(st.integers(1, 17)),
        window=draw(st.integers(1, 6)),
        segments=segments,
        skip=skip,
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@settings(deadline=None, max_examples=60)
@given(plans(), st.data())
def test_any_range_of_any_plan_is_that_of_the_slow_computation(plan, data):
    absolute = SlowOrder(plan).batches(70)
    skipped = {batch for first, end in plan.skip for batch in range(first, end)}
    wanted = [rows for batch, rows in enumerate(absolute) if batch not in skipped]
    first = data.draw(st.integers(0, 12))
    last = data.draw(st.integers(first, 15))
    low = data.draw(st.integers(0, plan.global_batch))
    high = data.draw(st.integers(low, plan.global_batch))
    rows = rows_of_batches(plan, first, last, (low, high))
    assert rows.row_id.tolist() == [row for batch in wanted[first:last] for row in batch[low:high]]
    assert rows.batch.tolist() == [step for step in range(first, last) for _ in range(low, high)]
    assert rows.slot.tolist() == list(range(low, high)) * (last - first)
    assert [absolute[plan.batch_at(step)] for step in range(20)] == wanted[:20]


@settings(deadline=None, max_examples=60)
@given(plans())
def test_each_row_comes_once_in_an_epoch(plan):
    rows_by_source = [sum(plan.parts[part].num_rows for part in indices) for _, indices in plan.sources]
    natural = hand_made(
        [(one.source, one.generation, one.num_rows, one.rows_per_shard) for one in plan.parts],
        global_batch=plan.global_batch,
        window=plan.window_shards,
        segments=[(0, rows_by_source)],
        seed=plan.seed,
    )
    every = {row_id_of(part, row) for part, info in enumerate(plan.parts) for row in range(info.num_rows)}
    samples = rows_of_batches(natural, 0, -(-3 * len(every) // plan.global_batch)).row_id.tolist()
    epochs = [samples[at : at + len(every)] for at in range(0, 3 * len(every), len(every))]
    for epoch in epochs:
        assert set(epoch) == every
        assert len(epoch) == len(every)
    if len(every) > 30:
        assert epochs[0] != epochs[1]
        assert epochs[0] != sorted(epochs[0])


def test_weights_that_change_lose_and_repeat_nothing():
    parts = [("a", 0, 101, 10), ("b", 0, 64, 10), ("b", 1, 33, 10)]
    plan = hand_made(parts, segments=[(0, [2, 1]), (7, [0, 5]), (20, [1, 1]), (33, [9, 2])])
    rows = rows_of_batches(plan, 0, 300).row_id.tolist()
    for source, size in ((0, 101), (1, 97)):
        taken = [row for row in rows if (part_of_rows(row)[0] > 0) == bool(source)]
        for epoch in range(len(taken) // size):
            assert set(Counter(taken[epoch * size : (epoch + 1) * size]).values()) == {1}
        # What each source gives, in its order, is the same whatever the weights.
        alone = hand_made(parts, segments=[(0, [1 - source, source])])
        assert taken == rows_of_batches(alone, 0, 300).row_id.tolist()[: len(taken)]
    paused = rows_of_batches(plan, 7, 20).row_id
    assert (paused >> np.uint64(48)).min() > 0


def test_skipping_a_range_leaves_all_other_batches_as_they_are():
    parts = [("a", 0, 101, 10), ("b", 0, 64, 10)]
    changes = [(0, [2, 1]), (30, [1, 4])]
    whole = all_rows(hand_made(parts, segments=changes), 80)
    plan = hand_made(parts, segments=changes, skip=[(0, 2), (25, 33), (33, 34), (50, 60)])
    left = [batch for number, batch in enumerate(whole) if not (number < 2 or 25 <= number < 34 or 50 <= number < 60)]
    assert all_rows(plan, len(left)) == left


def test_a_step_is_the_same_read_alone_in_slots_or_in_a_range():
    plan = PLANS["generations"]
    rows = all_rows(plan, 30)
    for step in range(30):
        assert rows_of_batch(plan, step).tolist() == rows[step]
        assert rows_of_batch(plan, step, 2, 5).tolist() == rows[step][2:5]
        assert rows_of_batch(plan, step, 2).tolist() == rows[step][2:]
    assert rows_of_batches(plan, 4, 4).row_id.size == 0
    assert rows_of_batches(plan, 4, 9, (3, 3)).row_id.size == 0
    for first, last, slots in ((-1, 2, None), (3, 2, None), (0, 1, (-1, 1)), (0, 1, (2, 1)), (0, 1, (0, 7))):
        with pytest.raises(ValueError, match="no range"):
            rows_of_batches(plan, first, last, slots)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_the_order_of_version_2_is_the_golden_one(case):
    plan = Plan.from_json(json.dumps(case["plan"]))
    assert plan.digest == case["digest"]
    for step, rows in case["rows"].items():
        assert rows_of_batch(plan, int(step)).tolist() == rows
    for consumed, digest in case["digest_at"].items():
        assert plan.digest_at(int(consumed)) == digest


def test_seed_dataset_source_and_generation_change_the_order():
    changed = [
        hand_made([("a", 0, 9999, 64)]),
        hand_made([("a", 0, 9999, 64)], seed=8),
        hand_made([("a", 0, 9999, 64)], dataset="d2"),
        hand_made([("b", 0, 9999, 64)]),
        hand_made([("a", 1, 9999, 64)]),
    ]
    assert len({tuple(rows_of_batch(plan, 3).tolist()) for plan in changed}) == len(changed)


def test_the_batch_size_does_not_change_the_samples():
    parts = [("a", 0, 500, 16), ("b", 0, 70, 16)]
    samples = [rows_of_batches(hand_made(parts, global_batch=size), 0, 1200 // size).row_id for size in (1, 8, 48)]
    np.testing.assert_array_equal(samples[0], samples[1])
    np.testing.assert_array_equal(samples[0], samples[2])


def test_rows_of_a_window_stay_together_and_no_window_is_tiny():
    per_shard, shards = 64, 33
    plan = hand_made([("a", 0, per_shard * shards, per_shard)], global_batch=per_shard, window=16)
    _, shard = shards_of(plan, rows_of_batches(plan, 0, shards).row_id)
    order = shard.reshape(3, 11 * per_shard)
    for window in order:
        assert np.unique(window).size == 11
    assert np.unique(order).size == shards


def test_an_eval_plan_is_sequential_and_ends():
    plan = hand_made([("a", 0, 33, 10), ("b", 0, 1, 10), ("a", 1, 66, 10)], split="eval")
    assert plan.num_batches == 13
    rows = rows_of_batches(plan, 0, 15)
    assert [part_of_rows(row) for row in rows.row_id.tolist()] == [
        (part, row) for part, size in enumerate((33, 1, 66)) for row in range(size)
    ]
    assert rows.batch.tolist() == [number // 8 for number in range(100)]
    assert [rows_of_batch(plan, step).size for step in (11, 12, 13)] == [8, 4, 0]


def median_s(action, repeats: int = 9) -> float:
    action(0)
    found = []
    for number in range(1, repeats + 1):
        began = time.process_time()
        action(number)
        found.append(time.process_time() - began)
    return sorted(found)[repeats // 2]


def test_a_jump_is_as_cheap_as_a_start():
    plan = hand_made([("a", 0, 10**11, 16_384)], global_batch=1024, window=16, seq_len=256)
    far = 7 * plan.num_batches + 12_345_678
    rows = rows_of_batch(plan, far)
    assert np.unique(rows).size == 1024
    assert int(rows.max()) < 10**11
    # Below 1 ms on a quiet machine.
    assert median_s(lambda number: rows_of_batch(plan, far + 1000 * number)) < 0.01


def test_small_batches_cost_no_fixed_time_each():
    plan = hand_made([("a", 0, 10**6, 4096), ("b", 0, 10**5, 4096)], window=16, seq_len=256)
    one = median_s(lambda number: rows_of_batches(plan, number, number + 1))
    many = median_s(lambda number: rows_of_batches(plan, 64 * number, 64 * number + 64))
    assert many < max(5 * one, 0.01)


def test_the_last_samples_that_can_be_numbered_and_none_behind():
    plan = hand_made([("a", 0, 2**43 + 5, 2**20), ("b", 0, 3, 1)], global_batch=2**20, window=16)
    last = MAX_SAMPLES // plan.global_batch
    rows = rows_of_batches(plan, last - 1, last, (2**20 - 8, 2**20)).row_id.tolist()
    assert len(set(rows)) >= 4
    assert all(part_of_rows(row)[1] < plan.parts[part_of_rows(row)[0]].num_rows for row in rows)
    with pytest.raises(ValueError, match="behind sample"):
        rows_of_batches(plan, last, last + 1, (0, 1))


MEMBERS = ("worker-0", "worker-1", "worker-2", "worker-3", "worker-4")


def test_each_row_has_one_owner_whoever_asks():
    plan = hand_made([("a", 0, 4000, 10), ("b", 0, 500, 10)], global_batch=50)
    rows = rows_of_batches(plan, 0, 40).row_id
    for count in range(1, len(MEMBERS) + 1):
        found = owners_of_rows(plan, MEMBERS[:count], rows)
        assert set(found.tolist()) == set(range(count))
        # Rows of one shard have one owner, in any company.
        part, shard = shards_of(plan, rows)
        np.testing.assert_array_equal(found, owners(plan, MEMBERS[:count], part, shard))
        np.testing.assert_array_equal(found[7:8], owners_of_rows(plan, MEMBERS[:count], rows[7:8]))
    assert owners_of_rows(plan, (), rows).max() == 0


def test_only_the_shards_of_a_member_that_left_move():
    plan = hand_made([("a", 0, 20_000, 10)])
    shard = np.arange(2000, dtype=np.uint64)
    part = np.zeros(2000, dtype=np.uint32)
    before = owners(plan, MEMBERS, part, shard)
    assert np.bincount(before).min() > 300
    for gone in range(len(MEMBERS)):
        left = MEMBERS[:gone] + MEMBERS[gone + 1 :]
        after = np.array(left)[owners(plan, left, part, shard)]
        stayed = before != gone
        assert (after[stayed] == np.array(MEMBERS)[before[stayed]]).all()
        assert np.unique(after[~stayed]).size == 4


def test_owners_do_not_depend_on_what_a_run_asks_for():
    shard, part = np.arange(500, dtype=np.uint64), np.zeros(500, dtype=np.uint32)
    plans = [hand_made([("a", 0, 5000, 10)]), hand_made([("a", 0, 5000, 10)], seed=99, window=9, global_batch=64)]
    found = [owners(plan, MEMBERS, part, shard).tolist() for plan in plans]
    assert found[0] == found[1]
    others = [
        hand_made([("b", 0, 5000, 10)]),
        hand_made([("a", 1, 5000, 10)]),
        hand_made([("a", 0, 5000, 10)], dataset="e"),
    ]
    for plan in others:
        assert owners(plan, MEMBERS, part, shard).tolist() != found[0]


def test_fallbacks_are_all_others_and_spread():
    firsts = set()
    for member in range(len(MEMBERS)):
        order = fallbacks(MEMBERS, member)
        assert sorted([*order, member]) == list(range(len(MEMBERS)))
        firsts.add(order[0])
    assert len(firsts) > 1
    assert fallbacks(("only",), 0) == []


def test_shuffle_quality_of_orders_that_are_known():
    draw = np.random.default_rng(0)
    uniform = quality_of(draw.permutation(2**17), rows_per_shard=1024, global_batch=256)
    assert (uniform.mean_distance, uniform.median_distance) == pytest.approx((1, 1), rel=0.02)
    assert (uniform.p05_distance, uniform.drift) == pytest.approx((1, 1), rel=0.15)
    assert uniform.mean_shards == pytest.approx(128 * (1 - (1 - 1 / 128) ** 256), rel=0.02)
    files = quality_of(np.arange(2**17), rows_per_shard=1024, global_batch=256)
    assert (files.mean_shards, files.least_shards) == (1, 1)
    assert files.mean_distance < 1e-4
    assert files.neighbours_in_batch > 400
    assert files.drift == pytest.approx(16, rel=0.02)


def test_a_wider_window_shuffles_better_and_all_shards_as_a_uniform_shuffle():
    found = [
        measure(shards=64, rows_per_shard=256, global_batch=128, window=window, seed=1) for window in (1, 4, 16, 64)
    ]
    assert [round(one.mean_shards) for one in found[:3]] == [1, 4, 16]
    assert [one.mean_distance for one in found] == pytest.approx([1 / 64, 4 / 64, 16 / 64, 1], abs=0.01)
    assert [one.drift for one in found] == sorted((one.drift for one in found), reverse=True)
    assert found[3].drift == pytest.approx(1, rel=0.25)
    assert found[3].mean_shards == pytest.approx(64 * (1 - (1 - 1 / 64) ** 128), rel=0.02)
