"""Rows without a service: the same plan, order and batch shape as the data service, tokens made up from the row id."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from data_service.hashing import row_crc
from data_service.order import rows_of_batch
from data_service.plan import PLAN_VERSION, Plan, num_rows_of
from data_service.schema import NO_ROW, BatchSlice
from trainer.protocol import WorkerSpec

NUM_TOKENS = {"train": 40_000, "eval": 700}


class LocalRows:
    """A `trainer.batching.RowSource` in the rank itself; any rank may be given other tokens by `tamper`."""

    def __init__(self, spec: WorkerSpec, tamper: int | None = None) -> None:
        self.spec = spec
        self.tamper = tamper

    def plan(self, split: Literal["train", "eval"]) -> Plan:
        spec, num_tokens = self.spec, NUM_TOKENS[split]
        return Plan(
            version=PLAN_VERSION,
            dataset_digest="made-up",
            split=split,
            seed=spec.seed,
            seq_len=spec.seq_len,
            global_batch=spec.train.global_batch,
            num_tokens=num_tokens,
            num_rows=num_rows_of(num_tokens, spec.seq_len),
            rows_per_shard=64,
            window_shards=4,
            shuffle=split == "train",
        )

    def stream(
        self, split: Literal["train", "eval"], start: int, stop: int, slots: tuple[int, int]
    ) -> Iterator[BatchSlice]:
        plan = self.plan(split)
        for index in range(start, stop):
            yield self._slice(plan, index, slots)

    def close(self) -> None:
        pass

    def _slice(self, plan: Plan, index: int, slots: tuple[int, int]) -> BatchSlice:
        count, width = slots[1] - slots[0], plan.seq_len + 1
        tokens = np.zeros((count, width), dtype=np.int32)
        row_id = np.full(count, NO_ROW, dtype=np.uint64)
        valid = np.zeros(count, dtype=np.uint32)
        crc = np.zeros(count, dtype=np.uint32)
        for at, row in enumerate(rows_of_batch(plan, index)[slots[0] : slots[1]]):
            tokens[at] = self._tokens(plan, int(row))
            row_id[at] = row
            valid[at] = min(plan.seq_len, plan.num_tokens - 1 - int(row) * plan.seq_len)
            crc[at] = row_crc(tokens[at].astype(np.uint16), int(valid[at]))
        if self.tamper == index:
            tokens[0, 1] ^= 1
            crc[0] = row_crc(tokens[0].astype(np.uint16), int(valid[0]))
        return BatchSlice(index, slots, tokens, np.zeros_like(tokens, dtype=np.bool_), row_id, valid, crc)

    def _tokens(self, plan: Plan, row: int) -> np.ndarray:
        """A walk with a rule to learn: mostly 3 · x + 1, at times a jump."""
        draws = np.random.default_rng([row, plan.split == "eval"])
        jumps = draws.integers(0, 20, plan.seq_len + 1)
        tokens = np.empty(plan.seq_len + 1, dtype=np.int32)
        tokens[0] = draws.integers(0, self.spec.vocab_size)
        for at in range(1, tokens.size):
            jump = int(draws.integers(0, self.spec.vocab_size)) if jumps[at] == 0 else 1
            tokens[at] = (3 * int(tokens[at - 1]) + jump) % self.spec.vocab_size
        return tokens
