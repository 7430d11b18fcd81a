"""Every row comes as often as it should, at any world size, read ahead or not."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from distopt.data.batches import GlobalBatches
from distopt.data.loading import Ahead, Loader, shard_batches, shard_rows

NUM_ROWS = 23


class Items(Dataset[Any]):
    """A map-style dataset, one of whose rows cannot be read."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> int:
        if index == 7:
            raise OSError("row 7 cannot be read")
        return index


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_read_the_global_batch_of_one_rank(world_size: int) -> None:
    alone = GlobalBatches(NUM_ROWS, 5, seed=3)
    for step in range(12):
        pieces = []
        for rank in range(world_size):
            batches = GlobalBatches(NUM_ROWS, 5, seed=3, rank=rank, world_size=world_size)
            with Loader(torch.arange(NUM_ROWS), batches, num_ahead=0) as loader:
                pieces.append(loader.batch(step)[0])
        assert sorted(torch.cat(pieces).tolist()) == alone.rows(step).tolist()


def test_steps_read_ahead_are_those_read_when_asked_for_also_after_a_jump() -> None:
    batches = GlobalBatches(NUM_ROWS, 4, seed=0)
    with Loader(torch.arange(NUM_ROWS), batches, num_ahead=3) as loader:
        for step in [0, 1, 2, 7, 8, 3, 3, 4]:
            assert loader.batch(step)[0].tolist() == batches.rows(step).tolist()
        assert [batch.tolist() for _, (batch,) in zip(range(2), loader.steps(5), strict=False)] == [
            batches.rows(step).tolist() for step in (5, 6)
        ]


def test_reading_ahead_happens_while_the_caller_works() -> None:
    fetched: list[int] = []
    second = threading.Event()

    def fetch(number: int) -> int:
        fetched.append(number)
        if number == 1:
            second.set()
        return number

    ahead = Ahead(fetch, 1)
    assert ahead.get(0) == 0
    assert second.wait(20), "the second was not fetched before it was asked for"
    ahead.close()
    assert fetched == [0, 1]


def test_error_of_the_data_is_raised_where_the_batch_is_asked_for() -> None:
    batches = GlobalBatches(NUM_ROWS)
    with Loader(Items(), batches) as loader, pytest.raises(OSError, match="row 7 cannot be read"):
        loader.batch(0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 23])
def test_shards_hold_every_row_once(world_size: int) -> None:
    shards = [shard_rows(NUM_ROWS, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shards).tolist() == list(range(NUM_ROWS))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_minibatches_of_a_shard_hold_each_datapoint_equally_often_and_differ_between_ranks() -> None:
    batches = shard_batches(20, 0.25, seed=1, rank=0)
    rows = np.concatenate([batches.rows(step) for step in range(8)])
    assert np.bincount(rows, minlength=20).tolist() == [2] * 20
    other = shard_batches(20, 0.25, seed=1, rank=1)
    assert batches.rows(0).tolist() != other.rows(0).tolist()
    assert batches.rows(3).tolist() == shard_batches(20, 0.25, seed=1, rank=0).rows(3).tolist()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: Loader(torch.zeros(3), GlobalBatches(4)), "the data have 3 rows, but the batches are made for 4"),
        (lambda: shard_rows(2, 0, 3), "2 rows cannot be split over 3 ranks"),
        (lambda: shard_batches(5, 0.0, 0, 0), "batch_fraction is 0.0"),
    ],
)
def test_wrong_data_are_refused_with_what_is_expected(what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        what()
