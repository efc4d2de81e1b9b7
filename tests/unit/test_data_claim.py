"""Two preparations into one folder: real processes here, interleaved calls for a store without locks."""

import logging

import pytest

from data_service.claim import claim_folder
from data_service.config import TokenizerConfig, TokenizerTrainConfig
from data_service.errors import ConfigError, DataUnavailableError
from data_service.manifest import read_manifest
from data_service.prepare import prepare
from data_service.shards import read_tokens
from data_service.storage import exists, join, list_names, remove_tree
from tests.helpers.data_runs import reviews, small_config, write_csv
from tests.helpers.prepare_process import DEADLINE_S, PrepareProcess
from tests.unit.test_data_prepare import all_bytes


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(write_csv(tmp_path_factory.mktemp("corpus") / "reviews.csv", reviews(200)))


@pytest.fixture(scope="module")
def other(config):
    return config.model_copy(update={"tokenizer": TokenizerConfig(train=TokenizerTrainConfig(vocab_size=500))})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    prepare(config, str(folder))
    return folder


@pytest.fixture
def start():
    running = []

    def start(*args, **kwargs):
        running.append(PrepareProcess(*args, **kwargs).start())
        return running[-1]

    yield start
    for process in running:
        process.stop()


@pytest.mark.parametrize("same", [True, False])
def test_of_two_processes_the_second_waits_and_finds_the_dataset(config, other, alone, tmp_path, start, same):
    dataset = tmp_path / "d"
    first = start(config, str(dataset), held=True)
    assert first.in_the_middle.wait(DEADLINE_S)
    second = start(config if same else other, str(dataset))
    assert second.waits.wait(DEADLINE_S), "the second does not say that it waits"
    first.go_on.set()
    manifest = read_manifest(str(alone)).to_json()
    assert first.result() == ("manifest", manifest)
    kind, text = second.result()
    if same:
        assert (kind, text) == ("manifest", manifest)
    else:
        assert kind == "ConfigError"
        assert "vocab_size is 600 there and 500 here" in text
    assert all_bytes(dataset) == all_bytes(alone)


def test_a_killed_preparation_leaves_nothing_in_the_way(config, alone, tmp_path, start):
    dataset = tmp_path / "d"
    first = start(config, str(dataset), held=True)
    assert first.in_the_middle.wait(DEADLINE_S)
    first.stop()
    assert [path for path in dataset.iterdir() if path.name.startswith("work-")]
    (dataset / "work-notes").mkdir()
    prepare(config, str(dataset))
    (dataset / "work-notes").rmdir()
    assert all_bytes(dataset) == all_bytes(alone)
    assert not [path for path in dataset.iterdir() if path.name.startswith((".", "work-"))]


def test_a_claim_that_is_not_given_up_is_named(tmp_path, caplog):
    with claim_folder(str(tmp_path)), caplog.at_level(logging.WARNING):
        with pytest.raises(DataUnavailableError, match=r"another process \(pid \d+\).*for 0\.3 s"):
            with claim_folder(str(tmp_path), wait_s=0.3):
                pass
    assert caplog.messages[0].startswith("waiting for another process (pid ")
    with claim_folder(str(tmp_path), wait_s=0.0):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("same", [True, False])
def test_on_a_store_without_locks_the_first_to_end_stays_whole(config, other, alone, tmp_path, same):
    dataset = f"memory://{tmp_path.name}"
    inner = []

    def mapper(function, items):
        inner.append(prepare(config, dataset))
        return map(function, items)

    try:
        if same:
            assert prepare(config, dataset, mapper=mapper) == inner[0]
        else:
            with pytest.raises(ConfigError, match="vocab_size is 600 there and 500 here"):
                prepare(other, dataset, mapper=mapper)
        assert inner[0] == read_manifest(dataset) == read_manifest(str(alone))
        for split in ("train", "eval"):
            ours, theirs = read_tokens(dataset, split), read_tokens(str(alone), split)
            assert [part.tolist() for part in ours] == [part.tolist() for part in theirs]
        assert list_names(dataset) == [
            "hashes.bin",
            "manifest.json",
            "rejects.jsonl",
            "shards",
            "stats.json",
            "tokenizer",
        ]
    finally:
        remove_tree(dataset)
    assert not exists(join(dataset, "manifest.json"))


def test_a_store_without_commits_is_refused_before_any_work(config, tmp_path):
    # To fsspec this is a store like another, one whose exclusive create looks first and writes then.
    with pytest.raises(ConfigError, match=r"local:// is not known to refuse a second writer"):
        prepare(config, f"local://{tmp_path}/d")
    assert list(tmp_path.iterdir()) == []
