"""The order of rows: permutations without arrays, the same for any way of reading them."""

import random
import time

import numpy as np
import pytest

from data_service.cursor import Cursor
from data_service.errors import CursorMismatchError
from data_service.hashing import row_crc, row_crcs, sample_hash
from data_service.order import permute, rows_of_batch
from data_service.plan import PLAN_VERSION, Plan, num_rows_of


def make(num_tokens, seq_len, global_batch, rows_per_shard, window, split="train", seed=7):
    return Plan(
        version=PLAN_VERSION,
        dataset_digest="d1",
        split=split,
        seed=seed,
        seq_len=seq_len,
        global_batch=global_batch,
        num_tokens=num_tokens,
        num_rows=num_rows_of(num_tokens, seq_len),
        rows_per_shard=rows_per_shard,
        window_shards=window,
        shuffle=split == "train",
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_is_a_bijection(size):
    keys = np.arange(8, dtype=np.uint64)
    assert sorted(permute(np.arange(size, dtype=np.uint64), size, keys).tolist()) == list(range(size))


# Blocks that divide the rows and that do not; one block; one row; batches over several epochs; window above the blocks.
@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "global_batch", "rows_per_shard", "window"),
    [
        (1001, 10, 8, 10, 2),
        (1000, 3, 7, 5, 2),
        (1000, 3, 400, 5, 3),
        (5, 2, 3, 1, 1),
        (2, 5, 3, 4, 4),
        (100_003, 7, 64, 100, 16),
        (1000, 7, 6, 40, 100),
        (1000, 7, 6, 10_000, 1),
    ],
)
def test_every_epoch_is_a_permutation_and_epochs_follow_each_other(
    num_tokens, seq_len, global_batch, rows_per_shard, window
):
    plan = make(num_tokens, seq_len, global_batch, rows_per_shard, window)
    n = plan.num_rows
    batches = [rows_of_batch(plan, batch) for batch in range(3 * n // global_batch + 1)]
    assert {batch.size for batch in batches} == {global_batch}
    epochs = np.concatenate(batches)[: 3 * n].reshape(3, n)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    if n > 20:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], np.arange(n))


def test_the_order_is_that_of_plan_version_1():
    plan = make(10_001, 10, 8, 64, 3)
    assert rows_of_batch(plan, 0).tolist() == GOLDEN[0]
    assert rows_of_batch(plan, 130).tolist() == GOLDEN[130]


GOLDEN = {0: [439, 417, 958, 392, 946, 418, 545, 555], 130: [106, 789, 104, 66, 817, 751, 115, 72]}


def test_seed_and_dataset_change_the_order():
    orders = [rows_of_batch(make(100_001, 10, 64, 64, 3, seed=seed), 3).tolist() for seed in range(5)]
    assert len({tuple(order) for order in orders}) == 5


def test_rows_of_a_window_stay_together():
    plan = make(64 * 30 * 10 + 1, 10, 64, 64, 3)
    window = np.concatenate([rows_of_batch(plan, batch) for batch in range(3)])
    assert len(set((window // 64).tolist())) == 3
    assert len(set(window.tolist())) == 192


def test_an_eval_plan_is_sequential_and_ends():
    plan = make(1001, 10, 8, 5, 2, split="eval")
    assert plan.num_batches == 13
    rows = [rows_of_batch(plan, batch) for batch in range(15)]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(100))
    assert [len(batch) for batch in rows[-3:]] == [4, 0, 0]


def test_a_jump_is_as_cheap_as_a_start():
    plan = make(10**11 * 256, 256, 1024, 16_384, 16)
    rows_of_batch(plan, 0)
    began = time.process_time()
    rows = rows_of_batch(plan, 3 * plan.num_batches + 12_345_678)
    assert time.process_time() - began < 0.1
    assert len(set(rows.tolist())) == 1024
    assert int(rows.max()) < plan.num_rows


@pytest.mark.parametrize("split", ["train", "eval"])
def test_slots_of_a_batch_are_a_slice_of_it(split):
    chance = random.Random(5)
    for _ in range(150):
        plan = make(
            chance.randint(2, 3000),
            chance.randint(1, 12),
            chance.randint(1, 300),
            chance.randint(1, 60),
            chance.randint(1, 5),
            split=split,
            seed=chance.randint(0, 9),
        )
        batch = chance.randint(0, 2 * plan.num_batches)
        first = chance.randint(0, plan.global_batch)
        last = chance.randint(first, plan.global_batch)
        rows = rows_of_batch(plan, batch)
        np.testing.assert_array_equal(rows_of_batch(plan, batch, first, last), rows[first:last])
        np.testing.assert_array_equal(rows_of_batch(plan, batch, first), rows[first:])
    for slots in ((-1, 1), (2, 1), (0, plan.global_batch + 1)):
        with pytest.raises(ValueError, match="no range within"):
            rows_of_batch(plan, 0, *slots)


def test_one_slot_of_a_huge_batch_costs_one_row():
    plan = make(10**11, 256, 2**61, 16_384, 16)
    began = time.process_time()
    assert rows_of_batch(plan, 2**61, 2**60, 2**60 + 1).size == 1
    assert time.process_time() - began < 0.1


def test_num_rows_counts_every_label_once():
    assert [num_rows_of(tokens, 4) for tokens in (0, 1, 2, 5, 6, 9, 10)] == [0, 0, 1, 1, 2, 2, 3]


def test_plan_and_cursor_travel_as_json():
    plan = make(1001, 10, 8, 5, 2)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).digest == plan.digest
    cursor = Cursor(plan.digest, 10**12)
    assert Cursor.from_json(cursor.to_json()) == cursor
    assert len(cursor.to_json()) < 1000
    cursor.check(plan)
    with pytest.raises(CursorMismatchError, match="seed 8"):
        cursor.check(make(1001, 10, 8, 5, 2, seed=8))


def test_a_plan_that_contradicts_itself_is_refused():
    text = make(1001, 10, 8, 5, 2).to_json()
    for broken in (
        text.replace('"num_rows":100', '"num_rows":1000'),
        text.replace('"seq_len":10', '"seq_len":"10"'),
        text.replace('"seed":7', '"sed":7'),
        text.replace('"global_batch":8', '"global_batch":0'),
        text.replace('"split":"train"', '"split":"test"'),
        "[]",
        "{",
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            Plan.from_json(broken)
    with pytest.raises(CursorMismatchError):
        Plan.from_json(text.replace('"version":1', '"version":2'))


def test_hashes_are_those_of_the_stated_bytes():
    tokens = np.array([[1, 2, 0xFFFF], [3, 4, 5]], dtype=np.uint16)
    valid = np.array([2, 1], dtype=np.uint32)
    assert row_crc(tokens[0], 2) == 0xCAC4A0FE
    assert row_crcs(tokens, valid).tolist() == [row_crc(tokens[0], 2), row_crc(tokens[1], 1)]
    assert row_crc(tokens[0], 2) != row_crc(tokens[0].astype(np.uint32), 2)
    with pytest.raises(TypeError):
        row_crc(tokens[0].astype(np.int64), 2)
    ids = np.array([2**40, 1], dtype=np.uint64)
    assert sample_hash(ids, row_crcs(tokens, valid)) != sample_hash(ids[::-1], row_crcs(tokens, valid)[::-1])
