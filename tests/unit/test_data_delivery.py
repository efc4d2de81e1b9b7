"""What a client does with answers that are not the plan's: none of them reaches the trainer unseen."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from data_service.client import DataClient
from data_service.delivery import RangeArrays, Wanted
from data_service.errors import DeliveryError
from data_service.hashing import row_crcs
from data_service.memory import Blocks
from data_service.order import rows_of_batch, rows_of_batches
from data_service.rows import ShardRows
from data_service.schema import RowBlock, block_to_batch, wire_schema
from tests.helpers.data_runs import GLOBAL_BATCH, read_hashes, running_service, small_order
from tests.helpers.written_datasets import WrittenPart, random_documents, stream_dataset, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return stream_dataset(tmp_path_factory.mktemp("data") / "d")


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


def test_a_consistent_lie_changes_the_hash(dataset):
    with running_service(dataset.uri, small_order(), (LyingRow,)) as service:
        lied_to = DataClient(service.access())
        plan = lied_to.plan("train")
        lies = read_hashes(lied_to, 0, 3, 1)
        lied_to.close()
    assert all(lie != dataset.hash_of_step(plan, step) for step, lie in enumerate(lies))


def with_nulls(batch, name):
    """The same message, where one cell of a column is null."""
    at = batch.schema.get_field_index(name)
    column = batch.column(at)
    cells = column.to_pylist()
    cells[1] = None
    return batch.set_column(at, batch.schema.field(at), pa.array(cells, column.type))


def with_null_items(batch, name):
    """The same message, where one item in the lists of a column is null."""
    at = batch.schema.get_field_index(name)
    column = batch.column(at)
    cells = column.to_pylist()
    cells[1] = [None, *cells[1][1:]]
    return batch.set_column(at, batch.schema.field(at), pa.array(cells, column.type))


NULLS = [
    *((with_nulls, name) for name in ("batch", "slot", "row_id", "length", "row_crc", "tokens", "starts")),
    *((with_nulls, name) for name in ("answer_bits", "label")),
    *((with_null_items, name) for name in ("tokens", "starts")),
]


@pytest.mark.parametrize(("lie", "column"), NULLS)
def test_cells_without_a_value_are_refused_and_named(tmp_path, lie, column):
    documents = random_documents(3, 2000, longest=33)
    part = WrittenPart("a", documents, labels=[1] * len(documents), answers=[one > 9 for one in documents])
    dataset = write_dataset(
        tmp_path / "d", {"train": [part]}, rows="document", seq_len=32, labels=("x", "y"), loss_masks=True
    )
    with running_service(dataset.uri, small_order(), (ShardRows,)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        (batch,) = client.stream("train", 4, 5, (0, GLOBAL_BATCH))
        client.close()
    rows = rows_of_batches(plan, 4, 5)
    offsets = np.searchsorted(batch.start_rows, np.arange(GLOBAL_BATCH + 1)).astype(np.int32)
    block = RowBlock(
        batch.row_id,
        batch.tokens,
        batch.length,
        batch.start_places,
        offsets,
        batch.answer_bits,
        batch.labels,
        batch.row_crc,
    )
    message = block_to_batch(block, rows.batch, rows.slot, wire_schema(plan, batch.tokens.dtype))
    wanted = Wanted(rows.batch, rows.slot, rows.row_id, np.arange(GLOBAL_BATCH))
    arrays = RangeArrays(plan, 4, 5, (0, GLOBAL_BATCH), Blocks())
    arrays.take(wanted, "a:1", [message])
    (taken,) = arrays.slices()
    assert taken.tokens.tolist() == batch.tokens.tolist()
    assert taken.start_places.tolist() == batch.start_places.tolist()
    named = rf"data worker a:1, global batch 4, slot 0 .*rows {rows.row_id[0]} to {rows.row_id[-1]} .*'{column}'"
    with pytest.raises(DeliveryError, match=named):
        arrays.take(wanted, "a:1", [lie(message, column)])


def test_an_answer_that_was_refused_leaves_nothing_behind(dataset):
    with running_service(dataset.uri, small_order(), (ShardRows,)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        (batch,) = client.stream("train", 2, 3, (0, GLOBAL_BATCH))
        client.close()
    rows = rows_of_batches(plan, 2, 3)
    offsets = np.searchsorted(batch.start_rows, np.arange(GLOBAL_BATCH + 1)).astype(np.int32)
    good = RowBlock(*(batch.row_id, batch.tokens, batch.length, batch.start_places, offsets, None, None, batch.row_crc))
    damaged = replace(good, tokens=batch.tokens.copy())
    damaged.tokens[-1, 5] ^= 1
    wanted = Wanted(rows.batch, rows.slot, rows.row_id, np.arange(GLOBAL_BATCH))
    arrays = RangeArrays(plan, 2, 3, (0, GLOBAL_BATCH), Blocks())
    schema = wire_schema(plan, batch.tokens.dtype)
    messages = [block_to_batch(one, rows.batch, rows.slot, schema) for one in (damaged, good)]
    half = GLOBAL_BATCH // 2
    with pytest.raises(DeliveryError, match=f"slot {GLOBAL_BATCH - 1}: row {rows.row_id[-1]} arrived with other"):
        arrays.take(wanted, "a:1", [messages[0].slice(0, half), messages[0].slice(half)])
    with pytest.raises(DeliveryError, match=f"{2 * GLOBAL_BATCH} rows were delivered .* the plan has {GLOBAL_BATCH}"):
        arrays.take(wanted, "a:1", [messages[1], messages[1]])
    arrays.take(wanted, "b:2", [messages[1].slice(0, half), messages[1].slice(half)])
    (taken,) = arrays.slices()
    for name in ("tokens", "length", "row_id", "row_crc", "start_rows", "start_places"):
        assert getattr(taken, name).tolist() == getattr(batch, name).tolist(), name


@pytest.mark.parametrize(
    ("lie", "column"), [(with_nulls, "row_id"), (with_nulls, "tokens"), (with_null_items, "tokens")]
)
def test_a_worker_that_sends_nulls_ends_the_stream_with_its_name(dataset, monkeypatch, lie, column):
    monkeypatch.setattr("data_service.server.block_to_batch", lambda *args: lie(block_to_batch(*args), column))
    with running_service(dataset.uri, small_order(), (ShardRows,)) as service:
        client = DataClient(service.access())
        with pytest.raises(DeliveryError, match=rf"data worker {service.workers[0]}, global batch 0, .*'{column}'"):
            list(client.stream("train", 0, 1, (0, GLOBAL_BATCH)))
        client.close()


def test_bitmaps_of_any_width_arrive_in_every_message_of_an_answer(tmp_path):
    """An answer of two messages: behind the rows of the first, its buffers go on with bytes of the second's."""
    documents = random_documents(5, 60_000, longest=20)
    part = WrittenPart("a", documents, answers=[one > 9 for one in documents])
    dataset = write_dataset(tmp_path / "d", {"train": [part]}, rows="document", seq_len=200, loss_masks=True)
    order = small_order(seq_len=200, global_batch=len(documents))
    assert len(documents) * 201 * 2 > 2**21
    with running_service(dataset.uri, order, (ShardRows,)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        (batch,) = client.stream("train", 0, 1, (0, len(documents)))
        client.close()
    plan_rows = [dataset.row(plan, int(one)) for one in batch.row_id[:: len(documents) // 50]]
    found = batch.answer_bits[:: len(documents) // 50]
    assert [row.answer_bits for row in plan_rows] == [bits.tobytes() for bits in found]


@pytest.mark.parametrize("source", [OtherRow, DamagedRow, FewerRows, ImpossibleStart])
def test_a_worker_that_answers_wrongly_is_left_for_another(dataset, source):
    with running_service(dataset.uri, small_order(), (source, ShardRows)) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        found = read_hashes(client, 0, 6, 1)
        client.close()
    assert found == [dataset.hash_of_step(plan, step) for step in range(6)]
