"""Rows: gathered as they were written, whatever their kind, with checksums over all they say."""

import time
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_service import storage
from data_service.audit import SampleAudit
from data_service.cache import ShardCache
from data_service.errors import CursorMismatchError, DeliveryError, ShardCorruptError
from data_service.hashing import row_crcs, sample_hash
from data_service.manifest import INDEX_PAGE, index_file
from data_service.order import rows_of_batch, rows_of_batches
from data_service.plan import OrderSpec, row_id_of
from data_service.planning import make_plan
from data_service.rows import ShardRows
from data_service.schema import NO_ROW, BatchSlice, block_to_batch, wire_schema
from data_service.shards import (
    Shard,
    ShardEntry,
    ShardIndex,
    checksum,
    encode_shard,
    index_pages,
    load_shard,
    open_shard,
    read_tokens,
    shard_file,
    verify_bytes,
)
from tests.helpers.written_datasets import EOS, WrittenPart, random_documents, stream_dataset, write_dataset


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


def packed_shard(draw, num_rows: int, width: int) -> Shard:
    lengths = draw.integers(2, width + 1, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    total = int(offsets[-1])
    starts = np.flatnonzero(draw.random(total) < 0.1).astype(np.uint32)  # rows may begin inside a document
    return Shard(
        draw.integers(1, 500, total).astype(np.uint16),
        starts,
        offsets,
        np.packbits(draw.random(total) < 0.5, bitorder="little"),
    )


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
        assert int(found[row]) == zlib.crc32(data)
    assert row_crcs(**{**given, "answer_bits": None, "labels": None})[1] == zlib.crc32(
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
    assert batch.torch_tokens().tolist() == batch.tokens.tolist()
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


# --- shards and their index


def test_a_shard_is_read_in_place(tmp_path):
    draw = np.random.default_rng(0)
    whole = replace(packed_shard(draw, 20, 30), labels=np.arange(-1, 19, dtype=np.int32))
    for shard in (
        whole,
        Shard(whole.tokens.astype(np.uint32), whole.starts),
        Shard(whole.tokens[:1], whole.starts[:0]),
    ):
        path = tmp_path / "one.arrow"
        path.write_bytes(encode_shard(shard))
        for found in (open_shard(path), open_shard(path.read_bytes())):
            for name, value in vars(shard).items():
                read = getattr(found, name)
                assert (read is None) == (value is None)
                if value is not None:
                    assert read.dtype == value.dtype
                    assert read.tolist() == value.tolist()
                    assert not read.flags.owndata
                    assert read.ctypes.data % read.itemsize == 0
        assert encode_shard(found) == path.read_bytes()
        assert found.num_bytes == shard.num_bytes


def test_what_is_no_shard_is_refused(tmp_path):
    good = encode_shard(Shard(np.arange(9, dtype=np.uint16), np.zeros(1, np.uint32)))

    def table(**columns) -> bytes:
        sink = pa.BufferOutputStream()
        batch = pa.record_batch(columns)
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()

    lists = {
        "tokens": pa.array([[1]], pa.large_list(pa.uint16())),
        "starts": pa.array([[0]], pa.large_list(pa.uint32())),
    }
    assert open_shard(table(**lists)).tokens.tolist() == [1]
    for data in (
        b"", b"ARROW1", good[:-40], good[:100],
        table(token=pa.array([1], pa.uint16())),
        table(tokens=lists["tokens"]),
        table(**lists, more=lists["starts"]),
        table(tokens=pa.array([[1.0]], pa.large_list(pa.float32())), starts=lists["starts"]),
        table(**{name: pa.concat_arrays([column, column]) for name, column in lists.items()}),
        table(tokens=pa.array([None], pa.large_list(pa.uint16())), starts=lists["starts"]),
        table(tokens=pa.array([[None]], pa.large_list(pa.uint16())), starts=lists["starts"]),
    ):  # fmt: skip
        path = tmp_path / "bad.arrow"
        path.write_bytes(data)
        for source in (data, path):
            with pytest.raises(ShardCorruptError, match="is no shard of this format"):
                open_shard(source)
    for bad in (
        Shard(np.zeros(3, np.int64), np.zeros(0, np.uint32)),
        Shard(np.zeros((2, 2), np.uint16), np.zeros(0, np.uint32)),
    ):
        with pytest.raises(ValueError, match="shard.tokens is"):
            encode_shard(bad)


def test_a_changed_byte_of_a_shard_is_found(tmp_path):
    dataset = stream_dataset(tmp_path / "d")
    entry = ShardIndex(dataset.uri, dataset.manifest).entry("train", 2)
    path = tmp_path / "d" / shard_file("train", 2)
    data = path.read_bytes()
    verify_bytes(dataset.uri, entry, data)
    for broken in (data[:-1], data + b"x", data[:700] + bytes([data[700] ^ 1]) + data[701:], b""):
        path.write_bytes(broken)
        with pytest.raises(ShardCorruptError, match="shards/train-00002.arrow was asked for"):
            load_shard(dataset.uri, entry)
    path.unlink()
    with pytest.raises(ShardCorruptError, match="is gone"):
        load_shard(dataset.uri, entry)


def test_pages_of_the_index_are_read_when_they_are_needed(tmp_path, monkeypatch):
    dataset = stream_dataset(tmp_path / "d")
    counts = {"train": 2 * INDEX_PAGE + 5, "eval": 40}
    entries = [
        ShardEntry(split, number, 10 * number, number % 7, 3 * number, number.to_bytes(16, "big"))
        for split, count in counts.items()
        for number in range(count)
    ]
    pages = index_pages(entries[::-1])
    assert len(pages) == 3
    generation = 3
    manifest = replace(
        dataset.manifest,
        generation=generation,
        splits={
            split: (replace(dataset.manifest.splits["train"][0], num_shards=count),) for split, count in counts.items()
        },
        index_digests=tuple(checksum(page).hex() for page in pages),
    )
    for number, page in enumerate(pages):
        (tmp_path / "d" / index_file(generation, number)).write_bytes(page)
    read: list[str] = []
    read_bytes = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(uri[-10:-6]) or read_bytes(uri))
    index = ShardIndex(dataset.uri, manifest)
    assert read == []
    assert index.entry("train", INDEX_PAGE + 3) == entries[INDEX_PAGE + 3]
    assert index.entry("train", INDEX_PAGE + 4) == entries[INDEX_PAGE + 4]
    assert read == ["0001"]
    assert index.entry("eval", 39) == entries[-1]
    assert index.entry("train", 2 * INDEX_PAGE + 4) == entries[2 * INDEX_PAGE + 4]
    assert read == ["0001", "0002"]
    assert list(index.entries("eval")) == entries[counts["train"] :]
    assert [index.num_shards(split) for split in counts] == list(counts.values())
    for split, number in (("train", counts["train"]), ("eval", 40), ("eval", -1)):
        with pytest.raises(IndexError, match="was asked for, it has"):
            index.entry(split, number)

    damaged = tmp_path / "d" / index_file(generation, 0)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardCorruptError, match=r"index.00003-00000.arrow: its checksum"):
        index.entry("train", 0)
    damaged.unlink()
    with pytest.raises(ShardCorruptError, match="is gone"):
        index.entry("train", 0)
    assert index.entry("train", INDEX_PAGE) == entries[INDEX_PAGE]
    with pytest.raises(ValueError, match="without gaps"):
        index_pages(entries[1:])


