"""Parts of a preparation on their own: the pool of processes, the search for duplicates, files of hashes, the pace."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster.pace import Pace, shown_seconds
from data_service.config import SourceConfig
from data_service.counts import length_counts
from data_service.dedupe import find_duplicates, kept_of
from data_service.errors import DataError, ShardCorruptError, SourceError
from data_service.hash_files import HASH, HashFile, encode_hashes, write_hashes
from data_service.mapping import ProcessMapper, serial
from data_service.readers import find_files
from data_service.source_files import source_state
from data_service.spool import ReadItem, Spool, read_file


def _double(number: int) -> int:
    time.sleep(0.001 * (number % 7))
    return number * 2


def _refuse(number: int) -> int:
    raise SourceError(f"item {number} is bad")


def _die(number: int) -> int:
    os._exit(9)


def _threads(number: int) -> str:
    return os.environ["TOKENIZERS_PARALLELISM"]


@pytest.mark.timeout(120)
def test_a_pool_keeps_the_order_passes_errors_on_and_names_a_dead_process():
    with ProcessMapper(2) as mapper:
        assert list(mapper(_double, range(40))) == [number * 2 for number in range(40)]
        assert set(mapper(_threads, range(4))) == {"false"}
        with pytest.raises(SourceError, match="item 0 is bad"):
            list(mapper(_refuse, range(3)))
        assert list(mapper(_double, range(3))) == [0, 2, 4]
    with ProcessMapper(2) as mapper, pytest.raises(DataError, match="2 processes.*one of them was killed"):
        list(mapper(_die, range(3)))
    assert list(ProcessMapper(1)(_double, [4])) == list(serial(_double, [4])) == [8]


def _wait_in_a_pool(answer) -> None:
    with ProcessMapper(2) as mapper:
        results = mapper(_double, range(10_000))
        next(results)
        answer.send([child.pid for child in psutil.Process().children(recursive=True)])
        time.sleep(60)


@pytest.mark.timeout(120)
def test_processes_of_a_pool_end_with_their_parent():
    spawn = multiprocessing.get_context("spawn")
    answers, answer = spawn.Pipe(duplex=False)
    parent = spawn.Process(target=_wait_in_a_pool, args=(answer,))
    parent.start()
    assert answers.poll(60)
    children = answers.recv()
    assert len(children) >= 2
    parent.kill()
    parent.join(10)
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in children):
        assert time.monotonic() < deadline, "processes of the pool outlive their parent"
        time.sleep(0.05)


@pytest.mark.parametrize("seed", range(6))
def test_of_equal_documents_the_first_stays_whatever_the_sizes(tmp_path, seed):
    rng = random.Random(seed)
    texts = [f"text {rng.randrange(300)}" for _ in range(rng.randrange(200, 900))]
    earlier = {f"text {number}" for number in rng.sample(range(300), 40)}
    work = str(tmp_path / "work")
    (tmp_path / "earlier.txt").write_text("\n".join(sorted(earlier)))
    cuts = sorted(rng.sample(range(1, len(texts)), 3))
    names = []
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(texts)], strict=True)):
        names.append(tmp_path / f"{number}.txt")
        names[-1].write_text("\n".join(texts[begin:end]))

    def spool_of(paths: list[Path], folder: str) -> Spool:
        files = find_files(tuple(SourceConfig(path=str(path)) for path in paths))
        chunk, run = rng.randrange(20, 400), rng.randrange(5, 200)
        return Spool(
            tuple(
                read_file(
                    ReadItem(
                        folder, number, file, source_state(file.uri), file.uri, 1000, chunk, run, True, False, None
                    )
                )
                for number, file in enumerate(files)
            )
        )

    old = spool_of([tmp_path / "earlier.txt"], str(tmp_path / "old"))
    assert not find_duplicates(str(tmp_path / "old"), old, [], 0, rng.randrange(5, 100), serial).dropped
    spool = spool_of(names, work)
    known = [str(tmp_path / "old" / "hashes.bin")]
    duplicates = find_duplicates(work, spool, known, 1, rng.randrange(5, 500), serial)
    kept = []
    place = 0
    for chunk in spool.chunks:
        mask = kept_of(work, chunk) if duplicates.touch(chunk) else np.ones(chunk.num_documents, bool)
        kept += [text for text, stays in zip(texts[place : place + chunk.num_documents], mask, strict=True) if stays]
        place += chunk.num_documents
    assert kept == [text for text in dict.fromkeys(texts) if text not in earlier]
    assert duplicates.total == len(texts) - len(kept)
    hashes = HashFile(f"{work}/hashes.00001.bin", HASH)
    assert hashes.count == len(kept)


def test_hashes_are_read_by_prefix_and_damage_is_named(tmp_path):
    rng = np.random.default_rng(3)
    records = np.empty(20_000, dtype=HASH)
    records["high"] = np.sort(rng.integers(0, 2**64, records.size, dtype=np.uint64))
    records["low"] = rng.integers(0, 2**64, records.size, dtype=np.uint64)
    path = tmp_path / "hashes.bin"
    with path.open("wb") as target:
        write_hashes(target, records.size, lambda: iter(np.array_split(records, 7)))
    assert path.read_bytes() == encode_hashes(records)
    file = HashFile(str(path), HASH)
    assert file.num_bytes == path.stat().st_size
    for bits in (0, 1, 3, file.bits, file.bits + 3):
        parts = [file.prefix(bits, number) for number in range(2**bits)]
        assert np.concatenate(parts).tobytes() == records.tobytes()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert file.prefix(1, 0).size
    with pytest.raises(ShardCorruptError, match="checksum"):
        file.prefix(1, 1)
    for broken in (b"", b"something else" * 50, bytes(data[:40])):
        path.write_bytes(broken)
        with pytest.raises(ShardCorruptError, match=r"hashes\.bin was asked for"):
            HashFile(str(path), HASH)


def test_lengths_fall_into_buckets_of_three_percent():
    lengths = np.array([*range(1, 5000), 10**6, 2**31], dtype=np.uint32)
    counts = length_counts(lengths)
    assert sum(counts.values()) == lengths.size
    assert list(counts) == sorted(counts)
    assert {least: count for least, count in counts.items() if least < 64} == dict.fromkeys(range(1, 64), 1)
    for length in lengths.tolist():
        least = max(one for one in counts if one <= length)
        assert (length - least) * 32 <= length


def test_the_time_left_follows_the_last_minute():
    pace = Pace()
    assert pace.left_s("read", 0, 1000, 5.0) is None
    assert pace.left_s("read", 100, 1000, 15.0) == 90.0
    assert pace.left_s("read", 100, 1000, 35.0) == 270.0
    assert pace.left_s("encode", 0, 50, 36.0) is None
    # A burst of items that were found finished is forgotten after a minute.
    pace.left_s("encode", 1_000_000, 2_000_000, 37.0)
    for second in range(38, 140):
        left = pace.left_s("encode", 1_000_000 + 100 * (second - 37), 2_000_000, float(second))
    assert left == pytest.approx((1_000_000 - 100 * 102) / 100)
    shown = [shown_seconds(value) for value in (3.4, 89, 100, 5300, 12_000)]
    assert shown == ["3 s", "89 s", "2 min", "88 min", "3 h 20 min"]
