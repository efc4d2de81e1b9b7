"""The bigram baseline against a direct transcription of the formulas, and against sums that must be 1."""

import math
from collections import Counter

import numpy as np
import pytest

from data_service.errors import ConfigError
from trainer.baseline import Bigram, bigram_perplexity

VOCAB = 17


def _stream(length: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append((tokens[-1] * 3 + generator.zipf(1.6)) % VOCAB)
    return np.array(tokens, dtype=np.uint16)


def _brute_force(train: list[int], held_out: list[int]) -> float:
    """Dictionaries and loops only."""
    bigrams = Counter(zip(train, train[1:], strict=False))
    continuations = Counter(second for _, second in bigrams)

    def discount(count: int, counts: list[int]) -> float:
        n = [sum(1 for found in counts if found == wanted) for wanted in range(5)]
        share = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] and n[3] else None
        if share is None:
            return 0.75 if count else 0.0
        by_count = [0, 1 - 2 * share * n[2] / n[1], 2 - 3 * share * n[3] / n[2], 3 - 4 * share * n[4] / n[3]]
        if not all(0 < value < bound for value, bound in zip(by_count[1:], (1, 2, 3), strict=True)):
            return 0.75 if count else 0.0
        return by_count[min(count, 3)]

    def lower(second: int) -> float:
        counts = list(continuations.values())
        spread = sum(discount(count, counts) for count in counts) / len(bigrams)
        found = continuations[second]
        return (found - discount(found, counts)) / len(bigrams) + spread / VOCAB

    def probability(first: int, second: int) -> float:
        after = {other: count for (start, other), count in bigrams.items() if start == first}
        if not after:
            return lower(second)
        counts, total = list(bigrams.values()), sum(after.values())
        found = after.get(second, 0)
        left = sum(discount(count, counts) for count in after.values()) / total
        return (found - discount(found, counts)) / total + left * lower(second)

    logs = [math.log(probability(first, second)) for first, second in zip(held_out, held_out[1:], strict=False)]
    return math.exp(-sum(logs) / len(logs))


@pytest.mark.parametrize(("length", "seed"), [(2, 0), (5, 1), (30, 2), (400, 3), (3000, 4)])
def test_equals_the_formulas(length: int, seed: int) -> None:
    train, held_out = _stream(length, seed), _stream(200, seed + 50)
    found = bigram_perplexity([train], [held_out], VOCAB)
    assert found == pytest.approx(_brute_force(train.tolist(), held_out.tolist()), rel=1e-9)


def test_by_hand() -> None:
    # "0 1 0 1 0 2": 01 twice, 10 twice, 02 once; discounts fall back to 0.75
    model = Bigram.fit([np.array([0, 1, 0, 1, 0, 2])], 3)
    # continuations: 0 <- {1}, 1 <- {0}, 2 <- {0}: each (1 - 0.75)/3 + 0.75/3 = 1/3
    assert model.lower.tolist() == pytest.approx([1 / 3] * 3)
    first, second = np.array([0, 0, 0, 2]), np.array([1, 2, 0, 1])
    left = 2 * 0.75 / 3
    expected = [(2 - 0.75) / 3 + left / 3, (1 - 0.75) / 3 + left / 3, left / 3, 1 / 3]
    assert model.probabilities(first, second).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 2, 40, 5000])
def test_probabilities_after_every_token_sum_to_one(length: int) -> None:
    model = Bigram.fit([_stream(length, 9)], VOCAB)
    for first in range(VOCAB):
        after = model.probabilities(np.full(VOCAB, first), np.arange(VOCAB))
        assert after.min() > 0
        assert after.sum() == pytest.approx(1.0)


def test_pieces_of_the_stream_do_not_matter() -> None:
    train, held_out = _stream(2000, 5), _stream(300, 6)
    whole = bigram_perplexity([train], [held_out], VOCAB)
    pieces = bigram_perplexity(np.split(train, [1, 2, 700, 700]), np.split(held_out, [100, 101]), VOCAB)
    assert pieces == pytest.approx(whole, rel=1e-12)
    assert whole < VOCAB


def test_large_vocabulary_does_not_overflow() -> None:
    vocab = 4_000_000
    tokens = np.array([vocab - 1, vocab - 2] * 50, dtype=np.uint32)
    assert bigram_perplexity([tokens], [tokens], vocab) < 1.2


def test_nothing_held_out_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"data\.split\.eval"):
        bigram_perplexity([_stream(50, 0)], [np.array([1])], VOCAB)
