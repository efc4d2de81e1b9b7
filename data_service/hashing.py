"""Checksums of rows and the hash of a step's samples.

Owns the byte layout that both ends must agree on; everything is little-endian.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from data_service.row_kernel import begin_checksums, finish_checksums

__all__ = ["row_crcs", "sample_hash"]

_PAIR = np.dtype([("row_id", "<u8"), ("row_crc", "<u4")])


def row_crcs(
    tokens: npt.NDArray[np.unsignedinteger],
    length: npt.NDArray[np.uint32],
    starts: npt.NDArray[np.uint32],
    start_offsets: npt.NDArray[np.int32],
    answer_bits: npt.NDArray[np.uint8] | None = None,
    labels: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.uint32]:
    """CRC-32C of each row (RFC 3720): length (uint32), tokens with padding, starts (uint32 each), bits and label.

    Args:
        tokens: [n, T+1] in the shard's dtype, uint16 or uint32.
        length: uint32 [n], tokens that are not padding.
        starts: uint32 [S], places of document starts, row after row.
        start_offsets: int32 [n+1]; row i has starts[start_offsets[i]:start_offsets[i+1]].
        answer_bits: uint8 [n, ceil(T/8)], where the dataset has them.
        labels: int32 [n], where the dataset has classes.

    Returns:
        uint32 [n].

    Raises:
        TypeError: for tokens of another dtype, whose bytes would hash differently.
        IndexError: for offsets that fall, or leave the starts.
    """
    if tokens.dtype not in (np.uint16, np.uint32):
        raise TypeError(f"a row's checksum is over uint16 or uint32 tokens, not {tokens.dtype}.")
    found = begin_checksums(tokens, length)
    finish_checksums(found, starts, start_offsets, answer_bits, labels)
    return found


def sample_hash(row_ids: npt.NDArray[np.uint64], row_crcs: npt.NDArray[np.uint32]) -> str:
    """BLAKE2b-64 of a step's samples, as 16 hexadecimal digits.

    Args:
        row_ids: uint64 [n], the step's rows in global order, masked rows left out.
        row_crcs: uint32 [n], of what was delivered for them.
    """
    if row_ids.shape != row_crcs.shape or row_ids.ndim != 1:
        raise ValueError(f"row_ids {row_ids.shape} and row_crcs {row_crcs.shape} must be of one length.")
    pairs = np.empty(row_ids.size, dtype=_PAIR)
    pairs["row_id"] = row_ids
    pairs["row_crc"] = row_crcs
    return hashlib.blake2b(pairs.tobytes(), digest_size=8).hexdigest()
