"""litdata's StreamingDataset over the same tokens: the fastest way it has, blocks of tokens from chunks on local disk.

    PYTHONPATH=PEERS:. python -m benchmarks.peers.litdata_tokens TOKENS.npy FOLDER SEQ_LEN BATCH

Tuned: TokensLoader, chunks of 64 MB, shuffled, with none and with one loading process, tokens as uint16 where this
release can and as int32. The loading processes' time counts as the trainer's, in whose machine they run.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

from benchmarks.parts.usage import Reading, measure, report

CHUNK_BYTES = 64 << 20
PIECE = 1 << 20


def _piece(begin: int, tokens: str, dtype: str) -> Any:
    values = np.load(tokens, mmap_mode="r")[begin : begin + PIECE]
    return torch.from_numpy(values.astype(dtype))


def _write(tokens: str, folder: Path, width: int, dtype: str) -> None:
    if (folder / "index.json").exists():
        return
    size = np.load(tokens, mmap_mode="r").size
    itemsize = np.dtype(dtype).itemsize
    litdata.optimize(
        fn=partial(_piece, tokens=tokens, dtype=dtype),
        inputs=list(range(0, size, PIECE)),
        output_dir=str(folder),
        chunk_size=CHUNK_BYTES // itemsize // width * width,
        item_loader=TokensLoader(block_size=width),
        num_workers=1,
        verbose=False,
    )


def _sizes(folder: Path, width: int, batch: int, workers: int) -> Iterator[int]:
    dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=width), shuffle=True, seed=1)
    for rows in StreamingDataLoader(dataset, batch_size=batch, num_workers=workers):
        yield rows.numel()


def main() -> None:
    """Write the chunks where they are not there yet, and read an epoch in each setting."""
    tokens, root, width, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) + 1, int(sys.argv[4])
    readings: list[Reading] = []
    for dtype in ("uint16", "int32"):
        folder = root / f"litdata-{dtype}"
        try:
            _write(tokens, folder, width, dtype)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            sys.stderr.write(f"litdata does not take {dtype} tokens: {error}\n")
            continue
        for workers in (0, 1):
            readings.append(measure(f"{dtype}, {workers} workers", _sizes(folder, width, batch, workers)))
    report(readings)


if __name__ == "__main__":
    main()
