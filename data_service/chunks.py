"""Chunks of text in the work folder: consecutive documents of a source file, the unit of encoding.

Owns what a chunk is and how its texts are read. They are written by `spool`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_service import storage
from data_service.work_items import arrays_of

__all__ = ["Chunk", "Texts", "chunk_uri", "read_texts"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of a file."""

    file: int
    number: int
    run: int
    """The run of the file that holds their hashes."""
    first: int
    """Place of the first document in the run."""
    num_documents: int
    num_bytes: int
    """Of text."""


def chunk_uri(work_uri: str, chunk: Chunk) -> str:
    """Where the text of a chunk lies."""
    return storage.join(work_uri, f"read/{chunk.file:05d}/chunk-{chunk.number:06d}.arrow")


@dataclass(frozen=True)
class Texts:
    """The documents of a chunk, n of them."""

    texts: list[str]
    num_bytes: npt.NDArray[np.int64]
    """[n]: of each text in UTF-8."""
    high: npt.NDArray[np.uint64]
    """[n]: first 8 bytes of each hash."""
    labels: npt.NDArray[np.int32] | None
    """[n]: places in `FileSpool.labels`."""


def read_texts(work_uri: str, chunk: Chunk, keep: npt.NDArray[np.bool_] | None = None) -> Texts:
    """Read a chunk.

    Args:
        work_uri: the work folder.
        chunk: which one.
        keep: [n], the documents wanted; None for all.
    """
    arrays = arrays_of(chunk_uri(work_uri, chunk))
    data = memoryview(arrays["text"].data)
    ends = arrays["end"]
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    labels = arrays.get("label")
    if keep is not None:
        begins, ends = begins[keep], ends[keep]
        labels = None if labels is None else labels[keep]
    texts = [str(data[a:b], "utf-8") for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
    high = arrays["high"] if keep is None else arrays["high"][keep]
    return Texts(texts, ends - begins, high, labels)
