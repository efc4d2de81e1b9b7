"""The client against real servers: the same rows for any slicing, nothing wrong handed on, nobody asked in vain."""

import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from data_service.access import DataAccess
from data_service.client import NO_ROW, DataClient
from data_service.errors import (
    ConfigError,
    DataError,
    DataStalledError,
    DataUnavailableError,
    DeliveryError,
    ShardCorruptError,
)
from data_service.hashing import row_crcs
from data_service.order import rows_of_batch, shards_of
from data_service.plan import OrderSpec
from data_service.rows import ShardRows
from data_service.schema import NO_LABEL, RowBlock
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
        assert tuple(batch.torch_tokens().shape) == batch.tokens.shape
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


class OtherRow(ShardRows):
    """Says and sends a row that is not the plan's."""

    def read(self, plan, row_ids):
        row_ids = row_ids.copy()
        row_ids[0] = row_ids[0] - 1 if row_ids[0] else 1
        return super().read(plan, row_ids)


class FewerRows(ShardRows):
    """Leaves the last row out."""

    def read(self, plan, row_ids):
        block = super().read(plan, row_ids[:-1])
        return replace(
            block,
            row_id=np.append(block.row_id, row_ids[-1]),
            tokens=np.concatenate([block.tokens, block.tokens[-1:]]),
            length=np.append(block.length, np.uint32(0)),
            start_offsets=np.append(block.start_offsets, block.start_offsets[-1]),
            row_crc=np.append(block.row_crc, np.uint32(0)),
        )


class DamagedRow(ShardRows):
    """Sends other tokens than it counted."""

    def read(self, plan, row_ids):
        block = super().read(plan, row_ids)
        block.tokens[-1, 3] ^= 1
        return block


class ImpossibleStart(ShardRows):
    """Sends a document start behind the row's end, under a checksum that fits."""

    def read(self, plan, row_ids):
        block = super().read(plan, row_ids)
        block.starts[block.start_offsets[-1] - 1] = 10**6
        crcs = row_crcs(block.tokens, block.length, block.starts, block.start_offsets)
        return replace(block, row_crc=crcs)


class LyingRow(ShardRows):
    """Sends other tokens under the right ids, with checksums that fit: nothing in the answer contradicts itself."""

    def read(self, plan, row_ids):
        block = super().read(plan, row_ids)
        block.tokens[:, 3] ^= 1
        crcs = row_crcs(block.tokens, block.length, block.starts, block.start_offsets)
        return RowBlock(block.row_id, block.tokens, block.length, block.starts, block.start_offsets, None, None, crcs)


@pytest.mark.parametrize(
    ("source", "slot"), [(OtherRow, 0), (DamagedRow, GLOBAL_BATCH - 1), (FewerRows, GLOBAL_BATCH - 1)]
)
def test_a_wrong_row_is_refused_and_named(dataset, source, slot):
    with running_service(dataset.uri, small_order(), (source,)) as service:
        client = DataClient(service.access())
        row = int(rows_of_batch(client.plan("train"), 5)[slot])
        where = rf"data worker {service.workers[0]}, global batch 5, slot {slot}: .*\b{row}\b"
        with pytest.raises(DeliveryError, match=where):
            list(client.stream("train", 5, 6, (0, GLOBAL_BATCH)))
        client.close()


def test_a_start_outside_its_row_is_refused(dataset):
    with running_service(dataset.uri, small_order(), (ImpossibleStart,)) as service:
        client = DataClient(service.access())
        with pytest.raises(DeliveryError, match="global batch 0, slot"):
            list(client.stream("train", 0, 1, (0, GLOBAL_BATCH)))
        client.close()


def test_a_consistent_lie_changes_the_hash(dataset, client):
    with running_service(dataset.uri, small_order(), (LyingRow,)) as service:
        lied_to = DataClient(service.access())
        lies = read_hashes(lied_to, 0, 3, 1)
        lied_to.close()
    truth = read_hashes(client, 0, 3, 1)
    assert all(lie != true for lie, true in zip(lies, truth, strict=True))


class Damaged(ShardRows):
    """Finds every shard damaged."""

    def read(self, plan, row_ids):
        raise ShardCorruptError("shards/train-00000.arrow was asked for, it is damaged.")


