"""What a killed or mixed-up preparation leaves in a dataset's folder never becomes part of a dataset."""

import json
import shutil

import pytest

from data_service import prepare as prepare_module
from data_service.config import DataConfig, SourceConfig, SplitConfig
from data_service.errors import ConfigError
from data_service.manifest import read_manifests
from data_service.prepare import prepare
from tests.helpers.data_runs import reviews, small_config, write_csv
from tests.unit.test_data_prepare import all_bytes
from tests.unit.test_data_prepare_rows import config_of

TEXTS = reviews(200)


def _killed_before_the_manifest(config: DataConfig, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare until everything is in place but the manifest."""

    def die(uri: str, data: bytes) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.storage, "put_if_absent", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, dataset)


def test_files_of_a_killed_preparation_are_no_part_of_another_dataset(tmp_path, monkeypatch):
    chats = config_of(tmp_path, "document", "plain", "chats")
    plain = small_config(write_csv(tmp_path / "few.csv", TEXTS[:40])).model_copy(
        update={"split": SplitConfig(eval=0.1, deduplicate=False)}
    )
    _killed_before_the_manifest(chats, str(tmp_path / "d"), monkeypatch)
    assert (tmp_path / "d" / "tokenizer" / "chat_template.jinja").exists()
    (tmp_path / "d" / "notes.txt").write_text("not a dataset's")
    manifest = prepare(plain, str(tmp_path / "d"))
    assert (tmp_path / "d" / "notes.txt").exists()
    (tmp_path / "d" / "notes.txt").unlink()
    assert prepare(plain, str(tmp_path / "alone")) == manifest
    assert all_bytes(tmp_path / "d") == all_bytes(tmp_path / "alone")
    before = all_bytes(tmp_path / "d")
    assert prepare(plain, str(tmp_path / "d")) == manifest
    assert all_bytes(tmp_path / "d") == before


def test_files_of_a_killed_generation_are_no_part_of_another_one(tmp_path, monkeypatch):
    write_csv(tmp_path / "a.csv", TEXTS[:60])
    write_csv(tmp_path / "b.csv", TEXTS[60:180])
    write_csv(tmp_path / "c.csv", TEXTS[180:200])
    first, many, few = (
        small_config(*(tmp_path / f"{name}.csv" for name in names), shard_tokens=1024) for names in ("a", "ab", "ac")
    )
    prepare(first, str(tmp_path / "d"))
    shutil.copytree(tmp_path / "d", tmp_path / "alone")
    before = all_bytes(tmp_path / "d")
    _killed_before_the_manifest(many, str(tmp_path / "d"), monkeypatch)
    manifest = prepare(few, str(tmp_path / "d"))
    assert prepare(few, str(tmp_path / "alone")) == manifest
    after = all_bytes(tmp_path / "d")
    assert after == all_bytes(tmp_path / "alone")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", ["stats.json", "rejects.jsonl", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["other bytes", "cut off", "gone"])
def test_damaged_files_beside_the_shards_are_restored(tmp_path, name, damage, caplog):
    (tmp_path / "c.jsonl").write_text("\n".join([*(json.dumps({"text": text}) for text in TEXTS), "bad"]))
    config = small_config(tmp_path / "c.jsonl")
    manifest = prepare(config, str(tmp_path / "d"))
    before = all_bytes(tmp_path / "d")
    path = tmp_path / "d" / name
    data = path.read_bytes()
    assert data
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(len(data)) if damage == "other bytes" else data[:-7])
    # The same file under another path: the rejects go on naming the one that was read.
    (tmp_path / "moved").mkdir()
    (tmp_path / "c.jsonl").rename(tmp_path / "moved" / "c.jsonl")
    assert prepare(small_config(tmp_path / "moved" / "c.jsonl"), str(tmp_path / "d")) == manifest
    assert all_bytes(tmp_path / "d") == before
    assert f"1 files are gone or not as they were written ({name.partition('/')[0]})" in caplog.text


def test_a_template_that_a_tokenizer_never_had_is_taken_away(tmp_path):
    config = small_config(write_csv(tmp_path / "a.csv", TEXTS[:60]))
    prepare(config, str(tmp_path / "d"))
    before = all_bytes(tmp_path / "d")
    (tmp_path / "d" / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    prepare(config, str(tmp_path / "d"))
    assert all_bytes(tmp_path / "d") == before


def test_manifests_that_do_not_follow_from_each_other_are_named(tmp_path):
    sources = tuple(
        SourceConfig(path=str(write_csv(tmp_path / f"{number}.csv", TEXTS[number * 40 : number * 40 + 40])))
        for number in range(3)
    )
    base = small_config(tmp_path / "0.csv")
    for number in range(1, 4):
        prepare(base.model_copy(update={"sources": sources[:number]}), str(tmp_path / "d"))
    other = base.model_copy(update={"sources": sources[1:2]})
    prepare(other, str(tmp_path / "other"))
    assert [one.base for one in read_manifests(str(tmp_path / "d"))][0] is None
    kept = all_bytes(tmp_path / "d")
    (tmp_path / "d" / "manifest.json").rename(tmp_path / "first")
    with pytest.raises(ConfigError, match=r"holds manifest\.00001\.json, and manifest\.json, which .* is gone"):
        prepare(other, str(tmp_path / "d"))
    shutil.copy(tmp_path / "other" / "manifest.json", tmp_path / "d" / "manifest.json")
    with pytest.raises(ConfigError, match=r"manifest\.00001\.json was asked for as generation 1 of the dataset"):
        prepare(other, str(tmp_path / "d"))
    (tmp_path / "first").rename(tmp_path / "d" / "manifest.json")
    (tmp_path / "d" / "manifest.00001.json").unlink()
    with pytest.raises(ConfigError, match=r"holds manifest\.00002\.json, and manifest\.00001\.json"):
        prepare(base.model_copy(update={"sources": sources}), str(tmp_path / "d"))
    assert {**all_bytes(tmp_path / "d"), "manifest.00001.json": kept["manifest.00001.json"]} == kept
