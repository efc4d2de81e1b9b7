"""The compiled module of `data_service/native/rows.c`; `data_service.row_kernel` says what the arguments are."""

from typing import Any

import numpy.typing as npt

Buffer = npt.NDArray[Any]

def order(
    leaf: Buffer, index: Buffer, stretches: Buffer, num_stretches: int, hints: Buffer, rows: Buffer, begin: int, /
) -> int: ...
def gather(
    tokens: Buffer,
    starts: Buffer,
    begins: Buffer,
    lengths: Buffer,
    slots: Buffer,
    width: int,
    itemsize: int,
    padding: int,
    target: Buffer,
    registers: Buffer,
    lows: Buffer,
    counts: Buffer,
    /,
) -> None: ...
def copy_starts(
    starts: Buffer, begins: Buffer, slots: Buffer, lows: Buffer, offsets: Buffer, out: Buffer, /
) -> None: ...
def begin(tokens: Buffer, row_size: int, lengths: Buffer, registers: Buffer, /) -> None: ...
def finish(
    registers: Buffer, starts: Buffer, offsets: Buffer, answer_bits: Buffer | None, labels: Buffer | None, /
) -> None: ...
def place(
    tokens: Buffer,
    row_size: int,
    lengths: Buffer,
    starts: Buffer,
    offsets: Buffer,
    answer_bits: Buffer | None,
    labels: Buffer | None,
    expected: Buffer,
    places: Buffer,
    target: Buffer,
    /,
) -> int: ...
