"""Device work of one pass: tokens in, logits out.

Owns the model and its cache. Knows nothing of requests, sampling or text. The output matrix is applied only where
logits are wanted: the last token of each sequence, and prompt tokens whose log-probabilities were asked for.

Shape letters: T tokens of the pass, S rows of logits, D model width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.packed_linear import pack_linears
from serve.engine.paged import KVCache, PagedContext
from serve.engine.scheduler import Chunk
from trainer.model import Transformer

__all__ = ["PassLogits", "Runner"]


@dataclass(frozen=True)
class PassLogits:
    """What a pass gives."""

    last_SV: Tensor
    """Logits that choose the next token, one row per entry of `chunks`."""
    chunks: list[Chunk]
    """Chunks that reached their sequence's newest token."""
    prompt: list[tuple[Chunk, Tensor]]
    """Chunks of prompts whose tokens are scored, with logits [chunk.count, V]."""


class Runner:
    """One model on one device."""

    def __init__(self, model: Transformer, num_blocks: int, block_tokens: int) -> None:
        """Take the model over (device and dtype stay, matrices are packed on CPUs) and allocate its cache."""
        self.model = model.eval().requires_grad_(False)
        weight = model.embedding.weight
        self.device = weight.device
        self._packed_head = pack_linears(model)
        self.cache = KVCache(model.config, num_blocks, block_tokens, weight.device, weight.dtype)

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> PassLogits:
        """Compute one pass and fill the cache."""
        decodes = [c for c in chunks if c.count == 1 and c.start]
        prefills = [c for c in chunks if not (c.count == 1 and c.start)]
        ordered = decodes + prefills
        tokens = [token for c in ordered for token in c.sequence.tokens_from(c.start, c.count)]
        positions = [position for c in ordered for position in range(c.start, c.end)]
        context = PagedContext(self.cache, decodes, prefills)
        hidden_BTD = self.model.hidden(
            torch.tensor([tokens], device=self.device), torch.tensor([positions], device=self.device), context
        )
        rows: list[int] = []
        last: list[Chunk] = []
        scored: list[tuple[Chunk, slice]] = []
        end = 0
        for chunk in ordered:
            end += chunk.count
            if chunk.samples:
                rows.append(end - 1)
                last.append(chunk)
        end = 0
        for chunk in ordered:
            end += chunk.count
            if chunk.sequence.params.prompt_logprobs and chunk.start < len(chunk.sequence.prompt):
                scored.append((chunk, slice(len(rows), len(rows) + chunk.count)))
                rows.extend(range(end - chunk.count, end))
        wanted_BSD = hidden_BTD if rows == list(range(end)) else hidden_BTD[:, rows]
        logits_SV = self._logits(wanted_BSD)[0]
        return PassLogits(logits_SV[: len(last)], last, [(chunk, logits_SV[part]) for chunk, part in scored])

    def _logits(self, hidden_BSD: Tensor) -> Tensor:
        if self._packed_head is None:
            return self.model.logits(hidden_BSD)
        logits_BSV: Tensor = self._packed_head(self.model.head.normed(hidden_BSD))
        return logits_BSV
