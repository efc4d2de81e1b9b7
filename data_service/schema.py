"""The batch that travels: its Arrow schema on the wire, and the slice of a global batch that a rank receives.

Owns column names, dtypes and the schema version. On the wire a row is tokens in the shard's own dtype, the offsets of
document starts, its id, its length and a checksum; masks and labels only where the dataset has them. Masked slots are
not sent.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_service.plan import Plan

__all__ = ["NO_LABEL", "NO_ROW", "SCHEMA_VERSION", "BatchSlice", "RowBlock", "block_to_batch", "wire_schema"]

SCHEMA_VERSION = 3

NO_ROW = np.uint64(2**64 - 1)
"""The row id of a masked slot."""
NO_LABEL = np.int32(-1)
"""The label of a masked slot, and of a row whose source has none."""


@dataclass(frozen=True)
class BatchSlice:
    """Some slots of one global batch; B slots, rows of T + 1 tokens."""

    index: int
    """The step index (0-based) that consumes the batch."""
    slots: tuple[int, int]
    """First slot and the one behind the last, in the global batch; B = last - first."""
    tokens: npt.NDArray[np.unsignedinteger]
    """[B, T+1], uint16 or uint32; inputs are [:, :T], labels [:, 1:]. Masked rows hold zeros."""
    length: npt.NDArray[np.uint32]
    """[B]: tokens of a row that are not padding; 0 where a slot is masked."""
    start_rows: npt.NDArray[np.uint32]
    """[S]: the slot (counted in this slice) of each document start, ascending."""
    start_places: npt.NDArray[np.uint32]
    """[S]: the place in 0 … T of each document start."""
    isolate_documents: bool
    """Whether the label that is a document's first token is masked."""
    answer_bits: npt.NDArray[np.uint8] | None
    """[B, ceil(T/8)] bitmap, least significant bit first, of labels that count (chats); None where all do."""
    labels: npt.NDArray[np.int32] | None
    """[B] class numbers, NO_LABEL where there is none; None where the dataset has no classes."""
    row_id: npt.NDArray[np.uint64]
    """[B]; NO_ROW where a slot is masked."""
    row_crc: npt.NDArray[np.uint32]
    """[B], computed from what arrived; 0 where a slot is masked."""

    @cached_property
    def doc_starts(self) -> npt.NDArray[np.bool_]:
        """[B, T+1]: a document begins at this token."""
        starts = np.zeros(self.tokens.shape, dtype=np.bool_)
        starts[self.start_rows, self.start_places] = True
        return starts

    @cached_property
    def doc_ids(self) -> npt.NDArray[np.int32]:
        """[B, T]: which document of its row an input token belongs to, counted from 0 (a row may begin inside one)."""
        starts = self.doc_starts[:, :-1]
        return np.cumsum(starts, axis=1, dtype=np.int32) - starts[:, :1]

    @cached_property
    def positions(self) -> npt.NDArray[np.int32]:
        """[B, T]: distance of an input token from its document's start, or from the row's where it began before it."""
        places = np.broadcast_to(np.arange(self.tokens.shape[1] - 1, dtype=np.int32), self.doc_ids.shape)
        begins = np.maximum.accumulate(np.where(self.doc_starts[:, :-1], places, 0), axis=1)
        return places - begins

    @cached_property
    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """[B, T]: which labels count. Label t is token t + 1."""
        width = self.tokens.shape[1]
        mask = np.arange(1, width, dtype=np.uint32) < self.length[:, None]
        if self.isolate_documents:
            mask &= ~self.doc_starts[:, 1:]
        if self.answer_bits is not None:
            mask &= np.unpackbits(self.answer_bits, axis=1, count=width - 1, bitorder="little").view(np.bool_)
        return mask

    @cached_property
    def valid_tokens(self) -> npt.NDArray[np.uint32]:
        """[B]: labels of a row that count; 0 where a slot is masked."""
        if not self.isolate_documents and self.answer_bits is None:
            return np.maximum(self.length, np.uint32(1)) - np.uint32(1)
        counts: npt.NDArray[np.uint32] = self.loss_mask.sum(axis=1, dtype=np.uint32)
        return counts

    @property
    def rows(self) -> npt.NDArray[np.bool_]:
        """[B]: which slots hold a row; the others are masked."""
        present: npt.NDArray[np.bool_] = self.row_id != NO_ROW
        return present


