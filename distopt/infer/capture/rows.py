"""A batch as rows of tensors, which a captured step reads itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from torch import Tensor


class TensorRows(Sequence[Tensor]):
    """Some rows of each of several tensors, as the arguments of a step; they are read when they are asked for.

    To an eager step this is the sequence of what was selected. A captured step selects in its first operations, without
    Python, and allocates nothing that it has not allocated before.

    Args:
        columns: (num_rows, ...) each, the same tensors at each step.
        rows: (batch,) int64, which rows of each.

    Example:
        >>> import torch
        >>> x, y = TensorRows((torch.arange(5), 10 * torch.arange(5)), torch.tensor([3, 0]))
        >>> x.tolist(), y.tolist()
        ([3, 0], [30, 0])
    """

    def __init__(self, columns: tuple[Tensor, ...], rows: Tensor) -> None:
        self.columns = columns
        self.rows = rows

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        if isinstance(index, slice):
            return tuple(column.index_select(0, self.rows) for column in self.columns[index])
        return self.columns[index].index_select(0, self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        return (column.index_select(0, self.rows) for column in self.columns)
