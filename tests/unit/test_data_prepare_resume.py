"""A preparation that was killed is taken up again: nothing finished is done twice, and the bytes are the same."""

import random
import shutil

import pytest

from data_service import encode, shard_writer, spool
from data_service.claim import claim_folder
from data_service.config import DataConfig, SourceConfig, SplitConfig, TokenizerConfig, TokenizerTrainConfig
from data_service.mapping import ProcessMapper
from data_service.prepare import prepare
from data_service.stages import Sizes
from tests.helpers.data_runs import reviews, small_config, write_csv
from tests.helpers.prepare_process import prepare_until_killed
from tests.unit.test_data_prepare import all_bytes

SIZES = Sizes(chunk_bytes=8192, run_documents=60, partition_documents=100)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    """Three files of two sources, with duplicates within a file, between files and between sources."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = reviews(240)
    paths = [
        write_csv(folder / "a-1.csv", texts[:120] + texts[20:40]),
        write_csv(folder / "a-2.csv", texts[90:180]),
        write_csv(folder / "b.csv", texts[150:] + texts[:10]),
    ]
    base = small_config(*paths)
    sources = (SourceConfig(name="a", path=str(folder / "a-*.csv")), SourceConfig(name="b", path=str(paths[2])))
    return base.model_copy(update={"sources": sources})


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    prepare(config, str(folder))
    return all_bytes(folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_any_file_leave_the_bytes_as_they_are(config, whole, tmp_path, seed):
    rng = random.Random(seed)
    kills = 0
    while not prepare_until_killed(config, str(tmp_path), sizes=SIZES, kill_at_rename=rng.randrange(1, 160)):
        kills += 1
        assert len([path for path in tmp_path.iterdir() if path.name.startswith("work-")]) == 1
        if kills == 6:
            assert prepare_until_killed(config, str(tmp_path), sizes=SIZES)
            break
    assert kills > 0
    assert all_bytes(tmp_path) == whole


@pytest.mark.timeout(300)
def test_kills_while_files_are_added_leave_the_bytes_as_they_are(config, tmp_path):
    first = config.model_copy(update={"sources": config.sources[:1]})
    for name in ("alone", "killed"):
        prepare(first, str(tmp_path / name))
    prepare(config, str(tmp_path / "alone"))
    rng = random.Random(1)
    for _ in range(5):
        before = all_bytes(tmp_path / "killed")
        if prepare_until_killed(config, str(tmp_path / "killed"), sizes=SIZES, kill_at_rename=rng.randrange(1, 60)):
            break
        kept = all_bytes(tmp_path / "killed")
        assert all(kept[name] == data for name, data in before.items() if not name.startswith((".", "work-")))
        assert prepare(first, str(tmp_path / "killed")).generation == 0
    prepare(config, str(tmp_path / "killed"))
    assert all_bytes(tmp_path / "killed") == all_bytes(tmp_path / "alone")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_time_with_a_pool_of_processes(config, whole, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(3):
        if prepare_until_killed(config, str(tmp_path), sizes=SIZES, kill_after_s=rng.uniform(0.1, 2.5), processes=2):
            break
    assert prepare_until_killed(config, str(tmp_path), sizes=SIZES, processes=2)
    assert all_bytes(tmp_path) == whole


def _stop_behind(calls):
    """A mapper that is interrupted behind so many results."""
    left = [calls]

    def apply(function, items):
        for item in items:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield function(item)

    return apply


def test_what_was_finished_is_not_done_again(config, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("data_service.prepare._SIZES", SIZES)
    done: list[object] = []

    def counted(module, name):
        original = getattr(module, name)

        def call(*args):
            done.append((name, args[0]))
            return original(*args)

        monkeypatch.setattr(module, name, call)

    counted(encode, "_encode")
    counted(shard_writer, "_write")
    read_records = spool.read_records

    def counted_read(*args):
        done.append("read")
        return read_records(*args)

    monkeypatch.setattr(spool, "read_records", counted_read)
    prepare(config, str(tmp_path / "once"))
    everything = list(done)
    assert everything.count("read") == 3
    assert len(everything) > 12
    for calls in (2, 14, 22, 25):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            prepare(config, str(tmp_path / f"{calls}"), mapper=_stop_behind(calls))
        prepare(config, str(tmp_path / f"{calls}"))
        assert len(done) == len(everything), calls
        assert all_bytes(tmp_path / f"{calls}") == whole


@pytest.mark.parametrize("damage", ["cut off", "zeros", "gone", "record cut off"])
def test_damaged_work_is_done_again(config, whole, tmp_path, monkeypatch, damage):
    monkeypatch.setattr("data_service.prepare._SIZES", SIZES)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, str(tmp_path), mapper=_stop_behind(22))
    (work,) = [path for path in tmp_path.iterdir() if path.name.startswith("work-")]
    suffix = ".done" if damage == "record cut off" else ".arrow"
    files = [path for path in sorted(work.rglob(f"*{suffix}")) if path.parent.parent.name in ("encode", "read")]
    assert len(files) > 6
    for path in files[::3]:
        data = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(bytes(len(data)) if damage == "zeros" else data[: len(data) // 2])
    prepare(config, str(tmp_path))
    assert all_bytes(tmp_path) == whole


def test_work_that_a_finished_preparation_left_is_removed_unless_somebody_is_at_it(config, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(config, str(tmp_path), mapper=_stop_behind(3))
    (work,) = [path for path in tmp_path.iterdir() if path.name.startswith("work-")]
    kept = tmp_path.with_name(f"{tmp_path.name}-kept")
    shutil.copytree(work, kept)
    prepare(config, str(tmp_path))
    # As if the kill had come just behind the manifest.
    shutil.copytree(kept, work)
    with claim_folder(str(tmp_path)):
        prepare(config, str(tmp_path))
        assert work.exists()
    prepare(config, str(tmp_path))
    assert all_bytes(tmp_path) == whole


def test_work_for_something_else_is_removed(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(config, str(tmp_path), mapper=_stop_behind(1))
    (work,) = [path for path in tmp_path.iterdir() if path.name.startswith("work-")]
    other = config.model_copy(
        update={
            "split": SplitConfig(eval=0.3),
            "tokenizer": TokenizerConfig(train=TokenizerTrainConfig(vocab_size=500)),
        }
    )
    prepare(other, str(tmp_path))
    assert not work.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "work-"))]


@pytest.mark.timeout(180)
def test_one_and_two_processes_give_the_same_bytes(config, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("data_service.prepare._SIZES", SIZES)
    for processes in (1, 2):
        with ProcessMapper(processes) as mapper:
            prepare(config, str(tmp_path / f"{processes}"), mapper=mapper)
        assert all_bytes(tmp_path / f"{processes}") == whole
