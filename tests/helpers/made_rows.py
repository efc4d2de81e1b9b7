"""Rows made on the spot: a source for ranks where the words do not matter, such as measurements."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from data_service.errors import EmptySplitError
from data_service.plan import Plan
from data_service.schema import BatchSlice
from tests.helpers.plans import hand_made

__all__ = ["MadeRows"]


class MadeRows:
    """Full rows of random tokens; a `trainer.batching.RowSource` without a held-out split."""

    def __init__(self, global_batch: int, seq_len: int, vocab_size: int) -> None:
        self._global_batch, self._seq_len, self._vocab_size = global_batch, seq_len, vocab_size

    def plan(self, split: Literal["train", "eval"]) -> Plan:
        if split == "eval":
            raise EmptySplitError("made rows have no held-out split")
        return hand_made([("made", 0, 4096, 64)], global_batch=self._global_batch, seq_len=self._seq_len)

    def stream(
        self, split: Literal["train", "eval"], start: int, stop: int, slots: tuple[int, int]
    ) -> Iterator[BatchSlice]:
        first, last = slots
        count, width = last - first, self._seq_len + 1
        for index in range(start, stop):
            draw = np.random.default_rng([index, first])
            there = np.arange(first, last) < self._global_batch
            yield BatchSlice(
                index=index,
                slots=slots,
                tokens=draw.integers(0, self._vocab_size, (count, width), dtype=np.uint32) * there[:, None],
                length=np.where(there, width, 0).astype(np.uint32),
                start_rows=np.zeros(0, np.uint32),
                start_places=np.zeros(0, np.uint32),
                isolate_documents=False,
                answer_bits=None,
                labels=None,
                row_id=np.where(there, np.arange(first, last) + 1, 2**64 - 1).astype(np.uint64),
                row_crc=np.zeros(count, np.uint32),
            )