@dataclass(frozen=True)
class RowBlock:
    """Rows as they were gathered from shards, n of them."""

    row_id: npt.NDArray[np.uint64]
    """[n]"""
    tokens: npt.NDArray[np.unsignedinteger]
    """[n, T+1] in the shard's dtype, padded with the end token; contiguous."""
    length: npt.NDArray[np.uint32]
    """[n]: tokens that are not padding."""
    starts: npt.NDArray[np.uint32]
    """[S]: places of document starts, row after row."""
    start_offsets: npt.NDArray[np.int32]
    """[n+1]: row i has starts[start_offsets[i]:start_offsets[i+1]]."""
    answer_bits: npt.NDArray[np.uint8] | None
    """[n, ceil(T/8)], or None; see BatchSlice."""
    labels: npt.NDArray[np.int32] | None
    """[n], or None; see BatchSlice."""
    row_crc: npt.NDArray[np.uint32]
    """[n], of `hashing.row_crcs`."""


def wire_schema(plan: Plan, token_dtype: np.dtype[np.unsignedinteger]) -> pa.Schema:
    """The schema of a stream of rows: batch, slot, row_id, length, row_crc, tokens, starts[, answer_bits][, label]."""
    width = plan.seq_len + 1
    token = pa.field("token", pa.from_numpy_dtype(token_dtype), nullable=False)
    fields = [
        pa.field("batch", pa.uint64(), nullable=False),
        pa.field("slot", pa.uint32(), nullable=False),
        pa.field("row_id", pa.uint64(), nullable=False),
        pa.field("length", pa.uint32(), nullable=False),
        pa.field("row_crc", pa.uint32(), nullable=False),
        pa.field("tokens", pa.list_(token, width), nullable=False),
        pa.field("starts", pa.list_(pa.field("place", pa.uint32(), nullable=False)), nullable=False),
    ]
    if plan.loss_masks:
        fields.append(pa.field("answer_bits", pa.binary(-(-plan.seq_len // 8)), nullable=False))
    if plan.num_labels:
        fields.append(pa.field("label", pa.int32(), nullable=False))
    return pa.schema(fields, metadata={"stormjib.schema": str(SCHEMA_VERSION)})


def _plain(values: npt.NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    """A numpy array as an Arrow array over the same memory (`pa.array` would import pandas where it is installed)."""
    return pa.Array.from_buffers(kind, values.size, [None, pa.py_buffer(np.ascontiguousarray(values))])


def block_to_batch(
    block: RowBlock, batch: npt.NDArray[np.uint64], slot: npt.NDArray[np.uint32], schema: pa.Schema
) -> pa.RecordBatch:
    """A record batch over the memory of a block.

    Args:
        block: n rows.
        batch: uint64 [n], the step index of each row's batch.
        slot: uint32 [n], its slot in that batch.
        schema: of `wire_schema`.
    """
    tokens, starts = schema.field("tokens").type, schema.field("starts").type
    count = block.row_id.size
    columns = [
        _plain(batch, pa.uint64()),
        _plain(slot, pa.uint32()),
        _plain(block.row_id, pa.uint64()),
        _plain(block.length, pa.uint32()),
        _plain(block.row_crc, pa.uint32()),
        pa.Array.from_buffers(tokens, count, [None], children=[_plain(block.tokens.reshape(-1), tokens.value_type)]),
        pa.Array.from_buffers(
            starts, count, [None, pa.py_buffer(block.start_offsets)], children=[_plain(block.starts, pa.uint32())]
        ),
    ]
    if block.answer_bits is not None:
        kind = schema.field("answer_bits").type
        columns.append(pa.Array.from_buffers(kind, count, [None, pa.py_buffer(block.answer_bits)]))
    if block.labels is not None:
        columns.append(_plain(block.labels, pa.int32()))
    return pa.RecordBatch.from_arrays(columns, schema=schema)
