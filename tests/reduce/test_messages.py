"""The control slots: what is written on each rank, summed, and read on all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.reduce.messages import (
    BASE,
    NUM_CHECKSUM_DIGITS,
    NUM_SLOTS,
    RankMessage,
    RoundKind,
    RoundSummary,
    read_summary,
    write_message,
    write_slots_,
)

GRADIENT = RoundKind.GRADIENT


def summed(*messages: RankMessage, dtype: torch.dtype = torch.float32) -> RoundSummary:
    """Returns what every rank reads when each has written one of `messages`."""
    rows = torch.zeros(len(messages), NUM_SLOTS, dtype=dtype)
    for row, message in zip(rows, messages, strict=True):
        write_message(row, message)
    return read_summary(rows.sum(0), len(messages))


def test_summary_counts_flags_and_averages_the_values_that_were_given() -> None:
    summary = summed(
        RankMessage(7, GRADIENT, has_changes=True, values=(1.0, 3.0), rank_local_square=2.0),
        RankMessage(7, GRADIENT, stop=True, nonfinite=True, values=(4.0, 4.0)),
        RankMessage(7, GRADIENT, stop=True, rank_local_square=0.5),
    )
    assert (summary.num_active, summary.num_changed, summary.num_aborts) == (3, 1, 0)
    assert (summary.num_stops, summary.num_nonfinite) == (2, 1)
    assert (summary.mean_values, summary.rank_local_square) == ((2.5, 3.5), 2.5)
    assert summary.kind is GRADIENT and summary.in_step and summary.in_sync


def test_joined_ranks_follow_the_step_and_kind_of_the_active_ones() -> None:
    summary = summed(RankMessage(3, None), RankMessage(9, RoundKind.SCHEDULE), RankMessage(100, None))
    assert (summary.num_active, summary.kind, summary.in_step) == (1, RoundKind.SCHEDULE, True)
    nobody = summed(RankMessage(3, None), RankMessage(4, None))
    assert (nobody.num_active, nobody.kind, nobody.mean_values) == (0, None, ())


def test_failed_rank_is_counted() -> None:
    assert summed(RankMessage(3, GRADIENT), RankMessage(3, RoundKind.ABORT)).num_aborts == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equality_of_digits_is_exact_for_4096_ranks(dtype: torch.dtype) -> None:
    size = 4096
    last = RankMessage(BASE - 4, GRADIENT, checksum=BASE**NUM_CHECKSUM_DIGITS - 1)
    slots = torch.zeros(NUM_SLOTS, dtype=dtype)
    write_message(slots, last)
    assert read_summary(slots * size, size).in_sync

    other = torch.zeros(NUM_SLOTS, dtype=dtype)
    write_message(other, RankMessage(BASE - 5, GRADIENT, checksum=BASE**NUM_CHECKSUM_DIGITS - 2))
    summary = read_summary(slots * (size - 1) + other, size)
    assert not summary.in_sync and not summary.in_step


@given(
    steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    sums=st.lists(st.integers(0, 2**48 - 1), min_size=5, max_size=5),
)
def test_ranks_are_in_step_and_in_sync_exactly_when_their_numbers_are_equal(steps: list[int], sums: list[int]) -> None:
    messages = [RankMessage(step, GRADIENT, checksum=total) for step, total in zip(steps, sums, strict=False)]
    summary = summed(*messages)
    assert summary.in_step == (len({step % 61 for step in steps}) == 1)
    assert summary.in_sync == (len(set(sums[: len(steps)])) == 1)


@given(first=st.integers(0, 2**24 - 1), second=st.integers(0, 2**24 - 1))
def test_equal_generators_are_seen_and_those_of_joined_ranks_do_not_count(first: int, second: int) -> None:
    messages = [RankMessage(1, GRADIENT, rng=first), RankMessage(1, GRADIENT, rng=second), RankMessage(1, None, rng=7)]
    assert summed(*messages).same_rng == (first == second)


@pytest.mark.parametrize("differs", [{"schedule_steps": 3}, {"skipped_calls": 1}])
def test_rank_that_has_stepped_its_schedule_or_skipped_a_call_alone_is_not_in_step(differs: dict[str, int]) -> None:
    assert summed(RankMessage(7, GRADIENT, **differs), RankMessage(7, GRADIENT, **differs)).in_step
    assert not summed(RankMessage(7, GRADIENT, **differs), RankMessage(7, GRADIENT)).in_step
    assert summed(RankMessage(7, None, **differs), RankMessage(7, GRADIENT)).in_step, "a joined rank follows"


def test_parameter_is_stepped_only_if_the_round_counts_and_a_rank_has_touched_it() -> None:
    slots = torch.zeros(NUM_SLOTS + 3)
    write_message(slots, RankMessage(0, GRADIENT))
    write_slots_(slots[NUM_SLOTS:], [2.0, 0.0, 1.0])
    summary = read_summary(slots, 1)
    assert [summary.is_stepped(index) for index in range(3)] == [True, False, True]
    write_message(slots, RankMessage(0, GRADIENT, has_changes=True))
    assert not read_summary(slots, 1).is_stepped(0)
