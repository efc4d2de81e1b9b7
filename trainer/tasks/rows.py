"""What a task makes its targets of: delivered rows as tensors, whatever is learned from them.

Shape letters: B rows, T tokens.
"""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["TaskRows"]


@dataclass(frozen=True)
class TaskRows:
    """Rows of a micro-batch."""

    tokens_BT1: Tensor
    """int64 [B, T + 1]; inputs are [:, :T], the label of token t is token t + 1."""
    counted_BT: Tensor
    """bool [B, T]: which labels count; none of a masked row's."""
    classes_B: Tensor | None
    """int64 [B] class numbers, -1 where a row has none; None where the dataset has no classes."""
