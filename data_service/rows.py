"""Row ids → tokens, for the row kind `stream`: windows of seq_len + 1 tokens, seq_len apart, over the whole split.

Row r holds tokens r·T … r·T + T of the concatenated documents; where a row starts follows from its id, for any T, so
nothing about rows is stored. The last row of a split is padded with the end token and says how many labels count.

Owns gathering. Refuses to know batches, ranks or the network.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from data_service.cache import ShardCache
from data_service.hashing import row_crcs
from data_service.plan import Plan
from data_service.schema import RowBlock
from data_service.shards import DatasetManifest, ShardEntry

__all__ = ["ShardRows", "valid_tokens_of"]


def valid_tokens_of(plan: Plan, row_ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """How many labels of each row count: seq_len, fewer in the last row. uint32 [n]."""
    left = (plan.num_tokens - 1) - row_ids.astype(np.int64) * plan.seq_len
    return np.clip(left, 0, plan.seq_len).astype(np.uint32)


class ShardRows:
    """Reads rows of one dataset. A data worker takes another one of the same shape, which is how tests make it lie."""

    def __init__(self, manifest: DatasetManifest, index: Mapping[str, Sequence[ShardEntry]], cache: ShardCache) -> None:
        self._manifest = manifest
        self._index = index
        self._cache = cache

    def read(self, plan: Plan, row_ids: npt.NDArray[np.uint64]) -> RowBlock:
        """The rows with these ids.

        Args:
            plan: of this dataset.
            row_ids: uint64 [n], each below plan.num_rows.

        Raises:
            ShardCorruptError: when a shard that they lie in is damaged.
        """
        width = plan.seq_len + 1
        info = self._manifest.splits[plan.split]
        begins = row_ids.astype(np.int64) * plan.seq_len
        ends = np.minimum(begins + width, info.num_tokens)
        first, last = begins // info.shard_tokens, (ends - 1) // info.shard_tokens
        numbers = sorted({n for a, b in zip(first.tolist(), last.tolist(), strict=True) for n in range(a, b + 1)})
        shards = self._cache.get([self._index[plan.split][number] for number in numbers])
        tokens = np.full((row_ids.size, width), self._manifest.eos_id, dtype=self._manifest.dtype)
        starts = np.zeros((row_ids.size, width), dtype=np.bool_)
        for row, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
            place = begin
            while place < end:
                number, offset = divmod(place, info.shard_tokens)
                count = min(end - place, info.shard_tokens - offset)
                target = slice(place - begin, place - begin + count)
                tokens[row, target] = shards[number].tokens[offset : offset + count]
                starts[row, target] = shards[number].starts[offset : offset + count]
                place += count
        valid = valid_tokens_of(plan, row_ids)
        return RowBlock(
            row_id=row_ids,
            tokens=tokens,
            starts=np.packbits(starts, axis=1, bitorder="little"),
            valid_tokens=valid,
            row_crc=row_crcs(tokens, valid),
        )
