"""Row ids → tokens, document starts, answer bits and classes, gathered from the shards that hold them.

A stream row is the window of seq_len + 1 tokens that begins at its number in the shard times seq_len; rows that were
fixed at prepare begin where the shard's `row_offsets` say. No row leaves its shard. Rows are padded with the end token.

Owns gathering. Refuses to know batches, ranks or the network.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_service.errors import ShardCorruptError
from data_service.manifest import DatasetManifest
from data_service.memory import Blocks
from data_service.plan import PART_SHIFT, Plan
from data_service.planning import check_plan
from data_service.row_kernel import copy_starts, finish_checksums, gather
from data_service.schema import NO_LABEL, RowBlock
from data_service.shards import Shard, ShardEntry, ShardIndex, shard_file

__all__ = ["ShardRows", "ShardStore"]

_I64 = npt.NDArray[np.int64]
_U32 = npt.NDArray[np.uint32]


class ShardStore(Protocol):
    """Where shards come from: verified, and kept as long as the store sees fit."""

    def get(self, entries: Iterable[ShardEntry]) -> Mapping[tuple[str, int], Shard]:
        """The shards by (split, number).

        Raises:
            ShardCorruptError: naming the shard.
            DataUnavailableError: naming the shard, when the storage gives no answer in time.
        """


@dataclass(frozen=True)
class _Block:
    """Rows of a block, filled shard by shard; n of them, T = seq_len."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[n, T+1]"""
    length: _U32
    """[n]"""
    answer_bits: npt.NDArray[np.uint8] | None
    labels: npt.NDArray[np.int32] | None
    checksums: _U32
    """[n], begun."""
    lows: _I64
    """[n]: index in its shard of a row's first document start."""
    start_counts: _I64
    """[n]"""


