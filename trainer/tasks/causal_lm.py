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

from data_service.schema import BatchSlice
from trainer.layers import Projection
from trainer.losses import IGNORED, projected_cross_entropy
from trainer.tasks.base import Outputs, Sums, Targets
from trainer.tasks.rows import TaskRows

__all__ = ["CausalLM", "make_targets"]


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
        assert isinstance(outputs, Projection), "a language model gives its projection"
        return projected_cross_entropy(outputs, labels_BT, weights_B)

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
