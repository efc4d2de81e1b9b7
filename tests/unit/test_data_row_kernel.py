"""The compiled rows: as slow Python computes them, with and without the processor's instruction, within all bounds."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_service.hashing import row_crcs
from data_service.row_kernel import (
    Stretches,
    begin_checksums,
    copy_starts,
    finish_checksums,
    gather,
    order,
    place,
)
from tests.helpers.plans import slow_crc32c

SOURCE = Path(__file__).parents[2] / "data_service" / "native" / "rows.c"
WITHOUT_INSTRUCTION = """
import sys
import numpy as np
import stormjib_rows as rows
assert rows.__file__ == sys.argv[1], rows.__file__
tokens = np.random.default_rng(5).integers(0, 256, (7, 131)).astype(np.uint8)
found = np.empty(7, np.uint32)
rows.begin(tokens, 131, np.arange(7, dtype=np.uint32), found)
rows.finish(found, np.arange(3, dtype=np.uint32), np.array([0, 1, 1, 1, 3, 3, 3, 3], np.int32), None, None)
print(found.tolist())
"""


def test_the_checksum_is_crc32c():
    assert slow_crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's polynomial
    no_starts = np.empty(0, np.uint32)
    for width in (1, 2, 3, 4, 5, 31, 64):
        for count in (0, 1, 2, 3, 4, 8):
            tokens = np.random.default_rng(width).integers(0, 2**16, (count, width)).astype(np.uint16)
            length = np.arange(count, dtype=np.uint32)
            found = row_crcs(tokens, length, no_starts, np.zeros(count + 1, np.int32))
            assert found.tolist() == [
                slow_crc32c(length[row].tobytes() + tokens[row].tobytes()) for row in range(count)
            ]


def test_a_processor_without_the_instruction_finds_the_same(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the package needs a C compiler"
    target = tmp_path / "stormjib_rows.abi3.so"
    include = sysconfig.get_paths()["include"]
    command = [compiler, "-shared", "-fPIC", "-O2", "-std=c11", "-DSOFTWARE_ONLY", f"-I{include}", str(SOURCE)]
    subprocess.run([*command, "-o", str(target)], check=True, timeout=60)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}){WITHOUT_INSTRUCTION}", str(target)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not run.returncode, run.stderr
    tokens = np.random.default_rng(5).integers(0, 256, (7, 131)).astype(np.uint8)
    starts, offsets = [0, 1, 2], [0, 1, 1, 1, 3, 3, 3, 3]
    expected = [
        slow_crc32c(
            row.to_bytes(4, "little")
            + tokens[row].tobytes()
            + np.array(starts[offsets[row] : offsets[row + 1]], np.uint32).tobytes()
        )
        for row in range(7)
    ]
    assert run.stdout.strip() == str(expected)


@st.composite
def shards(draw):
    """Tokens and starts of a shard, and rows of it in slots of a block."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    width, size = draw(st.integers(1, 40)), draw(st.integers(1, 300))
    tokens = random.integers(0, 2**16, size).astype(dtype)
    starts = np.flatnonzero(random.random(size) < draw(st.sampled_from([0.0, 0.1, 1.0]))).astype(np.uint32)
    count = draw(st.integers(0, 20))
    begin = random.integers(0, size, count)
    length = np.minimum(size - begin, random.integers(1, width + 1, count))
    slots = random.permutation(count + draw(st.integers(0, 5)))
    return tokens, starts, begin, length, slots[:count].copy(), slots.size, width


@settings(max_examples=200, deadline=None)
@given(shards())
def test_gathered_rows_are_those_of_a_loop(shard):
    tokens, starts, begin, length, slots, num_slots, width = shard
    target = np.full((num_slots, width), 9, tokens.dtype)
    registers = np.zeros(num_slots, np.uint32)
    lows, counts = np.zeros(num_slots, np.int64), np.zeros(num_slots, np.int64)
    gather(tokens, starts, begin, length, slots, 7, target, registers, lows, counts)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    out = np.empty(int(offsets[-1]), np.uint32)
    copy_starts(starts, begin, slots, lows, offsets, out)
    finish_checksums(registers, out, offsets, None, None)
    for first, size, slot in zip(begin, length, slots, strict=True):
        row = np.full(width, 7, tokens.dtype)
        row[:size] = tokens[first : first + size]
        own = starts[(starts >= first) & (starts < first + size)] - np.uint32(first)
        assert target[slot].tolist() == row.tolist()
        assert out[offsets[slot] : offsets[slot + 1]].tolist() == own.tolist()
        data = int(size).to_bytes(4, "little") + row.tobytes() + own.astype(np.uint32).tobytes()
        assert int(registers[slot]) == slow_crc32c(data)
    others = np.setdiff1d(np.arange(num_slots), slots)
    assert (target[others] == 9).all()


