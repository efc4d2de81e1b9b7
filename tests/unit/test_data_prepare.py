"""Preparation: what goes in, what is left out, and that the bytes depend on the text alone."""

import json
import logging
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from data_service.config import (
    DataConfig,
    RejectsConfig,
    SourceConfig,
    SplitConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
)
from data_service.errors import ConfigError, ShardCorruptError, SourceError
from data_service.manifest import DatasetManifest, read_manifest
from data_service.prepare import PrepareProgress, prepare
from data_service.shards import ShardIndex, load_shard, read_tokens
from data_service.stages import Sizes
from data_service.tokenizer import END_TOKEN
from tests.helpers.data_runs import reviews, small_config, write_csv


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents(dataset: Path, split: str) -> list[str]:
    """The documents of a split, decoded."""
    manifest = read_manifest(str(dataset))
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer" / "tokenizer.json"))
    tokens = np.concatenate([np.zeros(0, np.uint16), *read_tokens(str(dataset), split)])
    ends = np.flatnonzero(tokens == manifest.eos_id)
    parts = np.split(tokens, ends + 1)
    assert parts[-1].size == 0
    return [tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("corpus") / "reviews.csv", reviews(400))


@pytest.fixture(scope="module")
def dataset(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    prepare(small_config(corpus), str(folder))
    return folder


def test_the_text_comes_back_and_every_document_ends(corpus, dataset):
    train, held_out = documents(dataset, "train"), documents(dataset, "eval")
    assert sorted(train + held_out) == sorted(reviews(400))
    manifest = read_manifest(str(dataset))
    assert manifest.num_documents("train") == len(train) > 10 * 3
    assert manifest.num_documents("eval") == len(held_out) > 0
    assert manifest.vocab_size == 600
    assert manifest.token_dtype == "uint16"
    assert DatasetManifest.from_json(manifest.to_json()) == manifest


def test_shards_are_of_one_size_and_know_where_documents_begin(dataset):
    manifest = read_manifest(str(dataset))
    entries = list(ShardIndex(str(dataset), manifest).entries("train"))
    assert len(entries) == manifest.splits["train"][0].num_shards > 3
    assert {entry.num_tokens for entry in entries[:-1]} == {2048}
    shards = [load_shard(str(dataset), entry) for entry in entries]
    tokens = np.concatenate([shard.tokens[: entry.num_tokens] for shard, entry in zip(shards, entries, strict=True)])
    after_end = np.concatenate([[0], np.flatnonzero(tokens == manifest.eos_id)[:-1] + 1])
    for number, shard in enumerate(shards):
        if number < len(shards) - 1:
            assert shard.tokens.size == 2049
            assert shard.tokens[-1] == shards[number + 1].tokens[0]
        here = (after_end >= number * 2048) & (after_end < number * 2048 + shard.tokens.size)
        np.testing.assert_array_equal(shard.starts, after_end[here] - number * 2048)


@pytest.mark.timeout(180)
def test_bytes_are_the_same_from_a_pool_of_processes(corpus, dataset, tmp_path, monkeypatch):
    sizes = Sizes(chunk_bytes=4096, run_documents=50, partition_documents=30)
    monkeypatch.setattr("data_service.prepare._SIZES", sizes)
    prepare(small_config(corpus), str(tmp_path / "serial"))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        counts = []

        def pooled(function, items):
            counts.append(len(items))
            return pool.map(function, items)

        prepare(small_config(corpus), str(tmp_path / "pool"), mapper=pooled)
    assert max(counts) > 5
    assert all_bytes(tmp_path / "pool") == all_bytes(tmp_path / "serial") == all_bytes(dataset)


def test_progress_reaches_its_end(corpus, tmp_path):
    seen: list[PrepareProgress] = []
    prepare(small_config(corpus), str(tmp_path / "d"), progress=seen.append)
    assert [one.stage for one in seen if one.done == one.total] == [
        "look",
        "read",
        "deduplicate",
        "tokenizer",
        "encode",
        "write",
    ]
    assert all(0 <= one.done <= one.total for one in seen)
    assert seen[0].total == corpus.stat().st_size
    assert seen[-1].num_records == 400
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "hashes.bin",
        "manifest.json",
        "rejects.jsonl",
        "shards",
        "stats.json",
        "tokenizer",
    ]


