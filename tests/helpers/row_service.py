"""A real data service over a small corpus: prepared shards, a control plane and data workers in this process."""

import contextlib
import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_service.access import DataAccess
from data_service.config import DataConfig, RowKind
from data_service.control import ControlServer
from data_service.manifest import DatasetManifest
from data_service.plan import OrderSpec
from data_service.prepare import prepare
from data_service.rows import ShardRows
from data_service.server import DataWorker, ShardRowsFactory

__all__ = ["RowService", "data_config", "row_service", "served", "write_corpus"]

TOKEN = "a-token-for-tests"

_WHO = ("the keeper", "a sailor", "the old cook", "her brother", "the pilot")
_DOES = ("mends", "watches", "paints", "carries", "forgets")
_WHAT = ("the torn sail", "a red lantern", "the long rope", "two heavy crates", "the morning tide")
_WHEN = ("before dawn", "after the storm", "in the quiet harbour", "when the wind turns")


@dataclass(frozen=True)
class RowService:
    """What ranks need to know, and what tests may look at."""

    access: DataAccess
    manifest: DatasetManifest
    dataset: Path


def write_corpus(path: Path, num_documents: int = 600, seed: int = 0) -> None:
    """A CSV of short texts with a grammar that a tiny model learns in a few steps."""
    draw = random.Random(seed)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text"])
        for number in range(num_documents):
            lines = [
                f"{draw.choice(_WHO)} {draw.choice(_DOES)} {draw.choice(_WHAT)} {draw.choice(_WHEN)}."
                for _ in range(draw.randint(1, 4))
            ]
            writer.writerow([f"{number}: {' '.join(lines)}"])


def data_config(corpus: Path, seq_len: int, rows: RowKind = "stream", isolate_documents: bool = False) -> DataConfig:
    """The `data` section of the corpus, with shards small enough that there are several."""
    return DataConfig.model_validate(
        {
            "sources": [{"path": str(corpus)}],
            "tokenizer": {"train": {"vocab_size": 384}},
            "rows": rows,
            "seq_len": seq_len,
            "isolate_documents": isolate_documents,
            "split": {"eval": 0.05},
            "shard_tokens": 4096,
            "shuffle_window_shards": 2,
        }
    )


@contextlib.contextmanager
def row_service(
    folder: Path,
    seq_len: int,
    global_batch: int,
    seed: int,
    sources: Sequence[ShardRowsFactory] = (ShardRows, ShardRows),
    *,
    rows: RowKind = "stream",
    isolate_documents: bool = False,
) -> Iterator[RowService]:
    """Prepare (or find prepared) a corpus in `folder` and serve it with one worker for each row source."""
    corpus = folder / "corpus.csv"
    if not corpus.exists():
        write_corpus(corpus)
    config = data_config(corpus, seq_len, rows, isolate_documents)
    with served(config, folder / f"dataset-{rows}", global_batch, seed, sources) as service:
        yield service


@contextlib.contextmanager
def served(
    config: DataConfig, dataset: Path, global_batch: int, seed: int, sources: Sequence[ShardRowsFactory] = (ShardRows,)
) -> Iterator[RowService]:
    """Prepare (or find prepared) what a `data` section names, and serve it with one worker for each row source."""
    manifest = prepare(config, str(dataset))
    control = ControlServer(str(dataset), TOKEN)
    address = control.start()
    workers: list[DataWorker] = []
    try:
        for source in sources:
            workers.append(DataWorker(str(dataset), address, TOKEN, row_source=source))
            workers[-1].start()
        order = OrderSpec.from_config(config, seed=seed, global_batch=global_batch)
        access = DataAccess((address,), TOKEN, order, manifest.digest, stalled_s=20.0)
        yield RowService(access, manifest, dataset)
    finally:
        for worker in workers:
            worker.stop()
        control.stop()
