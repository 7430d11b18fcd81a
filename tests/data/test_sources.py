"""Rows of any kind of data, in the order asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import xarray
from scipy import sparse
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
    with pytest.raises(TypeError, match="found an array of <U1; give numbers"):
        ArraySource(np.array(["a", "b"]))


def test_dataset_of_single_values_becomes_a_batch_of_one_part() -> None:
    (batch,) = DatasetSource(list(range(10, 20))).read(np.array([2, 0]))
    assert batch.tolist() == [12, 10]


# Data of other libraries. x is 10 times the number of the row, and y is x plus 1, whatever the labels say.

POSITIONS = 10.0 * np.arange(NUM_ROWS)
SHUFFLED = pd.DataFrame({"x": POSITIONS, "y": POSITIONS + 1}, index=np.random.default_rng(0).permutation(NUM_ROWS))


class Columns:
    """A table as Hugging Face's: rows by number, columns by name."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, int):
            raise TypeError(f"expected an integer, found {index!r}")
        return self._values[index]


class RowTable(Columns):
    def __init__(self) -> None:
        super().__init__([{"x": 10.0 * row, "y": 10.0 * row + 1} for row in range(NUM_ROWS)])

    def keys(self) -> list[str]:
        return ["x", "y"]

    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [self[row] for row in rows]


class OnDisk:
    """An array as h5py's: no array of rows that does not ascend, and no methods of numpy."""

    shape = (NUM_ROWS,)
    dtype = np.dtype(float)

    def __getitem__(self, rows: Any) -> Any:
        assert (np.diff(rows) > 0).all(), "rows must ascend"
        return POSITIONS[rows]


SERIES_X, SERIES_Y = SHUFFLED["x"], SHUFFLED["y"]
PAIRS = {
    "array and series": (POSITIONS, SERIES_Y),
    "series": (SERIES_X, SERIES_Y),
    "series of rows in another order": (SERIES_X, SERIES_Y.set_axis(SERIES_Y.index[::-1])),
    "series of nullable numbers": (SERIES_X.astype("Float64"), SERIES_Y.astype("Int64")),
    "index": (pd.Index(POSITIONS), SERIES_Y),
    "duplicate labels": (SERIES_X.set_axis([0] * NUM_ROWS), SERIES_Y.set_axis(list("aabb") * 5 + list("abc"))),
    "series and tensor": (SERIES_X, torch.from_numpy(POSITIONS + 1)),
    "tensor and array": [torch.from_numpy(POSITIONS), POSITIONS + 1],
    "array on disk and series": (OnDisk(), SERIES_Y),
    "lists": (POSITIONS.tolist(), (POSITIONS + 1).tolist()),
    "list and array": [POSITIONS.tolist(), POSITIONS + 1],
    "range and list": (range(0, 10 * NUM_ROWS, 10), (POSITIONS + 1).tolist()),
    "columns of a dataset": (Columns(POSITIONS.tolist()), Columns((POSITIONS + 1).tolist())),
    "dataset beside a list": (Columns(POSITIONS), (POSITIONS + 1).tolist()),
    "unmasked array": (np.ma.array(POSITIONS, mask=False), POSITIONS + 1),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_rows_of_several_arrays_are_paired_by_position_whatever_their_labels(kind: str) -> None:
    source = as_source(PAIRS[kind])
    assert len(source) == NUM_ROWS
    for rows in ([5, 22, 0, 5], list(range(NUM_ROWS))[::-1]):
        x, y = source.read(np.array(rows))
        assert x.tolist() == [10.0 * row for row in rows] and y.tolist() == [10.0 * row + 1 for row in rows]


WIDE = np.where(VALUES % 3 == 0, 0.0, VALUES)


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame(WIDE, index=SHUFFLED.index),
        pd.DataFrame(WIDE, columns=["a", "a"]),
        *(kind(WIDE) for kind in (sparse.csr_matrix, sparse.csc_matrix, sparse.coo_matrix, sparse.lil_array)),
        sparse.csc_array(WIDE),
        torch.from_numpy(WIDE).to_sparse(),
        np.asmatrix(WIDE),
        WIDE.tolist(),
        (Columns(WIDE.tolist()),),
    ],
    ids=lambda data: type(data).__name__,
)
def test_tables_and_sparse_matrices_are_read_as_dense_rows_by_position(data: Any) -> None:
    rows = np.array([5, 22, 0, 5])
    source = as_source((data,) if isinstance(data, list) else data)
    assert len(source) == NUM_ROWS
    (values,) = source.read(rows)
    np.testing.assert_array_equal(values, WIDE[rows])


