"""The engine without threads: requests in, passes, pieces of text out.

Owns the order of one pass (schedule, compute, choose, write down) and the text of each completion. Everything happens
in the caller's thread; `serve.engine.driver` runs it beside an event loop.
"""

from serve.engine.detokenizer import StopFinder, Vocabulary
from serve.engine.messages import Delta, EngineRequest, EngineStats, Sampled, TokenLogprob
from serve.engine.runner import PassLogits, Runner
from serve.engine.sampler import sample, token_logprobs
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import FinishReason, Sequence
from serve.errors import EngineFailedError

__all__ = ["Completion", "EngineCore"]


class Completion:
    """A sequence and its text."""

    def __init__(self, sequence: Sequence, vocabulary: Vocabulary) -> None:
        """Nothing generated yet."""
        self.sequence = sequence
        self.prompt_logprobs: list[TokenLogprob] = []
        self._decoder = vocabulary.decoder()
        self._stops = StopFinder(sequence.params.stop)

    def start(self) -> Delta:
        """The delta of a completion of no tokens."""
        return Delta(self.sequence.index, "", [], [], self.prompt_logprobs, "length")

    def take(self, sampled: Sampled, eos_ids: frozenset[int]) -> Delta:
        """Append a token; the delta says whether the completion ended with it."""
        sequence = self.sequence
        if not sampled.finite:
            error = EngineFailedError(
                f"the model's logits after {sequence.num_tokens} tokens are not finite. Serve another checkpoint."
            )
            return Delta(sequence.index, "", [], [], [], "stop", error)
        sequence.append(sampled.token)
        reason: FinishReason | None = None
        text = ""
        if sampled.token in eos_ids and not sequence.params.ignore_eos:
            reason = "stop"
        else:
            text = self._stops.feed(self._decoder.feed(sampled.token))
            if self._stops.found:
                reason = "stop"
            elif len(sequence.output) >= sequence.params.max_tokens:
                reason = "length"
        if reason is not None and not self._stops.found:
            text += self._stops.flush()
        reported, self.prompt_logprobs = self.prompt_logprobs, []
        return Delta(
            sequence.index,
            text,
            [sampled.token],
            [] if sampled.logprob is None else [sampled.logprob],
            reported,
            reason,
        )


class EngineCore:
    """Scheduler, runner and texts of one engine."""

    def __init__(self, runner: Runner, scheduler: Scheduler, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> None:
        """Join the parts; see `serve.weights.build_engine`."""
        self._runner = runner
        self._scheduler = scheduler
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._requests: dict[str, dict[int, Completion]] = {}
        self._passes = 0
        self._tokens_out = 0

    @property
    def has_work(self) -> bool:
        """Whether a pass would compute anything."""
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        """Load at this moment; safe to call from another thread (numbers may be a pass apart)."""
        scheduler = self._scheduler
        return EngineStats(
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.backlog_tokens,
            scheduler.pool.num_used,
            scheduler.pool.num_blocks,
            self._passes,
            self._tokens_out,
        )

    def add(self, request: EngineRequest) -> None:
        """Queue all completions of a request.

        Raises:
            PromptTooLongError: one could never fit the cache.
            OverloadedError: the queue is full.
        """
        assert request.request_id not in self._requests, "request ids are unique"
        sequences = [
            Sequence(request.request_id, place * request.num_completions + number, prompt, request.params)
            for place, prompt in enumerate(request.prompts)
            for number in range(request.num_completions)
        ]
        self._scheduler.add(sequences)
        self._requests[request.request_id] = {s.index: Completion(s, self._vocabulary) for s in sequences}

    def abort(self, request_id: str) -> None:
        """Drop what is left of a request and free its blocks; an unknown or ended one is fine."""
        for completion in self._requests.pop(request_id, {}).values():
            self._scheduler.finish(completion.sequence)

    def abort_all(self) -> list[str]:
        """Drop everything; returns the requests that were under way."""
        dropped = list(self._requests)
        for request_id in dropped:
            self.abort(request_id)
        return dropped

    def step(self) -> list[tuple[str, Delta]]:
        """Compute one pass; returns (request id, delta) of every completion that gained something."""
        chunks = self._scheduler.schedule()
        logits = self._runner.forward(chunks)
        self._scheduler.advance(chunks)
        self._passes += 1
        self._score_prompts(logits)
        deltas: list[tuple[str, Delta]] = []
        sequences = [chunk.sequence for chunk in logits.chunks]
        if not sequences:
            return deltas
        for sequence, sampled in zip(sequences, sample(logits.last_SV, sequences), strict=True):
            completion = self._requests[sequence.request_id][sequence.index]
            if sequence.params.max_tokens == 0:
                delta = completion.start()
            else:
                delta = completion.take(sampled, self._eos_ids)
                self._tokens_out += 1
            if delta.finish_reason is not None:
                self._end(sequence)
            deltas.append((sequence.request_id, delta))
        return deltas

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        completions = self._requests[sequence.request_id]
        del completions[sequence.index]
        if not completions:
            del self._requests[sequence.request_id]

    def _score_prompts(self, logits: PassLogits) -> None:
        for chunk, logits_TV in logits.prompt:
            following = chunk.sequence.prompt[chunk.start + 1 : chunk.end + 1]
            completion = self._requests[chunk.sequence.request_id][chunk.sequence.index]
            num_top = chunk.sequence.params.logprobs or 0
            if following:
                completion.prompt_logprobs += token_logprobs(logits_TV[: len(following)], list(following), num_top)
