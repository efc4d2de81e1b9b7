"""The paged key/value cache and the attention context of one pass.

Owns cache tensors and how the tokens of a pass attend to them. A pass is one packed row: first one token of each
decoding sequence, then the prompt chunks; linear layers run over all of it at once, attention per part. Decoding
sequences are gathered to one padded batch: of the ways measured on two cores (a loop over sequences, a loop without
copies, explicit matrix products) it was the fastest at 8 sequences of 64 to 250 tokens and within 15 us of it at one.

Shape letters: B decoding sequences, T tokens of the pass, L cached tokens, N query heads, K key/value heads, G = N / K,
H head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.engine.scheduler import Chunk
from trainer.model import TransformerConfig

__all__ = ["KVCache", "PagedContext"]


class KVCache:
    """Keys and values of all layers in blocks, [blocks, block_tokens, K, H] a layer."""

    def __init__(
        self, config: TransformerConfig, num_blocks: int, block_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Allocate. Zeros, because padding is read (and masked): a NaN there would spread."""
        self.block_tokens = block_tokens
        self.device = device
        self.dtype = dtype
        shape = (num_blocks, block_tokens, config.num_kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]


@dataclass(frozen=True)
class _Prefill:
    rows: slice
    """Its tokens in the pass."""
    first: bool
    """Whether nothing is cached before the chunk."""
    end: int
    blocks: Tensor
    mask_TL: Tensor | None


class PagedContext:
    """Attention of one pass; implements `trainer.attention.AttentionContext` for a packed row (batch size 1)."""

    def __init__(self, cache: KVCache, decodes: list[Chunk], prefills: list[Chunk]) -> None:
        """Lay out the pass: `decodes` in order, one token each, then `prefills` in order."""
        self._cache = cache
        device = cache.device
        size = cache.block_tokens
        slots = [
            chunk.sequence.blocks[position // size] * size + position % size
            for chunk in (*decodes, *prefills)
            for position in range(chunk.start, chunk.end)
        ]
        self._slots_T = torch.tensor(slots, device=device)
        self._num_decodes = len(decodes)
        self._mask_B11L: Tensor | None = None
        if decodes:
            ends = [chunk.end for chunk in decodes]
            num_blocks = -(-max(ends) // size)
            tables = [(c.sequence.blocks + [0] * num_blocks)[:num_blocks] for c in decodes]
            self._tables = torch.tensor(tables, device=device).flatten()
            self._padded = num_blocks * size
            if len(decodes) == 1:
                self._padded_end = ends[0]
            else:
                self._padded_end = self._padded
                beyond = torch.arange(self._padded, device=device) >= torch.tensor(ends, device=device)[:, None]
                mask = torch.zeros(beyond.shape, dtype=cache.dtype, device=device).masked_fill_(beyond, float("-inf"))
                self._mask_B11L = mask[:, None, None]
        self._prefills: list[_Prefill] = []
        row = len(decodes)
        for chunk in prefills:
            mask_TL = None
            if chunk.start:
                mask_TL = torch.ones(chunk.count, chunk.end, dtype=torch.bool, device=device).tril(chunk.start)
            blocks = torch.tensor(chunk.sequence.blocks[: -(-chunk.end // size)], device=device)
            self._prefills.append(_Prefill(slice(row, row + chunk.count), chunk.start == 0, chunk.end, blocks, mask_TL))
            row += chunk.count

    def attend(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Store the pass's keys and values, then attend; see `AttentionContext.attend`. The batch axis is 1 long."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._slots_T, k_BTKH[0])
        values.flatten(0, 1).index_copy_(0, self._slots_T, v_BTKH[0])
        parts = []
        if self._num_decodes:
            parts.append(self._decode(keys, values, q_BTNH[0, : self._num_decodes]))
        for part in self._prefills:
            parts.append(self._prefill(part, keys, values, q_BTNH, k_BTKH, v_BTKH))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _decode(self, keys: Tensor, values: Tensor, q_BNH: Tensor) -> Tensor:
        """One query a sequence. Heads that share keys become rows of one query matrix: no copies for GQA."""
        num, num_heads, width = q_BNH.shape
        num_kv = keys.shape[2]
        k_BKLH = keys.index_select(0, self._tables).view(num, self._padded, num_kv, width)[:, : self._padded_end]
        v_BKLH = values.index_select(0, self._tables).view(num, self._padded, num_kv, width)[:, : self._padded_end]
        out_BKGH = F.scaled_dot_product_attention(
            q_BNH.reshape(num, num_kv, num_heads // num_kv, width),
            k_BKLH.transpose(1, 2),
            v_BKLH.transpose(1, 2),
            attn_mask=self._mask_B11L,
        )
        return out_BKGH.reshape(1, num, num_heads, width)

    def _prefill(
        self, part: _Prefill, keys: Tensor, values: Tensor, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor
    ) -> Tensor:
        if part.first:
            k_BTKH, v_BTKH = k_BTKH[:, part.rows], v_BTKH[:, part.rows]
        else:
            k_BTKH = keys.index_select(0, part.blocks).flatten(0, 1)[None, : part.end]
            v_BTKH = values.index_select(0, part.blocks).flatten(0, 1)[None, : part.end]
        out_BNTH = F.scaled_dot_product_attention(
            q_BTNH[:, part.rows].transpose(1, 2),
            k_BTKH.transpose(1, 2),
            v_BTKH.transpose(1, 2),
            attn_mask=part.mask_TL,
            is_causal=part.first,
            enable_gqa=q_BTNH.shape[2] != k_BTKH.shape[2],
        )
        return out_BNTH.transpose(1, 2)
