"""Rows put in order, gathered, checked and put in place by the compiled module `stormjib_rows`.

Its source is `data_service/native/rows.c`. The only caller of that module: owns the shapes and dtypes that it relies
on, so that a wrong array is an error here.
Shape letters: m rows of a call, n rows of the block, T + 1 tokens of a row, S document starts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_service.errors import ConfigError

try:
    import stormjib_rows as _compiled
except ImportError as error:
    raise ConfigError(
        "the compiled part of Stormjib, stormjib_rows, is missing. Install the package where there is a C compiler "
        f"(`pip install .` in its folder), or from a wheel ({error})."
    ) from error

__all__ = [
    "ROUNDS",
    "Permutation",
    "Stretch",
    "Stretches",
    "begin_checksums",
    "copy_starts",
    "finish_checksums",
    "gather",
    "order",
    "place",
]

ROUNDS = 8
"""Of a permutation's Feistel network."""

_I64 = npt.NDArray[np.int64]
_U32 = npt.NDArray[np.uint32]
_Tokens = npt.NDArray[np.unsignedinteger]
_Bits = npt.NDArray[np.uint8] | None
_Labels = npt.NDArray[np.int32] | None


def _as(array: npt.NDArray[Any], dtype: type[Any]) -> npt.NDArray[Any]:
    assert array.dtype == dtype, (array.dtype, dtype)
    return np.ascontiguousarray(array)


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of 0 … size-1, a Feistel network over Z_a x Z_b; integers below 2^64."""

    size: int
    a: int
    b: int
    """a · b >= size."""
    keys: tuple[int, ...]
    """ROUNDS of them."""

    def values(self) -> tuple[int, ...]:
        """As the compiled module lays it out."""
        return (self.size, self.a, self.b, *self.keys)


@dataclass(frozen=True)
class Stretch:
    """Consecutive samples of one part: those of a window of its shards in one epoch; integers below 2^64."""

    leaf: int
    """Number that the caller gives the part."""
    first: int
    """Sample of the part that it begins with; as many follow as `rows` permutes."""
    rows: Permutation
    """Of the rows of the window."""
    cut: int
    """Rows of the window up to the end of the part's short shard, where that lies in it; else all."""
    missing: int
    """Rows that the short shard lacks."""
    shard_rows: int
    low: int
    """First shard slot of the window."""
    short_slot: int
    """Shard slot of the part's short shard in this epoch."""
    shards: Permutation
    """Of the other shards over the other slots."""
    last_shard: int
    """Number of the short shard."""
    base: int
    """Added to the row's number in the part."""

    def values(self) -> tuple[int, ...]:
        """As the compiled module lays it out."""
        return (
            *(self.leaf, self.first, *self.rows.values(), self.cut, self.missing, self.shard_rows, self.low),
            *(self.short_slot, *self.shards.values(), self.last_shard, self.base),
        )


class Stretches:
    """Stretches that `order` looks samples up in."""

    def __init__(self, num_leaves: int) -> None:
        """None yet; leaves are numbered below `num_leaves`."""
        self.table = np.empty((4, 9 + 2 * (3 + ROUNDS)), np.uint64)
        self.count = 0
        self.hints = np.zeros(num_leaves, np.int64)

    def add(self, stretch: Stretch) -> None:
        """Know one more."""
        if self.count == self.table.shape[0]:
            self.table = np.concatenate([self.table, np.empty_like(self.table)])
        self.table[self.count] = stretch.values()
        self.count += 1


def order(leaf: _I64, index: npt.NDArray[np.uint64], known: Stretches, rows: npt.NDArray[np.uint64], begin: int) -> int:
    """Row ids of samples, from one of them on.

    Args:
        leaf: [n], the part that each sample is of.
        index: [n], its number among the samples of that part.
        known: where they are looked up.
        rows: [n], written.
        begin: the first sample to look up.

    Returns:
        The first sample that lies in no stretch, or n.
    """
    stopped: int = _compiled.order(
        _as(leaf, np.int64), _as(index, np.uint64), known.table, known.count, known.hints, rows, begin
    )
    return stopped


