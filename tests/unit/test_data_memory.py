"""Memory of messages: used again once nobody holds it, never before."""

import ctypes

import numpy as np
import pyarrow as pa
import torch

from data_service.memory import Blocks, keep_freed_memory

U16 = np.dtype(np.uint16)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_it_is_let_go():
    blocks = Blocks()
    first = blocks.array((4, 10), U16)
    assert (first.shape, first.dtype) == ((4, 10), U16)
    at = address(first)
    del first
    again = blocks.array((2, 10), np.dtype(np.uint32))
    assert address(again) == at


def test_memory_that_anything_lies_over_is_given_to_nobody():
    blocks = Blocks()
    holders = [
        lambda array: array[1:2],
        lambda array: array.reshape(-1)[3:].view(np.uint8),
        lambda array: torch.from_numpy(array[2:]),
        lambda array: pa.py_buffer(array.reshape(-1)),
        lambda array: memoryview(array),
    ]
    taken = set()
    held = []
    for holder in holders:
        array = blocks.array((4, 10), U16)
        assert address(array) not in taken
        taken.add(address(array))
        held.append(holder(array))
        del array
    assert address(blocks.array((4, 10), U16)) not in taken
    held.clear()
    assert address(blocks.array((4, 10), U16)) in taken


def test_no_more_is_kept_than_was_said():
    blocks = Blocks(most_bytes=1000)
    sizes = [blocks.array((1, size), np.dtype(np.uint8)) for size in (400, 400, 400, 5000)]
    assert [array.size for array in sizes] == [400, 400, 400, 5000]
    assert sum(one.size for one in blocks._kept) <= 1000
    del sizes
    wide = blocks.array((1, 900), np.dtype(np.uint8))
    assert wide.size == 900
    assert sum(one.size for one in blocks._kept) <= 1000


def test_freed_memory_is_kept_where_the_c_library_can():
    keep_freed_memory()
    # Below the size of blocks that are mapped alone, so that the same memory is there when it is asked for again.
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    size = 6 << 20
    found = []
    for _ in range(2):
        pointer = libc.malloc(size)
        ctypes.memset(pointer, 1, size)
        found.append(pointer)
        libc.free(pointer)
    assert found[0] == found[1]