def test_table_of_named_rows_is_a_dataset_of_mappings() -> None:
    (batch,) = as_source(RowTable()).read(np.array([3, 1]))
    assert {name: values.tolist() for name, values in batch.items()} == {"x": [30.0, 10.0], "y": [31.0, 11.0]}


class Annotated:
    """As AnnData."""

    X = VALUES
    obs = SHUFFLED

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, rows: Any) -> Any:
        return self


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"x": POSITIONS, "y": POSITIONS}, ValueError, r"found a dict, .* \(data\['x'\], data\['y'\]\)"),
        (Annotated(), ValueError, r"\(data.X, data.obs\['name'\]\)"),
        (torch.utils.data.DataLoader(list(POSITIONS)), ValueError, "give its `dataset`"),
        (pd.DataFrame({"a": [1.0], "b": ["x"]}), TypeError, "number categories by .cat.codes"),
        (pd.Series(["a", "b"], dtype="category"), TypeError, "number categories by .cat.codes"),
        (SHUFFLED.assign(c=pd.Timestamp(0)), TypeError, "astype"),
        (np.ma.array(POSITIONS, mask=POSITIONS > 50), ValueError, "fill it by array.filled"),
        (np.array([None, 1.0]), TypeError, "found an array of object; give numbers"),
        (np.array(3.0), ValueError, r"expected \(num_rows, ...\)"),
        (([1.0, 2.0], ["a", "b"]), TypeError, "found an array of <U1; give numbers"),
        (([[1.0], [2.0, 3.0]], [1, 2]), ValueError, "found a list whose items differ in length"),
        ((POSITIONS, POSITIONS[:-1].tolist()), ValueError, "found arrays of 23, 22 rows"),
        ((), ValueError, "found no arrays"),
        ({1, 2}, ValueError, "data of type set cannot be read by row"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), ValueError, "pad it by"),
        (torch.ones(4, device="meta"), ValueError, "has no values"),
        ((torch.ones(4, device="meta"), torch.ones(4)), ValueError, "has no values"),
        (torch.tensor(3.0), ValueError, r"expected \(num_rows, ...\)"),
        (torch.ones(4).untyped_storage(), ValueError, "give the tensor"),
        (SHUFFLED.groupby("x"), ValueError, "give the table itself, data.obj"),
        ((SHUFFLED.groupby("x").y, POSITIONS), ValueError, "give the table itself, data.obj"),
        (xarray.Dataset({"x": ("row", POSITIONS)}), ValueError, r"such as \(data\['x'\],\)"),
    ],
)
def test_data_without_rows_of_numbers_are_refused_with_the_edit(data: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        as_source(data)


@pytest.mark.filterwarnings("ignore")  # torch's own words about these kinds
@pytest.mark.parametrize("source", [as_source, TensorSource])
def test_tensors_that_are_no_rows_of_numbers_are_refused_wherever_a_source_is_made(source: Any) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    for tensor, message in ((nested, "pad it by"), (quantized, "dequantize"), (torch.ones(()), "without dimensions")):
        with pytest.raises(ValueError, match=message):
            source(tensor)


def test_file_of_several_arrays_is_refused_with_their_names_and_tilde_is_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "both.npz", x=POSITIONS, y=POSITIONS)
    with pytest.raises(ValueError, match=r"both.npz holds several arrays; .* \(data\['x'\], data\['y'\]\)"):
        as_source(tmp_path / "both.npz")
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", POSITIONS)
    assert as_source("~/x.npy").read(np.array([2]))[0].tolist() == [20.0]
