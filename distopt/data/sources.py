"""Where rows of data come from: tensors in memory, arrays on disk, tables, sparse matrices, map-style datasets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate


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
        ValueError: There are no tensors, their lengths differ, or one has no rows of numbers (nested, meta, quantized).

    Example:
        >>> [tensor.tolist() for tensor in TensorSource(torch.arange(5), 10 * torch.arange(5)).read(np.array([3, 0]))]
        [[3, 0], [30, 0]]
    """

    def __init__(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            _check_tensor(tensor)
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
        ValueError: There are no arrays, or their lengths differ, or some elements are masked.
        TypeError: torch has no type for their elements.
    """

    def __init__(self, *arrays: str | Path | Any) -> None:
        self._arrays = [_opened(array) if isinstance(array, str | Path) else array for array in arrays]
        for array in self._arrays:
            _check_elements(array)
        _check_lengths([array.shape[0] for array in self._arrays])

    def __len__(self) -> int:
        return int(self._arrays[0].shape[0])

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns copies of the rows: (len(rows), ...) each, in the machine's byte order."""
        # In the order of the file, which saves seeks and which h5py insists on; then put into the order asked for.
        ascending, inverse = np.unique(rows, return_inverse=True)
        return tuple(_as_tensor(array[ascending])[torch.from_numpy(inverse)] for array in self._arrays)


def _opened(path: str | Path) -> Any:
    array = np.load(Path(path).expanduser(), mmap_mode="r", allow_pickle=False)
    if isinstance(array, np.ndarray):
        return array
    raise ValueError(f"{path} holds several arrays; {_order_of(array)}")


def _check_elements(array: Any) -> None:
    """Refuses arrays of which torch cannot make tensors, before the first step needs a row."""
    if not array.shape:
        raise ValueError("found an array without dimensions, expected (num_rows, ...)")
    if np.ma.is_masked(array):
        raise ValueError("found a masked array, and tensors have no mask; fill it by array.filled(value)")
    try:
        torch.from_numpy(np.empty(0, np.dtype(array.dtype).newbyteorder("=")))
    except TypeError as error:
        raise TypeError(
            f"found an array of {array.dtype}; give numbers, for example by array.astype('float32') or by numbering "
            f"categories ({error})"
        ) from None


def _as_tensor(values: Any) -> Tensor:
    """Returns rows as a tensor in the machine's byte order."""
    values = np.asarray(values)
    if values.dtype.byteorder not in ("=", "|", "<" if sys.byteorder == "little" else ">"):
        values = values.astype(values.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(values))


class SparseSource:
    """A sparse matrix of scipy or torch in memory, whose rows are read as dense tensors.

    Args:
        matrix: (num_rows, num_columns), of any sparse format; it is converted once to one whose rows are quick to read.
    """

    def __init__(self, matrix: Any) -> None:
        self._is_tensor = isinstance(matrix, Tensor)
        if self._is_tensor:
            _check_tensor(matrix)
        self._matrix: Any = matrix.detach().cpu().to_sparse_coo().coalesce() if self._is_tensor else matrix.tocsr()
        if not self._is_tensor:
            _check_elements(self._matrix)

    def __len__(self) -> int:
        return int(self._matrix.shape[0])

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor]:
        """Returns the rows: (len(rows), num_columns), dense."""
        if self._is_tensor:
            return (self._matrix.index_select(0, torch.from_numpy(rows)).to_dense(),)
        # A copy by torch, whose memory is aligned: MKL's product of a matrix and a vector rounds by that.
        return (_as_tensor(self._matrix[rows].toarray()).clone(),)


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


class JoinedSource:
    """Several sources side by side, row by row.

    Args:
        *sources: Of equal length.

    Raises:
        ValueError: There are none, or their lengths differ.
    """

    def __init__(self, *sources: Source) -> None:
        _check_lengths([len(source) for source in sources])
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources[0])

    def read(self, rows: NDArray[np.int64]) -> tuple[Any, ...]:
        """Returns what all sources return for the rows, one after the other."""
        return tuple(argument for source in self._sources for argument in source.read(rows))


# Libraries have no base class in common for what has rows, and the same brackets mean a position to numpy, a label to
# pandas, the name of a column to tables and mappings. Read by the wrong one, x and y would be paired wrongly without an
# error. So each kind is recognised by what only it has, and what is none of them is refused.


def as_source(data: Any) -> Source:
    """Returns a source of the rows of `data`, which are counted by position whatever labels they have.

    Args:
        data: A source; a tensor, an `.npy` file, an array, a table or series (pandas, polars), or a sparse matrix; a
            tuple of such, one for each argument of the model, which may also hold lists of numbers and datasets; or a
            map-style dataset. A list of tensors or arrays counts as a tuple, any other list as a dataset of its items.

    Raises:
        ValueError: It is none of these; the message says what to write.
        TypeError: torch has no type for its elements.
    """
    if callable(getattr(data, "read", None)) and hasattr(data, "__len__"):
        return data  # type: ignore[no-any-return]
    if isinstance(data, tuple | list) and (not data or any(map(_is_column, data))):
        return _joined(data)
    if isinstance(data, tuple) and all(hasattr(each, "__len__") for each in data):
        return _joined(data)
    return _source_of(data, DatasetSource)


def _joined(columns: Sequence[Any]) -> Source:
    if all(map(_is_dense, columns)):
        return TensorSource(*columns)
    return JoinedSource(*(_source_of(column, _items_of) for column in columns))


