"""From logits to the next token of each sequence.

Owns penalties, biases, temperature, top-k, top-p and log-probabilities. Each sequence draws from its own generator, so
that what runs beside it does not matter. Refuses to know of caches or text.

Shape letters: S sequences that need a token, V vocabulary.
"""

import torch
from torch import Tensor

from serve.engine.messages import Sampled, TokenLogprob
from serve.engine.sequence import Sequence

__all__ = ["GREEDY_BELOW", "sample", "token_logprobs"]

GREEDY_BELOW = 1e-5
"""Temperatures below this take the most likely token: dividing by them leaves fp32."""


def sample(logits_SV: Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """Choose the next token of each sequence.

    Args:
        logits_SV: one row per sequence, any float dtype; not modified.
        sequences: in the order of the rows.
    """
    logits_SV = logits_SV.float()
    adjusted_SV = _adjust(logits_SV, sequences)
    best_S, tokens_S = adjusted_SV.max(dim=-1)
    finite = torch.isfinite(best_S).tolist()
    tokens = tokens_S.tolist()
    drawn = [row for row, s in enumerate(sequences) if s.params.temperature >= GREEDY_BELOW and finite[row]]
    if drawn:
        chosen = _draw(
            adjusted_SV if len(drawn) == len(sequences) else adjusted_SV[drawn], [sequences[r] for r in drawn]
        )
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    reported: dict[int, TokenLogprob] = {}
    for row, sequence in enumerate(sequences):
        if sequence.params.logprobs is not None and finite[row]:
            reported[row] = token_logprobs(logits_SV[row : row + 1], [tokens[row]], sequence.params.logprobs)[0]
    return [Sampled(tokens[row], finite[row], reported.get(row)) for row in range(len(sequences))]


def token_logprobs(logits_TV: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens, one per row of logits, and of the `num_top` most likely ones."""
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    ids = torch.tensor(tokens, device=logits_TV.device)
    own = logprobs_TV.gather(1, ids[:, None])[:, 0].tolist()
    if num_top == 0:
        return [TokenLogprob(token, logprob, ()) for token, logprob in zip(tokens, own, strict=True)]
    values, indices = logprobs_TV.topk(min(num_top, logits_TV.shape[1]), dim=-1)
    return [
        TokenLogprob(token, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(tokens, own, indices.tolist(), values.tolist(), strict=True)
    ]


def _adjust(logits_SV: Tensor, sequences: list[Sequence]) -> Tensor:
    """Penalties and biases as in OpenAI's API reference: mu[j] -= c[j] * frequency + (c[j] > 0) * presence."""
    touched = [
        row
        for row, s in enumerate(sequences)
        if s.params.logit_bias or (s.counts and (s.params.presence_penalty or s.params.frequency_penalty))
    ]
    if not touched:
        return logits_SV
    adjusted_SV = logits_SV.clone()
    for row in touched:
        sequence = sequences[row]
        params = sequence.params
        if sequence.counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(sequence.counts), device=logits_SV.device)
            counts = torch.tensor(list(sequence.counts.values()), dtype=torch.float32, device=logits_SV.device)
            adjusted_SV[row, ids] -= counts * params.frequency_penalty + params.presence_penalty
        for token, bias in params.logit_bias:
            adjusted_SV[row, token] += bias
    return adjusted_SV


def _draw(logits_RV: Tensor, sequences: list[Sequence]) -> list[int]:
    """Inverse-transform sampling from the sorted, truncated distribution, one uniform number a sequence."""
    device = logits_RV.device
    vocab_size = logits_RV.shape[1]
    temperature = torch.tensor([s.params.temperature for s in sequences], device=device)
    top_p = torch.tensor([s.params.top_p for s in sequences], device=device)
    top_k = torch.tensor([s.params.top_k or vocab_size for s in sequences], device=device)
    uniform = torch.tensor([s.rng.random() for s in sequences], device=device)
    sorted_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    probs_RV = torch.softmax(sorted_RV / temperature[:, None], dim=-1)
    before_RV = probs_RV.cumsum(dim=-1) - probs_RV
    ranks_V = torch.arange(vocab_size, device=device)
    keep_RV = (before_RV < top_p[:, None]) & (ranks_V < top_k[:, None])
    keep_RV[:, 0] = True
    mass_RV = (probs_RV * keep_RV).cumsum(dim=-1)
    target_R = uniform * mass_RV[:, -1]
    rank_R = torch.searchsorted(mass_RV, target_R[:, None], right=True)[:, 0]
    last_R = keep_RV.sum(dim=-1) - 1
    chosen: list[int] = ids_RV.gather(1, torch.minimum(rank_R, last_R)[:, None])[:, 0].tolist()
    return chosen
