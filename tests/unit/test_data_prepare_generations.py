"""Files added to a dataset: only they are read, what is there stays as it is, and every generation can be had again."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_service import spool
from data_service.config import DataConfig, SourceConfig
from data_service.counts import read_counts
from data_service.errors import ConfigError, ShardCorruptError, SourceError
from data_service.manifest import manifest_name, read_manifest, read_manifests
from data_service.planning import make_plan
from data_service.prepare import prepare
from data_service.shards import ShardIndex, load_shard
from data_service.stages import Sizes
from data_service.storage import remove_tree
from tests.helpers.data_runs import reviews, small_config, small_order, write_csv
from tests.unit.test_data_prepare import all_bytes, documents

TEXTS = reviews(400)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sources: a folder `a` of files that grows, and `b`."""
    (tmp_path / "a").mkdir()
    write_csv(tmp_path / "a" / "2.csv", TEXTS[:150])
    write_csv(tmp_path / "b.csv", TEXTS[150:200])
    return tmp_path


def config_of(folder: Path, *names: str, rows: str = "stream", label: str | None = None) -> DataConfig:
    paths = {"a": str(folder / "a"), "b": str(folder / "b.csv"), "c": str(folder / "c.csv")}
    sources = tuple(SourceConfig(name=name, path=paths[name], label=label) for name in names)
    return small_config(folder / "b.csv").model_copy(update={"sources": sources, "rows": rows})


def train_order(dataset: Path) -> list[str]:
    return documents(dataset, "train")


def test_added_files_become_a_generation_and_alone_are_read(folder, tmp_path, monkeypatch):
    dataset = tmp_path / "d"
    first = prepare(config_of(folder, "a", "b"), str(dataset))
    before = all_bytes(dataset)
    # One file in front of the others in its folder, one source more; old texts come again, and new ones twice.
    write_csv(folder / "a" / "1.csv", TEXTS[100:160] + TEXTS[200:260])
    write_csv(folder / "c.csv", TEXTS[190:210] + TEXTS[250:300] + TEXTS[290:300])
    read: list[str] = []
    real = spool.read_records
    monkeypatch.setattr(
        spool, "read_records", lambda file, *rest: read.append(Path(file.uri).name) or real(file, *rest)
    )
    second = prepare(config_of(folder, "a", "b", "c"), str(dataset))
    assert read == ["1.csv", "c.csv"]
    assert second.generation == 1
    after = all_bytes(dataset)
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before) - {name for name in after if "/train-" in name or "/eval-" in name}) == [
        "hashes.00001.bin",
        "manifest.00001.json",
        "rejects.00001.jsonl",
        "shards/index.00001-00000.arrow",
        "stats.00001.json",
    ]
    # Each text once, on the side on which the first generation's bound puts it.
    train, held_out = documents(dataset, "train"), documents(dataset, "eval")
    assert sorted(train + held_out) == sorted(TEXTS[:300])
    assert second.num_duplicates == 60 + 20 + 10 + 10
    assert second.eval_below == first.eval_below
    assert second.tokenizer_digest == first.tokenizer_digest
    for split in ("train", "eval"):
        assert second.splits[split][: len(first.splits[split])] == first.splits[split]
        first_shard = 0
        for part in second.splits[split]:
            assert part.first_shard == first_shard
            first_shard += part.num_shards
    assert [(part.source, part.generation) for part in second.splits["train"]] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("c", 1),
    ]
    # The order of the documents is that of the parts, and in a part that of the files.
    expected = [text for text in [*TEXTS[:200], *TEXTS[200:300]] if text in set(train)]
    assert train == expected
    assert [one.source for one in second.files if one.generation == 1] == ["a", "c"]
    counts = {one.source: one for one in read_counts(str(dataset), 1)}
    assert {name: (one.num_records, one.num_duplicates) for name, one in counts.items()} == {
        "a": (270, 60),
        "b": (50, 0),
        "c": (80, 40),
    }
    assert sum(one.splits["train"].tokens for one in counts.values()) == second.num_tokens("train")


