"""How well the order shuffles, for windows of different sizes: the table in docs/data.md.

    python -m benchmarks.shuffle_quality --shards 256 --rows-per-shard 4096 --global-batch 512

Only the order is computed; no shard is read. Measured over one whole epoch for each window and seed:

- neighbour distance: how far apart two rows that lie side by side in a shard come in the order, as a multiple of what a
  uniform shuffle gives (a third of the epoch in the mean, 0.293 of it in the median, 0.0253 of it at the 5th
  percentile).
- neighbours in a batch: how often two such rows meet in one global batch, as a multiple of the uniform shuffle's rate.
- shards in a batch: distinct shards in a global batch, in the mean and in the worst batch of the epoch.
- batch drift: the root mean square, over batches, of the distance between the mean place of a batch's rows in the
  dataset and the dataset's middle, as a multiple of the uniform shuffle's. Where text is sorted by topic or date, this
  is how much more the batches differ from each other than independent samples would.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from data_service.order import rows_of_batches
from data_service.plan import PLAN_VERSION, Plan, PlanPart, Segment

__all__ = ["Quality", "main", "measure", "quality_of"]


@dataclass(frozen=True)
class Quality:
    """Of one epoch; 1 is a uniform shuffle where nothing else is said."""

    mean_distance: float
    median_distance: float
    p05_distance: float
    neighbours_in_batch: float
    mean_shards: float
    """Distinct shards in a global batch."""
    least_shards: float
    """In the batch with the fewest."""
    drift: float


def quality_of(rows: npt.NDArray[np.int64], rows_per_shard: int, global_batch: int) -> Quality:
    """The quality of an order.

    Args:
        rows: int64 [n], a permutation of 0 … n-1: row numbers in the order in which they come.
        rows_per_shard: rows that lie in one shard.
        global_batch: rows of a batch; a rest at the end that fills none is left out of the figures by batch.
    """
    count = rows.size
    place = np.empty(count, dtype=np.int64)
    place[rows] = np.arange(count)
    distance = np.abs(np.diff(place)) / count
    p05, median = np.quantile(distance, [0.05, 0.5])
    together = np.mean(np.diff(place // global_batch) == 0)
    batches = rows[: count - count % global_batch].reshape(-1, global_batch)
    shards = np.sort(batches // rows_per_shard, axis=1)
    distinct = 1 + np.count_nonzero(np.diff(shards, axis=1), axis=1)
    drift = np.sqrt(np.mean(((batches.mean(axis=1) + 0.5) / count - 0.5) ** 2))
    # Two of n places are |difference| > x apart with probability (1 - x)^2.
    return Quality(
        mean_distance=float(distance.mean() * 3),
        median_distance=float(median / (1 - 0.5**0.5)),
        p05_distance=float(p05 / (1 - 0.95**0.5)),
        neighbours_in_batch=float(together / ((global_batch - 1) / (count - 1))),
        mean_shards=float(distinct.mean()),
        least_shards=float(distinct.min()),
        drift=float(drift * np.sqrt(12 * global_batch)),
    )


def measure(shards: int, rows_per_shard: int, global_batch: int, window: int | None, seed: int) -> Quality:
    """One epoch of one source; `window` None is a uniform shuffle of numpy."""
    count = shards * rows_per_shard
    if window is None:
        rows = np.random.default_rng(seed).permutation(count)
    else:
        plan = Plan(
            version=PLAN_VERSION,
            dataset_digest="shuffle quality",
            split="train",
            rows="stream",
            seed=seed,
            seq_len=1024,
            global_batch=global_batch,
            window_shards=window,
            shuffle=True,
            isolate_documents=False,
            loss_masks=False,
            num_labels=0,
            parts=(PlanPart("source", 0, count, rows_per_shard),),
            segments=(Segment(0, (count,)),),
            skip=(),
        )
        rows = rows_of_batches(plan, 0, -(-count // global_batch)).row_id[:count].astype(np.int64)
    return quality_of(rows, rows_per_shard, global_batch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table in Markdown: the median over the seeds, and the largest spread (max - min) of each column."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=256)
    parser.add_argument("--rows-per-shard", type=int, default=4096)
    parser.add_argument("--global-batch", type=int, default=512)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    print(f"{given.shards} shards of {given.rows_per_shard} rows, global batches of {given.global_batch}")
    print()
    print(
        "| data.shuffle_window_shards | neighbour distance, mean | median | 5th percentile | neighbours in a batch "
        "| shards in a batch | in the worst batch | batch drift |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    spreads = []
    for window in (*given.windows, None):
        found = [
            astuple(measure(given.shards, given.rows_per_shard, given.global_batch, window, seed))
            for seed in range(given.seeds)
        ]
        columns = list(zip(*found, strict=True))
        spreads.append([max(column) - min(column) for column in columns])
        cells = [f"{statistics.median(column):.3g}" for column in columns]
        print(f"| {window or 'uniform shuffle'} | {' | '.join(cells)} |")
    cells = [f"{max(column):.2g}" for column in zip(*spreads, strict=True)]
    print(f"| largest spread of {given.seeds} seeds | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
