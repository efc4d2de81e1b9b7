"""Shard files and the index: read in place, verified, and named where they are damaged."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from data_service import storage
from data_service.errors import ShardCorruptError
from data_service.manifest import INDEX_PAGE, index_file
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
from tests.helpers.written_datasets import packed_shard, stream_dataset


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
