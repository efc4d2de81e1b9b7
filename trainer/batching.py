"""From delivered rows to the micro-batches an engine takes.

Owns the tensors of a micro-batch and what a rank asks of a source of rows. Which rows a rank
gets is decided by `trainer.topology`, what they hold by the data service, what is learned from them by the task.
"""

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from data_service.plan import Plan
from data_service.schema import BatchSlice
from trainer.model import default_positions
from trainer.tasks.base import Targets, Task
from trainer.tasks.rows import TaskRows
from trainer.topology import BatchLayout

__all__ = ["MicroBatch", "RowSource", "count_tokens", "micro_batches", "task_rows"]

MicroBatch = tuple[tuple[Tensor, ...], Targets]
"""(inputs, targets) of a forward pass over B rows.

Inputs are (tokens, positions), or (tokens, positions, doc_ids) where attention stays within documents and where rows
are classified: int64 [B, T].
Targets are the task's.
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
    """Tokens of this rank's rows that go through the model and are no padding."""
    return int(np.maximum(rows.length, 1).sum()) - len(rows.length)


def micro_batches(
    task: Task, rows: BatchSlice, layout: BatchLayout, num_units: int, device: torch.device
) -> list[MicroBatch]:
    """Cut one rank's rows of a global batch.

    Args:
        task: makes the targets.
        rows: as many rows as the layout has slots in a rank.
        layout: the cut.
        num_units: units of the whole global batch (`Task.count`); with none, every loss and gradient is 0.
        device: where the tensors go.
    """
    assert rows.tokens.shape[0] == layout.slots_per_rank, (rows.tokens.shape, layout)
    documents = _padding(rows, device) if task.num_labels else _documents(rows, device)
    weight = layout.weight(max(1, num_units))
    cut: list[MicroBatch] = []
    for index, own in enumerate(task_rows(rows, layout, device)):
        first = index * layout.micro_batch
        tokens_BT = own.tokens_BT1[:, :-1].contiguous()
        places = tuple(one[first : first + layout.micro_batch] for one in documents)
        inputs = (tokens_BT, *(places or (default_positions(tokens_BT).contiguous(),)))
        cut.append((inputs, task.targets(own, weight)))
    return cut


def task_rows(rows: BatchSlice, layout: BatchLayout, device: torch.device) -> Iterator[TaskRows]:
    """What a task makes targets of, micro-batch by micro-batch; tokens travel to the device as narrow as they came."""
    tokens_ST1 = torch.from_numpy(rows.tokens).to(device).to(torch.int64)
    counted_ST = torch.from_numpy(rows.loss_mask).to(device)
    classes_S = None if rows.labels is None else torch.from_numpy(rows.labels).to(device).to(torch.int64)
    for first in range(0, layout.slots_per_rank, layout.micro_batch):
        part = slice(first, first + layout.micro_batch)
        yield TaskRows(tokens_ST1[part], counted_ST[part], None if classes_S is None else classes_S[part])


def _documents(rows: BatchSlice, device: torch.device) -> tuple[Tensor, ...]:
    """(positions, doc_ids), int64 [S, T], where documents are isolated; nothing where they are not."""
    if not rows.isolate_documents:
        return ()
    return tuple(torch.from_numpy(one).to(device).to(torch.int64) for one in (rows.positions, rows.doc_ids))


def _padding(rows: BatchSlice, device: torch.device) -> tuple[Tensor, Tensor]:
    """(positions, doc_ids), int64 [S, T], of rows that are one text each: 0 for its tokens, 1 for what follows."""
    num_tokens = rows.tokens.shape[1] - 1
    places = np.broadcast_to(np.arange(num_tokens, dtype=np.int64), (len(rows.length), num_tokens))
    behind = (places >= rows.length[:, None]) & rows.rows[:, None]  # a masked slot is one document, of nothing
    return torch.from_numpy(places.copy()).to(device), torch.from_numpy(behind.astype(np.int64)).to(device)
