"""From delivered rows to the micro-batches an engine takes.

Owns the tensors of a micro-batch, the count of valid tokens and what a rank asks of a source of rows. Which rows a rank
gets is decided by `trainer.topology`, what they hold by the data service, what is learned from them by the task.
"""

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from data_service.plan import Plan
from data_service.schema import BatchSlice
from trainer.model import default_positions
from trainer.tasks.causal_lm import make_targets
from trainer.topology import BatchLayout

__all__ = ["MicroBatch", "RowSource", "count_tokens", "micro_batches"]

MicroBatch = tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""((tokens, positions, doc_ids), (labels, weights)): four int64 [B, T] and fp32 [B].

doc_ids are carried and not used: attention is causal over whole rows (see `trainer.pipeline.State`).
"""


class RowSource(Protocol):
    """Where a rank's rows come from: `data_service.client.DataClient`."""

    def plan(self, split: Literal["train", "eval"]) -> Plan:
        """The order of a split's rows."""

    def stream(
        self, split: Literal["train", "eval"], start: int, stop: int, slots: tuple[int, int]
    ) -> Iterator[BatchSlice]:
        """Slots [first, last) of the global batches [start, stop)."""


def count_tokens(rows: BatchSlice) -> int:
    """Valid tokens of this rank's rows; masked rows have none."""
    return int(rows.valid_tokens.sum())


def micro_batches(rows: BatchSlice, layout: BatchLayout, num_tokens: int, device: torch.device) -> list[MicroBatch]:
    """Cut one rank's rows of a global batch.

    Args:
        rows: as many rows as the layout has slots in a rank.
        layout: the cut.
        num_tokens: valid tokens of the whole global batch.
        device: where the tensors go.
    """
    tokens_ST1 = rows.torch_tokens().to(device)
    doc_ids_ST = torch.from_numpy(rows.doc_ids).to(device=device, dtype=torch.int64)
    valid_S = torch.from_numpy(rows.valid_tokens.astype("int64")).to(device)
    assert tokens_ST1.shape[0] == layout.slots_per_rank, (tokens_ST1.shape, layout)
    weight = layout.weight(num_tokens)
    cut: list[MicroBatch] = []
    for first in range(0, layout.slots_per_rank, layout.micro_batch):
        tokens_BT1 = tokens_ST1[first : first + layout.micro_batch]
        tokens_BT = tokens_BT1[:, :-1].contiguous()
        inputs = (tokens_BT, default_positions(tokens_BT).contiguous(), doc_ids_ST[first : first + layout.micro_batch])
        cut.append((inputs, make_targets(tokens_BT1, valid_S[first : first + layout.micro_batch], weight)))
    return cut
