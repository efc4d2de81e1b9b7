"""Memory of messages, kept instead of being returned to the kernel and faulted in anew, page by page.

A stream fills and drops blocks of a few MiB all the time. Left to the C library and to Arrow's pool, each is a third of
a reader's time: pages are cleared, handed over, and given back a moment later. Owns the blocks that are kept, and what
the C library is asked to keep.
"""

import ctypes
import sys
import threading

import numpy as np
import numpy.typing as npt

__all__ = ["Blocks", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of `mallopt(3)`."""
_KEPT_BYTES = 64 << 20
_LARGEST_KEPT = 32 << 20
"""The most that glibc takes, and where its own threshold ends; a fixed one below would slow larger tensors down."""


def keep_freed_memory() -> None:
    """Ask the C library to keep up to 64 MiB of freed memory in a process; where it cannot, nothing happens.

    gRPC allocates a buffer for each message. glibc's own thresholds grow with what is freed, but to twice the largest
    block only, so that every few messages are given back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class Blocks:
    """Arrays whose memory is used again once nobody holds it any more. Thread-safe."""

    def __init__(self, most_bytes: int = _KEPT_BYTES) -> None:
        """Keep at most so many bytes, in use and free; what goes beyond is allocated and let go."""
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: list[npt.NDArray[np.uint8]] = []

    def array(self, shape: tuple[int, int], dtype: np.dtype[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
        """An array with any content. Whatever is made over its memory, without a copy, keeps the memory from others."""
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        with self._lock:
            memory = self._free(num_bytes)
            return memory[:num_bytes].view(dtype).reshape(shape)

    def _free(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A block of at least so many bytes that nobody else refers to. The caller holds the lock."""
        for number in range(len(self._kept)):
            # Views refer to the block itself, however many lie between: two are this list and the call's argument.
            if self._kept[number].size >= num_bytes and sys.getrefcount(self._kept[number]) == 2:
                return self._kept[number]
        memory = np.empty(num_bytes, np.uint8)
        # What nobody uses and is too small now goes first.
        total = num_bytes + sum(one.size for one in self._kept)
        for number in reversed(range(len(self._kept))):
            if total <= self._most_bytes:
                break
            if sys.getrefcount(self._kept[number]) == 2:
                total -= self._kept.pop(number).size
        if total <= self._most_bytes:
            self._kept.append(memory)
        return memory
