"""Rows: gathered as they were written, whatever their kind, with checksums over all they say."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_service.cache import ShardCache
from data_service.errors import CursorMismatchError, ShardCorruptError
from data_service.hashing import row_crcs, sample_hash
from data_service.order import rows_of_batch, rows_of_batches
from data_service.plan import OrderSpec, row_id_of
from data_service.planning import make_plan
from data_service.rows import ShardRows
from data_service.schema import NO_ROW, BatchSlice, block_to_batch, wire_schema
from data_service.shards import (
    ShardIndex,
    encode_shard,
    load_shard,
    open_shard,
)
from tests.helpers.plans import slow_crc32c
from tests.helpers.written_datasets import (
    EOS,
    WrittenPart,
    packed_shard,
    random_documents,
    stream_dataset,
    write_dataset,
)


class Shards:
    """A store of shards in memory."""

    def __init__(self, dataset_uri: str) -> None:
        self.dataset_uri = dataset_uri
        self.asked: list[int] = []

    def get(self, entries):
        entries = list(entries)
        self.asked += [entry.number for entry in entries]
        return {(entry.split, entry.number): load_shard(self.dataset_uri, entry) for entry in entries}


def rows_of(dataset) -> ShardRows:
    return ShardRows(dataset.manifest, ShardIndex(dataset.uri, dataset.manifest), Shards(dataset.uri))


def plan_of(dataset, split="train", seq_len=32, **changes):
    order = {"seed": 5, "seq_len": seq_len, "global_batch": 16, "window_shards": 3, **changes}
    return make_plan(dataset.manifest, split, OrderSpec(**order))


def all_ids(plan) -> np.ndarray:
    ids = [row_id_of(number, row) for number, part in enumerate(plan.parts) for row in range(part.num_rows)]
    return np.array(ids, dtype=np.uint64)


def expect(dataset, plan, block) -> None:
    """A block's rows against those cut from the documents."""
    for at, row_id in enumerate(block.row_id.tolist()):
        row = dataset.row(plan, row_id)
        assert block.tokens[at].tolist() == row.tokens.tolist()
        assert int(block.length[at]) == row.length
        assert block.starts[block.start_offsets[at] : block.start_offsets[at + 1]].tolist() == row.starts.tolist()
        if row.answer_bits:
            assert block.answer_bits[at].tobytes() == row.answer_bits
        assert row.label is None or int(block.labels[at]) == row.label
        assert int(block.row_crc[at]) == row.crc


