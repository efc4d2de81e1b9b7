"""The client against real servers: the same rows for any slicing, nothing wrong handed on, nobody asked in vain."""

import time
from dataclasses import replace

import numpy as np
import pytest

from data_service.access import DataAccess
from data_service.client import NO_ROW, DataClient
from data_service.order import rows_of_batch, shards_of
from data_service.plan import OrderSpec
from data_service.rows import ShardRows
from data_service.schema import NO_LABEL
from tests.helpers.data_runs import GLOBAL_BATCH, TOKEN, hash_of, read_hashes, running_service, small_order
from tests.helpers.written_datasets import WrittenPart, random_documents, stream_dataset, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def service(dataset):
    with running_service(dataset.uri, small_order(), (ShardRows, ShardRows, ShardRows)) as running:
        yield running


@pytest.fixture
def client(service):
    client = DataClient(service.access())
    yield client
    client.close()


def assert_rows(dataset, plan, batch):
    """Every field of a slice equals the rows as they were cut from the documents."""
    first = batch.slots[0]
    ids = rows_of_batch(plan, batch.index)[first : batch.slots[1]]
    np.testing.assert_array_equal(batch.row_id[: ids.size], ids)
    assert not batch.tokens[ids.size :].any()
    assert not batch.length[ids.size :].any()
    assert (batch.row_id[ids.size :] == NO_ROW).all()
    starts = np.zeros(batch.tokens.shape, dtype=np.bool_)
    for slot, row_id in enumerate(ids.tolist()):
        row = dataset.row(plan, row_id)
        np.testing.assert_array_equal(batch.tokens[slot], row.tokens)
        assert batch.length[slot] == row.length
        assert batch.row_crc[slot] == row.crc
        starts[slot, row.starts] = True
        if plan.loss_masks:
            assert batch.answer_bits[slot].tobytes() == row.answer_bits
        if plan.num_labels:
            assert batch.labels[slot] == row.label
    np.testing.assert_array_equal(batch.doc_starts, starts)
    assert (np.diff(batch.start_rows.astype(np.int64) * 10**6 + batch.start_places) > 0).all()


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
def test_any_slicing_gives_the_rows_of_the_plan(dataset, client, dp):
    plan = client.plan("train")
    # Across the end of the first epoch, so that rows of two epochs and padded rows are among them.
    start = plan.num_batches - 3
    per_rank = -(-GLOBAL_BATCH // dp)
    ranks = [list(client.stream("train", start, start + 6, (r * per_rank, (r + 1) * per_rank))) for r in range(dp)]
    for number in range(6):
        slices = [rank[number] for rank in ranks]
        assert [one.index for one in slices] == [start + number] * dp
        for one in slices:
            assert one.tokens.dtype == np.uint16
            assert_rows(dataset, plan, one)
        assert hash_of(slices) == dataset.hash_of_step(plan, start + number)
        assert sum(int(one.rows.sum()) for one in slices) == GLOBAL_BATCH


def test_eval_ends_with_masked_rows_and_counts_every_label(dataset, client):
    plan = client.plan("eval")
    batches = list(client.stream("eval", 0, plan.num_batches, (0, GLOBAL_BATCH)))
    assert sum(int(batch.valid_tokens.sum()) for batch in batches) == dataset.manifest.num_tokens("eval") - 1
    for batch in batches:
        assert_rows(dataset, plan, batch)
    ids = np.concatenate([batch.row_id[batch.rows] for batch in batches])
    np.testing.assert_array_equal(ids, np.arange(plan.num_rows))
    assert 0 < batches[-1].rows.sum() < GLOBAL_BATCH
    beyond = list(client.stream("eval", 0, plan.num_batches, (GLOBAL_BATCH, GLOBAL_BATCH + 2)))
    assert len(beyond) == plan.num_batches
    assert not any(batch.rows.any() for batch in beyond)
    with pytest.raises(ValueError, match="it has"):
        client.stream("eval", 0, plan.num_batches + 1, (0, 1))


def test_positions_and_masks_follow_the_documents(dataset, service):
    order = replace(small_order(), isolate_documents=True)
    client = DataClient(service.access(order=order))
    for batch in client.stream("train", 0, 5, (0, GLOBAL_BATCH)):
        for slot in range(GLOBAL_BATCH):
            document, position = 0, 0
            for place in range(32):
                if batch.doc_starts[slot, place]:
                    document, position = document + (place > 0), 0
                assert batch.doc_ids[slot, place] == document
                assert batch.positions[slot, place] == position
                position += 1
                counts = place + 1 < batch.length[slot] and not batch.doc_starts[slot, place + 1]
                assert batch.loss_mask[slot, place] == counts
    client.close()


def test_document_rows_bring_their_labels_and_answers(tmp_path):
    draw = np.random.default_rng(3)
    documents = random_documents(5, 3000, vocab=70_000, longest=33, dtype="uint32")
    answers = [draw.random(one.size) < 0.5 for one in documents]
    labels = draw.integers(-1, 3, len(documents)).tolist()
    part = WrittenPart("chats", documents, labels=labels, answers=answers)
    dataset = write_dataset(
        tmp_path / "d", {"train": [part]}, rows="document", seq_len=32, labels=("a", "b", "c"), loss_masks=True
    )
    with running_service(dataset.uri, small_order(), (ShardRows, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        for batch in client.stream("train", 0, plan.num_batches + 2, (0, GLOBAL_BATCH + 3)):
            assert batch.tokens.dtype == np.uint32
            assert_rows(dataset, plan, batch)
            assert (batch.labels[GLOBAL_BATCH:] == NO_LABEL).all()
            assert not batch.answer_bits[GLOBAL_BATCH:].any()
            for slot in range(GLOBAL_BATCH):
                document = documents[int(batch.row_id[slot])]
                counted = answers[int(batch.row_id[slot])][1:]
                np.testing.assert_array_equal(batch.loss_mask[slot, : document.size - 1], counted)
        client.close()


def watched(seen):
    """A row source that notes which rows it reads."""

    class Watched(ShardRows):
        def read(self, plan, row_ids):
            seen.extend(row_ids.tolist())
            return super().read(plan, row_ids)

    return Watched


def test_each_shard_is_read_by_one_worker_and_each_row_once(tmp_path):
    dataset = stream_dataset(tmp_path / "d", shard_tokens=256)
    seen = [[], [], []]
    with running_service(dataset.uri, small_order(), [watched(one) for one in seen]) as service:
        clients = [DataClient(service.access()) for _ in range(4)]
        plan = clients[0].plan("train")
        for rank, client in enumerate(clients):
            list(client.stream("train", 0, plan.num_batches, (2 * rank, 2 * rank + 2)))
            client.close()
    assert sum(map(len, seen)) == plan.num_batches * GLOBAL_BATCH
    shards = [set(zip(*(a.tolist() for a in shards_of(plan, np.array(one, np.uint64))), strict=True)) for one in seen]
    assert all(shards), "a worker was never asked"
    for number, one in enumerate(shards):
        for other in shards[:number]:
            assert not one & other


def test_a_stream_holds_no_more_than_its_credits(dataset):
    asked = []
    with running_service(dataset.uri, small_order(), (watched(asked),)) as service:
        client = DataClient(service.access(run_ahead=3))
        stream = client.stream("train", 0, 100, (0, GLOBAL_BATCH))
        for taken in range(1, 8):
            next(stream)
            time.sleep(0.05)
            assert len(asked) <= (taken + 3) * GLOBAL_BATCH
        stream.close()
        client.close()


def test_runs_of_other_orders_share_the_service(dataset, service):
    for seed in (1, 2):
        order = OrderSpec(seed=seed, seq_len=48, global_batch=GLOBAL_BATCH, window_shards=2)
        client = DataClient(service.access(order=order))
        plan = client.plan("train")
        assert (plan.seed, plan.seq_len) == (seed, 48)
        assert read_hashes(client, 4, 7, 3) == [dataset.hash_of_step(plan, step) for step in (4, 5, 6)]
        client.close()


def test_an_access_without_bounds_is_refused():
    with pytest.raises(ValueError, match="empty"):
        DataAccess((), TOKEN, small_order(), "digest")
    with pytest.raises(ValueError, match="hedge_s=0"):
        DataAccess(("a:1",), TOKEN, small_order(), "digest", hedge_s=0)
    access = DataAccess(("a:1", "b:2"), TOKEN, small_order(), "digest", stalled_s=3.5)
    assert DataAccess.from_json(access.to_json()) == access
    assert TOKEN not in repr(access)
