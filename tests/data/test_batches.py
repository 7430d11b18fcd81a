from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.data import GlobalBatches, batches


@st.composite
def sizes(draw):
    """(rows, global batch, ranks, seed) with at least one row per rank and batch."""
    num_rows = draw(st.integers(1, 60))
    global_batch = draw(st.integers(1, num_rows))
    return num_rows, global_batch, draw(st.integers(1, global_batch)), draw(st.integers(0, 2**63 - 1))


@settings(deadline=None)
@given(sizes(), st.integers(0, 200))
def test_global_batch_whatever_the_world_size_has_the_same_rows(size, step):
    num_rows, global_batch, world_size, seed = size
    alone = GlobalBatches(num_rows, global_batch, seed).rows(step)
    shared = [GlobalBatches(num_rows, global_batch, seed, rank, world_size).rows(step) for rank in range(world_size)]
    assert np.array_equal(np.sort(np.concatenate(shared)), alone)
    assert all((np.diff(share) >= 0).all() for share in shared)
    assert len(alone) == global_batch
    assert max(map(len, shared)) - min(map(len, shared)) <= 1


@settings(deadline=None)
@given(sizes(), st.integers(1, 4))
def test_batches_hold_each_row_once_per_epoch(size, num_epochs):
    num_rows, global_batch, _, seed = size
    batches = GlobalBatches(num_rows, global_batch, seed)
    counts = np.zeros(num_rows, int)
    for step in range(num_rows * num_epochs // global_batch):
        counts += np.bincount(batches.rows(step), minlength=num_rows)
    rest = num_rows * num_epochs % global_batch
    assert counts.sum() == num_rows * num_epochs - rest
    assert num_epochs - rest <= counts.min() and counts.max() <= num_epochs  # the rest of the last epoch comes later


@settings(deadline=None)
@given(sizes())
def test_weights_make_the_mean_over_ranks_the_loss_of_the_global_batch(size):
    num_rows, global_batch, world_size, seed = size
    loss = np.random.default_rng(0).normal(size=num_rows)  # of each row
    ranks = [GlobalBatches(num_rows, global_batch, seed, rank, world_size) for rank in range(world_size)]
    shares = [batches.weight * num_rows * loss[batches.rows(3)].mean() for batches in ranks]
    whole = num_rows * loss[GlobalBatches(num_rows, global_batch, seed).rows(3)].mean()
    assert np.mean(shares) == pytest.approx(whole)


def test_order_depends_on_seed_and_step_and_not_on_the_steps_asked_before():
    batches = GlobalBatches(1000, 64, seed=3)
    asked_in_order = [batches.rows(step) for step in range(40)]
    assert np.array_equal(GlobalBatches(1000, 64, seed=3).rows(39), asked_in_order[39])
    assert np.array_equal(batches.rows(0), asked_in_order[0])
    assert not np.array_equal(GlobalBatches(1000, 64, seed=4).rows(0), asked_in_order[0])
    of_next_epoch = GlobalBatches(1024, 64, seed=3)
    assert not np.array_equal(of_next_epoch.rows(0), of_next_epoch.rows(16)), "each epoch has an order of its own"


@settings(deadline=None)
@given(st.data(), st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_order_is_the_same_whether_rows_are_looked_for_or_put_in_order(data, num_rows, num_digits, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "NUM_DIGITS", num_digits)
        searched, ordered = (batches._Permutation(num_rows, seed, 5, is_searched) for is_searched in (True, False))
        one_by_one = np.concatenate([ordered.rows(at, at + 1) for at in range(num_rows)])
        first = data.draw(st.integers(0, num_rows - 1))
        last = data.draw(st.integers(first + 1, num_rows))
        expected = np.sort(one_by_one[first:last])
        assert np.array_equal(searched.rows(first, last), expected)
        assert np.array_equal(ordered.rows(first, last), expected)
    assert np.array_equal(np.sort(one_by_one), np.arange(num_rows))


@pytest.mark.parametrize("num_digits", [1, 2, 3, 4])
def test_every_order_of_the_rows_is_as_likely(num_digits, monkeypatch):
    monkeypatch.setattr(batches, "NUM_DIGITS", num_digits)
    permutations = [batches._Permutation(4, seed, 0, is_searched=True) for seed in range(4800)]
    orders = [tuple(each.rows(at, at + 1).item() for at in range(4)) for each in permutations]
    counts = [orders.count(each) for each in itertools.permutations(range(4))]
    assert sum(counts) == 4800
    assert scipy.stats.chisquare(counts).pvalue > 1e-4  # the seeds are the same in every run


def test_more_rows_than_digits_are_all_read_once_an_epoch_in_large_and_small_batches():
    num_rows = 3 * batches.NUM_DIGITS // 2
    for global_batch in (num_rows // 2, num_rows // 256):
        each = GlobalBatches(num_rows, global_batch, seed=1)
        rows = np.concatenate([each.rows(step) for step in range(num_rows // global_batch)])
        assert np.array_equal(np.sort(rows), np.arange(num_rows))
    large, small = (GlobalBatches(num_rows, num_rows // count, seed=1) for count in (2, 128))
    assert np.array_equal(np.sort(np.concatenate([small.rows(step) for step in range(64)])), large.rows(0))


def test_no_global_batch_takes_all_rows_at_each_step_and_shares_them():
    shares = [GlobalBatches(7, None, rank=rank, world_size=3) for rank in range(3)]
    for step in (0, 5):
        assert [share.rows(step).tolist() for share in shares] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [share.weight for share in shares] == [pytest.approx(6 / 7), pytest.approx(6 / 7), pytest.approx(9 / 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_rows=10, global_batch=11), "10 rows: make it smaller, or None"),
        (dict(num_rows=10, global_batch=2, world_size=3), "cannot be shared by 3 ranks"),
        (dict(num_rows=10, global_batch=2, rank=2, world_size=2), "rank 2 is not in a world of 2"),
    ],
)
def test_impossible_sizes_are_refused_with_the_edit_that_mends_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatches(**arguments)


def test_all_ranks_draw_an_epoch_in_the_same_step_and_once(monkeypatch):
    class Noted(batches._Permutation):
        def __init__(self, num_rows, seed, number, is_searched):
            drawn.append(number)
            super().__init__(num_rows, seed, number, is_searched)

    monkeypatch.setattr(batches, "_Permutation", Noted)
    steps_by_rank = []
    for rank in range(3):
        ranks = GlobalBatches(100, 30, seed=1, rank=rank, world_size=3)
        steps = []
        for step in range(20):
            drawn = []
            ranks.rows(step)
            steps.append(tuple(drawn))
        steps_by_rank.append(steps)
    assert steps_by_rank[0] == steps_by_rank[1] == steps_by_rank[2]
    assert list(itertools.chain.from_iterable(steps_by_rank[0])) == list(range(6))