def _source_of(data: Any, otherwise: Callable[[Any], Source]) -> Source:
    """Returns the source of one argument of the model; `otherwise` makes that of whatever has items by number."""
    if isinstance(data, Tensor):
        return TensorSource(data) if _is_dense(data) else SparseSource(data)
    if isinstance(data, str | Path):
        return ArraySource(data)
    if hasattr(data, "tocsr"):
        return SparseSource(data)
    if _is_table(data):
        return ArraySource(_values_of(data))
    if hasattr(data, "dtype") and hasattr(data, "shape"):
        return ArraySource(data)
    _refuse_without_positions(data)
    return otherwise(data)


def _check_tensor(tensor: Tensor) -> None:
    """Refuses tensors that have no rows of numbers."""
    if tensor.is_nested:
        raise ValueError("found a nested tensor; pad it by torch.nested.to_padded_tensor(tensor, value)")
    if tensor.is_meta:
        raise ValueError("found a tensor on the device meta, which has no values; load its values first")
    if tensor.is_quantized:
        raise ValueError("found a quantized tensor; give tensor.dequantize()")
    if tensor.ndim == 0:
        raise ValueError("found a tensor without dimensions, expected (num_rows, ...)")


def _is_column(value: Any) -> bool:
    """Returns whether `value` can only be all values of one argument, and not an item of a data set."""
    return (
        isinstance(value, Tensor | str | Path)
        or hasattr(value, "tocsr")
        or hasattr(value, "iloc")
        or (hasattr(value, "dtype") and bool(getattr(value, "shape", ())))
    )


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _is_table(value: Any) -> bool:
    """Returns whether `value` is a table or series of pandas, polars or arrow, whose brackets take labels and names."""
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    return hasattr(value, "__array__") and (hasattr(value, "iloc") or hasattr(value, "to_arrow") or not is_array)


def _values_of(table: Any) -> NDArray[Any]:
    """Returns the values of a table or series in their order, whatever its index says."""
    try:
        values = np.asarray(table)
    except TypeError as error:  # as xarray.Dataset raises, which has an __array__ to say so
        hint = _order_of(table) if callable(getattr(table, "keys", None)) else "give its arrays"
        raise ValueError(f"found a {type(table).__name__}, of which no array can be made; {hint} ({error})") from None
    if values.dtype != object:
        return values
    kinds: Any = getattr(table, "dtypes", None)
    described = {name: str(kind) for name, kind in kinds.items()} if hasattr(kinds, "items") else values.dtype
    raise TypeError(
        f"found a {type(table).__name__} of {described}, which have no type of torch in common: choose columns of "
        "numbers, number categories by .cat.codes, fill gaps by .fillna(value), and make it .astype('float32')"
    )


def _items_of(column: Any) -> Source:
    """Returns the source of an argument that is a list of numbers, or a column or dataset of another library."""
    if not isinstance(column, Sequence):
        return DatasetSource(column, _as_one_argument)
    try:
        values = np.asarray(column)
    except ValueError as error:
        raise ValueError(f"found a {type(column).__name__} whose items differ in length: {error}") from None
    return ArraySource(values)


def _as_one_argument(items: list[Any]) -> tuple[Any]:
    """Makes one argument of the items of a column, which torch's collation takes apart where they are lists."""
    return (_as_tensor(items).clone() if isinstance(items[0], list | tuple) else default_collate(items),)


def _refuse_without_positions(data: Any) -> None:
    """Raises for data of which nobody can tell row 5 from the rest."""
    kind = type(data).__name__
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        hint = (
            "tensors, .npy files, arrays, or a dataset with __len__ and __getitem__ (an IterableDataset has no rows to "
        )
        hint = "its `dataset`" if hasattr(data, "dataset") else f"{hint}choose from)"
        raise ValueError(f"data of type {kind} cannot be read by row; give {hint}")
    if isinstance(data, torch.UntypedStorage | torch.TypedStorage):
        raise ValueError(f"found a {kind}, the memory of a tensor; give the tensor")
    if isinstance(data, Dataset) or hasattr(data, "__getitems__"):
        return

    if hasattr(data, "ngroups") and hasattr(data, "obj"):
        raise ValueError(f"found a {kind}, whose items are groups and not rows; give the table itself, data.obj")
    if hasattr(data, "obs") and hasattr(data, "X"):
        raise ValueError(f"found a {kind}, expected the arrays that the model takes: (data.X, data.obs['name'])")
    if callable(getattr(data, "keys", None)):
        raise ValueError(f"found a {kind}, whose items have names and no numbers; {_order_of(data)}")


def _order_of(mapping: Any) -> str:
    """Returns how to write the values of a mapping as arguments of a model."""
    names = [repr(str(name)) for name in mapping.keys()]  # noqa: SIM118  # it need not be iterable
    values = ", ".join(f"data[{name}]" for name in names[:5]) + ("," if len(names) == 1 else "")
    return f"give the arrays in the order of the model's arguments, such as ({values})"


def _check_lengths(lengths: Sequence[int]) -> None:
    """Raises unless all arrays have the same number of rows."""
    if not lengths:
        raise ValueError("found no arrays, expected at least one")
    if len(set(lengths)) > 1:
        raise ValueError(
            f"found arrays of {', '.join(map(str, lengths))} rows, expected the same number in all of them"
        )
