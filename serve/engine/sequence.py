"""One completion while it is being made: its tokens, its settings, its state.

Owns plain values only: no tensors, no text, no clock.
"""

import enum
import random
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["FinishReason", "SamplingParams", "Sequence", "SequenceState"]

FinishReason = Literal["stop", "length"]


class SequenceState(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"

    @property
    def terminal(self) -> bool:
        """Whether nothing follows."""
        return self is SequenceState.FINISHED


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one completion are chosen, as the OpenAI completions API names it."""

    max_tokens: int = 16
    """New tokens at most; 0 only scores the prompt."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability."""
    top_k: int | None = None
    """Keep this many most likely tokens."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens generated before."""
    frequency_penalty: float = 0.0
    """Taken off once per earlier generation of the token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    seed: int | None = None
    """Makes sampling repeatable, whatever runs beside it."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; not part of it."""
    logprobs: int | None = None
    """Report this many most likely tokens per position (and the chosen one)."""
    prompt_logprobs: bool = False
    """Report the prompt's tokens too (`echo` with `logprobs`)."""
    ignore_eos: bool = False
    """Go on past the end token (for measurements)."""


@dataclass
class Sequence:
    """One completion in the engine."""

    request_id: str
    index: int
    """Which of the request's completions (0 … n-1, over all prompts)."""
    prompt: tuple[int, ...]
    """Prompt token ids; at least one."""
    params: SamplingParams
    state: SequenceState = SequenceState.WAITING
    output: list[int] = field(default_factory=list)
    """Generated token ids."""
    num_cached: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks, in order."""
    counts: dict[int, int] = field(default_factory=dict)
    """How often each token was generated; kept where penalties need it."""
    rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        """Seed this completion's own generator, so that neighbours do not matter."""
        if self.params.seed is not None:
            self.rng = random.Random(self.params.seed * 1_000_003 + self.index)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt) + len(self.output)

    @property
    def max_cached(self) -> int:
        """Cache slots it needs at most: the last generated token is never fed back."""
        return len(self.prompt) + max(self.params.max_tokens - 1, 0)

    @property
    def prefilled(self) -> bool:
        """Whether only the newest token is left to feed."""
        return self.num_cached >= len(self.prompt)

    def tokens_from(self, start: int, count: int) -> list[int]:
        """Token ids at positions [start, start + count)."""
        if start >= len(self.prompt):
            first = start - len(self.prompt)
            return self.output[first : first + count]
        head = list(self.prompt[start : start + count])
        return head + self.output[: count - len(head)]

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.output.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
