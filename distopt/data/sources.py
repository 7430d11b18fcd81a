"""Where rows of data come from: tensors in memory, arrays on disk, map-style datasets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate


class Source(Protocol):
    """Rows that can be read in any order. Only one thread reads at a time."""

    def __len__(self) -> int:
        """Returns the number of rows."""

    def read(self, rows: NDArray[np.int64]) -> tuple[Any, ...]:
        """Returns the arguments of the model for these rows, in their order and on the CPU."""


class TensorSource:
    """Tensors in memory.

    Args:
        *tensors: (num_rows, ...) each.

    Raises:
        ValueError: There are no tensors, or their lengths differ.

    Example:
        >>> [tensor.tolist() for tensor in TensorSource(torch.arange(5), 10 * torch.arange(5)).read(np.array([3, 0]))]
        [[3, 0], [30, 0]]
    """

    def __init__(self, *tensors: Tensor) -> None:
        _check_lengths([len(tensor) for tensor in tensors])
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns copies of the rows: (len(rows), ...) each."""
        index = torch.from_numpy(rows)
        return tuple(tensor[index.to(tensor.device)] for tensor in self._tensors)


class ArraySource:
    """Arrays on disk, which may be larger than memory: only the rows that are asked for are read.

    Args:
        *arrays: (num_rows, ...) each: `.npy` files, which are opened as memory maps and never unpickled, or arrays such
            as `numpy.memmap`, `h5py.Dataset` or `zarr.Array` that can be indexed by an ascending array of rows.

    Raises:
        ValueError: There are no arrays, or their lengths differ.
        TypeError: torch has no type for their elements.
    """

    def __init__(self, *arrays: str | Path | Any) -> None:
        self._arrays = [
            np.load(array, mmap_mode="r", allow_pickle=False) if isinstance(array, str | Path) else array
            for array in arrays
        ]
        _check_lengths([len(array) for array in self._arrays])
        # An empty array of the dtype shows whether torch knows it, before the first step needs a row.
        for array in self._arrays:
            torch.from_numpy(np.empty(0, np.dtype(array.dtype).newbyteorder("=")))

    def __len__(self) -> int:
        return len(self._arrays[0])

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns copies of the rows: (len(rows), ...) each, in the machine's byte order."""
        # In the order of the file, which saves seeks and which h5py insists on; then put into the order asked for.
        ascending, inverse = np.unique(rows, return_inverse=True)
        return tuple(self._read(array, ascending)[torch.from_numpy(inverse)] for array in self._arrays)

    def _read(self, array: Any, rows: NDArray[np.int64]) -> Tensor:
        values = np.asarray(array[rows])
        if values.dtype.byteorder not in ("=", "|", "<" if sys.byteorder == "little" else ">"):
            values = values.astype(values.dtype.newbyteorder("="))
        return torch.from_numpy(np.ascontiguousarray(values))


class DatasetSource:
    """A map-style dataset of torch.

    Args:
        dataset: Has `__len__` and `__getitem__`. If it has `__getitems__`, which reads many rows at once, that is used.
        collate_fn: Makes a batch from a list of items, as in `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] = default_collate) -> None:
        self._dataset = dataset
        self._collate = collate_fn

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, rows: NDArray[np.int64]) -> tuple[Any, ...]:
        """Returns the collated batch, in a tuple if it is not a sequence."""
        indices = rows.tolist()
        # torch's own protocol: `DataLoader` looks for `__getitems__` in the same way.
        items = (
            self._dataset.__getitems__(indices)
            if hasattr(self._dataset, "__getitems__")
            else [self._dataset[index] for index in indices]
        )
        batch = self._collate(items)
        return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def as_source(data: Any) -> Source:
    """Returns a source of the rows of `data`.

    Args:
        data: A source, one or several tensors, `.npy` files or arrays, or a map-style dataset.

    Raises:
        ValueError: It is none of these.
    """
    arrays = data if isinstance(data, tuple | list) else (data,)
    if callable(getattr(data, "read", None)) and hasattr(data, "__len__"):
        return data  # type: ignore[no-any-return]
    if all(isinstance(array, Tensor) for array in arrays):
        return TensorSource(*arrays)
    if all(isinstance(array, str | Path) or _looks_like_array(array) for array in arrays):
        return ArraySource(*arrays)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DatasetSource(data)
    raise ValueError(
        f"data of type {type(data).__name__} cannot be read by row; give tensors, .npy files, arrays, or a dataset "
        "with __len__ and __getitem__ (an IterableDataset has no rows to choose from)"
    )


def _looks_like_array(value: Any) -> bool:
    """Returns whether `value` is an array of numpy, h5py, zarr or the like, which share no base class."""
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _check_lengths(lengths: Sequence[int]) -> None:
    """Raises unless all arrays have the same number of rows."""
    if not lengths:
        raise ValueError("found no arrays, expected at least one")
    if len(set(lengths)) > 1:
        raise ValueError(
            f"found arrays of {', '.join(map(str, lengths))} rows, expected the same number in all of them"
        )
