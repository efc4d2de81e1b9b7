"""From an engine's deltas to the choices of an answer.

Owns text, echo and log-probability reports of one request. Knows nothing of HTTP or Ray.
"""

from dataclasses import dataclass, field

from serve.api.completions import Choice, CompletionRequest, LogprobsReport, Usage
from serve.engine.detokenizer import Decoder, Vocabulary
from serve.engine.messages import Delta, TokenLogprob

__all__ = ["AnswerWriter"]


@dataclass
class _Progress:
    decoder: Decoder
    length: int = 0
    """Characters of the tokens reported so far."""
    begun: bool = False
    num_tokens: int = 0


@dataclass
class AnswerWriter:
    """Choices of one request, piece by piece or as a whole."""

    request: CompletionRequest
    prompts: list[list[int]]
    vocabulary: Vocabulary
    _progress: dict[int, _Progress] = field(default_factory=dict)

    def chunks(self, deltas: list[Delta]) -> list[Choice]:
        """What a stream sends for these deltas; nothing for one that shows nothing yet."""
        choices = (self._choice(delta) for delta in deltas)
        return [choice for choice in choices if choice.text or choice.finish_reason or choice.logprobs is not None]

    def whole(self, deltas: list[Delta]) -> list[Choice]:
        """All choices of a finished request, in the order of their index."""
        merged: dict[int, Delta] = {}
        for delta in deltas:
            if delta.index in merged:
                merged[delta.index].absorb(delta)
            else:
                merged[delta.index] = delta
        return [self._choice(merged[index]) for index in sorted(merged)]

    def usage(self) -> Usage:
        """Tokens of all prompts and of the choices written so far."""
        prompt = sum(len(ids) for ids in self.prompts)
        completion = sum(progress.num_tokens for progress in self._progress.values())
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _choice(self, delta: Delta) -> Choice:
        progress = self._progress.get(delta.index)
        if progress is None:
            progress = self._progress[delta.index] = _Progress(self.vocabulary.decoder())
        progress.num_tokens += len(delta.tokens)
        report = LogprobsReport() if self.request.logprobs is not None else None
        text = delta.text
        if not progress.begun:
            progress.begun = True
            if self.request.echo:
                place = delta.index // self.request.num_completions
                text = self._prompt_text(place) + text
                if report is not None:
                    self._report_prompt(report, progress, self.prompts[place], delta.prompt_logprobs)
        if report is not None:
            for entry in delta.logprobs:
                self._report(report, progress, entry.token, entry)
        return Choice(index=delta.index, text=text, logprobs=report, finish_reason=delta.finish_reason)

    def _prompt_text(self, place: int) -> str:
        given = self.request.prompts[place]
        if isinstance(given, str):
            return given
        return str(self.vocabulary.tokenizer.decode(given, skip_special_tokens=True))

    def _report_prompt(
        self, report: LogprobsReport, progress: _Progress, ids: list[int], logprobs: list[TokenLogprob]
    ) -> None:
        self._report(report, progress, ids[0], None)
        for entry in logprobs:
            self._report(report, progress, entry.token, entry)

    def _report(self, report: LogprobsReport, progress: _Progress, token: int, entry: TokenLogprob | None) -> None:
        show = self.vocabulary.token_text
        report.tokens.append(show(token))
        report.text_offset.append(progress.length)
        report.token_logprobs.append(None if entry is None else entry.logprob)
        top = None
        if entry is not None:
            top = {show(other): logprob for other, logprob in entry.top}
            top.setdefault(show(token), entry.logprob)
        report.top_logprobs.append(top)
        progress.length += len(progress.decoder.feed(token))
