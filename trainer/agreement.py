"""What the ranks agree on after each optimizer step: which rows were consumed, and whether to stop.

One gathering of a small fixed-size tensor does both. First and last stages read the same rows from the service, each on
its own: rows that differ between them are a delivery fault. Every rank comes to the same answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed as dist

from data_service.errors import DeliveryError
from data_service.hashing import sample_hash
from data_service.schema import NO_ROW, BatchSlice
from trainer.deepspeed_engine import TrainEngine

__all__ = ["NEVER", "StepAgreement", "agree"]

NEVER = 2**62
"""A stop step that does not come."""


@dataclass(frozen=True)
class StepAgreement:
    """What holds on every rank after a step."""

    sample_hash: str
    """Of the rows that the last stages consumed, in global order."""
    stop_after: int
    """The earliest step that some rank was asked to stop after; NEVER where none was."""


def agree(engine: TrainEngine, rows: BatchSlice | None, step: int, stop_after: int) -> StepAgreement:
    """Gather consumed rows and wishes to stop. A collective: every rank calls it after every step.

    Args:
        engine: knows the mesh and the layout.
        rows: what this rank consumed; None on a stage between the first and the last.
        step: optimizer steps done; for the message.
        stop_after: what this rank was asked, or NEVER.

    Raises:
        DeliveryError: first and last stage of a pipeline consumed different rows.
    """
    mesh, num_slots = engine.mesh, engine.layout.slots_per_rank
    mine = np.zeros((2, num_slots + 1), dtype=np.int64)
    mine[0, 0] = stop_after
    if rows is not None:
        mine[0, 1:] = rows.row_id.view(np.int64)
        mine[1, 1:] = rows.row_crc.astype(np.int64)
    sent = torch.from_numpy(mine).to(engine.device)
    gathered = [torch.empty_like(sent) for _ in range(mesh.world_size)]
    dist.all_gather(gathered, sent)
    per_rank = [one.cpu().numpy() for one in gathered]
    consumed = [per_rank[rank][:, 1:] for rank in mesh.stage_ranks(mesh.pp - 1)]
    if mesh.pp > 1:
        _compare(consumed, [per_rank[rank][:, 1:] for rank in mesh.stage_ranks(0)], step)
    row_ids = np.concatenate([one[0] for one in consumed]).view(np.uint64)
    row_crcs = np.concatenate([one[1] for one in consumed]).astype(np.uint32)
    present = row_ids != NO_ROW
    return StepAgreement(sample_hash(row_ids[present], row_crcs[present]), min(int(one[0, 0]) for one in per_rank))


def _compare(last: Sequence[npt.NDArray[np.int64]], first: Sequence[npt.NDArray[np.int64]], step: int) -> None:
    for dp_index, (labels, tokens) in enumerate(zip(last, first, strict=True)):
        if not np.array_equal(labels, tokens):
            (slots,) = np.nonzero((labels != tokens).any(axis=0))
            slot = int(slots[0])
            raise DeliveryError(
                f"Step {step}: pipeline {dp_index} was given different rows for tokens and for labels in {len(slots)} "
                f"slots, first in slot {slot}: rows {int(tokens[0, slot]) % 2**64} and {int(labels[0, slot]) % 2**64}, "
                f"checksums {int(tokens[1, slot]):08x} and {int(labels[1, slot]):08x}. Check the data workers' shards."
            )
