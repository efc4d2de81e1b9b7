"""The whole path on a real S3 server: sources there, a dataset there, workers, a client; and what spoils it."""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_service import storage
from data_service.access import DataAccess
from data_service.client import DataClient
from data_service.config import DataConfig, SourceConfig
from data_service.errors import DataUnavailableError, ShardCorruptError
from data_service.manifest import read_manifest
from data_service.order import rows_of_batch, shards_of
from data_service.prepare import prepare
from data_service.shards import ShardIndex
from tests.helpers.data_runs import TOKEN, order_of, read_hashes, reviews, running_service, small_config
from tests.helpers.s3_faults import Fault, FaultProxy

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("slow down", "error", "reset", "truncate", "short")


def spoiled(share: float, methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "DELETE", "POST")) -> list[Fault]:
    """Some of all requests, of every kind."""
    chance = random.Random(11)
    return [
        Fault(kind, "", method, times=-1, share=share / len(KINDS), chance=chance)
        for kind in KINDS
        for method in methods
        if method == "GET" or kind in ("slow down", "error", "reset")
    ]


def write_sources(folder: str) -> None:
    """A part of the reviews as compressed JSON lines, and the others as Parquet."""
    texts = reviews(600)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:300])
    storage.write_bytes(f"{folder}/first/a.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"text": texts[300:]}), sink, row_group_size=100)
    storage.write_bytes(f"{folder}/second/b.parquet", sink.getvalue().to_pybytes())


def config_of(folder: str) -> DataConfig:
    sources = tuple(
        SourceConfig(path=f"{folder}/{name}", weight=weight) for name, weight in (("first", 3), ("second", 1))
    )
    return small_config(Path("unused"), shard_tokens=8192).model_copy(update={"sources": sources})


def shard_bytes(dataset: str) -> dict[str, bytes]:
    folder = storage.join(dataset, "shards")
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_names(folder)}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, str]:
    """The same sources and the dataset made of them on this machine's disk."""
    folder = tmp_path_factory.mktemp("local")
    write_sources(str(folder))
    config = config_of(str(folder))
    prepare(config, str(folder / "dataset"))
    return config, str(folder / "dataset")