@dataclass(frozen=True)
class _Part:
    """Rows of a block that lie in one shard, m of them."""

    shard: Shard
    slots: _I64
    """[m]: rows of the block."""
    begin: _I64
    """[m]: first token of each in the shard."""


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a plan lie; int64 [parts] each."""

    plan: Plan
    num_rows: _I64
    shard_rows: _I64
    first_shard: _I64
    """Numbers of shards in the split."""


class ShardRows:
    """Reads rows of one dataset. A data worker takes another one of the same shape, which is how tests make it lie."""

    def __init__(self, manifest: DatasetManifest, index: ShardIndex, shards: ShardStore) -> None:
        self._manifest = manifest
        self._index = index
        self._shards = shards
        self._layout: _Layout | None = None
        self._blocks = Blocks()
        self._gathering = threading.Lock()

    def read(self, plan: Plan, row_ids: npt.NDArray[np.uint64]) -> RowBlock:
        """The rows with these ids, in their order.

        Args:
            plan: of this dataset.
            row_ids: uint64 [n], of rows that the plan has.

        Raises:
            CursorMismatchError: when the plan is of another dataset, or does not fit this one.
            ValueError: when there is no such row.
            ShardCorruptError: when a shard that they lie in is damaged.
        """
        number, in_shard = self._locate(self._layout_of(plan), row_ids)
        order = np.argsort(number, kind="stable")
        in_order = number[order]
        cuts = np.flatnonzero(np.diff(in_order, prepend=-1))
        numbers = in_order[cuts].tolist()
        shards = self._shards.get([self._index.entry(plan.split, one) for one in numbers])
        # One block at a time: several threads would only take the interpreter's lock from each other, call by call.
        with self._gathering:
            return self._gathered(plan, row_ids, shards, numbers, np.split(order, cuts[1:]), in_shard)

    def _gathered(
        self,
        plan: Plan,
        row_ids: npt.NDArray[np.uint64],
        shards: Mapping[tuple[str, int], Shard],
        numbers: list[int],
        slots_of: list[_I64],
        in_shard: _I64,
    ) -> RowBlock:
        """The rows, from shards that are here: `numbers`, each with the places in the block that it fills."""
        block = self._empty(plan, row_ids.size)
        parts = []
        for one, slots in zip(numbers, slots_of, strict=False):
            try:
                parts.append(self._gather(plan, shards[plan.split, one], slots, in_shard[slots], block))
            except IndexError as error:
                raise ShardCorruptError(
                    f"{shard_file(plan.split, one)} holds fewer rows or tokens than the manifest says ({error}). "
                    "Prepare the dataset again into another folder."
                ) from error
        offsets = np.zeros(row_ids.size + 1, np.int32)
        np.cumsum(block.start_counts, out=offsets[1:])
        starts = np.empty(int(offsets[-1]), np.uint32)
        for part in parts:
            copy_starts(part.shard.starts, part.begin, part.slots, block.lows, offsets, starts)
        finish_checksums(block.checksums, starts, offsets, block.answer_bits, block.labels)
        return RowBlock(
            row_id=row_ids,
            tokens=block.tokens,
            length=block.length,
            starts=starts,
            start_offsets=offsets,
            answer_bits=block.answer_bits,
            labels=block.labels,
            row_crc=block.checksums,
        )

    def _layout_of(self, plan: Plan) -> _Layout:
        """Where the parts of a plan lie; kept for the plan of the last call, which is most often the next one's."""
        layout = self._layout
        if layout is None or layout.plan is not plan:
            check_plan(plan, self._manifest)
            first = {(one.source, one.generation): one.first_shard for one in self._manifest.splits[plan.split]}
            layout = _Layout(
                plan=plan,
                num_rows=np.array([one.num_rows for one in plan.parts], dtype=np.int64),
                shard_rows=np.array([one.rows_per_shard for one in plan.parts], dtype=np.int64),
                first_shard=np.array([first[one.source, one.generation] for one in plan.parts], dtype=np.int64),
            )
            self._layout = layout
        return layout

    @staticmethod
    def _locate(layout: _Layout, row_ids: npt.NDArray[np.uint64]) -> tuple[_I64, _I64]:
        """The number of each row's shard in the split, and of the row in the shard; int64 [n] each."""
        part = (row_ids >> np.uint64(PART_SHIFT)).astype(np.int64)
        row = (row_ids & np.uint64((1 << PART_SHIFT) - 1)).astype(np.int64)
        if row_ids.size and (int(part.max()) >= layout.num_rows.size or (row >= layout.num_rows[part]).any()):
            raise ValueError(f"rows with ids up to {int(row_ids.max())} were asked for, the plan lacks some of them.")
        shard, in_shard = np.divmod(row, layout.shard_rows[part])
        return layout.first_shard[part] + shard, in_shard

    def _empty(self, plan: Plan, count: int) -> _Block:
        return _Block(
            tokens=self._blocks.array((count, plan.seq_len + 1), self._manifest.dtype),
            length=np.empty(count, dtype=np.uint32),
            answer_bits=np.empty((count, -(-plan.seq_len // 8)), dtype=np.uint8) if plan.loss_masks else None,
            labels=np.full(count, NO_LABEL, dtype=np.int32) if plan.num_labels else None,
            checksums=np.empty(count, dtype=np.uint32),
            lows=np.empty(count, dtype=np.int64),
            start_counts=np.empty(count, dtype=np.int64),
        )

    def _gather(self, plan: Plan, shard: Shard, slots: _I64, rows: _I64, block: _Block) -> _Part:
        """Copy rows of one shard (`rows`, numbers in it) to places of the block (`slots`); int64 [m] each."""
        width = plan.seq_len + 1
        if shard.row_offsets is None:
            begin = rows * plan.seq_len
            length = np.minimum(shard.tokens.size - begin, width)
        else:
            begin = shard.row_offsets[rows].astype(np.int64)
            length = np.minimum(shard.row_offsets[rows + 1].astype(np.int64) - begin, width)
        gather(
            *(shard.tokens, shard.starts, begin, length, slots, self._manifest.eos_id),
            *(block.tokens, block.checksums, block.lows, block.start_counts),
        )
        block.length[slots] = length
        if block.answer_bits is not None:
            block.answer_bits[slots] = _label_bits(shard, begin, length, block.answer_bits.shape[1])
        if block.labels is not None and shard.labels is not None:
            block.labels[slots] = shard.labels[rows]
        return _Part(shard, slots, begin)


def _label_bits(shard: Shard, begin: _I64, length: _I64, num_bytes: int) -> npt.NDArray[np.uint8]:
    """Bit t of a row: whether its token t + 1 counts as a label; 0 behind its end. uint8 [m, num_bytes]."""
    bits = shard.answer_bits
    if bits is None:
        bits = np.full(-(-shard.tokens.size // 8), 0xFF, dtype=np.uint8)
    place = begin + 1
    at = (place >> 3)[:, None] + np.arange(num_bytes + 1)
    found = bits[np.minimum(at, bits.size - 1)].astype(np.uint16)
    shift = (place & 7).astype(np.uint16)[:, None]
    joined = ((found[:, :-1] | found[:, 1:] << np.uint16(8)) >> shift).astype(np.uint8)
    left = np.clip((length - 1)[:, None] - 8 * np.arange(num_bytes), 0, 8)
    kept: npt.NDArray[np.uint8] = joined & ((1 << left) - 1).astype(np.uint8)
    return kept
