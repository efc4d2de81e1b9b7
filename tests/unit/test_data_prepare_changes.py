"""Sources that change or fail while they are read, and what is told meanwhile."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from cluster.commands.data import _label as shown_label
from data_service import generations, reading, spool, stages
from data_service.config import RejectsConfig, SourceConfig
from data_service.counts import NO_ANSWER, read_counts
from data_service.errors import ConfigError, DataUnavailableError, SourceError
from data_service.manifest import read_manifest
from data_service.plan import OrderSpec
from data_service.planning import make_plan
from data_service.prepare import prepare
from data_service.progress import PrepareProgress
from data_service.stats import describe
from tests.helpers.data_runs import order_of, reviews, small_config, write_csv
from tests.unit.test_data_prepare import all_bytes
from tests.unit.test_data_prepare_rows import TEMPLATE

TEXTS = reviews(200)


def _grow(path: Path) -> None:
    write_csv(path, TEXTS[:90])


def _touch_same_size(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"text", b"TEXT", 1))
    os.utime(path, ns=(1, 1))


def _replace(path: Path) -> None:
    found = path.stat()
    data = path.read_bytes()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("change", [_grow, _touch_same_size, _replace])
@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_source_that_changes_is_named(tmp_path, monkeypatch, change, when):
    path = write_csv(tmp_path / "a.csv", TEXTS[:60])
    config = small_config(path)
    real = spool.read_records

    def changing(file, *rest):
        found = list(real(file, *rest))
        if when == "while it is read":
            change(path)
        yield from found

    def reading_later(function, items):
        if function is spool.read_file and when == "before it is read":
            change(path)
        return map(function, items)

    monkeypatch.setattr(spool, "read_records", changing)
    with pytest.raises(SourceError, match=r"a\.csv changed while it was read"):
        prepare(config, str(tmp_path / "d"), mapper=reading_later)
    assert not (tmp_path / "d" / "manifest.json").exists()
    monkeypatch.setattr(spool, "read_records", real)
    if change is not _touch_same_size:
        assert prepare(config, str(tmp_path / "d")).num_records == (90 if change is _grow else 60)


def test_files_that_did_not_change_are_not_hashed_again(tmp_path, monkeypatch):
    paths = [write_csv(tmp_path / f"{name}.csv", TEXTS[at : at + 50]) for name, at in (("a", 0), ("b", 50))]
    hashed: list[str] = []
    real = generations.fingerprint
    monkeypatch.setattr(generations, "fingerprint", lambda uri, tell: hashed.append(Path(uri).name) or real(uri, tell))
    first = prepare(small_config(*paths), str(tmp_path / "d"))
    assert sorted(hashed) == ["a.csv", "b.csv"]
    assert prepare(small_config(*paths), str(tmp_path / "d")) == first
    assert len(hashed) == 2
    os.utime(paths[0])
    assert prepare(small_config(*paths), str(tmp_path / "d")) == first
    assert hashed[2:] == ["a.csv"]
    write_csv(paths[1], TEXTS[100:150])
    with pytest.raises(ConfigError, match=r"source file 1 \(content\)"):
        prepare(small_config(*paths), str(tmp_path / "d"))


def test_one_large_file_is_seen_to_advance(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_LOOK_S", 0.01)
    monkeypatch.setattr(spool, "_TELL_S", 0.0)
    path = tmp_path / "large.txt"
    path.write_text("".join(f"{number} {TEXTS[number % 200]}\n" for number in range(60_000)), encoding="utf-8")
    seen: list[PrepareProgress] = []
    config = small_config(path).model_copy(update={"shard_tokens": 1 << 20})

    def until_read(function, items):
        if function is not spool.read_file:
            raise KeyboardInterrupt
        return map(function, items)

    with pytest.raises(KeyboardInterrupt):
        prepare(config, str(tmp_path / "d"), mapper=until_read, progress=seen.append)
    read = [one for one in seen if one.stage == "read"]
    between = [one for one in read if 0 < one.done < one.total]
    assert len(between) > 3
    assert any(one.num_records for one in between)
    assert [one.done for one in read] == sorted(one.done for one in read)
    assert read[-1].done == read[-1].total == path.stat().st_size
    assert read[-1].num_records == 60_000


def _failing(monkeypatch, name: str, error: Exception) -> list[str]:
    """Reading the file of this name fails; returns the names of those that are read."""
    read: list[str] = []
    real = spool.read_records

    def failing(file, *rest):
        read.append(Path(file.uri).name)
        yield from real(file, *rest)
        if Path(file.uri).name == name:
            raise error

    monkeypatch.setattr(spool, "read_records", failing)
    return read


def test_a_store_that_fails_costs_its_file_alone(tmp_path, monkeypatch):
    paths = [write_csv(tmp_path / f"{name}.csv", TEXTS[at : at + 50]) for name, at in (("a", 0), ("b", 50), ("c", 100))]
    config = small_config(*paths)
    with monkeypatch.context() as patch:
        read = _failing(patch, "b.csv", DataUnavailableError("no answer"))
        with pytest.raises(DataUnavailableError):
            prepare(config, str(tmp_path / "d"))
        assert read == ["a.csv", "b.csv"]
    read = _failing(monkeypatch, "none", ValueError())
    prepare(config, str(tmp_path / "d"))
    assert read == ["b.csv", "c.csv"]
    prepare(config, str(tmp_path / "alone"))
    assert all_bytes(tmp_path / "d") == all_bytes(tmp_path / "alone")


def test_a_mended_file_or_a_raised_limit_keeps_what_was_read(tmp_path, monkeypatch):
    paths = [write_csv(tmp_path / f"{name}.csv", TEXTS[at : at + 50]) for name, at in (("a", 0), ("b", 50), ("c", 100))]
    with paths[1].open("a") as file:
        file.write('"broken,x\n' * 60)
    config = small_config(*paths)
    read = _failing(monkeypatch, "none", ValueError())
    with pytest.raises(SourceError, match="max_fraction"):
        prepare(config, str(tmp_path / "d"))
    assert read == ["a.csv", "b.csv", "c.csv"]
    raised = config.model_copy(update={"rejects": RejectsConfig(max_fraction=0.9)})
    with pytest.raises(KeyboardInterrupt):
        prepare(raised, str(tmp_path / "d"), mapper=_stop_behind_reading)
    assert len(read) == 3
    # Files change places, one is mended, one is new.
    write_csv(paths[1], TEXTS[50:100])
    other = write_csv(tmp_path / "0.csv", TEXTS[150:180])
    mended = config.model_copy(update={"sources": small_config(other, paths[2], paths[1], paths[0]).sources})
    prepare(mended, str(tmp_path / "d"))
    assert read[3:] == ["0.csv", "b.csv"]
    prepare(mended, str(tmp_path / "alone"))
    assert all_bytes(tmp_path / "d") == all_bytes(tmp_path / "alone")


def _stop_behind_reading(function, items):
    if function is not spool.read_file:
        raise KeyboardInterrupt
    return map(function, items)


def _chats(path: Path, questions: list[str]) -> None:
    turns = [[{"role": "user", "content": one}, {"role": "assistant", "content": "yes"}] for one in questions]
    path.write_text("\n".join(json.dumps({"messages": one}) for one in turns))


@pytest.mark.parametrize("rows", ["document", "packed"])
def test_chats_whose_answer_no_row_holds_are_left_out_and_told(tmp_path, caplog, rows):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    short = [f"jib {number}" for number in range(40)]
    _chats(tmp_path / "chats.jsonl", [*short, *("".join(TEXTS[at : at + 10]) + "?" for at in range(0, 50, 10))])
    source = SourceConfig(name="chats", path=str(tmp_path / "chats.jsonl"), messages="messages")
    config = small_config(tmp_path / "x.csv", seq_len=60).model_copy(
        update={"sources": (source,), "rows": rows, "chat_template": str(tmp_path / "chat.jinja")}
    )
    with caplog.at_level(logging.WARNING):
        manifest = prepare(config, str(tmp_path / "d"))
    assert manifest.left_out == {NO_ANSWER: 5}
    assert manifest.num_documents() == 40
    assert (manifest.num_rejects, manifest.num_truncated) == (0, 0)
    assert "5 chats were left out (answer beyond data.seq_len=60)" in caplog.text
    (counts,) = read_counts(str(tmp_path / "d"), 0)
    assert counts.left_out == {NO_ANSWER: 5}
    assert sum(split.documents for split in counts.splits.values()) == 40
    assert read_manifest(str(tmp_path / "d")) == manifest
    _chats(tmp_path / "chats.jsonl", ["".join(TEXTS[at : at + 10]) + "?" for at in range(0, 50, 10)])
    with pytest.raises(SourceError, match=r"data\.seq_len=60: in 5 chats of chats the answer begins behind the end"):
        prepare(config, str(tmp_path / "e"))


def test_a_weighted_source_without_rows_is_told_and_refused(tmp_path, caplog):
    texts = write_csv(tmp_path / "a.csv", TEXTS[:60])
    write_csv(tmp_path / "b.csv", TEXTS[:20])
    sources = (
        SourceConfig(path=str(texts), weight=1.0),
        SourceConfig(path=str(tmp_path / "b.csv"), weight=2.0),
    )
    config = small_config(texts).model_copy(update={"sources": sources})
    with caplog.at_level(logging.WARNING):
        manifest = prepare(config, str(tmp_path / "d"))
    assert "b: no row of the train split came of its 20 records" in caplog.text
    with pytest.raises(ConfigError, match="above 0 for b, .*b: no row .* repeat texts read before"):
        make_plan(manifest, "train", order_of(config))
    assert make_plan(manifest, "eval", order_of(config)).num_rows
    assert isinstance(order_of(config), OrderSpec)


def test_a_compression_that_is_set_is_part_of_what_was_asked_for(tmp_path):
    import gzip

    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress("\n".join(TEXTS[:60]).encode()))
    packed = small_config(path).model_copy(update={"sources": (SourceConfig(path=str(path), compression="gzip"),)})
    prepare(packed, str(tmp_path / "d"))
    with pytest.raises(ConfigError, match=r"source file 0 \(content\).* is txt\.gzip:"):
        prepare(small_config(path), str(tmp_path / "d"))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_write_that_fails_says_where_and_keeps_what_was_done(tmp_path, monkeypatch, error):
    paths = [write_csv(tmp_path / f"{name}.csv", TEXTS[at : at + 50]) for name, at in (("a", 0), ("b", 50))]
    real = Path.write_bytes

    def full(self, data):
        if "/encode/" in str(self):
            raise OSError(error, os.strerror(error))
        return real(self, data)

    read = _failing(monkeypatch, "none", ValueError())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataUnavailableError, match=r"/encode/00000/.*is kept.*data\.dataset") as caught:
            prepare(small_config(*paths), str(tmp_path / "d"))
    assert ("room" in str(caught.value)) == (error != errno.EIO)
    prepare(small_config(*paths), str(tmp_path / "d"))
    assert read == ["a.csv", "b.csv"]


def test_classes_are_limited_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "MAX_CLASSES", 10)
    sources = []
    for name, labels in (("a", range(8)), ("b", range(4, 12))):
        lines = ["text,label", *(f"{name} {label},{label}" for label in labels)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        sources.append(SourceConfig(path=str(tmp_path / f"{name}.csv"), label="label"))
    config = small_config(tmp_path / "a.csv").model_copy(update={"sources": tuple(sources), "rows": "document"})
    with pytest.raises(SourceError, match="columns of a, b have 12 values together, at most 10 classes"):
        prepare(config, str(tmp_path / "d"))


def test_statistics_tell_stored_tokens_and_those_cut_off(tmp_path):
    lines = ["text,label", *(f"{'word ' * (5 + 40 * (number % 2))}{number},x" for number in range(40))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    source = SourceConfig(path=str(tmp_path / "a.csv"), label="label")
    config = small_config(tmp_path / "a.csv").model_copy(update={"sources": (source,), "rows": "document"})
    manifest = prepare(config, str(tmp_path / "d"))
    assert manifest.num_truncated == 20
    plans = {split: make_plan(manifest, split, order_of(config)) for split in ("train", "eval")}
    (counts,) = read_counts(str(tmp_path / "d"), 0)
    (found,) = describe(str(tmp_path / "d"), manifest, [counts], plans, 3).sources
    for split in ("train", "eval"):
        assert found.splits[split].tokens == manifest.num_tokens(split)
        assert found.splits[split].tokens + found.splits[split].cut_tokens == counts.splits[split].tokens
    assert found.splits["train"].cut_tokens > 0


def test_classes_are_shown_short_and_printable():
    assert shown_label("good\x1b[31m") == "good\\x1b[31m"
    assert shown_label("x" * 100) == "x" * 60 + "…"
