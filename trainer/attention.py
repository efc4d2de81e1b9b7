"""Attention contexts: how queries of a block meet keys and values.

Owns the protocol that blocks call and the contexts of training: causal or bidirectional, over whole rows or within
documents. The paged key/value cache of serving implements the same protocol in `serve`. Knows nothing of weights,
rotary positions (they are applied before `attend`) or pipelines.

Shape letters: B rows, T tokens, N query heads, K key/value heads, H head width.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AttentionContext", "BidirectionalContext", "CausalContext", "DocumentContext", "within_documents"]


class AttentionContext(Protocol):
    """What a block needs to attend."""

    def attend(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Attend with the rotated queries of one layer.

        Args:
            layer: index of the block in the whole model, also inside a pipeline stage.
            q_BTNH: queries, rotated.
            k_BTKH: keys of the same tokens, rotated; N is a multiple of K.
            v_BTKH: values of the same tokens.

        Returns:
            The weighted values, [B, T, N, H], in the dtype of the queries.
        """
        ...


class CausalContext:
    """Each token sees itself and all earlier tokens of its row."""

    def attend(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Attend causally; see `AttentionContext.attend`."""
        return _attend(q_BTNH, k_BTKH, v_BTKH, None, causal=True)


class BidirectionalContext:
    """Each token sees all tokens of its row."""

    def attend(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Attend to everything; see `AttentionContext.attend`."""
        return _attend(q_BTNH, k_BTKH, v_BTKH, None, causal=False)


class DocumentContext:
    """Each token sees tokens of its own document only: itself and earlier ones, or, not causal, all of them.

    Padding that has a number of its own is seen by padding alone.
    """

    def __init__(self, doc_ids_BT: Tensor, causal: bool = True) -> None:
        """Prepare the mask.

        Args:
            doc_ids_BT: integers; tokens of a row with the same number belong to one document.
            causal: whether later tokens are hidden.
        """
        seen_BTT = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
        self._hidden_BTT = (seen_BTT.tril_() if causal else seen_BTT).logical_not_()
        self._bias_B1TT: Tensor | None = None

    def attend(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Attend within documents; see `AttentionContext.attend`."""
        if self._bias_B1TT is None or self._bias_B1TT.dtype != q_BTNH.dtype:
            # as an addend, which the blocks share: of a boolean mask torch 2.13 makes one for each call, and keeps it
            bias_BTT = torch.zeros_like(self._hidden_BTT, dtype=q_BTNH.dtype)
            self._bias_B1TT = bias_BTT.masked_fill_(self._hidden_BTT, -torch.inf)[:, None]
        return _attend(q_BTNH, k_BTKH, v_BTKH, self._bias_B1TT, causal=False)


def within_documents(doc_ids_BT: Tensor, causal: bool = True) -> AttentionContext:
    """The context that keeps attention inside documents; without a mask where each row lies in one document.

    Waits for the device, once for each micro-batch: what it computes must be known to choose the kernel.

    Args:
        doc_ids_BT: integers that do not fall along a row.
        causal: whether tokens are hidden from earlier ones.
    """
    if bool((doc_ids_BT[:, 0] == doc_ids_BT[:, -1]).all()):
        return CausalContext() if causal else BidirectionalContext()
    return DocumentContext(doc_ids_BT, causal)


def _attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1) through torch's fused kernels."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BTKH.transpose(1, 2),
        v_BTKH.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q_BTNH.shape[2] != k_BTKH.shape[2],
    )
    return out_BNTH.transpose(1, 2)
