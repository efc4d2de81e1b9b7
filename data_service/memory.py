"""Memory for messages: from Arrow's pool, which keeps what it gave out before.

The C library returns blocks of a message's size to the kernel, and the next one is faulted in anew, page by page: a
quarter of a reader's time. Owns nothing else.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["pooled_array"]


def pooled_array(shape: tuple[int, int], dtype: np.dtype[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    """An array with any content, in memory of Arrow's pool."""
    memory = pa.allocate_buffer(shape[0] * shape[1] * dtype.itemsize)
    found: npt.NDArray[np.unsignedinteger] = np.frombuffer(memory, dtype).reshape(shape)
    return found