@pytest.fixture
def on_s3(local: tuple[DataConfig, str], proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the dataset on S3, of which no shard lies in a worker's cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = f"s3://bucket/{tmp_path.name}/dataset"
    for name in storage.list_tree(local[1]):
        storage.write_bytes(f"{uri}/{name}", storage.read_bytes(f"{local[1]}/{name}"))
    proxy.clear()
    return uri


@contextmanager
def process(role: str, dataset: str, proxy: FaultProxy, *arguments: str) -> Iterator[str]:
    """`python -m data_service`, told of the store by its arguments and of the secrets by its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_ENDPOINT")}
    command = [sys.executable, "-m", "data_service", role, "--dataset", dataset, *arguments]
    command += ["--s3-endpoint-url", proxy.url, "--s3-region", "us-east-1"]
    environment["STORMJIB_DATA_TOKEN"] = TOKEN
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            yield str(json.loads(running.stdout.readline())["address"])
        finally:
            running.terminate()


@pytest.mark.timeout(300)
def test_from_sources_on_s3_to_batches_through_faults(local, proxy, tmp_path):
    root = f"s3://bucket/{tmp_path.name}"
    write_sources(root)
    proxy.faults = spoiled(0.25)
    manifest = prepare(config_of(root), f"{root}/dataset")
    assert sum(one.fault is not None for one in proxy.requests) > 10
    proxy.clear()
    there = read_manifest(local[1])
    assert (manifest.digest, manifest.index_digests) == (there.digest, there.index_digests)
    assert shard_bytes(f"{root}/dataset") == shard_bytes(local[1])
    assert prepare(config_of(root), f"{root}/dataset") == manifest  # found, not made again
    assert not [name for name in storage.list_tree(f"{root}/dataset") if name.startswith("work-")]

    order = order_of(local[0])
    with running_service(local[1], order) as service:
        client = DataClient(service.access())
        num_batches = client.plan("train").num_batches
        expected = read_hashes(client, 0, num_batches, dp=2)
        client.close()
    proxy.clear()
    proxy.faults = spoiled(0.2)
    with process("control", f"{root}/dataset", proxy) as control:
        caches = [("--control", control, "--cache-dir", str(tmp_path / f"cache-{number}")) for number in range(2)]
        with (
            process("worker", f"{root}/dataset", proxy, *caches[0]),
            process("worker", f"{root}/dataset", proxy, *caches[1]),
        ):
            client = DataClient(DataAccess((control,), TOKEN, order, manifest.digest, 4, 5.0, 20.0, 60.0))
            assert read_hashes(client, 0, num_batches, dp=2) == expected
            client.close()
    # Every shard left the store once, whatever had to be asked for again.
    whole = [one.path.partition("?")[0] for one in proxy.asked("GET", "/shards/train-") if one.fault is None]
    assert sorted(whole) == sorted(set(whole))
    assert len(whole) == len([name for name in shard_bytes(local[1]) if name.startswith("train-")])


def test_a_shard_that_is_damaged_there_is_named_and_never_served(local, on_s3, proxy):
    order = order_of(local[0])
    uri = f"{on_s3}/shards/train-00003.arrow"
    data = bytearray(storage.read_bytes(uri))
    data[len(data) // 2] ^= 1
    storage.write_bytes(uri, bytes(data))
    with running_service(local[1], order) as service:
        client = DataClient(service.access())
        plan = client.plan("train")
        expected = read_hashes(client, 0, plan.num_batches, dp=1)
        client.close()
    holding = [one for one in read_manifest(on_s3).splits["train"] if one.first_shard <= 3]
    number_in_part = 3 - holding[-1].first_shard
    part = [one.source for one in plan.parts].index(holding[-1].source)

    def touches(step: int) -> bool:
        parts, numbers = shards_of(plan, rows_of_batch(plan, step))
        return bool(((parts == part) & (numbers == number_in_part)).any())

    fine = [step for step in range(plan.num_batches) if not touches(step)]
    hurt = [step for step in range(plan.num_batches) if touches(step)]
    assert fine
    assert hurt
    with running_service(on_s3, order) as service:
        client = DataClient(service.access())
        for step in fine[:5]:
            assert read_hashes(client, step, step + 1, dp=1) == [expected[step]]
        for step in hurt[:3]:
            with pytest.raises(ShardCorruptError, match=r"train-00003\.arrow .*checksum"):
                read_hashes(client, step, step + 1, dp=1)
        client.close()


def test_a_shard_that_is_damaged_on_its_way_is_fetched_again(local, on_s3, proxy):
    order = order_of(local[0])
    proxy.faults = [Fault("corrupt", "/shards/train-", times=2)]
    with running_service(local[1], order) as there, running_service(on_s3, order) as here:
        clients = [DataClient(service.access()) for service in (there, here)]
        plan = clients[0].plan("train")
        hashes = [read_hashes(client, 0, plan.num_batches, dp=1) for client in clients]
        for client in clients:
            client.close()
    assert hashes[0] == hashes[1]
    assert [one.fault for one in proxy.requests].count("corrupt") == 2


def test_a_damaged_index_is_named(on_s3):
    manifest = read_manifest(on_s3)
    (name,) = [name for name in storage.list_tree(on_s3) if "index" in name]
    data = storage.read_bytes(f"{on_s3}/{name}")
    storage.write_bytes(f"{on_s3}/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ShardCorruptError, match=name.replace(".", r"\.")):
        ShardIndex(on_s3, manifest).entry("train", 0)


@pytest.mark.parametrize("role", ["control", "worker"])
def test_a_worker_with_a_wrong_secret_ends_with_one_line(on_s3, proxy, role):
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong", "STORMJIB_DATA_TOKEN": TOKEN}
    command = [sys.executable, "-m", "data_service", role, "--dataset", on_s3]
    command += ["--control", "127.0.0.1:1"] if role == "worker" else []
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Set credentials" in line
    assert "Traceback" not in ended.stderr


def test_a_store_that_gives_no_answer_is_named(proxy, tmp_path):
    storage.write_bytes(f"s3://bucket/{tmp_path.name}/a.txt", b"text\n")
    proxy.faults = [Fault("reset", "", method, times=-1) for method in ("GET", "HEAD", "PUT")]
    config = small_config(Path("unused")).model_copy(
        update={"sources": (SourceConfig(path=f"s3://bucket/{tmp_path.name}/a.txt"),)}
    )
    with pytest.raises(DataUnavailableError, match=r"s3://bucket/.* failed 5 times"):
        prepare(config, f"s3://bucket/{tmp_path.name}/dataset")
    with pytest.raises(DataUnavailableError, match=r"s3://bucket/.*/a\.txt .*failed 5 times"):
        prepare(config, str(tmp_path / "dataset"))
