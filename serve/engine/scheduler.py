"""Which tokens the next forward pass computes. No tensors, no clock.

Continuous batching with chunked prefill (Agrawal et al. 2023, "SARATHI"): every pass decodes one token of each running
sequence and fills what is left of a token budget with prompts, first come first served. A new request therefore joins
at the next pass, and a long prompt does not stall running streams for longer than one chunk.
"""

from collections import deque
from dataclasses import dataclass

from serve.engine.kv_blocks import BlockPool
from serve.engine.sequence import Sequence, SequenceState
from serve.errors import OverloadedError, PromptTooLongError

__all__ = ["Chunk", "Scheduler"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence in a pass."""

    sequence: Sequence
    start: int
    """Position of the first token, which is also how many are cached before it."""
    count: int

    @property
    def end(self) -> int:
        """Tokens cached after the pass."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether the pass reaches the newest token, so that its logits choose the next."""
        return self.end == self.sequence.num_tokens


class Scheduler:
    """Waiting and running sequences of one engine."""

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_queue: int, budget_tokens: int) -> None:
        """Nothing waits.

        Args:
            pool: KV blocks.
            max_num_seqs: sequences that run together.
            max_queue: sequences that wait at most.
            budget_tokens: tokens of one pass; at least `max_num_seqs`.
        """
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_queue = max_queue
        self.budget_tokens = max(budget_tokens, max_num_seqs + 1)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a pass would compute anything."""
        return bool(self.waiting or self.running)

    @property
    def backlog_tokens(self) -> int:
        """Prompt tokens not yet computed and new tokens not yet made, at most."""
        every = (*self.waiting, *self.running)
        return sum(len(s.prompt) + s.params.max_tokens - max(s.num_cached, len(s.output)) for s in every)

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request: all or none.

        Raises:
            PromptTooLongError: one of them could never fit the cache.
            OverloadedError: the queue is full.
        """
        for sequence in sequences:
            if not self.pool.fits_ever(sequence):
                raise PromptTooLongError(
                    f"the prompt's {len(sequence.prompt)} tokens with max_tokens={sequence.params.max_tokens} need "
                    f"more than the KV cache's {self.pool.num_blocks * self.pool.block_tokens} tokens. "
                    "Shorten the prompt, lower max_tokens, or raise serve.kv_cache_tokens.",
                    "max_tokens",
                )
        places = self.max_num_seqs - len(self.running)
        if len(self.waiting) + len(sequences) > self.max_queue + max(places, 0):
            raise OverloadedError(
                f"{len(self.waiting)} completions wait already and serve.max_queue={self.max_queue}. Try again later.",
                retry_after_s=1.0,
            )
        self.waiting.extend(sequences)

    def schedule(self) -> list[Chunk]:
        """The next pass: all running sequences first, in their order, then newly admitted ones.

        The pool's blocks for every chunk are taken; call `advance` after the pass.
        """
        chunks = []
        budget = self.budget_tokens - sum(1 for s in self.running if s.prefilled)
        for sequence in self.running:
            count = 1 if sequence.prefilled else min(sequence.num_tokens - sequence.num_cached, budget)
            if not sequence.prefilled:
                budget -= count
            if count:
                chunks.append(self._chunk(sequence, count))
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self.pool.reserve(sequence):
                break
            self.waiting.popleft()
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
            count = min(len(sequence.prompt), budget)
            budget -= count
            chunks.append(self._chunk(sequence, count))
        return chunks

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        self.pool.grow(sequence, sequence.num_cached + count)
        return Chunk(sequence, sequence.num_cached, count)

    def advance(self, chunks: list[Chunk]) -> None:
        """Note that the keys and values of a pass are in the cache."""
        for chunk in chunks:
            chunk.sequence.num_cached = chunk.end

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting, and free its blocks; a second call does nothing."""
        if sequence.state.terminal:
            return
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        self.pool.release(sequence)
