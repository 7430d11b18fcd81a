"""Where rows of data come from: tensors in memory, arrays on disk that may be bigger than it, map-style datasets."""

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
    """Rows that can be read in any order; each `read` by one thread at a time."""

    def __len__(self) -> int:
        """Number of rows."""

    def read(self, rows: NDArray[np.int64]) -> tuple[Any, ...]:
        """Returns what the model is called with for these rows, in their order; on the CPU."""


class TensorSource:
    """Tensors in memory.

    Args:
        *tensors: (num_rows, ...) each.

    Raises:
        ValueError: None given, or of different lengths.

    Example:
        >>> [part.tolist() for part in TensorSource(torch.arange(5), 10 * torch.arange(5)).read(np.array([3, 0]))]
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
    """Arrays on disk, of which only the rows that are asked for are read; they may be bigger than memory.

    Rows are read in the order in which they lie on disk, which saves seeks, and handed over in the order asked for.

    Args:
        *arrays: `.npy` files (opened as memory maps, never unpickled), or arrays such as `numpy.memmap`, `h5py.Dataset`
            or `zarr.Array` that are indexed by an ascending array of rows; (num_rows, ...) each.

    Raises:
        ValueError: None given, or of different lengths, or numbers that torch has no type for.
    """

    def __init__(self, *arrays: str | Path | Any) -> None:
        self._arrays = [
            np.load(array, mmap_mode="r", allow_pickle=False) if isinstance(array, str | Path) else array
            for array in arrays
        ]
        _check_lengths([len(array) for array in self._arrays])
        for array in self._arrays:
            torch.from_numpy(np.empty(0, np.dtype(array.dtype).newbyteorder("=")))

    def __len__(self) -> int:
        return len(self._arrays[0])

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns copies of the rows: (len(rows), ...) each, in the machine's byte order."""
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
        dataset: Has `__len__` and `__getitem__`; `__getitems__`, which reads many rows at once, is used where it has
            one.
        collate_fn: Makes a batch of a list of items, as in `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] = default_collate) -> None:
        self._dataset = dataset
        self._collate = collate_fn

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, rows: NDArray[np.int64]) -> tuple[Any, ...]:
        """Returns the collated batch, as a tuple if it is not a sequence already."""
        indices = rows.tolist()
        items = (
            self._dataset.__getitems__(indices)
            if hasattr(self._dataset, "__getitems__")
            else [self._dataset[index] for index in indices]
        )
        batch = self._collate(items)
        return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def as_source(data: Any) -> Source:
    """Returns a source for what is commonly given: a source, tensors, `.npy` files, arrays, or a map-style dataset.

    Raises:
        ValueError: It is none of these; the message says what it is.
    """
    parts = data if isinstance(data, tuple | list) else (data,)
    if callable(getattr(data, "read", None)) and hasattr(data, "__len__"):
        return data  # type: ignore[no-any-return]
    if all(isinstance(part, Tensor) for part in parts):
        return TensorSource(*parts)
    if all(isinstance(part, str | Path) or (hasattr(part, "dtype") and hasattr(part, "shape")) for part in parts):
        return ArraySource(*parts)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DatasetSource(data)
    raise ValueError(
        f"data of type {type(data).__name__} cannot be read by row; give tensors, .npy files, arrays, or a dataset "
        "with __len__ and __getitem__ (an IterableDataset has no rows to choose from)"
    )


def _check_lengths(lengths: Sequence[int]) -> None:
    """Raises unless all parts have the same number of rows."""
    if not lengths or len(set(lengths)) > 1:
        raise ValueError(f"parts of the data have {', '.join(map(str, lengths)) or 'no'} rows; all must have as many")
