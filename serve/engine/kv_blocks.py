"""Which KV blocks are free, and whose the others are. No tensors.

A sequence's worst case is reserved when it is admitted, so that a running stream is never preempted or recomputed;
blocks themselves are taken as the sequence grows and go back when it ends.
"""

from serve.engine.sequence import Sequence

__all__ = ["BlockPool"]


class BlockPool:
    """A fixed number of equal blocks."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        """All blocks free.

        Args:
            num_blocks: blocks of the cache.
            block_tokens: tokens that one block holds.
        """
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._reserved: dict[int, int] = {}
        """id of sequence -> blocks promised to it in all."""
        self._promised = 0

    @property
    def num_free(self) -> int:
        """Blocks nobody holds (some may be promised)."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - len(self._free)

    @property
    def num_promised(self) -> int:
        """Blocks promised to admitted sequences, held or not."""
        return self._promised

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` need."""
        return -(-num_tokens // self.block_tokens)

    def fits_ever(self, sequence: Sequence) -> bool:
        """Whether the empty pool could hold it."""
        return self.blocks_for(sequence.max_cached) <= self.num_blocks

    def reserve(self, sequence: Sequence) -> bool:
        """Promise a sequence its worst case; False where that cannot be promised now."""
        needed = self.blocks_for(sequence.max_cached)
        if self._promised + needed > self.num_blocks:
            return False
        assert id(sequence) not in self._reserved, "reserved twice"
        self._reserved[id(sequence)] = needed
        self._promised += needed
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give a sequence the blocks for its first `num_tokens`, out of what was promised."""
        needed = self.blocks_for(num_tokens)
        assert needed <= self._reserved[id(sequence)], "more blocks than promised"
        while len(sequence.blocks) < needed:
            sequence.blocks.append(self._free.pop())

    def release(self, sequence: Sequence) -> None:
        """Take everything back; a sequence that holds nothing is fine."""
        self._promised -= self._reserved.pop(id(sequence), 0)
        self._free.extend(reversed(sequence.blocks))
        sequence.blocks.clear()
