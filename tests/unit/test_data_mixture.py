"""Mixtures: exact counts over every prefix, and the source of any sample without the samples before it."""

import math
import random
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_service.mixture import MAX_SAMPLES, assign, counts_before
from tests.helpers.plans import slow_counts

WEIGHTS = st.lists(st.integers(0, 2**40), min_size=1, max_size=40).filter(any)


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 1], [3, 1], [0, 5], [5, 0, 0], [0, 0, 1, 0, 2], [7, 1, 1, 1, 1], [10**9 - 1, 1], list(range(1, 18))],
)
def test_sources_of_samples_are_those_of_a_tree_with_counters(weights):
    samples = 700
    slow = list(slow_counts(weights, samples))
    source, index = assign(weights, np.arange(samples, dtype=np.uint64))
    assert list(zip(source.tolist(), index.tolist(), strict=True)) == slow


@given(WEIGHTS, st.integers(0, MAX_SAMPLES - 300))
def test_a_range_anywhere_continues_the_counts_before_it(weights, begin):
    source, index = assign(weights, np.arange(begin, begin + 300, dtype=np.uint64))
    counts = counts_before(weights, begin)
    for one, at in zip(source.tolist(), index.tolist(), strict=True):
        assert at == counts[one]
        counts[one] += 1
    assert counts == counts_before(weights, begin + 300)


@given(WEIGHTS, st.integers(0, 10**30))
def test_every_prefix_holds_the_weights_proportions(weights, samples):
    counts = counts_before(weights, samples)
    total = sum(weights)
    assert sum(counts) == samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(samples * weight, total)) <= math.log2(len(weights)) + 1
        assert weight or not count


def test_proportions_hold_at_every_sample_of_a_long_run():
    draw = random.Random(4)
    for size in (2, 3, 5, 8, 13):
        weights = [draw.randrange(1, 10**6) for _ in range(size)]
        source, _ = assign(weights, np.arange(20_000, dtype=np.uint64))
        counts = np.cumsum(source[:, None] == np.arange(size), axis=0)
        exact = np.arange(1, 20_001)[:, None] * (np.array(weights) / sum(weights))
        assert np.abs(counts - exact).max() <= math.log2(size) + 1


def test_sizes_as_weights_end_each_epoch_exactly():
    sizes = [17, 400, 3, 1, 96]
    for epoch in range(4):
        assert counts_before(sizes, epoch * sum(sizes)) == [epoch * size for size in sizes]


def test_the_largest_numbers_are_exact():
    draw = random.Random(9)
    for _ in range(300):
        weights = [draw.randrange(2**38, 2**41) for _ in range(draw.randrange(2, 12))]
        weights[0] = 2**46 - 1 - sum(weights[1:])
        samples = [draw.randrange(MAX_SAMPLES) for _ in range(20)] + [MAX_SAMPLES - 1]
        source, index = assign(weights, np.array(samples, dtype=np.uint64))
        for sample, one, at in zip(samples, source.tolist(), index.tolist(), strict=True):
            before, after = counts_before(weights, sample), counts_before(weights, sample + 1)
            assert at == before[one]
            assert after[one] == before[one] + 1


def test_many_sources_cost_their_logarithm():
    weights = [1 + number for number in range(1024)]
    samples = np.arange(512, dtype=np.uint64) + np.uint64(10**15)
    assign(weights, samples)
    began = time.process_time()
    for _ in range(10):
        assign(weights, samples)
    assert time.process_time() - began < 0.2
