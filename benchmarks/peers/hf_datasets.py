"""Hugging Face datasets over the same rows: memory-mapped Arrow, shuffled.

    PYTHONPATH=PEERS:. python -m benchmarks.peers.hf_datasets TOKENS.npy FOLDER SEQ_LEN BATCH

Tuned: rows are stored as they are fed (fixed-size lists of uint16), batches come as numpy arrays through the map-style
dataset with shuffled indices, and through the iterable one with a buffer of 1,000 rows.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from benchmarks.parts.usage import measure, report


def _write(tokens: str, folder: Path, width: int) -> None:
    if folder.exists():
        return
    values = np.load(tokens, mmap_mode="r")
    rows = values.size // width
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.array(values[: rows * width])), width)
    datasets.Dataset(pa.table({"tokens": column})).save_to_disk(str(folder))


def _sizes(batches: Iterable[Any]) -> Iterator[int]:
    for one in batches:
        yield np.asarray(one["tokens"]).size


def main() -> None:
    """Write the rows where they are not there yet, and read an epoch in each setting."""
    tokens, folder, width, batch = sys.argv[1], Path(sys.argv[2]) / "hf", int(sys.argv[3]) + 1, int(sys.argv[4])
    datasets.disable_progress_bars()
    _write(tokens, folder, width)
    rows = datasets.load_from_disk(str(folder)).with_format("numpy")
    iterable = rows.to_iterable_dataset(num_shards=8).shuffle(seed=1, buffer_size=1000)
    report(
        [
            measure("map-style, shuffled", _sizes(rows.shuffle(seed=1).iter(batch_size=batch))),
            measure("iterable, buffer 1000", _sizes(iterable.iter(batch_size=batch))),
        ]
    )


if __name__ == "__main__":
    main()
