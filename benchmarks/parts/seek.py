"""The first batch after a jump in a dataset of 10^11 rows that was never written: rows are made up by their ids."""

import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data_service.access import DataAccess
from data_service.client import DataClient
from data_service.control import ControlServer
from data_service.cursor import Cursor
from data_service.hashing import row_crcs
from data_service.manifest import DatasetManifest, PartInfo, manifest_name, read_manifest
from data_service.plan import OrderSpec, Plan
from data_service.rows import ShardRows
from data_service.schema import RowBlock
from data_service.server import DataWorker

__all__ = ["measure_seek"]

NUM_ROWS = 10**11
SEQ_LEN = 1024
GLOBAL_BATCH = 64
SHARD_TOKENS = 4 << 20
TOKEN = "a-token-of-a-benchmark"
NUM_JUMPS = 60


class _MadeUpRows(ShardRows):
    """Rows that follow from their ids."""

    def read(self, plan: Plan, row_ids: np.ndarray) -> RowBlock:
        places = np.arange(plan.seq_len + 1, dtype=np.uint64)
        tokens = ((row_ids[:, None] * np.uint64(31) + places) % np.uint64(60_000)).astype(np.uint16)
        count = row_ids.size
        length = np.full(count, plan.seq_len + 1, np.uint32)
        starts, offsets = np.zeros(count, np.uint32), np.arange(count + 1, dtype=np.int32)
        crcs = row_crcs(tokens, length, starts, offsets)
        return RowBlock(row_ids, tokens, length, starts, offsets, None, None, crcs)


def _manifest() -> DatasetManifest:
    num_tokens = NUM_ROWS * SEQ_LEN + 1
    part = PartInfo("made-up", 0, NUM_ROWS // 10, num_tokens, 0, 0, -(-num_tokens // SHARD_TOKENS))
    return DatasetManifest(
        version=2,
        digest="made-up",
        generation=0,
        rows="stream",
        row_tokens=0,
        shard_tokens=SHARD_TOKENS,
        shard_rows=0,
        vocab_size=60_000,
        token_dtype="uint16",
        eos_id=0,
        labels=(),
        loss_masks=False,
        splits={"train": (part,), "eval": ()},
        num_shards=part.num_shards,
        index_digests=(),
        tokenizer_digest="none",
        eval_below=0,
        prepare_key="made up",
        inputs={},
        files=(),
        num_records=0,
        num_rejects=0,
        num_duplicates=0,
        num_truncated=0,
    )


def measure_seek() -> dict[str, Any]:
    """Seconds to the first batch after a jump, by a client that reads already and by one that resumes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / manifest_name(0)).write_text(_manifest().to_json())
        control = ControlServer(folder, TOKEN)
        address = control.start()
        workers = [DataWorker(folder, address, TOKEN, row_source=_MadeUpRows) for _ in range(2)]
        for worker in workers:
            worker.start()
        order = OrderSpec(seed=1, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, window_shards=16)
        access = DataAccess((address,), TOKEN, order, read_manifest(folder).digest)
        try:
            return _jump(access)
        finally:
            for worker in workers:
                worker.stop()
            control.stop()


def _jump(access: DataAccess) -> dict[str, Any]:
    draw = np.random.default_rng(1)
    client = DataClient(access)
    plan = client.plan("train")
    assert plan.num_rows >= NUM_ROWS
    next(client.stream("train", 0, 10, (0, GLOBAL_BATCH)))
    jumps, resumes, memory = [], [], []
    for step in draw.integers(0, plan.num_batches, NUM_JUMPS).tolist():
        began = time.perf_counter()
        stream = client.stream("train", step, step + 1000, (0, GLOBAL_BATCH))
        batch = next(stream)
        jumps.append(time.perf_counter() - began)
        assert batch.rows.all()
        assert batch.index == step
        stream.close()  # type: ignore[attr-defined]
        memory.append(psutil.Process().memory_info().rss)
    for step in draw.integers(0, plan.num_batches, NUM_JUMPS // 3).tolist():
        cursor = Cursor.of(plan, step).to_json()
        began = time.perf_counter()
        resumed = DataClient(replace(access))
        found = Cursor.from_json(cursor)
        found.check(resumed.plan("train"))
        next(resumed.stream("train", found.consumed_batches, step + 10, (0, GLOBAL_BATCH)))
        resumes.append(time.perf_counter() - began)
        resumed.close()
    client.close()
    return {
        "rows": plan.num_rows,
        "jump_p50_s": float(np.quantile(jumps, 0.5)),
        "jump_p99_s": float(np.quantile(jumps, 0.99)),
        "resume_p50_s": float(np.quantile(resumes, 0.5)),
        "resume_p99_s": float(np.quantile(resumes, 0.99)),
        "cursor_bytes": len(cursor),
        "rss_growth_bytes": memory[-1] - memory[NUM_JUMPS // 6],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