def test_bad_records_are_left_out_with_file_line_and_reason(tmp_path):
    path = tmp_path / "bad.csv"
    good = reviews(60)
    lines = ["text,label", *(f'"{text.replace(chr(34), chr(34) * 2)}",x' for text in good[:30])]
    lines += ['"never closed,x', "nul\0here,x", "   ,x", "too,many,fields", "y" * 3000 + ",x", "INVALID,x"]
    lines += [f'"{text.replace(chr(34), chr(34) * 2)}",x' for text in good[30:]]
    path.write_bytes("\n".join(lines).encode().replace(b"INVALID", b"\xff\xfe\xc3"))
    config = small_config(path).model_copy(update={"rejects": RejectsConfig(max_fraction=0.2, max_record_bytes=2500)})
    manifest = prepare(config, str(tmp_path / "d"))
    rejects = [json.loads(line) for line in (tmp_path / "d" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"].partition(":")[0]) for reject in rejects] == [
        (32, "broken quotes"),
        (33, "NUL character"),
        (34, "empty text"),
        (35, "ragged"),
        (36, "over-long"),
        (37, "invalid UTF-8"),
    ]
    assert {reject["file"] for reject in rejects} == {str(path)}
    assert (manifest.num_records, manifest.num_rejects) == (66, 6)
    assert sorted(documents(tmp_path / "d", "train") + documents(tmp_path / "d", "eval")) == sorted(good)


def test_too_many_rejects_stop_the_run_and_leave_no_dataset(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("text,label\n" + "good one,x\ngood two,x\n" + '"broken,x\n')
    with pytest.raises(SourceError, match=r"max_fraction=0\.1: 1 of 3 .*1 × broken quotes.*rejects\.jsonl"):
        prepare(small_config(path), str(tmp_path / "d"))
    assert not (tmp_path / "d" / "manifest.json").exists()
    assert "broken quotes" in (tmp_path / "d" / "rejects.jsonl").read_text()


def test_duplicates_go_before_the_split(tmp_path):
    texts = reviews(200)
    path = write_csv(tmp_path / "twice.csv", texts + texts[::-1])
    manifest = prepare(small_config(path, eval_share=0.5), str(tmp_path / "d"))
    train, held_out = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "eval")
    assert manifest.num_duplicates == 200
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 200


def test_the_split_follows_the_text_not_its_place(tmp_path):
    texts = reviews(200)
    prepare(small_config(write_csv(tmp_path / "a.csv", texts)), str(tmp_path / "a"))
    prepare(small_config(write_csv(tmp_path / "b.csv", texts[::-1])), str(tmp_path / "b"))
    assert sorted(documents(tmp_path / "a", "eval")) == sorted(documents(tmp_path / "b", "eval"))


def test_a_tiny_corpus_still_has_both_parts(tmp_path):
    path = write_csv(tmp_path / "tiny.csv", ["one text", "another text"])
    prepare(small_config(path, eval_share=0.05), str(tmp_path / "low"))
    prepare(small_config(path, eval_share=0.95), str(tmp_path / "high"))
    for name in ("low", "high"):
        assert len(documents(tmp_path / name, "train")) == len(documents(tmp_path / name, "eval")) == 1
    with pytest.raises(SourceError, match="one distinct document"):
        prepare(small_config(write_csv(tmp_path / "1.csv", ["a text", "a text"])), str(tmp_path / "1"))
    manifest = prepare(small_config(path, eval_share=0.0), str(tmp_path / "none"))
    assert manifest.splits["eval"] == ()


def test_text_that_spells_the_end_token_ends_nothing(tmp_path):
    texts = [f"before {END_TOKEN} after", "another text"]
    path = write_csv(tmp_path / "c.csv", texts)
    prepare(small_config(path, eval_share=0.0), str(tmp_path / "d"))
    assert documents(tmp_path / "d", "train") == texts


def test_a_missing_file_a_missing_column_and_an_empty_file_are_named(tmp_path):
    header_only = tmp_path / "header.csv"
    header_only.write_text("text,label\n")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    other = tmp_path / "other.csv"
    other.write_text("body,label\nsome text,x\n")
    cases = [
        (tmp_path / "absent.csv", r"data\.sources\.0\.path=.*absent\.csv.*does not exist"),
        (tmp_path / "*.tsv.csv", "no file matches"),
        (header_only, r"header\.csv.*a header and no records"),
        (empty, r"empty\.csv.*empty, not even a header"),
        (other, r"other\.csv.*text=text was asked for, it is not among the columns 'body', 'label'"),
    ]
    for path, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            prepare(small_config(path), str(tmp_path / "d"))
        assert caught.value.exit_code == 2
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_a_label_column_must_exist_and_is_not_stored(corpus, dataset, tmp_path):
    base = small_config(corpus)
    config = base.model_copy(update={"sources": (SourceConfig(path=str(corpus), label="label"),)})
    assert prepare(config, str(tmp_path / "d")).digest == read_manifest(str(dataset)).digest
    config = base.model_copy(update={"sources": (SourceConfig(path=str(corpus), label="stars"),)})
    with pytest.raises(SourceError, match="stars was asked for, it is not among the columns 'text', 'label'"):
        prepare(config, str(tmp_path / "e"))


def test_jsonl_parquet_and_text_give_what_csv_gives(corpus, dataset, tmp_path):
    texts = reviews(400)
    jsonl = tmp_path / "r.jsonl"
    jsonl.write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in texts) + '\n{"text": 3}\nnot json\n')
    pa.parquet.write_table(pa.table({"text": pa.array(texts), "n": pa.array(range(400))}), tmp_path / "r.parquet")
    (tmp_path / "r.txt").write_text("\n\n".join(texts))
    for name in ("r.jsonl", "r.parquet", "r.txt"):
        manifest = prepare(small_config(tmp_path / name), str(tmp_path / f"{name}.d"))
        assert manifest.digest == read_manifest(str(dataset)).digest, name
    rejects = (tmp_path / "r.jsonl.d" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejects] == [401, 402]
    for suffix in ("jsonl", "parquet"):
        source = SourceConfig(path=str(tmp_path / f"r.{suffix}"), text="body")
        config = small_config(corpus).model_copy(
            update={"sources": (source,), "rejects": RejectsConfig(max_fraction=1.0)}
        )
        with pytest.raises(SourceError, match="body was asked for, it is not among the columns 'text', 'n'"):
            prepare(config, str(tmp_path / "e"))


