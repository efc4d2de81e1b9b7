"""What arrived, checked against the plan and put in its slots.

    rows of a range of batches ─ Wanted ─┐
    record batches of one worker ────────┴ RangeArrays.take: columns ─ checked ─▶ placed ─▶ BatchSlice per batch

Owns verification: batch, slot and row ids, lengths, document starts and checksums that this side computes itself.
Refuses to place a row that is not the plan's. No network here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_service.errors import DeliveryError
from data_service.memory import Blocks
from data_service.plan import Plan
from data_service.row_kernel import place
from data_service.schema import NO_LABEL, NO_ROW, BatchSlice, wire_schema

__all__ = ["RangeArrays", "Wanted"]

_TOKEN_TYPES: dict[int, type[np.unsignedinteger]] = {16: np.uint16, 32: np.uint32}


@dataclass(frozen=True)
class Wanted:
    """The rows that one ticket asks for, n of them, in the order in which they are to come."""

    batch: npt.NDArray[np.uint64]
    """[n], step index."""
    slot: npt.NDArray[np.uint32]
    """[n]"""
    row_id: npt.NDArray[np.uint64]
    """[n]"""
    place: npt.NDArray[np.int64]
    """[n]: row of `RangeArrays` to put it in."""

    def part(self, begin: int, end: int) -> "Wanted":
        """Its rows [begin, end)."""
        rows = slice(begin, end)
        return Wanted(self.batch[rows], self.slot[rows], self.row_id[rows], self.place[rows])

    def at(self, number: int) -> str:
        """Where a row belongs, for messages."""
        return f"global batch {self.batch[number]}, slot {self.slot[number]}"


@dataclass(frozen=True)
class _Message:
    """A record batch that claims to hold the plan's rows, as arrays over its memory; n rows."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[n, T+1]"""
    length: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.uint32]
    """[S]: places of document starts, row after row."""
    offsets: npt.NDArray[np.int32]
    """[n+1]: row i has starts[offsets[i]:offsets[i+1]]."""
    answer_bits: npt.NDArray[np.uint8] | None
    labels: npt.NDArray[np.int32] | None
    row_crc: npt.NDArray[np.uint32]


@lru_cache(maxsize=64)
def _schemas(plan: Plan) -> tuple[pa.Schema, ...]:
    """What an answer may look like."""
    return tuple(wire_schema(plan, np.dtype(kind)) for kind in (np.uint16, np.uint32))


