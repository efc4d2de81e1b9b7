"""What crosses between the parts of serving, within a process and between replicas.

Plain values; imports no torch, so that the ingress stays small.
"""

from dataclasses import dataclass

from serve.engine.sequence import FinishReason, SamplingParams
from serve.errors import EngineFailedError

__all__ = ["Delta", "EngineRequest", "EngineStats", "Sampled", "TokenLogprob"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one position under the model, before temperature, penalties and biases."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the most likely tokens, best first."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token."""

    token: int
    finite: bool
    """False where the logits hold NaN or nothing but -inf: the sequence cannot go on."""
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class EngineRequest:
    """Prompts to complete, as they reach an engine."""

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each prompt; at least one token each."""
    num_completions: int
    """Completions of each prompt; their index is prompt * num_completions + i."""
    params: SamplingParams


@dataclass(slots=True)
class Delta:
    """What one completion gained since the last delta."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    """One per token where asked for, else empty."""
    prompt_logprobs: list[TokenLogprob]
    """Prompt tokens from the second on, in the first delta, where asked for."""
    finish_reason: FinishReason | None
    error: EngineFailedError | None = None

    def absorb(self, later: "Delta") -> None:
        """Add what came after."""
        self.text += later.text
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.error = later.error


@dataclass(frozen=True)
class EngineStats:
    """A moment's load."""

    num_running: int
    num_waiting: int
    backlog_tokens: int
    blocks_used: int
    blocks_total: int
    passes: int
    tokens_out: int
