"""How many samples each of k sources gives up to any sample, in closed form.

A binary tree over the sources: of the first n samples of a node the left half of its sources gives
floor(n * left / all) and the right half the rest, with the weights' integer sums. So counts over any prefix are within
ceil(log2 k) of n times the share, never shrink, and sum to n; and the source of any sample follows from log2 k
divisions, with no state and no array. Weights that are the sources' own sizes come out exact at the end of each epoch.

Owns these counts. Knows neither rows nor plans.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SAMPLES", "assign", "counts_before", "descend"]

MAX_SAMPLES = 2**62
"""Samples are numbered below this. Weights sum to less than 2^46."""

_U64 = npt.NDArray[np.uint64]
_I64 = npt.NDArray[np.int64]


def counts_before(weights: Sequence[int], samples: int) -> list[int]:
    """How many of the first `samples` samples each source gives: exact integers that sum to `samples`.

    Args:
        weights: integers of at least 0, one above.
        samples: at least 0, of any size.
    """
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    counts = [0] * len(weights)
    nodes = [(0, len(weights), samples)]
    while nodes:
        low, high, count = nodes.pop()
        if not count:
            continue
        if high - low == 1:
            counts[low] = count
            continue
        middle = (low + high) // 2
        left = count * (sums[middle] - sums[low]) // (sums[high] - sums[low])
        nodes += [(low, middle, left), (middle, high, count - left)]
    return counts


def assign(weights: Sequence[int], samples: _U64) -> tuple[_I64, _U64]:
    """Which source gives each sample, and how many it has given before.

    Args:
        weights: integers of at least 0 that sum to less than 2^46 and more than 0.
        samples: uint64 [n], below MAX_SAMPLES, in any order.

    Returns:
        source int64 [n] and index_in_source uint64 [n]: counts_before(weights, samples[i])[source[i]].
    """
    sums = np.concatenate([[0], np.cumsum(np.asarray(weights, dtype=np.uint64))]).astype(np.uint64)
    low = np.zeros(samples.size, dtype=np.int64)
    return descend(sums, low, low + len(weights), samples)


def descend(sums: _U64, low: _I64, high: _I64, samples: _U64) -> tuple[_I64, _U64]:
    """`assign` for samples of several trees at once: sample i is in the tree of the sources [low[i], high[i]).

    Args:
        sums: uint64 [k+1], prefix sums of the weights of all sources; each tree's sum is above 0 and below 2^46.
        low: int64 [n].
        high: int64 [n].
        samples: uint64 [n], below MAX_SAMPLES.
    """
    for _ in range(int((high - low).max(initial=1) - 1).bit_length()):
        middle = (low + high) >> 1
        left_sum, node_sum = sums[middle] - sums[low], sums[high] - sums[low]
        taken, rest = _scaled(samples, left_sum, node_sum)
        # The sample goes left exactly when the count of the left half grows with it.
        is_left = rest + left_sum >= node_sum
        samples = np.where(is_left, taken, samples - taken)
        low, high = np.where(is_left, low, middle), np.where(is_left, middle, high)
    return low, samples


def _scaled(samples: _U64, numerator: _U64, denominator: _U64) -> tuple[_U64, _U64]:
    """floor(samples * numerator / denominator), and the remainder of that division; uint64 [n] each.

    With numerator <= denominator < 2^46 and samples < 2^62. The product has up to 108 bits: the quotient is split at
    the denominator, and the rest of it, below 2^46, is estimated in float64 with an error of at most 1, which the
    remainder, exact modulo 2^64, tells.
    """
    whole, part = np.divmod(samples, denominator)
    estimate = (part.astype(np.float64) * numerator.astype(np.float64) / denominator.astype(np.float64)).astype(
        np.uint64
    )
    rest = (part * numerator - estimate * denominator).view(np.int64)
    over = (rest >= denominator.view(np.int64)).astype(np.int64) - (rest < 0)
    estimate = estimate + over.view(np.uint64)
    rest = rest - over * denominator.view(np.int64)
    return whole * numerator + estimate, rest.view(np.uint64)
