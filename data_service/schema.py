"""The batch that travels: its Arrow schema on the wire, and the slice of a global batch that a rank receives.

Owns column names, dtypes and the schema version. On the wire a row is tokens in the shard's own dtype, a bitmap of
document starts, its id, its count of valid labels and a checksum; masked slots are not sent.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    import torch

__all__ = ["NO_ROW", "SCHEMA_VERSION", "BatchSlice", "RowBlock", "block_to_batch", "wire_schema"]

SCHEMA_VERSION = 1

NO_ROW = np.uint64(2**64 - 1)
"""The row id of a masked slot."""


@dataclass(frozen=True)
class BatchSlice:
    """Some slots of one global batch; B slots, rows of T + 1 tokens."""

    index: int
    """Number of the global batch, from 0."""
    slots: tuple[int, int]
    """First slot and the one behind the last, in the global batch; B = last - first."""
    tokens: npt.NDArray[np.int32]
    """[B, T+1]; inputs are [:, :T], labels [:, 1:]. Masked rows hold zeros."""
    doc_starts: npt.NDArray[np.bool_]
    """[B, T+1]: a document begins at this token."""
    row_id: npt.NDArray[np.uint64]
    """[B]; NO_ROW where a slot is masked."""
    valid_tokens: npt.NDArray[np.uint32]
    """[B]: labels 0 … valid-1 of a row count; 0 where a slot is masked."""
    row_crc: npt.NDArray[np.uint32]
    """[B], computed from the tokens that arrived; 0 where a slot is masked."""

    @cached_property
    def doc_ids(self) -> npt.NDArray[np.int32]:
        """[B, T]: which document of its row an input token belongs to, counted from 0 (a row may begin inside one)."""
        return np.cumsum(self.doc_starts[:, :-1], axis=1, dtype=np.int32)

    @property
    def rows(self) -> npt.NDArray[np.bool_]:
        """[B]: which slots hold a row; the others are masked."""
        present: npt.NDArray[np.bool_] = self.row_id != NO_ROW
        return present

    def torch_tokens(self) -> "torch.Tensor":
        """The tokens as torch.int64 [B, T+1]; torch is imported here."""
        import torch

        return torch.from_numpy(self.tokens).to(torch.int64)


@dataclass(frozen=True)
class RowBlock:
    """Rows as they were gathered from shards, n of them."""

    row_id: npt.NDArray[np.uint64]
    """[n]"""
    tokens: npt.NDArray[np.unsignedinteger]
    """[n, T+1] in the shard's dtype, padded with the end token."""
    starts: npt.NDArray[np.uint8]
    """[n, ceil((T+1)/8)] bitmap of document starts, least significant bit first."""
    valid_tokens: npt.NDArray[np.uint32]
    """[n]"""
    row_crc: npt.NDArray[np.uint32]
    """[n]"""


def wire_schema(seq_len: int, token_dtype: np.dtype[np.unsignedinteger]) -> pa.Schema:
    """The schema of a stream of rows."""
    width = seq_len + 1
    return pa.schema(
        [
            pa.field("batch", pa.uint64(), nullable=False),
            pa.field("slot", pa.uint32(), nullable=False),
            pa.field("row_id", pa.uint64(), nullable=False),
            pa.field("valid_tokens", pa.uint32(), nullable=False),
            pa.field("row_crc", pa.uint32(), nullable=False),
            pa.field("tokens", pa.list_(pa.field("token", pa.from_numpy_dtype(token_dtype), nullable=False), width)),
            pa.field("doc_starts", pa.binary(-(-width // 8)), nullable=False),
        ],
        metadata={"stormjib.schema": str(SCHEMA_VERSION)},
    )


def _plain(values: npt.NDArray[np.unsignedinteger], kind: pa.DataType) -> pa.Array:
    """A numpy array as an Arrow array over the same memory (`pa.array` would import pandas where it is installed)."""
    return pa.Array.from_buffers(kind, values.size, [None, pa.py_buffer(np.ascontiguousarray(values))])


def block_to_batch(
    block: RowBlock, batch: npt.NDArray[np.uint64], slot: npt.NDArray[np.uint32], schema: pa.Schema
) -> pa.RecordBatch:
    """A record batch over the memory of a block.

    Args:
        block: n rows.
        batch: uint64 [n], the global batch of each row.
        slot: uint32 [n], its slot in that batch.
        schema: of `wire_schema`.
    """
    tokens = schema.field("tokens").type
    starts = schema.field("doc_starts").type
    count = block.row_id.size
    columns = [
        _plain(batch, pa.uint64()),
        _plain(slot, pa.uint32()),
        _plain(block.row_id, pa.uint64()),
        _plain(block.valid_tokens, pa.uint32()),
        _plain(block.row_crc, pa.uint32()),
        pa.Array.from_buffers(tokens, count, [None], children=[_plain(block.tokens.reshape(-1), tokens.value_type)]),
        pa.Array.from_buffers(starts, count, [None, pa.py_buffer(np.ascontiguousarray(block.starts))]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
