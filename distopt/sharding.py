"""Which parameters belong to one rank alone: those of datapoints that only this rank holds.

A plate that is sharded splits its datapoints over the ranks, and a parameter with a row for each datapoint is split
with them. Such a parameter is never sent: it is stepped by its rank alone, and saved by the global index of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SPLIT = "_sharded"
"""Key of a message of Pyro whose scale was multiplied by the number of shards.

It is in the `infer` dictionary of a site too, which `poutine.replay` copies from the guide's trace to the model's, so
that a site of the model can tell whether the guide's plate was sharded.
"""


def is_split(msg: Any) -> bool:
    """Returns whether the scale of a site was multiplied by the number of shards."""
    return bool(msg.get(SPLIT))


class LocalParameterError(ValueError):
    """A parameter that is replicated where it should be local, or the other way round; the message has the edit."""


@dataclass
class PlateShard:
    """This rank's shard of a plate whose datapoints are split over the ranks.

    Args:
        name: The plate's name.
        num_shards: Over how many ranks the plate is split; the density of its sites is multiplied by this.
        size: Number of datapoints that this rank holds, 0 until the plate was first entered.
        rows: (size,) int64, the global index of each datapoint, or None: ranks hold consecutive blocks in order of
            rank.
        local: Parameters with a row per datapoint that their statement does not declare: by name (or pattern, as in
            `fnmatch`), which dimension runs over the datapoints.
        replicated: Names (or patterns) of parameters that have the shard's size in their shape by chance.
    """

    name: str
    num_shards: int
    size: int = 0
    rows: NDArray[np.int64] | None = None
    local: dict[str, int] = field(default_factory=dict)
    replicated: tuple[str, ...] = ()

    def resize(self, size: int) -> None:
        """Records this rank's number of datapoints, which is seen when the plate is entered.

        Raises:
            LocalParameterError: `rows` has another length.
        """
        if self.rows is not None and self.rows.shape != (size,):
            raise LocalParameterError(
                f"plate {self.name!r} has {size} datapoints on this rank, but its rows have shape {self.rows.shape}: "
                "give the global index of each datapoint this rank holds, and this rank's number of datapoints as the "
                "size"
            )
        self.size = size

    def global_rows(self, sizes: Sequence[int], rank: int) -> NDArray[np.int64]:
        """Returns the (size,) int64 global index of each datapoint of this rank, in the order of the plate.

        Args:
            sizes: How many datapoints each rank holds.
            rank: This rank.
        """
        if self.rows is not None:
            return self.rows
        start = sum(sizes[:rank])
        return np.arange(start, start + self.size, dtype=np.int64)


@dataclass(frozen=True)
class LocalParameter:
    """How a parameter's numbers belong to the datapoints of a plate.

    Args:
        plate: The plate, and which of its datapoints are here.
        shape: Shape of the parameter, unflattened: a guide that keeps one flat vector for a site of 7 datapoints of 2
            numbers each has shape (7, 2).
        dim: Which dimension of `shape` runs over the datapoints, counted from the left.
    """

    plate: PlateShard
    shape: tuple[int, ...]
    dim: int

    def by_row(self, values: Tensor) -> Tensor:
        """Returns `values` (in the parameter's shape, perhaps constrained) as (size, ...): one row per datapoint."""
        if values.numel() == 0 or values.shape[: self.dim + 1] == self.shape[: self.dim + 1]:
            return values.movedim(self.dim, 0)
        return values.reshape(self.shape).movedim(self.dim, 0)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Returns (size, ...) `rows` in the shape of `like`, the parameter: undoes `by_row`."""
        return rows.movedim(0, self.dim).reshape(like.shape)


# By tensor and weakly, not by name: the mark goes with the parameter when the store is cleared, and a new parameter
# that takes an old name has none until its plate marks it.
_LOCAL: Any = WeakTensorKeyDictionary()


def mark_local(param: Tensor, entry: LocalParameter) -> None:
    """Declares `param`, an unconstrained leaf tensor, to belong to this rank alone."""
    _LOCAL[param] = entry


def local_parameter(param: Tensor) -> LocalParameter | None:
    """Returns how `param` is split, or None for a replicated one.

    Local parameters take no part in agreement, reduction and drift watch. Before clipping and stepping, their gradient
    is divided by `plate.num_shards`: the density of the plate was multiplied by it, so that the mean over ranks of the
    replicated gradients is that of all the data. Where gradients are summed over ranks and not averaged, it stays
    larger by the number of ranks.
    """
    entry: LocalParameter | None = _LOCAL.get(param)
    return entry


def num_shards(param: Tensor) -> int:
    """Returns over how many ranks the plate of `param` is split; 1 for a replicated parameter."""
    entry = local_parameter(param)
    return 1 if entry is None else entry.plate.num_shards


def any_local() -> bool:
    """Returns whether there are local parameters at all, without looking at any parameter."""
    return len(_LOCAL.data) > 0


def local_parameters() -> dict[str, LocalParameter]:
    """Returns the local parameters in Pyro's store, by name, in order of name."""
    named = sorted(pyro.get_param_store().named_parameters())
    return {name: entry for name, param in named if (entry := local_parameter(param)) is not None}