def gather(
    tokens: _Tokens,
    starts: _U32,
    begin: _I64,
    length: _I64,
    slots: _I64,
    padding: int,
    target: _Tokens,
    registers: _U32,
    lows: _I64,
    counts: _I64,
) -> None:
    """Copy rows of one shard into a block, pad them, begin their checksums and find their document starts.

    Args:
        tokens: of the shard.
        starts: [S], ascending places in `tokens`.
        begin: [m], each row's first token.
        length: [m], 1 to T + 1 tokens of it.
        slots: [m], its row of the block.
        padding: token behind a row's end.
        target: [n, T+1], written.
        registers: [n], written: checksums that `finish_checksums` goes on with.
        lows: [n], written: index of the first start that lies in a row.
        counts: [n], written: how many do.

    Raises:
        IndexError: a row leaves the tokens or the block; nothing is written.
    """
    assert target.dtype == tokens.dtype, (target.dtype, tokens.dtype)
    _compiled.gather(
        tokens,
        _as(starts, np.uint32),
        _as(begin, np.int64),
        _as(length, np.int64),
        _as(slots, np.int64),
        target.shape[1],
        target.itemsize,
        padding,
        target,
        registers,
        lows,
        counts,
    )


def copy_starts(starts: _U32, begin: _I64, slots: _I64, lows: _I64, offsets: npt.NDArray[np.int32], out: _U32) -> None:
    """Copy the document starts of rows that `gather` found, counted from each row's first token.

    Args:
        starts: of the shard, as for `gather`.
        begin: [m], as for `gather`.
        slots: [m], as for `gather`.
        lows: [n], of `gather`.
        offsets: [n+1], where each row's starts belong in `out`.
        out: [S], written.

    Raises:
        IndexError: they leave the shard or `out`.
    """
    _compiled.copy_starts(_as(starts, np.uint32), _as(begin, np.int64), _as(slots, np.int64), lows, offsets, out)


def begin_checksums(tokens: _Tokens, length: _U32) -> _U32:
    """Checksums of rows [n, T+1] of uint16 or uint32 over lengths and tokens; `finish_checksums` goes on with them."""
    registers = np.empty(tokens.shape[0], np.uint32)
    rows = np.ascontiguousarray(tokens)
    _compiled.begin(rows, rows.shape[1] * rows.itemsize, _as(length, np.uint32), registers)
    return registers


def finish_checksums(
    registers: _U32, starts: _U32, offsets: npt.NDArray[np.int32], answer_bits: _Bits, labels: _Labels
) -> None:
    """Finish checksums that were begun, in place.

    Args:
        registers: [n].
        starts: [S], places of document starts, row after row.
        offsets: [n+1]; row i has starts[offsets[i]:offsets[i+1]].
        answer_bits: [n, bytes], where the dataset has them.
        labels: [n], where the dataset has classes.

    Raises:
        IndexError: the offsets fall, or leave the starts.
    """
    _compiled.finish(
        registers,
        _as(starts, np.uint32),
        _as(offsets, np.int32),
        None if answer_bits is None else _as(answer_bits, np.uint8),
        None if labels is None else _as(labels, np.int32),
    )


def place(
    tokens: _Tokens,
    length: _U32,
    starts: _U32,
    offsets: npt.NDArray[np.int32],
    answer_bits: _Bits,
    labels: _Labels,
    expected: _U32,
    places: _I64,
    target: _Tokens,
) -> int:
    """Copy rows whose checksums are as expected to their places, up to the first whose checksum is another.

    Args:
        tokens: [m, T+1].
        length: [m].
        starts: [S], as for `finish_checksums`.
        offsets: [m+1].
        answer_bits: [m, bytes] or None.
        labels: [m] or None.
        expected: [m], checksums.
        places: [m], rows of the target.
        target: [n, T+1] in the dtype of `tokens`, written.

    Returns:
        -1, or the row whose checksum differs; rows before it were copied.

    Raises:
        IndexError: the offsets fall or leave the starts, or a place is none of the target's.
    """
    assert (target.dtype, target.shape[1]) == (tokens.dtype, tokens.shape[1]), (target.dtype, tokens.dtype)
    bad: int = _compiled.place(
        np.ascontiguousarray(tokens),
        tokens.shape[1] * tokens.itemsize,
        _as(length, np.uint32),
        _as(starts, np.uint32),
        _as(offsets, np.int32),
        None if answer_bits is None else _as(answer_bits, np.uint8),
        None if labels is None else _as(labels, np.int32),
        _as(expected, np.uint32),
        _as(places, np.int64),
        target,
    )
    return bad
