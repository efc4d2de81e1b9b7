"""Files on a real S3 server, and what a store does when it is busy, slow, broken or shut."""

import gzip
import io
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_service import conditional_put, object_store, remote_input, storage
from data_service.config import SourceConfig
from data_service.errors import ConfigError, DataUnavailableError, SourceError
from data_service.readers import Record, find_files, fingerprint, read_records
from tests.helpers.s3_faults import Fault, FaultProxy

ROOT = Path(__file__).resolve().parents[2]
DATA = random.Random(5).randbytes(300_000)


@pytest.fixture
def root(proxy: FaultProxy, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"


def test_files_on_s3(root):
    uri = f"{root}/a/b.bin"
    assert not storage.exists(uri)
    assert storage.kind_of(root) is None
    storage.write_bytes(uri, b"0123456789")
    storage.write_bytes(f"{root}/a/empty", b"")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(f"{root}/a/empty") == b""
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.read_range(uri, 8, 100) == b"89"
    assert storage.read_range(uri, 10, 5) == storage.read_range(uri, 99, 5) == storage.read_range(uri, 0, 0) == b""
    assert storage.file_size(uri) == 10
    assert (storage.kind_of(uri), storage.kind_of(f"{root}/a")) == ("file", "folder")
    assert storage.list_names(f"{root}/a") == ["b.bin", "empty"]
    assert storage.list_tree(root) == ["a/b.bin", "a/empty"]
    assert storage.list_sizes(f"{root}/a") == {"b.bin": 10, "empty": 0}
    assert storage.glob_files(f"{root}/**/*.bin") == [uri]
    storage.move_file(uri, f"{root}/c")
    assert storage.read_bytes(f"{root}/c") == b"0123456789"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    with pytest.raises(FileNotFoundError):
        storage.open_input(uri)
    with pytest.raises(FileNotFoundError):
        storage.open_input(f"{root}/a")
    storage.remove_tree(root)
    assert storage.list_tree(root) == []


def test_of_many_writers_one_wins(root):
    won: list[int] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        if storage.put_if_absent(f"{root}/manifest.json", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(f"{root}/manifest.json") == str(won[0]).encode()


def test_a_write_whose_answer_was_lost_is_known_as_ones_own(root, proxy):
    proxy.faults = [Fault("swallow", "manifest.json", "PUT")]
    assert storage.put_if_absent(f"{root}/manifest.json", b"mine")
    assert len(proxy.asked("PUT", "manifest.json")) == 2
    proxy.faults = [Fault("reset", "manifest.json", "PUT")]
    assert not storage.put_if_absent(f"{root}/manifest.json", b"another's")
    assert storage.read_bytes(f"{root}/manifest.json") == b"mine"


def test_a_store_that_ignores_the_condition_takes_no_commits(root, proxy, monkeypatch):
    monkeypatch.setattr(conditional_put, "_checked", set())
    proxy.faults = [Fault("no condition", "", "PUT", times=-1)]
    for commit in (lambda: storage.check_commits(root), lambda: storage.put_if_absent(f"{root}/manifest.json", b"x")):
        with pytest.raises(ConfigError, match=rf"{root}: .* second writer replace .* Use a store that honours it"):
            commit()
    assert storage.list_tree(root) == []
    proxy.clear()
    storage.check_commits(root)
    storage.check_commits(f"{root}/other")  # known by now
    assert len(proxy.asked("PUT", "check-")) == 2
    assert storage.list_tree(root) == []


def test_long_files_come_in_pieces_of_one_version(root, proxy, monkeypatch):
    monkeypatch.setattr(storage, "_READ_PIECE", 64 << 10)
    uri = f"{root}/long"
    storage.write_bytes(uri, DATA)
    proxy.faults = [Fault("truncate", "long", times=3), Fault("slow down", "long", times=2)]
    assert storage.read_bytes(uri) == DATA
    assert storage.read_range(uri, 1000, 200_000) == DATA[1000:201_000]
    # Replaced after the first piece: the pieces would be of two files.
    first = object_store.fetch(uri, 0, 1000)
    storage.write_bytes(uri, DATA[::-1])
    with pytest.raises(OSError, match="long was replaced while it was read"):
        object_store.fetch(uri, 1000, 1000, first.tag)


READ_FAULTS = ("slow down", "error", "reset", "stall", "truncate", "short")


@pytest.mark.parametrize("kind", READ_FAULTS)
def test_a_read_that_fails_is_tried_again(root, proxy, kind, caplog):
    uri = f"{root}/file"
    storage.write_bytes(uri, DATA)
    proxy.clear()
    proxy.faults = [Fault(kind, "file", times=3)]
    began = time.monotonic()
    assert storage.read_bytes(uri) == DATA
    assert storage.read_range(uri, 100, 5000) == DATA[100:5100]
    assert time.monotonic() - began < 60
    assert [one.fault for one in proxy.asked("GET", "file")] == [kind] * 3 + [None] * 2
    if kind == "reset":
        return  # aiohttp asks once more by itself
    told = [record.getMessage() for record in caplog.records if record.name.startswith("data_service")]
    assert [message.partition(" failed (")[0] for message in told] == [f"reading {uri}"] * 3
    waits = [after.at_s - before.at_s for before, after in zip(proxy.requests, proxy.requests[1:], strict=False)]
    assert len({round(wait, 4) for wait in waits[:3]}) == 3  # with jitter


@pytest.mark.parametrize("kind", READ_FAULTS)
def test_a_stream_that_breaks_goes_on_where_it_was(root, proxy, kind, monkeypatch):
    monkeypatch.setattr(remote_input, "_STREAM_PIECE", 64 << 10)
    uri = f"{root}/stream"
    storage.write_bytes(uri, DATA)
    proxy.clear()
    proxy.faults = [Fault(kind, "stream", times=-1, share=0.3)]
    with storage.open_input(uri) as stream:
        parts = []
        while part := stream.read(10_000):
            parts.append(part)
    assert b"".join(parts) == DATA
    assert any(one.fault for one in proxy.requests)
    # No byte but those of broken requests was asked for twice.
    whole = [one for one in proxy.asked("GET", "stream") if one.fault is None]
    assert sum(one.num_bytes for one in whole) == len(DATA)
    with storage.open_input(uri) as stream:
        assert stream.read() == DATA


def test_a_steady_drip_is_a_failure_too(root, proxy, monkeypatch):
    monkeypatch.setattr(object_store, "_REQUEST_S", 1.5)
    uri = f"{root}/drip"
    storage.write_bytes(uri, DATA[:5000])
    proxy.faults = [Fault("drip", "drip")]
    began = time.monotonic()
    assert storage.read_bytes(uri) == DATA[:5000]
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(("kind", "times"), [("slow down", 8), ("error", 5), ("reset", 5), ("truncate", 5)])
def test_what_stays_broken_ends_after_a_few_tries_of_one_layer(root, proxy, kind, times):
    """The libraries below try again too, unless they are kept from it: 5 x 5 x 5 requests.

    All but aiohttp, which asks once more where a connection that it used before ends without an answer.
    """
    uri = f"{root}/file"
    storage.write_bytes(uri, DATA)
    proxy.clear()
    proxy.faults = [Fault(kind, "file", times=-1)]
    with pytest.raises(OSError, match=rf"reading {uri} failed {times} times, at last with "):
        storage.read_bytes(uri)
    assert times <= len(proxy.asked("GET", "file")) <= (2 * times if kind == "reset" else times)


def test_no_attempt_begins_after_the_time_for_all(root, proxy, monkeypatch):
    monkeypatch.setattr(object_store, "_GIVE_UP_S", 2.5)
    uri = f"{root}/file"
    storage.write_bytes(uri, DATA)
    proxy.faults = [Fault("stall", "file", times=-1)]
    began = time.monotonic()
    with pytest.raises(OSError, match="failed (once|[23] times, at last) with .*Timeout"):
        storage.read_bytes(uri)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("kind", ["slow down", "error", "reset", "swallow"])
def test_writes_lists_and_moves_are_tried_again(root, proxy, kind):
    for method in ("PUT", "HEAD", "GET", "DELETE", "POST"):
        proxy.faults.append(Fault(kind, "", method, times=2))
    storage.write_bytes(f"{root}/sub/a", DATA)
    proxy.faults.append(Fault(kind, "", "PUT", times=1))
    storage.move_file(f"{root}/sub/a", f"{root}/sub/b")
    assert storage.list_names(f"{root}/sub") == ["b"]
    assert storage.exists(f"{root}/sub/b")
    assert storage.read_bytes(f"{root}/sub/b") == DATA
    storage.remove_file(f"{root}/sub/b")
    assert storage.list_tree(root) == []
    assert sum(one.fault == kind for one in proxy.requests) >= 6


@pytest.mark.parametrize("operation", ["read_bytes", "open_input", "exists", "kind_of", "list_names", "file_size"])
def test_a_wrong_secret_is_said_at_once(proxy, monkeypatch, operation):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ConfigError, match=r"s3://bucket/x: .*Set credentials that may do this") as raised:
        getattr(storage, operation)("s3://bucket/x")
    assert len(proxy.requests) == 1
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path=s3://bucket/x\.csv: .*Set credentials"):
        find_files((SourceConfig(path="s3://bucket/x.csv"),))
    with pytest.raises(ConfigError, match="Set credentials"):
        storage.put_if_absent("s3://bucket/x", b"x")
    assert "wrong" not in str(raised.value)


def test_a_bucket_that_is_not_there_is_named(proxy):
    for operation in ("read_bytes", "kind_of", "list_names"):
        with pytest.raises(ConfigError, match=r"s3://no-bucket/x: .*Create the bucket"):
            getattr(storage, operation)("s3://no-bucket/x")


def test_settings_of_the_run_go_before_the_environment(proxy, monkeypatch, tmp_path):
    """Endpoint, region and profile; secrets come from the profile, and children inherit all of it."""
    storage.write_bytes("s3://bucket/settings", b"found")
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = test-key\naws_secret_access_key = test-secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("STORMJIB_S3", "")  # restored at the end
    proxy.clear()
    storage.configure_s3(endpoint_url=proxy.url, region="eu-central-1", profile="team")
    assert storage.read_bytes("s3://bucket/settings") == b"found"
    assert len(proxy.asked("GET", "settings")) == 1
    program = "from data_service import storage; print(storage.read_bytes('s3://bucket/settings'))"
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout == "b'found'\n"
    assert set(storage.s3_environment()) == {"STORMJIB_S3"}
    assert "secret" not in str(storage.s3_environment())
    storage.configure_s3(endpoint_url=proxy.url, profile="nobody")
    with pytest.raises(ConfigError, match=r"profile \(nobody\) could not be found\. Correct run\.s3\.profile"):
        storage.read_bytes("s3://bucket/settings")
    storage.configure_s3()
    assert storage.s3_environment() == {}


# ---------------------------------------------------------------------------------------------------------------------
# Sources

ROWS = [f"{number} 文字 " + "word " * (number % 50) for number in range(4000)]


@pytest.fixture
def corpus(root: str, proxy: FaultProxy) -> str:
    """The same rows in every format."""
    table = pa.table({"text": ROWS})
    for name in ("a.parquet", "b.arrow"):
        buffer = io.BytesIO()
        if name == "a.parquet":
            pa.parquet.write_table(table, buffer, row_group_size=500)
        else:
            with pa.ipc.new_file(buffer, table.schema) as writer:
                writer.write_table(table, max_chunksize=700)
        storage.write_bytes(f"{root}/{name}", buffer.getvalue())
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ROWS)
    storage.write_bytes(f"{root}/deep/c.jsonl.gz", gzip.compress(lines.encode()))
    storage.write_bytes(f"{root}/deep/d.csv", ("text\n" + "".join(f'"{text}"\n' for text in ROWS)).encode())
    storage.write_bytes(f"{root}/.hidden.csv", b"x")
    storage.write_bytes(f"{root}/notes.md", b"x")
    proxy.clear()
    return root


