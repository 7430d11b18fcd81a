"""Permutations of which single elements are computed are permutations, and look like those that are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.data import permutation
from distopt.data.permutation import permuted


@settings(deadline=None, max_examples=40)
@given(st.one_of(st.integers(1, 300), st.integers(65_537, 200_000)), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_each_element_comes_once_and_does_not_depend_on_what_else_is_asked_for(size, seed, epoch):
    every = permuted(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(every), np.arange(size))
    some = np.random.default_rng(0).integers(0, size, 100)
    assert np.array_equal(permuted(some, size, seed, epoch), every[some])


@pytest.mark.parametrize("size", [2**31 - 1, 2**32 + 7, 10**12, 2**60])
def test_large_sizes_stay_within_and_collide_nowhere(size):
    positions = np.unique(np.random.default_rng(1).integers(0, size, 50_000))
    values = permuted(positions, size, 5, 2)
    assert values.min() >= 0
    assert values.max() < size
    assert len(np.unique(values)) == len(positions)
    counts, _ = np.histogram(values, bins=100, range=(0, size))
    assert chi_square(counts, len(positions) / 100) < 2.0


def chi_square(counts, expected):
    """Returns the statistic over its degrees of freedom: about 1 where `counts` are of independent uniform draws."""
    return float(((counts - expected) ** 2).sum() / expected / (counts.size - 1))


SIZE, NUM_EPOCHS = 1_000, 2_000  # far below the sizes that the network serves, where it mixes least


def orders(monkeypatch):
    """Returns permutations by the network, (NUM_EPOCHS, SIZE)."""
    monkeypatch.setattr(permutation, "_DRAWN", 0)
    return np.stack([permuted(np.arange(SIZE), SIZE, 11, epoch) for epoch in range(NUM_EPOCHS)])


def test_rows_neighbours_and_epochs_are_independent_as_far_as_chi_square_tells(monkeypatch):
    each = orders(monkeypatch)
    limit = 1 + 6 * np.sqrt(2 / 99)  # 6 standard deviations of 99 degrees of freedom
    bins = 10 * each // SIZE
    for ahead in (1, 2, 31, 32, 500):  # 31 columns: neighbours in a row of the table and in a column
        pairs = np.bincount((10 * bins[:, :-ahead] + bins[:, ahead:]).ravel(), minlength=100)
        assert chi_square(pairs, pairs.sum() / 100) < limit
    epochs = np.bincount((10 * bins[:-1] + bins[1:]).ravel(), minlength=100)
    assert chi_square(epochs, epochs.sum() / 100) < limit
    for position in (0, 1, 500, SIZE - 1):
        counts = np.bincount(each[:, position], minlength=SIZE)
        assert chi_square(counts, NUM_EPOCHS / SIZE) < 1 + 6 * np.sqrt(2 / SIZE)


def test_a_batch_of_a_shuffled_epoch_has_the_variance_of_sampling_without_replacement(monkeypatch):
    each = orders(monkeypatch)
    values = np.random.default_rng(2).normal(size=SIZE)
    means = values[each[:, :100]].mean(1)
    expected = values.var(ddof=1) / 100 * (1 - 100 / SIZE)
    assert means.var() == pytest.approx(expected, rel=6 * np.sqrt(2 / NUM_EPOCHS))