def _message(plan: Plan, wanted: Wanted, address: str, batch: Any) -> _Message:
    """The columns of a record batch whose ids are those of the plan.

    Raises:
        DeliveryError: naming worker, batch and rows, when they are others, or a column cannot be read.
    """
    _check_arrays(wanted, address, batch)
    width, count = plan.seq_len + 1, batch.num_rows
    row_id = _values(batch.column(2), np.uint64)
    wrong = _values(batch.column(0), np.uint64) != wanted.batch
    wrong |= _values(batch.column(1), np.uint32) != wanted.slot
    wrong |= row_id != wanted.row_id
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DeliveryError(
            f"data worker {address}, {wanted.at(at)}: row {row_id[at]} was delivered where the plan has "
            f"{wanted.row_id[at]}, {int(wrong.sum())} such rows in this answer. The worker runs another version or is "
            "broken: stop it."
        )
    tokens_column, starts_column = batch.column(5), batch.column(6)
    # Not `flatten` and `to_numpy`: they load pyarrow's functions, a tenth of a second before the first batch.
    flat = _values(tokens_column.values, _TOKEN_TYPES[tokens_column.type.value_type.bit_width])
    offsets = np.frombuffer(starts_column.buffers()[1], np.int32)[starts_column.offset :][: count + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    if not 0 <= first <= last <= len(starts_column.values):
        raise _without_starts(wanted, address)
    rest = list(range(7, batch.num_columns))
    return _Message(
        tokens=flat[tokens_column.offset * width :][: count * width].reshape(count, width),
        length=_values(batch.column(3), np.uint32),
        starts=_values(starts_column.values, np.uint32)[first:last],
        offsets=offsets - np.int32(first),
        answer_bits=_bits(batch.column(rest.pop(0))) if plan.loss_masks else None,
        labels=_values(batch.column(rest.pop(0)), np.int32) if plan.num_labels else None,
        row_crc=_values(batch.column(4), np.uint32),
    )


def _without_starts(wanted: Wanted, address: str) -> DeliveryError:
    return DeliveryError(
        f"data worker {address}, {wanted.at(0)}: the answer holds no document starts for some rows. "
        "The worker runs another version or is broken: stop it."
    )


def _damaged(wanted: Wanted, address: str, row: int) -> DeliveryError:
    return DeliveryError(
        f"data worker {address}, {wanted.at(row)}: row {wanted.row_id[row]} arrived with other tokens than its "
        "checksum says. The worker, or the network between, damages data: replace it."
    )


def _check_arrays(wanted: Wanted, address: str, batch: Any) -> None:
    """Refuse a message with cells that are null, or arrays that are shorter than it says.

    Raises:
        DeliveryError: naming worker, batches, rows and column.
    """
    found: Exception | None = None
    names: list[str] = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate()
            whole = not column.null_count and not (pa.types.is_nested(column.type) and column.values.null_count)
        except pa.ArrowInvalid as error:
            found, whole = error, False
        if not whole:
            names.append(name)
    if names:
        rows = wanted.row_id
        raise DeliveryError(
            f"data worker {address}, {wanted.at(0)} to {wanted.at(rows.size - 1)}: the answer for rows {rows[0]} to "
            f"{rows[-1]} has no value for some cells of {names}. The worker runs another version or is broken: stop it."
        ) from found


def _values(column: Any, dtype: type[Any]) -> npt.NDArray[Any]:
    """The values of a column without nulls, over its memory (`to_numpy` checks more, and costs more)."""
    data = column.buffers()[1]
    if data is None:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype)[column.offset :][: len(column)]


def _bits(column: Any) -> npt.NDArray[np.uint8]:
    """A fixed-size binary column as uint8 [n, bytes]."""
    width, first = column.type.byte_width, column.offset
    held = np.frombuffer(column.buffers()[1], np.uint8)  # padded behind the last row
    return held[first * width : (first + len(column)) * width].reshape(len(column), width)


