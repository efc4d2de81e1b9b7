"""Cross-entropy over a large vocabulary without its logits.

Owns the loss of a language model's `Projection`, taken in chunks of tokens: neither the forward nor the backward pass
holds more than one chunk's logits. Which tokens count, and how much, is said by the task.

Shape letters: B rows, T tokens, S = B · T tokens of a micro-batch, N tokens of a chunk, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.layers import Projection

__all__ = ["IGNORED", "default_chunk_tokens", "projected_cross_entropy"]

IGNORED = -100
"""Label of a token that has no loss."""

_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Logits of a chunk: 16 MiB in fp32 on a CPU, near its caches; on a GPU enough to fill it."""


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens of a chunk, so that its logits have a size that suits the device; a multiple of 64."""
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    return max(64, elements // vocab_size // 64 * 64)


def projected_cross_entropy(
    projection: Projection, labels_BT: Tensor, weights_B: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Each row's weight times the sum of its token losses, summed.

    Losses and their sum are fp32. Gradients are made in the forward pass, where the logits are, and scaled in the
    backward pass: three matrix products in all, as many as with full logits. That of the matrix is summed over chunks
    in fp32 and rounded once. They are made for the largest weight 1, so that small weights do not vanish in fp16.

    Args:
        projection: output of a language model.
        labels_BT: int64, `IGNORED` where a token has no loss.
        weights_B: fp32, not negative; a row without labels may weigh 0.
        chunk_tokens: tokens whose logits are held at once; by default as many as suit the device.

    Returns:
        An fp32 scalar; 0 with zero gradients where no label counts.
    """
    chunk = chunk_tokens or default_chunk_tokens(projection.weight_VD.shape[0], projection.weight_VD.device)
    hidden_SD, labels_S = projection.normed_BTD.flatten(0, 1), labels_BT.flatten()
    weights_S = weights_B.float()[:, None].expand_as(labels_BT).flatten()
    arguments = (hidden_SD, projection.weight_VD, projection.bias_V, labels_S, weights_S, chunk)
    if torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (hidden_SD, projection.weight_VD, projection.bias_V)
    ):
        loss: Tensor = _ChunkedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss
    return _sum_losses(*arguments)


def _chunk_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> tuple[Tensor, ...]:
    """Logits of a chunk in fp32, the log of their sum of exponentials, and the losses, 0 where ignored."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V).float()
    log_sum_N = torch.logsumexp(logits_NV, dim=1)
    own_N = logits_NV.gather(1, labels_N.clamp_min(0)[:, None])[:, 0]
    return logits_NV, log_sum_N, (log_sum_N - own_N).masked_fill(labels_N == IGNORED, 0.0)


def _sum_losses(
    hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_S: Tensor, weights_S: Tensor, chunk: int
) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=hidden_SD.device)
    for start in range(0, len(labels_S), chunk):
        part = slice(start, start + chunk)
        losses_N = _chunk_logits(hidden_SD[part], weight_VD, bias_V, labels_S[part])[2]
        total += (losses_N * weights_S[part]).sum()
    return total


class _ChunkedLoss(torch.autograd.Function):
    """`_sum_losses` with gradients for hidden states, matrix and bias, whichever ask for one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_S: Tensor,
        weights_S: Tensor,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        largest = weights_S.max().clamp_min(torch.finfo(torch.float32).tiny)
        counted_S = labels_S != IGNORED
        factors_S = torch.where(counted_S, weights_S / largest, 0.0)
        grad_hidden_SD = torch.empty_like(hidden_SD) if wants_hidden else None
        fresh = torch.empty_like if len(labels_S) else torch.zeros_like  # the first chunk fills it
        grad_weight_VD = fresh(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_SD.device)
        for start in range(0, len(labels_S), chunk):
            part = slice(start, start + chunk)
            labels_N = labels_S[part]
            logits_NV, log_sum_N, losses_N = _chunk_logits(hidden_SD[part], weight_VD, bias_V, labels_N)
            total += (losses_N * weights_S[part]).sum()
            # the gradient by the logits takes their place: (softmax - one hot) * factor
            slope_NV = logits_NV.sub_(log_sum_N[:, None]).exp_()
            slope_NV.scatter_add_(1, labels_N.clamp_min(0)[:, None], -torch.ones_like(losses_N)[:, None])
            slope_NV.mul_(factors_S[part, None])
            if grad_bias_V is not None:
                grad_bias_V += slope_NV.sum(dim=0)
            slope_NV = slope_NV.to(hidden_SD.dtype)
            if grad_hidden_SD is not None:
                torch.mm(slope_NV, weight_VD, out=grad_hidden_SD[part])
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, slope_NV.T, hidden_SD[part], first=start == 0)
        ctx.save_for_backward(largest, grad_hidden_SD, grad_weight_VD, grad_bias_V)
        ctx.is_scaled = False
        ctx.dtypes = (hidden_SD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_scaled:
            raise RuntimeError("the loss was taken backwards before: its gradients are scaled in place, once")
        ctx.is_scaled = True
        largest, *grads = ctx.saved_tensors
        scale = grad_loss.float() * largest
        scaled = (None if grad is None else grad.mul_(scale) for grad in grads)
        rounded = (None if grad is None else grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True))
        return (*rounded, None, None, None)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add left @ right to an fp32 total, in place; the first product is written over what the total holds."""
    if left.dtype == torch.float32:
        total.addmm_(left, right, beta=0 if first else 1)
        return
    product = torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left @ right
    if first:
        total.copy_(product)
    else:
        total.add_(product)