@pytest.mark.parametrize("seq_len", [1, 7, 8, 32, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_stream_rows_are_those_of_the_documents(tmp_path, seq_len, dtype):
    train = [
        WrittenPart("a", random_documents(1, 9000, dtype=dtype)),
        WrittenPart("b", random_documents(2, 2048, dtype=dtype)),
        WrittenPart("a", random_documents(3, 300, dtype=dtype), generation=1),
    ]
    dataset = write_dataset(
        tmp_path / "d", {"train": train, "eval": [WrittenPart("b", random_documents(4, 3000, dtype=dtype))]}
    )
    for split in ("train", "eval"):
        plan = plan_of(dataset, split, seq_len)
        ids = all_ids(plan)
        if ids.size > 3000:
            ids = ids[:: ids.size // 500]
        ids = np.random.default_rng(0).permutation(ids)
        expect(dataset, plan, rows_of(dataset).read(plan, ids))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=3), st.integers(1, 60), st.integers(2, 200), st.integers(0, 9)
)
def test_any_stream_dataset_gives_the_rows_of_its_documents(tmp_path_factory, sizes, seq_len, shard_tokens, seed):
    parts = [WrittenPart(f"s{at}", random_documents(seed + at, size)) for at, size in enumerate(sizes)]
    folder = tmp_path_factory.mktemp("any") / "d"
    dataset = write_dataset(folder, {"train": parts}, shard_tokens=shard_tokens)
    plan = plan_of(dataset, seq_len=seq_len)
    expect(dataset, plan, rows_of(dataset).read(plan, np.random.default_rng(seed).permutation(all_ids(plan))))


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("classes", [(), ("bad", "good")])
@pytest.mark.parametrize("seq_len", [40, 47, 48])
def test_document_rows_with_masks_and_classes(tmp_path, masks, classes, seq_len):
    documents = random_documents(8, 3000, longest=seq_len + 1)
    draw = np.random.default_rng(5)
    part = WrittenPart(
        "chats",
        documents,
        labels=draw.integers(-1, 2, len(documents)).tolist() if classes else (),
        answers=[draw.random(one.size) < 0.4 for one in documents] if masks else (),
    )
    dataset = write_dataset(
        tmp_path / "d", {"train": [part]}, rows="document", seq_len=seq_len, labels=classes, loss_masks=masks
    )
    plan = plan_of(dataset, seq_len=seq_len)
    assert plan.num_labels == len(classes)
    block = rows_of(dataset).read(plan, np.random.default_rng(1).permutation(all_ids(plan)))
    expect(dataset, plan, block)
    assert (block.labels is None, block.answer_bits is None) == (not classes, not masks)


def test_packed_rows_and_plain_sources_in_a_dataset_of_chats(tmp_path):
    """Packed rows begin anywhere; where a shard has no answer bits, every label of its rows counts."""
    seq_len, draw = 29, np.random.default_rng(3)
    documents = WrittenPart("chats", random_documents(8, 900, longest=seq_len + 1))
    shape = write_dataset(tmp_path / "d", {"train": [documents]}, rows="document", seq_len=seq_len, loss_masks=True)
    shards = [packed_shard(draw, 16, seq_len + 1) for _ in range(shape.manifest.num_shards)]
    shards[1] = replace(shards[1], answer_bits=None)
    index = ShardIndex(shape.uri, shape.manifest)

    class Store:
        def get(self, entries):
            return {(entry.split, entry.number): open_shard(encode_shard(shards[entry.number])) for entry in entries}

    manifest = replace(shape.manifest, rows="packed")
    plan = make_plan(manifest, "train", OrderSpec(seed=1, seq_len=seq_len, global_batch=4, window_shards=2))
    ids = np.array([row_id_of(0, row) for row in range(32)][::-1], dtype=np.uint64)
    block = ShardRows(manifest, index, Store()).read(plan, ids)
    for at, row_id in enumerate(ids.tolist()):
        shard = shards[row_id // 16]
        begin, end = (int(shard.row_offsets[row_id % 16 + more]) for more in (0, 1))
        assert block.tokens[at].tolist() == [*shard.tokens[begin:end].tolist(), *[EOS] * (seq_len + 1 - end + begin)]
        wanted = [int(start) - begin for start in shard.starts if begin <= start < end]
        assert block.starts[block.start_offsets[at] : block.start_offsets[at + 1]].tolist() == wanted
        bits = np.unpackbits(block.answer_bits[at], bitorder="little").tolist()
        every = [1] * shard.tokens.size
        stored = every if shard.answer_bits is None else np.unpackbits(shard.answer_bits, bitorder="little").tolist()
        assert bits == [*stored[begin + 1 : end], *[0] * (len(bits) - (end - begin - 1))]


def test_each_shard_is_asked_for_once_and_no_row_leaves_its_shard(tmp_path):
    dataset = stream_dataset(tmp_path / "d")
    plan = plan_of(dataset)
    store = Shards(dataset.uri)
    rows = ShardRows(dataset.manifest, ShardIndex(dataset.uri, dataset.manifest), store)
    rows.read(plan, all_ids(plan))
    assert store.asked == list(range(sum(part.num_shards for part in dataset.manifest.splits["train"])))
    for part, info in zip(plan.parts, dataset.manifest.splits["train"], strict=True):
        for row in range(0, part.num_rows, 5):
            store.asked.clear()
            rows.read(plan, np.array([row_id_of(plan.parts.index(part), row)], dtype=np.uint64))
            assert store.asked == [info.first_shard + row // part.rows_per_shard]


def test_a_read_of_no_row_and_of_rows_that_are_not_there(tmp_path):
    dataset = stream_dataset(tmp_path / "d")
    plan, rows = plan_of(dataset), rows_of(dataset)
    empty = rows.read(plan, np.zeros(0, np.uint64))
    assert (empty.tokens.shape, empty.start_offsets.tolist(), empty.row_crc.size) == ((0, 33), [0], 0)
    for row_id in (row_id_of(0, plan.parts[0].num_rows), row_id_of(2, 0), 2**64 - 1, row_id_of(60_000, 3)):
        with pytest.raises(ValueError, match="the plan lacks some of them"):
            rows.read(plan, np.array([0, row_id], dtype=np.uint64))
    other = replace(plan, parts=(replace(plan.parts[0], num_rows=10**6), *plan.parts[1:]))
    with pytest.raises(CursorMismatchError, match="does not fit"):
        rows.read(other, np.array([10**5], dtype=np.uint64))


def test_a_shard_that_holds_less_than_the_manifest_says_is_named(tmp_path):
    dataset = stream_dataset(tmp_path / "d")
    plan = plan_of(dataset)

    class Short(Shards):
        def get(self, entries):
            return {key: replace(one, tokens=one.tokens[:900]) for key, one in super().get(entries).items()}

    rows = ShardRows(dataset.manifest, ShardIndex(dataset.uri, dataset.manifest), Short(dataset.uri))
    with pytest.raises(ShardCorruptError, match="shards/train-00000.arrow holds fewer rows or tokens"):
        rows.read(plan, all_ids(plan)[:40])


def test_a_batch_is_fast(tmp_path):
    """About 1.5 µs a row of 1024 tokens on a quiet machine, most of it the checksum."""
    draw = np.random.default_rng(1)
    documents = np.split(draw.integers(1, 60_000, 2**21).astype(np.uint16), np.arange(400, 2**21, 400))
    dataset = write_dataset(tmp_path / "d", {"train": [WrittenPart("a", documents)]}, shard_tokens=2**18)
    plan = plan_of(dataset, seq_len=1024, global_batch=512, window_shards=8)
    cache = ShardCache(dataset.uri)
    rows = ShardRows(dataset.manifest, ShardIndex(dataset.uri, dataset.manifest), cache)
    times = []
    for step in range(25):
        ids = rows_of_batch(plan, step)
        began = time.process_time()
        rows.read(plan, ids)
        times.append(time.process_time() - began)
    cache.close()
    assert sorted(times)[12] / 512 < 20e-6


# --- checksums


def fields(count=3, width=6):
    draw = np.random.default_rng(2)
    return {
        "tokens": draw.integers(0, 2**16, (count, width)).astype(np.uint16),
        "length": np.array([6, 4, 6], dtype=np.uint32),
        "starts": np.array([0, 3, 1, 5], dtype=np.uint32),
        "start_offsets": np.array([0, 2, 2, 4], dtype=np.int32),
        "answer_bits": draw.integers(0, 256, (count, 1)).astype(np.uint8),
        "labels": np.array([-1, 5, 0], dtype=np.int32),
    }


def test_a_checksum_is_over_the_stated_bytes():
    given = fields()
    found = row_crcs(**given)
    for row in range(3):
        low, high = given["start_offsets"][row : row + 2]
        data = int(given["length"][row]).to_bytes(4, "little") + given["tokens"][row].astype("<u2").tobytes()
        data += given["starts"][low:high].astype("<u4").tobytes() + given["answer_bits"][row].tobytes()
        data += int(given["labels"][row]).to_bytes(4, "little", signed=True)
        assert int(found[row]) == slow_crc32c(data)
    assert row_crcs(**{**given, "answer_bits": None, "labels": None})[1] == slow_crc32c(
        (4).to_bytes(4, "little") + given["tokens"][1].tobytes()
    )


def test_a_checksum_covers_every_field_of_its_row_and_no_other():
    given = fields()
    before = row_crcs(**given)
    for name, at, row in (
        *(("tokens", (row, place), row) for row in range(3) for place in range(6)),
        *(("length", (row,), row) for row in range(3)),
        *(("starts", (place,), row) for place, row in enumerate((0, 0, 2, 2))),
        *(("answer_bits", (row, 0), row) for row in range(3)),
        *(("labels", (row,), row) for row in range(3)),
    ):
        changed = {key: value.copy() for key, value in given.items()}
        changed[name][at] ^= 1
        different = row_crcs(**changed) != before
        assert different.tolist() == [number == row for number in range(3)], name
    moved = row_crcs(**{**given, "start_offsets": np.array([0, 1, 2, 4], dtype=np.int32)})
    assert (moved != before).tolist() == [True, True, False]
    wide = row_crcs(**{**given, "tokens": given["tokens"].astype(np.uint32)})
    assert (wide != before).all()
    with pytest.raises(TypeError, match="not int64"):
        row_crcs(**{**given, "tokens": given["tokens"].astype(np.int64)})


def test_a_step_hash_depends_on_the_order_of_its_rows():
    crcs = row_crcs(**fields())
    ids = np.array([2**48, 1, 7], dtype=np.uint64)
    assert sample_hash(ids, crcs) != sample_hash(ids[::-1], crcs[::-1])
    assert sample_hash(ids, crcs) != sample_hash(ids[::-1], crcs)
    with pytest.raises(ValueError, match="of one length"):
        sample_hash(ids[:2], crcs)


# --- the batch


def slice_of(**changes) -> BatchSlice:
    """Three slots of T = 6: one that begins at a document, one that begins inside one, one masked."""
    values = {
        "index": 4,
        "slots": (0, 3),
        "tokens": np.arange(21, dtype=np.uint16).reshape(3, 7),
        "length": np.array([7, 5, 0], dtype=np.uint32),
        "start_rows": np.array([0, 0, 1, 1], dtype=np.uint32),
        "start_places": np.array([0, 4, 2, 3], dtype=np.uint32),
        "isolate_documents": False,
        "answer_bits": None,
        "labels": None,
        "row_id": np.array([3, 4, NO_ROW], dtype=np.uint64),
        "row_crc": np.zeros(3, dtype=np.uint32),
    }
    return BatchSlice(**{**values, **changes})


def test_masks_positions_and_documents_of_a_batch():
    batch = slice_of()
    assert batch.doc_ids.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 2, 2, 2], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert batch.loss_mask.astype(int).tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0], [0] * 6]
    assert batch.valid_tokens.tolist() == [6, 4, 0]
    assert batch.rows.tolist() == [True, True, False]
    alone = slice_of(isolate_documents=True)
    # Label t is token t + 1: those at which a document begins are not predicted.
    assert alone.loss_mask.astype(int).tolist() == [[1, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 0], [0] * 6]
    assert alone.valid_tokens.tolist() == [5, 2, 0]
    chat = slice_of(answer_bits=np.array([[0b101110], [0b111111], [0b111111]], dtype=np.uint8))
    assert chat.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert chat.valid_tokens.tolist() == [4, 4, 0]