def test_the_index_keeps_a_bounded_number_of_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("data_service.shards._PAGES_KEPT", 2)
    monkeypatch.setattr("data_service.shards.INDEX_PAGE", 1)
    dataset = stream_dataset(tmp_path / "d")
    index = ShardIndex(dataset.uri, dataset.manifest)
    assert dataset.manifest.num_shards > 4
    before = list(index.entries("train"))
    assert list(index.entries("train")) == before
    assert len(index._pages) == 2


def test_tokens_come_without_the_repeated_ones(tmp_path):
    dataset = stream_dataset(tmp_path / "d")
    for split in ("train", "eval"):
        wanted = np.concatenate([part.tokens for part in dataset.parts[split]])
        np.testing.assert_array_equal(np.concatenate(list(read_tokens(dataset.uri, split))), wanted)


# --- the audit


@pytest.fixture
def audited(tmp_path):
    dataset = stream_dataset(tmp_path / "d")
    plan = plan_of(dataset, skip=((2, 9),))
    audit = SampleAudit(dataset.uri, plan, dataset.manifest, cache_bytes=1 << 20)
    yield dataset, plan, audit
    audit.close()


def test_the_audit_accepts_the_plans_rows_and_counts_steps_behind_skips(audited):
    dataset, plan, audit = audited
    whole = plan_of(dataset)
    hashes = [dataset.hash_of_step(plan, step) for step in range(6)]
    assert hashes[2] == dataset.hash_of_step(whole, 9)
    for step, found in enumerate(hashes, start=1):
        assert audit.expected(step - 1) == found
        audit.submit(step, found)
    assert audit.settle(6, deadline_s=30)
    assert audit.is_settled(6)


def test_the_audit_finds_a_step_of_other_rows_and_forgets_what_was_superseded(audited):
    dataset, plan, audit = audited
    audit.submit(1, dataset.hash_of_step(plan, 0))
    audit.submit(2, dataset.hash_of_step(plan, 2))
    with pytest.raises(DeliveryError, match="step 2: the rows that the ranks consumed hash to"):
        audit.settle(2, deadline_s=30)
    audit.submit(3, "0" * 16)
    audit.forget()
    assert audit.settle(3, deadline_s=30)


def test_the_audit_names_a_damaged_shard(audited):
    dataset, plan, audit = audited
    for number in range(dataset.manifest.num_shards):
        path = storage.local_path(storage.join(dataset.uri, shard_file("train", number)))
        if path.exists():
            path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    audit.submit(1, dataset.hash_of_step(plan, 0))
    with pytest.raises(ShardCorruptError, match="shards/train-0000"):
        audit.settle(1, deadline_s=30)


def test_a_large_step_is_audited_in_pieces(audited, monkeypatch):
    dataset, plan, audit = audited
    audit._rows_at_once = 5
    assert audit.expected(1) == dataset.hash_of_step(plan, 1)