def test_sources_on_s3_in_every_format_through_faults(corpus, proxy, monkeypatch):
    monkeypatch.setattr(remote_input, "_STREAM_PIECE", 16 << 10)
    chance = random.Random(3)
    for kind in ("slow down", "error", "reset", "truncate", "short"):
        for method in ("GET", "HEAD"):
            proxy.faults.append(Fault(kind, "", method, times=-1, share=0.06, chance=chance))
    files = find_files((SourceConfig(path=corpus),))
    assert [file.uri.removeprefix(corpus) for file in files] == [
        "/a.parquet",
        "/b.arrow",
        "/deep/c.jsonl.gz",
        "/deep/d.csv",
    ]
    for file in files:
        found = list(read_records(file, 1 << 20))
        assert [record.text for record in found if isinstance(record, Record)] == ROWS
    assert len([one for one in proxy.requests if one.fault]) > 10


def test_globs_names_and_identities_on_s3(corpus, proxy):
    (only,) = find_files((SourceConfig(path=f"{corpus}/**/*.csv"),))
    assert only.uri == f"{corpus}/deep/d.csv"
    with pytest.raises(
        SourceError, match=r"data\.sources\.0\.path=.*deep \(deep\) and data\.sources\.1\.path=.*d\.csv"
    ):
        find_files((SourceConfig(path=f"{corpus}/deep"), SourceConfig(path=only.uri)))
    with pytest.raises(SourceError, match=r"data\.sources\.0\.path=.*nothing\.csv: the file does not exist"):
        find_files((SourceConfig(path=f"{corpus}/nothing.csv"),))
    proxy.clear()
    before = fingerprint(only.uri)
    assert not proxy.asked("GET", "d.csv")  # nothing was downloaded
    assert fingerprint(only.uri) == before
    storage.write_bytes(only.uri, storage.read_bytes(only.uri) + b"more\n")
    assert fingerprint(only.uri) != before


def test_a_source_that_stays_broken_is_named(corpus, proxy):
    (file,) = find_files((SourceConfig(path=f"{corpus}/deep/d.csv"),))
    proxy.faults = [Fault("truncate", "d.csv", times=-1)]
    with pytest.raises(DataUnavailableError, match=r"deep/d\.csv was to be read: .* failed 5 times"):
        list(read_records(file, 1 << 20))
    # A compressed file whose bytes are not what they were.
    (packed,) = find_files((SourceConfig(path=f"{corpus}/deep/c.jsonl.gz"),))
    proxy.faults = [Fault("corrupt", "c.jsonl.gz", times=-1)]
    with pytest.raises(SourceError, match=r"c\.jsonl\.gz could not be read to its end as gzip"):
        list(read_records(packed, 1 << 20))
