"""What an epoch reads from the object store, and what it serves: a real S3 server, three workers, four trainers.

The controller's audit, which reads the epoch for itself, is counted apart.
"""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import grpc

from data_service import control_pb2 as pb
from data_service import control_pb2_grpc as pb_grpc
from data_service import storage
from data_service.audit import SampleAudit
from data_service.bearer import CHANNEL_OPTIONS, bearer_metadata
from data_service.client import DataClient
from data_service.plan import OrderSpec
from data_service.planning import make_plan
from data_service.schema import BatchSlice
from tests.helpers.data_fleet import fleet
from tests.helpers.data_runs import TOKEN
from tests.helpers.s3_server import BUCKET, running_server
from tests.helpers.written_datasets import WrittenDataset

__all__ = ["measure_egress"]

NUM_WORKERS = 3
NUM_TRAINERS = 4
GLOBAL_BATCH = 64


def _wire_bytes(one: BatchSlice) -> int:
    """Bytes of the columns that a slice's rows came in: tokens, ids, lengths, checksums, starts and their offsets."""
    rows = int(one.rows.sum())
    return rows * (one.tokens.shape[1] * one.tokens.itemsize + 8 + 4 + 8 + 4 + 4 + 4) + 4 * one.start_places.size


def measure_egress(local: WrittenDataset) -> dict[str, Any]:
    """Read one epoch of a dataset that lies in S3.

    Args:
        local: the dataset, on this machine.
    """
    with (
        running_server() as server,
        tempfile.TemporaryDirectory() as caches,
        mock.patch.dict(os.environ, {**server.environment(), "TMPDIR": caches}),
    ):
        uri = f"s3://{BUCKET}/dataset"
        files = [path for path in Path(local.uri).rglob("*") if path.is_file()]
        for path in files:
            storage.write_bytes(storage.join(uri, str(path.relative_to(local.uri))), path.read_bytes())
        shard_bytes = sum(path.stat().st_size for path in files if path.name.startswith("train-"))
        with fleet(WrittenDataset(uri, local.manifest, local.parts), NUM_WORKERS) as running:
            order = OrderSpec(seed=1, seq_len=1024, global_batch=GLOBAL_BATCH, window_shards=16)
            access = running.access(order, run_ahead=16)
            consumed = [0] * NUM_TRAINERS
            share = GLOBAL_BATCH // NUM_TRAINERS

            def train(rank: int) -> None:
                client = DataClient(access)
                steps = client.plan("train").num_rows // GLOBAL_BATCH
                slots = (rank * share, (rank + 1) * share)
                consumed[rank] = sum(_wire_bytes(one) for one in client.stream("train", 0, steps, slots))
                client.close()

            threads = [threading.Thread(target=train, args=(rank,)) for rank in range(NUM_TRAINERS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            # Counters travel with the heartbeats, one a second.
            threading.Event().wait(2.5)
            workers = _stats(running.control_address)
        audited = _audit_bytes(uri, local, order)
    read, served = sum(one.bytes_read for one in workers), sum(one.bytes_sent for one in workers)
    return {
        "dataset_bytes": shard_bytes,
        "read_bytes": read,
        "read_ratio": read / shard_bytes,
        "audit_bytes": audited,
        "audit_ratio": audited / shard_bytes,
        "shards_read": sum(one.shards_read for one in workers),
        "served_bytes": served,
        "consumed_bytes": sum(consumed),
        "served_ratio": served / sum(consumed),
    }


def _audit_bytes(uri: str, local: WrittenDataset, order: OrderSpec) -> int:
    """What the audit of the epoch's steps reads from the store, with no shards that an ended worker left."""
    plan = make_plan(local.manifest, "train", order)
    with tempfile.TemporaryDirectory() as own:
        audit = SampleAudit(uri, plan, local.manifest, cache_bytes=8 << 30, cache_dir=own)
        try:
            for step in range(plan.num_rows // GLOBAL_BATCH):
                audit.expected(step)
            return audit.num_read_bytes
        finally:
            audit.close()


def _stats(control: str) -> list[Any]:
    with grpc.insecure_channel(control, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.DataControlStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.Stats(pb.StatsRequest(), timeout=5, metadata=bearer_metadata(TOKEN))
    return [one.counters for one in answer.workers]