def named(config: DataConfig, *names: str) -> DataConfig:
    """The configuration with names given to its sources."""
    sources = tuple(
        source.model_copy(update={"name": name}) for source, name in zip(config.sources, names, strict=True)
    )
    return config.model_copy(update={"sources": sources})


def test_an_existing_dataset_is_reused_or_refused_and_never_touched(corpus, dataset, tmp_path):
    before = all_bytes(dataset)
    manifest = read_manifest(str(dataset))
    assert prepare(small_config(corpus, seq_len=64), str(dataset)) == manifest
    moved = tmp_path / "moved.csv"
    moved.write_bytes(corpus.read_bytes())
    assert prepare(named(small_config(moved), "reviews"), str(dataset)) == manifest
    with pytest.raises(ConfigError, match=r"source 'reviews' \(text, messages, label\).*absent here"):
        prepare(small_config(moved), str(dataset))
    other = small_config(corpus).model_copy(
        update={
            "tokenizer": TokenizerConfig(train=TokenizerTrainConfig(vocab_size=500)),
            "split": SplitConfig(eval=0.2),
        }
    )
    with pytest.raises(ConfigError, match=r"data\.split\.eval is 0\.1 there and 0\.2 here.*vocab_size is 600 there"):
        prepare(other, str(dataset))
    moved.write_bytes(corpus.read_bytes() + b"one more,x\n")
    with pytest.raises(ConfigError, match=r"source file 0 \(content\) of 'reviews'") as caught:
        prepare(named(small_config(moved), "reviews"), str(dataset))
    assert caught.value.exit_code == 2
    assert all_bytes(dataset) == before


