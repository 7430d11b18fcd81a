"""Rows of any kind of data, in the order asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from distopt.data.sources import ArraySource, DatasetSource, TensorSource, as_source

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


class Stream(IterableDataset[int]):
    """Has no rows."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: as_source(Stream()), "IterableDataset has no rows"),
        (lambda: as_source((torch.zeros(3), torch.zeros(4))), "found arrays of 3, 4 rows, expected the same number"),
        (lambda: TensorSource(), "found no arrays"),
    ],
)
def test_wrong_data_are_refused_with_what_is_expected(what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        what()


def test_array_of_text_is_refused_before_it_is_read() -> None:
    with pytest.raises(TypeError, match="can't convert"):
        ArraySource(np.array(["a", "b"]))


def test_dataset_of_single_values_becomes_a_batch_of_one_part() -> None:
    (batch,) = DatasetSource(list(range(10, 20))).read(np.array([2, 0]))
    assert batch.tolist() == [12, 10]