def test_rows_that_one_worker_finds_damaged_come_from_another(dataset):
    with running_service(dataset.uri, small_order(), (Damaged, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        assert read_hashes(client, 0, 12, 2) == [dataset.hash_of_step(plan, step) for step in range(12)]
        client.close()


def test_rows_that_all_workers_find_damaged_end_the_stream(dataset):
    with running_service(dataset.uri, small_order(), (Damaged, Damaged)) as service:
        client = DataClient(service.access())
        began = time.monotonic()
        with pytest.raises(ShardCorruptError, match=r"data worker .*train-00000\.arrow"):
            next(client.stream("train", 0, 1, (0, 1)))
        assert time.monotonic() - began < 5
        client.close()


def test_a_corrupt_shard_is_named_and_never_served(tmp_path):
    dataset = stream_dataset(tmp_path / "d", tokens=(12_000,))
    shard = tmp_path / "d" / "shards" / "train-00002.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    delivered = []
    with running_service(dataset.uri, small_order(), (ShardRows, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")

        def drain():
            for batch in client.stream("train", 0, plan.num_batches, (0, GLOBAL_BATCH)):
                delivered.extend(batch.row_id.tolist())

        with pytest.raises(ShardCorruptError, match=r"train-00002\.arrow"):
            drain()
        client.close()
    _, shards = shards_of(plan, np.array(delivered, dtype=np.uint64))
    assert 2 not in shards.tolist()


class Unavailable(ShardRows):
    """Its storage gives no answer."""

    def read(self, plan, row_ids):
        raise DataUnavailableError("the storage gave no answer")


def test_a_worker_without_storage_is_left_for_another(dataset):
    with running_service(dataset.uri, small_order(), (Unavailable, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        assert read_hashes(client, 0, 12, 1) == [dataset.hash_of_step(plan, step) for step in range(12)]
        client.close()


def test_strangers_and_other_datasets_are_refused(service):
    stranger = DataClient(replace(service.access(), token="wrong"))
    with pytest.raises(DataError, match="UNAUTHENTICATED"):
        stranger.plan("train")
    stranger.close()
    elsewhere = DataClient(replace(service.access(), dataset_digest="0" * 32))
    with pytest.raises(ConfigError, match="0" * 32):
        elsewhere.plan("train")
    elsewhere.close()


def test_a_split_without_rows_and_a_service_without_workers_say_so(tmp_path):
    part = WrittenPart("source", random_documents(1, 3000))
    dataset = write_dataset(tmp_path / "d", {"train": [part]})
    with running_service(dataset.uri, small_order(), ()) as service:
        client = DataClient(service.access(stalled_s=0.6))
        with pytest.raises(ConfigError, match=r"eval split.*data\.split\.eval"):
            client.plan("eval")
        with pytest.raises(DataStalledError, match="no data worker is registered"):
            next(client.stream("train", 0, 1, (0, 1)))
        client.close()


def test_a_control_plane_that_is_away_is_waited_for_and_the_next_one_asked(dataset, service):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    access = service.access(stalled_s=1.0)
    alone = DataClient(replace(access, control=(nobody,)))
    began = time.monotonic()
    with pytest.raises(DataUnavailableError, match="none answers"):
        alone.plan("train")
    assert 0.9 < time.monotonic() - began < 5
    alone.close()
    client = DataClient(replace(access, control=(nobody, service.control), stalled_s=20.0))
    assert read_hashes(client, 0, 2, 1) == [dataset.hash_of_step(client.plan("train"), step) for step in range(2)]
    client.close()


def test_runs_of_other_orders_share_the_service(dataset, service):
    for seed in (1, 2):
        order = OrderSpec(seed=seed, seq_len=48, global_batch=GLOBAL_BATCH, window_shards=2)
        client = DataClient(service.access(order=order))
        plan = client.plan("train")
        assert (plan.seed, plan.seq_len) == (seed, 48)
        assert read_hashes(client, 4, 7, 3) == [dataset.hash_of_step(plan, step) for step in (4, 5, 6)]
        client.close()


def test_closing_ends_the_threads_and_a_blocked_reader(dataset):
    with running_service(dataset.uri, small_order(), (ShardRows,)) as service:
        before = set(threading.enumerate())
        client = DataClient(service.access(run_ahead=2))
        stream = client.stream("train", 0, 1000, (0, GLOBAL_BATCH))
        next(stream)
        client.close()
        deadline = time.monotonic() + 5
        names = ("data-stream", "data-read", "data-members")
        while left := [one for one in threading.enumerate() if one.name.startswith(names) and one not in before]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)


def test_an_access_without_bounds_is_refused():
    with pytest.raises(ValueError, match="empty"):
        DataAccess((), TOKEN, small_order(), "digest")
    with pytest.raises(ValueError, match="hedge_s=0"):
        DataAccess(("a:1",), TOKEN, small_order(), "digest", hedge_s=0)
    access = DataAccess(("a:1", "b:2"), TOKEN, small_order(), "digest", stalled_s=3.5)
    assert DataAccess.from_json(access.to_json()) == access
    assert TOKEN not in repr(access)