@pytest.mark.parametrize("damaged", [None, 0, 1, 4, 9])
def test_rows_are_placed_up_to_the_first_that_is_damaged(damaged):
    random = np.random.default_rng(1)
    tokens = random.integers(0, 2**16, (10, 33)).astype(np.uint16)
    length = random.integers(1, 34, 10).astype(np.uint32)
    offsets = np.array([0, 2, 2, 3, 3, 3, 4, 6, 6, 6, 7], np.int32)
    starts = random.integers(0, 33, 7).astype(np.uint32)
    bits, labels = random.integers(0, 256, (10, 4)).astype(np.uint8), random.integers(-1, 5, 10).astype(np.int32)
    expected = row_crcs(tokens, length, starts, offsets, bits, labels)
    if damaged is not None:
        tokens[damaged, 32] ^= 0x100
    places = random.permutation(15)[:10].astype(np.int64)
    target = np.zeros((15, 33), np.uint16)
    bad = place(tokens, length, starts, offsets, bits, labels, expected, places, target)
    assert bad == (-1 if damaged is None else damaged)
    whole = 10 if damaged is None else damaged
    wanted = np.zeros_like(target)
    wanted[places[:whole]] = tokens[:whole]
    assert target.tolist() == wanted.tolist()


def no_rows() -> dict[str, np.ndarray]:
    return {
        "tokens": np.zeros((2, 4), np.uint16),
        "length": np.full(2, 4, np.uint32),
        "starts": np.zeros(3, np.uint32),
        "offsets": np.array([0, 1, 3], np.int32),
        "expected": np.zeros(2, np.uint32),
        "places": np.array([0, 1]),
        "target": np.zeros((2, 4), np.uint16),
    }


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("offsets", [0, 1, 4], IndexError),
        ("offsets", [-1, 1, 3], IndexError),
        ("offsets", [0, 2, 1], IndexError),
        ("offsets", [0, 1], ValueError),
        ("places", [0, 2], IndexError),
        ("places", [-1, 0], IndexError),
        ("places", [0], ValueError),
        ("length", [4], ValueError),
        ("expected", [0, 0, 0], ValueError),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(name, value, error):
    given = no_rows()
    given[name] = np.array(value, dtype=given[name].dtype)
    with pytest.raises(error):
        place(
            *(given["tokens"], given["length"], given["starts"], given["offsets"], None, None),
            *(given["expected"], given["places"], given["target"]),
        )


@pytest.mark.parametrize(
    ("begin", "length", "slot"), [(8, 3, 0), (-1, 3, 0), (0, 0, 0), (0, 5, 0), (0, 3, 2), (0, 3, -1), (2**62, 3, 0)]
)
def test_a_row_that_leaves_the_shard_or_the_block_is_refused(begin, length, slot):
    target = np.full((2, 4), 9, np.uint16)
    with pytest.raises(IndexError, match="a row leaves"):
        gather(
            np.zeros(10, np.uint16),
            np.zeros(0, np.uint32),
            *(np.array([0, begin]), np.array([3, length]), np.array([1, slot])),
            0,
            target,
            np.zeros(2, np.uint32),
            np.zeros(2, np.int64),
            np.zeros(2, np.int64),
        )
    assert (target == 9).all()


@pytest.mark.parametrize(("low", "offsets"), [(3, [0, 1, 1]), (-1, [0, 1, 1]), (0, [0, 4, 4]), (0, [-1, 0, 0])])
def test_starts_that_leave_the_shard_or_the_block_are_refused(low, offsets):
    with pytest.raises(IndexError, match="document starts leave"):
        copy_starts(
            np.zeros(3, np.uint32),
            np.array([0]),
            np.array([0]),
            np.array([low, 0]),
            np.array(offsets, np.int32),
            np.zeros(3, np.uint32),
        )


def test_a_sample_in_no_stretch_stops_the_order():
    rows = np.zeros(3, np.uint64)
    leaf, index = np.array([0, 1, 0]), np.zeros(3, np.uint64)
    assert order(leaf, index, Stretches(2), rows, 0) == 0
    assert order(np.array([5]), index[:1], Stretches(2), rows[:1], 0) == 0
    assert order(leaf, index, Stretches(2), rows, 3) == 3


def test_checksums_of_no_rows_are_none():
    assert begin_checksums(np.empty((0, 5), np.uint16), np.empty(0, np.uint32)).size == 0
