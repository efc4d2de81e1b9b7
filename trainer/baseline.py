"""The bigram model that a trained model must beat.

Interpolated modified Kneser-Ney (Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language
Modeling", equations 24 to 26), the lower order interpolated with the uniform distribution, so that every token has a
probability. It predicts the same tokens of the held-out stream as a model of stream rows does: all but the first (where
several preparations or sources gave one each, the model leaves out the first of each). Memory is bounded by the number
of distinct bigrams, not by the length of the corpus.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_service.errors import ConfigError

__all__ = ["Bigram", "bigram_perplexity"]

_DISCOUNT_OF_SMALL_CORPORA = 0.75
"""Absolute discount where counts of counts are too few to estimate one (Church and Gale 1991)."""
_MAX_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True, eq=False)
class Bigram:
    """A smoothed bigram model over `vocab_size` tokens."""

    vocab_size: int
    keys: NDArray[np.uint64]
    """Seen bigrams as first · vocab_size + second, ascending."""
    counts: NDArray[np.int64]
    """How often each was seen."""
    discounts: NDArray[np.float64]
    """By count: 0, 1, 2, 3 and more."""
    totals: NDArray[np.int64]
    """How often each token was followed by another; [vocab_size]."""
    left_over: NDArray[np.float64]
    """Probability that each token leaves to the lower order; 1 where it was never followed; [vocab_size]."""
    lower: NDArray[np.float64]
    """The lower order: share of the distinct bigrams that end in a token, smoothed; [vocab_size]."""

    @classmethod
    def fit(cls, stream: Iterable[NDArray[np.integer]], vocab_size: int) -> Self:
        """Count and smooth.

        Args:
            stream: consecutive pieces of one token stream, ids below `vocab_size`.
            vocab_size: tokens that share the probability.
        """
        keys, counts = _count(stream, vocab_size)
        first, second = (
            (keys // np.uint64(vocab_size)).astype(np.int64),
            (keys % np.uint64(vocab_size)).astype(np.int64),
        )
        discounts = _discounts(counts)
        taken = np.bincount(first, weights=discounts[np.minimum(counts, 3)], minlength=vocab_size)
        totals = np.bincount(first, weights=counts, minlength=vocab_size).astype(np.int64)
        left_over = np.where(totals > 0, taken / np.maximum(totals, 1), 1.0)
        return cls(vocab_size, keys, counts, discounts, totals, left_over, _lower_order(second, vocab_size))

    def probabilities(self, first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.float64]:
        """Probability of each `second` after its `first`; both of one length."""
        wanted = first.astype(np.uint64) * np.uint64(self.vocab_size) + second.astype(np.uint64)
        smoothed: NDArray[np.float64] = self.left_over[first] * self.lower[second]
        if not len(self.keys):
            return smoothed
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        counts = np.where(self.keys[places] == wanted, self.counts[places], 0)
        kept = counts - self.discounts[np.minimum(counts, 3)]
        return np.asarray(kept / np.maximum(self.totals[first], 1) + smoothed, dtype=np.float64)


def bigram_perplexity(
    train: Iterable[NDArray[np.integer]], eval: Iterable[NDArray[np.integer]], vocab_size: int
) -> float:
    """Perplexity on held-out tokens of a bigram model fitted to the training tokens.

    Args:
        train: consecutive pieces of the training stream.
        eval: consecutive pieces of the held-out stream.
        vocab_size: entries of the tokenizer.

    Returns:
        exp of the mean negative log probability of every held-out token but the first.

    Raises:
        ConfigError: the held-out stream has fewer than two tokens.
    """
    model = Bigram.fit(train, vocab_size)
    total, num_tokens = 0.0, 0
    for piece in _overlapping(eval):
        total -= float(np.log(model.probabilities(piece[:-1], piece[1:])).sum())
        num_tokens += len(piece) - 1
    if num_tokens == 0:
        raise ConfigError(
            "A bigram model was asked to predict the held-out split, which has fewer than two tokens. "
            "Raise data.split.eval."
        )
    return math.exp(total / num_tokens)


def _overlapping(stream: Iterable[NDArray[np.integer]]) -> Iterator[NDArray[np.int64]]:
    """Pieces of bounded length, each starting with the last token of the one before; each token is a second once."""
    last = np.empty(0, dtype=np.int64)
    for piece in stream:
        for begin in range(0, len(piece), _MAX_CHUNK_TOKENS):
            joined = np.concatenate((last, piece[begin : begin + _MAX_CHUNK_TOKENS].astype(np.int64)))
            if len(joined) > 1:
                yield joined
            last = joined[-1:]


def _count(stream: Iterable[NDArray[np.integer]], vocab_size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Distinct bigrams, ascending, and how often each occurs."""
    keys, counts = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    for piece in _overlapping(stream):
        found = piece[:-1].astype(np.uint64) * np.uint64(vocab_size) + piece[1:].astype(np.uint64)
        new_keys, new_counts = np.unique(found, return_counts=True)
        merged, places = np.unique(np.concatenate((keys, new_keys)), return_inverse=True)
        sums = np.bincount(places, weights=np.concatenate((counts, new_counts)), minlength=len(merged))
        keys, counts = merged, sums.astype(np.int64)
    return keys, counts


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Chen and Goodman 1998, equation 26: what a count of 0, 1, 2, 3 or more gives up."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == count)) for count in (1, 2, 3, 4))
    plain = np.array([0.0, *3 * [_DISCOUNT_OF_SMALL_CORPORA]])
    if not (n1 and n2 and n3):
        return plain
    share = n1 / (n1 + 2 * n2)
    estimated = np.array([0.0, 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3])
    sound = np.all(estimated[1:] > 0) and np.all(estimated < np.array([1.0, 1.0, 2.0, 3.0]))
    return estimated if sound else plain


def _lower_order(second: NDArray[np.int64], vocab_size: int) -> NDArray[np.float64]:
    """Continuation probabilities (equation 25 with equation 24's form), the rest spread evenly over all tokens."""
    continuations = np.bincount(second, minlength=vocab_size)
    num_bigrams = len(second)
    if num_bigrams == 0:
        return np.full(vocab_size, 1.0 / vocab_size)
    discounts = _discounts(continuations)
    taken = discounts[np.minimum(continuations, 3)]
    return np.asarray((continuations - taken) / num_bigrams + taken.sum() / num_bigrams / vocab_size, dtype=np.float64)
