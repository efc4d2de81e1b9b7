"""The `causal_lm` task: predict the next token.

Owns labels, their weights and the loss. One optimizer step is the mean of the token losses over the N valid tokens of
the global batch; the weight w = dp · gas / N (`BatchLayout.weight`) makes it so on every mesh. Nothing here knows the
mesh.

Shape letters: B rows, T tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data_service.schema import BatchSlice
from trainer.layers import Projection
from trainer.losses import IGNORED, projected_cross_entropy
from trainer.tasks.base import Outputs, Sums, Targets
from trainer.tasks.rows import TaskRows

__all__ = ["CausalLM", "make_targets", "token_losses", "weighted_loss"]


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction over every token that counts."""

    metric: str = "loss"
    better: Literal["lower", "higher"] = "lower"
    num_labels: int = 0

    def count(self, rows: BatchSlice) -> int:
        """Labels of these rows that count; masked rows have none."""
        return int(rows.valid_tokens.sum())

    def targets(self, rows: TaskRows, weight: float) -> Targets:
        """(labels, weights): see `make_targets`."""
        return make_targets(rows, weight)

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Each row's weight times the sum of its token losses, summed; a masked row adds 0 · 0, never 0 / 0."""
        labels_BT, weights_B = targets
        if isinstance(outputs, Projection):
            return projected_cross_entropy(outputs, labels_BT, weights_B)
        return weighted_loss(outputs, (labels_BT, weights_B))

    def zeros(self) -> Sums:
        """None: the loss says it all."""
        return {}

    def observe(self, outputs: Outputs, targets: Targets) -> Sums:
        """None."""
        return {}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """None."""
        return {}


def make_targets(rows: TaskRows, weight: float) -> tuple[Tensor, Tensor]:
    """Labels and weights of delivered rows.

    Args:
        rows: as delivered; masked rows count no label.
        weight: the step's weight w.

    Returns:
        Labels, int64 [B, T], `IGNORED` where they do not count; weights, fp32 [B], w, or 0 for a row without labels.
    """
    labels_BT = rows.tokens_BT1[:, 1:].masked_fill(~rows.counted_BT, IGNORED)
    return labels_BT, torch.where(rows.counted_BT.any(dim=1), weight, 0.0).to(torch.float32)


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