def test_an_earlier_request_finds_its_generation(folder, tmp_path):
    dataset = tmp_path / "d"
    first = prepare(config_of(folder, "b"), str(dataset))
    second = prepare(config_of(folder, "b", "a"), str(dataset))
    write_csv(folder / "c.csv", TEXTS[200:230])
    third = prepare(config_of(folder, "b", "a", "c"), str(dataset))
    assert [one.generation for one in (first, second, third)] == [0, 1, 2]
    before = all_bytes(dataset)
    assert prepare(config_of(folder, "b"), str(dataset)) == first
    assert prepare(config_of(folder, "a", "b"), str(dataset)) == second
    assert prepare(config_of(folder, "c", "a", "b"), str(dataset)) == third
    assert read_manifests(str(dataset)) == [first, second, third]
    assert read_manifest(str(dataset), second.digest) == second
    for manifest in (first, second, third):
        for entry in ShardIndex(str(dataset), manifest).entries("train"):
            load_shard(str(dataset), entry)
        plan = make_plan(manifest, "train", small_order())
        assert plan.num_rows == sum(-(-(part.num_tokens - 1) // 32) for part in manifest.splits["train"])
    assert all_bytes(dataset) == before


def test_what_was_removed_or_changed_is_named(folder, tmp_path):
    dataset = tmp_path / "d"
    prepare(config_of(folder, "a", "b"), str(dataset))
    write_csv(folder / "c.csv", TEXTS[200:230])
    prepare(config_of(folder, "a", "b", "c"), str(dataset))
    before = all_bytes(dataset)
    with pytest.raises(ConfigError, match=r"source 'a' \(text, messages, label\).*absent here"):
        prepare(config_of(folder, "b", "c"), str(dataset))
    write_csv(folder / "b.csv", TEXTS[150:199])
    with pytest.raises(ConfigError, match=r"source file 1 \(content\) of 'b'.*only files may be added"):
        prepare(config_of(folder, "a", "b", "c"), str(dataset))
    write_csv(folder / "b.csv", TEXTS[150:200])
    with pytest.raises(ConfigError, match=r"source 'b' \(text, messages, label\) is 'text', None, None there"):
        prepare(config_of(folder, "a", "b", "c", label="label"), str(dataset))
    with pytest.raises(ConfigError, match=r"data\.rows is stream there and packed here"):
        prepare(config_of(folder, "a", "b", "c", rows="packed"), str(dataset))
    assert all_bytes(dataset) == before


@pytest.mark.parametrize(
    "name",
    [
        "shards/train-00001.arrow",
        "hashes.bin",
        "LAST TRAIN",
        "shards/index.00001-00000.arrow",
        "hashes.00001.bin",
        "stats.00001.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_files_of_any_generation_are_restored(folder, tmp_path, name):
    dataset = tmp_path / "d"
    prepare(config_of(folder, "a", "b"), str(dataset))
    write_csv(folder / "c.csv", TEXTS[190:260])
    config = config_of(folder, "a", "b", "c")
    manifest = prepare(config, str(dataset))
    before = all_bytes(dataset)
    if name == "LAST TRAIN":
        name = f"shards/train-{ShardIndex(str(dataset), manifest).num_shards('train') - 1:05d}.arrow"
    (dataset / name).unlink()
    assert prepare(config, str(dataset)) == manifest
    assert all_bytes(dataset) == before


def test_damage_to_both_generations_is_restored_together(folder, tmp_path):
    dataset = tmp_path / "d"
    prepare(config_of(folder, "a"), str(dataset))
    manifest = prepare(config_of(folder, "a", "b"), str(dataset))
    before = all_bytes(dataset)
    shutil.rmtree(dataset / "shards")
    (dataset / "hashes.bin").unlink()
    assert prepare(config_of(folder, "a", "b"), str(dataset)) == manifest
    assert all_bytes(dataset) == before


def test_damaged_hashes_are_named_before_anything_is_added(folder, tmp_path):
    dataset = tmp_path / "d"
    prepare(config_of(folder, "a"), str(dataset))
    data = bytearray((dataset / "hashes.bin").read_bytes())
    data[-5] ^= 1
    (dataset / "hashes.bin").write_bytes(data)
    with pytest.raises(ShardCorruptError, match=r"hashes\.bin.*checksum.*Delete the file"):
        prepare(config_of(folder, "a", "b"), str(dataset))
    assert not (dataset / manifest_name(1)).exists()
    (dataset / "hashes.bin").unlink()
    assert prepare(config_of(folder, "a", "b"), str(dataset)).generation == 1


def test_only_repeats_add_no_shards(folder, tmp_path):
    dataset = tmp_path / "d"
    first = prepare(config_of(folder, "a", "b"), str(dataset))
    write_csv(folder / "c.csv", TEXTS[:20])
    second = prepare(config_of(folder, "a", "b", "c"), str(dataset))
    assert (second.generation, second.splits, second.digest) == (1, first.splits, first.digest)
    assert second.num_duplicates == first.num_duplicates + 20


def test_classes_are_those_of_the_first_generation(folder, tmp_path):
    def labelled(name: str, rows: list[tuple[str, str]]) -> None:
        lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / name).write_text("\n".join(lines), encoding="utf-8")

    source = SourceConfig(name="t", path=str(tmp_path / "t"), label="label")
    config = config_of(folder, "b", rows="document").model_copy(update={"sources": (source,)})
    labelled("1.tsv", [(text, str(number % 12)) for number, text in enumerate(TEXTS[:120])])
    first = prepare(config, str(tmp_path / "d"))
    assert first.labels == tuple(str(number) for number in range(12))
    labelled("2.tsv", [(text, "11") for text in TEXTS[120:140]])
    second = prepare(config, str(tmp_path / "d"))
    assert second.labels == first.labels
    found = []
    index = ShardIndex(str(tmp_path / "d"), second)
    for split in ("train", "eval"):
        for part in second.splits[split]:
            if part.generation == 1:
                for number in range(part.first_shard, part.first_shard + part.num_shards):
                    found.append(load_shard(str(tmp_path / "d"), index.entry(split, number)).labels)
    assert np.concatenate(found).tolist() == [11] * 20
    labelled("3.tsv", [(TEXTS[150], "12"), (TEXTS[151], "3"), (TEXTS[152], "x")])
    with pytest.raises(SourceError, match=r"hold the classes '12', 'x', the dataset was prepared with '0', '1'"):
        prepare(config, str(tmp_path / "d"))
    assert len(read_manifests(str(tmp_path / "d"))) == 2


def test_a_remote_dataset_grows_as_well(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data_service.prepare._SIZES", Sizes(4096, 40, 50))
    remote = f"memory://{tmp_path.name}-grows"
    try:
        for target in (remote, str(tmp_path / "d")):
            prepare(config_of(folder, "b"), target)
            prepare(config_of(folder, "b", "a"), target)
        assert read_manifests(remote) == read_manifests(str(tmp_path / "d"))
        remove_tree(f"{remote}/shards")
        manifest = prepare(config_of(folder, "b", "a"), remote)
        for split in ("train", "eval"):
            for entry in ShardIndex(remote, manifest).entries(split):
                load_shard(remote, entry)
    finally:
        remove_tree(remote)