class RangeArrays:
    """Slots [slots[0], slots[1]) of the global batches [first, last), being filled; shapes as in BatchSlice."""

    def __init__(self, plan: Plan, first: int, last: int, slots: tuple[int, int], blocks: Blocks) -> None:
        self._plan = plan
        self._blocks = blocks
        self._first = first
        self._slots = slots
        self._num_slots = slots[1] - slots[0]
        count = (last - first) * self._num_slots
        self._tokens: npt.NDArray[np.unsignedinteger] | None = None
        self._length = np.zeros(count, dtype=np.uint32)
        self._row_id = np.full(count, NO_ROW, dtype=np.uint64)
        self._row_crc = np.zeros(count, dtype=np.uint32)
        self._bits = np.zeros((count, -(-plan.seq_len // 8)), dtype=np.uint8) if plan.loss_masks else None
        self._labels = np.full(count, NO_LABEL, dtype=np.int32) if plan.num_labels else None
        self._starts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]] = []

    def places(self, batch: npt.NDArray[np.uint64], slot: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """Where rows belong: int64 [n], for `Wanted.place`."""
        return (batch.astype(np.int64) - self._first) * self._num_slots + (slot.astype(np.int64) - self._slots[0])

    def take(self, wanted: Wanted, address: str, answer: Sequence[Any]) -> None:
        """Check the answer to a ticket, and copy its rows into place.

        Args:
            wanted: the rows that the ticket asks for.
            address: who answered, for messages.
            answer: its record batches.

        Raises:
            DeliveryError: naming worker, batches and rows, when anything differs from the plan. Some rows may be in
                place by then: another answer to the ticket writes them again.
        """
        schemas = _schemas(self._plan)
        starts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]] = []
        begin = 0
        for batch in answer:
            if not any(batch.schema.equals(schema, check_metadata=True) for schema in schemas):
                raise DeliveryError(
                    f"data worker {address}: the answer has another schema, {batch.schema.names}. Use one version."
                )
            end = begin + batch.num_rows
            if batch.num_rows and end <= wanted.row_id.size:
                part = wanted.part(begin, end)
                starts.append(self._place(part, address, _message(self._plan, part, address, batch)))
            begin = end
        if begin != wanted.row_id.size:
            raise DeliveryError(
                f"data worker {address}: {sum(batch.num_rows for batch in answer)} rows were delivered from "
                f"{wanted.at(0)} on, where the plan has {wanted.row_id.size}. The worker runs another version or is "
                "broken: stop it."
            )
        self._starts.extend(starts)

    def _place(
        self, wanted: Wanted, address: str, message: _Message
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Copy the rows of a message into place whose checksums, computed on this side, are those that came along.

        Returns:
            Of each document start, int64 [S] its row of these arrays and uint32 [S] its place in it.
        """
        width = self._plan.seq_len + 1
        if self._tokens is None:
            self._tokens = self._blocks.array((self._length.size, width), message.tokens.dtype)
        if self._tokens.dtype != message.tokens.dtype:
            raise DeliveryError(
                f"tokens came as {message.tokens.dtype} and as {self._tokens.dtype} from workers of one dataset. "
                "One of them runs another version or is broken: stop it."
            )
        impossible = (message.length < 1) | (message.length > width)
        try:
            bad = place(
                *(message.tokens, message.length, message.starts, message.offsets, message.answer_bits),
                *(message.labels, message.row_crc, wanted.place, self._tokens),
            )
        except IndexError as error:
            raise _without_starts(wanted, address) from error
        counts = np.diff(message.offsets)
        rows = np.repeat(np.arange(counts.size), counts)
        impossible[rows[message.starts >= width]] = True
        if bad >= 0:
            impossible[bad] = True
        if impossible.any():
            raise _damaged(wanted, address, int(np.argmax(impossible)))
        into = wanted.place
        self._length[into] = message.length
        self._row_id[into] = wanted.row_id
        self._row_crc[into] = message.row_crc
        if self._bits is not None and message.answer_bits is not None:
            self._bits[into] = message.answer_bits
        if self._labels is not None and message.labels is not None:
            self._labels[into] = message.labels
        return into[rows], message.starts

    def slices(self) -> list[BatchSlice]:
        """A slice for each batch, over this memory."""
        plan, count = self._plan, self._num_slots
        tokens = self._tokens
        if tokens is None:
            tokens = np.zeros((self._length.size, plan.seq_len + 1), np.uint16)
        tokens[self._row_id == NO_ROW] = 0
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in self._starts)])
        places = np.concatenate([np.empty(0, np.uint32), *(places for _, places in self._starts)])
        if len(self._starts) > 1:
            order = np.argsort(rows, kind="stable")
            rows, places = rows[order], places[order]
        cuts = np.searchsorted(rows, np.arange(0, self._length.size + 1, count)).tolist()
        start_rows = (rows % count).astype(np.uint32)
        found = []
        for number in range(self._length.size // count):
            part = slice(number * count, (number + 1) * count)
            begins = slice(cuts[number], cuts[number + 1])
            found.append(
                BatchSlice(
                    index=self._first + number,
                    slots=self._slots,
                    tokens=tokens[part],
                    length=self._length[part],
                    start_rows=start_rows[begins],
                    start_places=places[begins],
                    isolate_documents=plan.isolate_documents,
                    answer_bits=None if self._bits is None else self._bits[part],
                    labels=None if self._labels is None else self._labels[part],
                    row_id=self._row_id[part],
                    row_crc=self._row_crc[part],
                )
            )
        return found
