"""What arrived, checked against the plan and put in its slots.

Owns verification: batch, slot and row ids, counts of valid labels, and checksums that this side computes itself.
Refuses to place a row that is not the plan's. No network here.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_service.errors import DeliveryError
from data_service.hashing import row_crcs
from data_service.order import rows_of_batch
from data_service.plan import Plan
from data_service.rows import valid_tokens_of
from data_service.schema import NO_ROW, BatchSlice, wire_schema
from data_service.ticket import Ticket

__all__ = ["SliceArrays", "place_rows"]


@dataclass(frozen=True)
class SliceArrays:
    """A batch slice being filled; shapes and meaning as in BatchSlice."""

    tokens: npt.NDArray[np.int32]
    doc_starts: npt.NDArray[np.bool_]
    row_id: npt.NDArray[np.uint64]
    valid_tokens: npt.NDArray[np.uint32]
    row_crc: npt.NDArray[np.uint32]

    @classmethod
    def masked(cls, num_slots: int, width: int) -> "SliceArrays":
        """All slots masked, rows of `width` tokens."""
        return cls(
            tokens=np.zeros((num_slots, width), dtype=np.int32),
            doc_starts=np.zeros((num_slots, width), dtype=np.bool_),
            row_id=np.full(num_slots, NO_ROW, dtype=np.uint64),
            valid_tokens=np.zeros(num_slots, dtype=np.uint32),
            row_crc=np.zeros(num_slots, dtype=np.uint32),
        )

    def to_slice(self, index: int, slots: tuple[int, int]) -> BatchSlice:
        """The slice, once it is filled."""
        return BatchSlice(
            index=index,
            slots=slots,
            tokens=self.tokens,
            doc_starts=self.doc_starts,
            row_id=self.row_id,
            valid_tokens=self.valid_tokens,
            row_crc=self.row_crc,
        )


def _check_ids(
    address: str, batch: pa.RecordBatch, wanted: Sequence[npt.NDArray[np.unsignedinteger]]
) -> npt.NDArray[np.uint64]:
    """The row ids of a message, which must be the wanted global batches, slots and row ids."""
    row_id: npt.NDArray[np.uint64] = batch.column(2).to_numpy()
    if batch.num_rows > wanted[0].size:
        raise DeliveryError(
            f"data worker {address}: {batch.num_rows} rows were delivered where the plan has {wanted[0].size}. "
            "The worker runs another version or is broken: stop it."
        )
    wrong = np.zeros(batch.num_rows, dtype=np.bool_)
    for number, values in enumerate(wanted):
        wrong |= batch.column(number).to_numpy() != values
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DeliveryError(
            f"{_where(address, wanted, at)}: row {row_id[at]} was delivered where the plan has {wanted[2][at]}, "
            f"{int(wrong.sum())} such rows in this answer. The worker runs another version or is broken: stop it."
        )
    return row_id


def _where(address: str, wanted: Sequence[npt.NDArray[np.unsignedinteger]], at: int) -> str:
    return f"data worker {address}, global batch {wanted[0][at]}, slot {wanted[1][at]}"


def place_rows(
    arrays: Sequence[SliceArrays], slots: tuple[int, int], ticket: Ticket, address: str, answer: Sequence[Any]
) -> None:
    """Check an answer and copy its rows into place.

    Args:
        arrays: one per global batch of the ticket.
        slots: the slots that `arrays` cover; those of the ticket lie among them.
        ticket: what was asked for.
        address: who answered, for messages.
        answer: its record batches.

    Raises:
        DeliveryError: naming worker, batches and rows, when anything differs from the plan.
    """
    plan: Plan = ticket.plan
    first, last = ticket.slots
    rows = [rows_of_batch(plan, number, first, last) for number in range(ticket.first, ticket.last)]
    counts = [ids.size for ids in rows]
    wanted_ids = np.concatenate(rows)
    wanted_batch = np.repeat(np.arange(ticket.first, ticket.last, dtype=np.uint64), counts)
    wanted_slot = np.concatenate([np.arange(first, first + count, dtype=np.uint32) for count in counts])
    where = f"data worker {address}, global batches {ticket.first} to {ticket.last - 1}, slots {first} to {last - 1}"
    width = plan.seq_len + 1
    schemas = [wire_schema(plan.seq_len, np.dtype(kind)) for kind in (np.uint16, np.uint32)]
    place = 0
    for batch in answer:
        if not any(batch.schema.equals(schema, check_metadata=True) for schema in schemas):
            raise DeliveryError(f"{where}: the answer has another schema, {batch.schema.names}. Use one version.")
        part = slice(place, place + batch.num_rows)
        wanted = (wanted_batch[part], wanted_slot[part], wanted_ids[part])
        row_id = _check_ids(address, batch, wanted)
        tokens = batch.column(5).flatten().to_numpy(zero_copy_only=True).reshape(batch.num_rows, width)
        valid = batch.column(3).to_numpy()
        crcs = row_crcs(tokens, valid)
        bad = (crcs != batch.column(4).to_numpy()) | (valid != valid_tokens_of(plan, row_id))
        if bad.any():
            raise DeliveryError(
                f"{_where(address, wanted, int(np.argmax(bad)))}: rows {row_id[bad][:8].tolist()} arrived with other "
                "tokens than their checksums say. The worker, or the network between, damages data: replace it."
            )
        packed = np.frombuffer(batch.column(6).buffers()[1], dtype=np.uint8).reshape(-1, -(-width // 8))
        packed = packed[batch.column(6).offset :][: batch.num_rows]
        starts = np.unpackbits(packed, axis=1, count=width, bitorder="little").view(np.bool_)
        # Rows come batch by batch with their slots in order, so each batch's share is one run on both sides.
        cuts = np.flatnonzero(np.diff(wanted_batch[part])) + 1
        for begin, end in itertools.pairwise([0, *cuts.tolist(), batch.num_rows]):
            if begin == end:
                continue
            target = arrays[int(wanted_batch[part][begin]) - ticket.first]
            into = slice(int(wanted_slot[part][begin]) - slots[0], int(wanted_slot[part][end - 1]) - slots[0] + 1)
            target.tokens[into] = tokens[begin:end]
            target.doc_starts[into] = starts[begin:end]
            target.row_id[into] = row_id[begin:end]
            target.valid_tokens[into] = valid[begin:end]
            target.row_crc[into] = crcs[begin:end]
        place += batch.num_rows
    if place != wanted_ids.size:
        raise DeliveryError(f"{where}: {place} rows were delivered where the plan has {wanted_ids.size}.")
