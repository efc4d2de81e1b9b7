"""Checksums of rows and the hash of a step's samples.

Owns the byte layout that both ends must agree on. Everything is little-endian whatever the machine.
"""

import hashlib
import zlib

import numpy as np
import numpy.typing as npt

__all__ = ["row_crc", "row_crcs", "sample_hash"]

_PAIR = np.dtype([("row_id", "<u8"), ("row_crc", "<u4")])


def row_crc(tokens: npt.NDArray[np.unsignedinteger], valid_tokens: int) -> int:
    """CRC-32 of one row as it lies in the shards.

    Args:
        tokens: [T+1] in the shard's dtype (uint16 or uint32), padding included.
        valid_tokens: labels that count; hashed behind the tokens as a uint32.

    Raises:
        TypeError: for another dtype, whose bytes would hash differently.
    """
    if tokens.dtype not in (np.uint16, np.uint32):
        raise TypeError(f"a row's checksum is over uint16 or uint32 tokens, not {tokens.dtype}.")
    little = np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<"))
    return zlib.crc32(int(valid_tokens).to_bytes(4, "little"), zlib.crc32(little.data))


def row_crcs(tokens: npt.NDArray[np.unsignedinteger], valid_tokens: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """`row_crc` of each row.

    Args:
        tokens: [B, T+1] in the shard's dtype.
        valid_tokens: uint32 [B].

    Returns:
        uint32 [B].
    """
    return np.array(
        [row_crc(row, int(valid)) for row, valid in zip(tokens, valid_tokens, strict=True)], dtype=np.uint32
    )


def sample_hash(row_ids: npt.NDArray[np.uint64], row_crcs: npt.NDArray[np.uint32]) -> str:
    """BLAKE2b-64 of a step's samples, as 16 hexadecimal digits.

    Args:
        row_ids: uint64 [n], the step's rows in global order, masked rows left out.
        row_crcs: uint32 [n], of the tokens that were delivered for them.
    """
    if row_ids.shape != row_crcs.shape or row_ids.ndim != 1:
        raise ValueError(f"row_ids {row_ids.shape} and row_crcs {row_crcs.shape} must be of one length.")
    pairs = np.empty(row_ids.size, dtype=_PAIR)
    pairs["row_id"] = row_ids
    pairs["row_crc"] = row_crcs
    return hashlib.blake2b(pairs.tobytes(), digest_size=8).hexdigest()
