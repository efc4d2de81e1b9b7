"""The `causal_lm` task: predict the next token.

Owns labels, their weights and the loss. One optimizer step is the mean of the token losses over the N valid tokens of
the global batch; the weight w = dp · gas / N (`BatchLayout.weight`) makes it so on every mesh. Nothing here knows the
mesh.

Shape letters: B rows, T tokens, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IGNORED", "make_targets", "token_losses", "weighted_loss"]

IGNORED = -100
"""Label of a token that has no loss."""


def make_targets(tokens_BT1: Tensor, valid_tokens_B: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Labels and weights of delivered rows.

    Args:
        tokens_BT1: int64 [B, T + 1], as delivered.
        valid_tokens_B: how many labels of each row count; 0 for a masked row.
        weight: the step's weight w.

    Returns:
        Labels, int64 [B, T], `IGNORED` where they do not count; weights, fp32 [B], w or 0 for a masked row.
    """
    labels_BT = tokens_BT1[:, 1:]
    columns_T = torch.arange(labels_BT.shape[1], device=tokens_BT1.device)
    valid_B = valid_tokens_B.to(device=tokens_BT1.device, dtype=torch.int64)
    labels_BT = labels_BT.masked_fill(columns_T >= valid_B[:, None], IGNORED)
    return labels_BT, torch.where(valid_B > 0, weight, 0.0).to(torch.float32)


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of each token in fp32, [B, T]; 0 where the label is `IGNORED`."""
    flat = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view(labels_BT.shape)


def weighted_loss(logits_BTV: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of one micro-batch: each row's weight times the sum of its token losses, summed.

    A masked row adds 0 · 0, never 0 / 0.

    Args:
        logits_BTV: output of the model.
        targets: what `make_targets` returns.
    """
    labels_BT, weights_B = targets
    return (token_losses(logits_BTV, labels_BT).sum(dim=1) * weights_B).sum()