def test_every_label_is_counted_once_over_an_epoch(tmp_path):
    dataset = stream_dataset(tmp_path / "d")
    plan, rows = plan_of(dataset, seq_len=50), rows_of(dataset)
    block = rows.read(plan, all_ids(plan))
    labels = sum(part.num_tokens - 1 for part in dataset.manifest.splits["train"])
    assert int((block.length - 1).sum()) == labels
    assert int(block.length.min()) >= 2


@pytest.mark.parametrize("masks", [False, True])
def test_a_block_is_a_record_batch_without_a_copy(tmp_path, masks):
    documents = random_documents(8, 3000, longest=33)
    part = WrittenPart(
        "a", documents, labels=[1] * len(documents), answers=[one > 9 for one in documents] if masks else ()
    )
    dataset = write_dataset(
        tmp_path / "d", {"train": [part]}, rows="document", seq_len=32, labels=("x", "y"), loss_masks=masks
    )
    plan = plan_of(dataset)
    asked = rows_of_batches(plan, 0, 3)
    block = rows_of(dataset).read(plan, asked.row_id)
    schema = wire_schema(plan, dataset.manifest.dtype)
    batch = block_to_batch(block, asked.batch, asked.slot, schema)
    batch.validate(full=True)
    assert batch.schema.equals(schema, check_metadata=True)
    assert batch.column("tokens").to_pylist() == block.tokens.tolist()
    assert batch.column("starts").to_pylist() == [
        block.starts[low:high].tolist() for low, high in zip(block.start_offsets, block.start_offsets[1:], strict=False)
    ]
    for name, values in (
        ("batch", asked.batch),
        ("slot", asked.slot),
        ("row_id", block.row_id),
        ("length", block.length),
    ):
        assert batch.column(name).to_pylist() == values.tolist()
    assert batch.column("label").to_pylist() == [1] * 48
    if masks:
        assert batch.column("answer_bits").to_pylist() == [bits.tobytes() for bits in block.answer_bits]
    tokens = batch.column("tokens").values.buffers()[1]
    assert tokens.address == block.tokens.ctypes.data
