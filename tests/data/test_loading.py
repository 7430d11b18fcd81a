"""Every row comes as often as it should, from any kind of data, at any world size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from distopt.data.batches import GlobalBatches
from distopt.data.loading import Ahead, Loader, shard_batches, shard_rows
from distopt.data.sources import ArraySource, DatasetSource, as_source

NUM_ROWS = 23
VALUES = np.arange(2.0 * NUM_ROWS).reshape(NUM_ROWS, 2)


class Items(Dataset[Any]):
    """A map-style dataset of pairs."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(VALUES[index]), index


class ManyItems(Items):
    """One that reads many at once."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[index] for index in indices]


def _sources(folder: Path) -> dict[str, Any]:
    np.save(folder / "values.npy", VALUES)
    np.save(folder / "index.npy", np.arange(NUM_ROWS))
    np.save(folder / "foreign.npy", VALUES.astype(">f4"))
    fortran = np.asfortranarray(VALUES)
    return {
        "tensors": (torch.from_numpy(VALUES), torch.arange(NUM_ROWS)),
        "files": (folder / "values.npy", str(folder / "index.npy")),
        "other byte order": (folder / "foreign.npy", folder / "index.npy"),
        "arrays": (fortran, np.arange(NUM_ROWS)),
        "dataset": Items(),
        "dataset of many": ManyItems(),
    }


def test_any_source_gives_the_rows_asked_for_in_their_order(tmp_path: Path) -> None:
    rows = np.array([5, 22, 0, 5])
    for name, data in _sources(tmp_path).items():
        source = as_source(data)
        assert len(source) == NUM_ROWS, name
        values, index = source.read(rows)
        assert index.tolist() == rows.tolist(), name
        np.testing.assert_array_equal(values, VALUES[rows], err_msg=name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_read_the_global_batch_of_one_rank(world_size: int) -> None:
    alone = GlobalBatches(NUM_ROWS, 5, seed=3)
    for step in range(12):
        parts = []
        for rank in range(world_size):
            batches = GlobalBatches(NUM_ROWS, 5, seed=3, rank=rank, world_size=world_size)
            with Loader(torch.arange(NUM_ROWS), batches, num_ahead=0) as loader:
                parts.append(loader.batch(step)[0])
        assert torch.cat(parts).tolist() == alone.rows(step).tolist()


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
    class Broken(Items):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index == 7:
                raise OSError("row 7 cannot be read")
            return super().__getitem__(index)

    batches = GlobalBatches(NUM_ROWS)
    with Loader(Broken(), batches) as loader, pytest.raises(OSError, match="row 7 cannot be read"):
        loader.batch(0)


def test_array_twice_as_big_as_memory_is_read_without_holding_it(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    num_rows = 2 * total // (8 * 16)
    path = tmp_path / "big.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(num_rows, 16))  # a file of holes
    wanted = np.array([num_rows - 1, 0, num_rows // 2])
    array[wanted] = wanted[:, None]
    del array
    before = psutil.Process().memory_info().rss
    (values,) = ArraySource(path).read(wanted)
    assert values[:, 3].tolist() == wanted.tolist()
    assert psutil.Process().memory_info().rss - before < 50e6


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


class Stream(IterableDataset[int]):
    """Has no rows."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: as_source(Stream()), "IterableDataset has no rows"),
        (lambda: as_source((torch.zeros(3), torch.zeros(4))), "3, 4 rows"),
        (lambda: Loader(torch.zeros(3), GlobalBatches(4)), "the data have 3 rows, the batches are for 4"),
        (lambda: shard_rows(2, 0, 3), "2 rows cannot be split over 3 ranks"),
        (lambda: shard_batches(5, 0.0, 0, 0), "batch_fraction is 0.0"),
    ],
)
def test_wrong_data_are_refused_with_what_is_expected(what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        what()


def test_dataset_of_single_values_becomes_a_batch_of_one_part() -> None:
    (batch,) = DatasetSource(list(range(10, 20))).read(np.array([2, 0]))
    assert batch.tolist() == [12, 10]