def _delete(path):
    path.unlink()


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shards/train-00001.arrow", _delete),
        ("shards/train-00001.arrow", _truncate),
        ("shards/eval-00000.arrow", _truncate),
        ("shards/index-00000.arrow", _delete),
        ("shards/index-00000.arrow", _truncate),
        ("hashes.bin", _truncate),
        ("stats.json", _delete),
        ("tokenizer/tokenizer.json", _truncate),
        ("tokenizer/special_tokens_map.json", _delete),
    ],
)
def test_what_is_gone_from_a_dataset_is_restored(corpus, dataset, tmp_path, caplog, name, damage):
    folder = tmp_path / "d"
    shutil.copytree(dataset, folder)
    damage(folder / name)
    with caplog.at_level(logging.WARNING, logger="data_service.prepare"):
        assert prepare(small_config(corpus), str(folder)) == read_manifest(str(dataset))
    assert all_bytes(folder) == all_bytes(dataset)
    assert f"1 files are gone or not as they were written ({name.removesuffix('/' + Path(name).name)}" in caplog.text
    assert "restored, with the same bytes" in caplog.text


def test_a_dataset_that_would_not_become_the_same_is_left_alone(corpus, dataset, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(dataset, folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(read_manifest(str(dataset)).digest, "0" * 32))
    (folder / "shards" / "train-00001.arrow").unlink()
    before = all_bytes(folder)
    with pytest.raises(ConfigError, match="gave other bytes .* Nothing was changed.*delete the folder"):
        prepare(small_config(corpus), str(folder))
    assert all_bytes(folder) == before


def test_an_existing_tokenizer_is_used(corpus, dataset, tmp_path):
    base = small_config(corpus)
    config = base.model_copy(update={"tokenizer": TokenizerConfig(path=str(dataset / "tokenizer"))})
    manifest = prepare(config, str(tmp_path / "d"))
    assert manifest.digest == read_manifest(str(dataset)).digest
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path=.*does not exist"):
        prepare(
            base.model_copy(update={"tokenizer": TokenizerConfig(path=str(tmp_path / "nowhere"))}), str(tmp_path / "e")
        )
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a Hugging Face tokenizer"):
        prepare(
            base.model_copy(update={"tokenizer": TokenizerConfig(path=str(tmp_path / "tokenizer.json"))}),
            str(tmp_path / "e"),
        )


@pytest.mark.timeout(180)
def test_transformers_loads_the_tokenizer_folder(dataset):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(dataset / "tokenizer"))
    text = reviews(2)[0]
    ours = Tokenizer.from_file(str(dataset / "tokenizer" / "tokenizer.json"))
    assert tokenizer(text)["input_ids"] == ours.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_TOKEN
    assert tokenizer.eos_token_id == read_manifest(str(dataset)).eos_id
    assert len(tokenizer) == 600


def test_a_damaged_shard_or_index_is_named(corpus, tmp_path):
    prepare(small_config(corpus), str(tmp_path))
    manifest = read_manifest(str(tmp_path))
    entry = ShardIndex(str(tmp_path), manifest).entry("train", 1)
    shard = tmp_path / "shards" / "train-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardCorruptError, match=rf"train-00001.*delete the folder {tmp_path}"):
        load_shard(str(tmp_path), entry)
    shard.write_bytes(data[:-100])
    with pytest.raises(ShardCorruptError, match="train-00001"):
        load_shard(str(tmp_path), entry)
    shard.unlink()
    with pytest.raises(ShardCorruptError, match="train-00001"):
        load_shard(str(tmp_path), entry)
    (tmp_path / "shards" / "index-00000.arrow").write_bytes(b"x")
    with pytest.raises(ShardCorruptError, match=r"index-00000\.arrow"):
        ShardIndex(str(tmp_path), manifest).entry("train", 1)
