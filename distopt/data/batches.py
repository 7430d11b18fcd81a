"""The order of the data: which rows make up batch `t`, and which of them this rank reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class GlobalBatches:
    """Batches of the whole world, of which each rank reads its part.

    Each epoch is a permutation of all rows, drawn from the seed and the epoch's number; the epochs are laid end to end
    and cut into batches of `global_batch` rows, so that every batch is full and a batch may hold the end of one epoch
    and the beginning of the next. Which rows are in batch `t` therefore depends on the seed and on `t` alone: a run
    that goes on with another number of workers sees the same batches, and `t` alone says where it is in the data.

    Where `world_size` does not divide the batch, some ranks read one row more and `weight` says by how much a
    rank's loss counts, so that the mean over ranks stays the loss of the batch.

    Args:
        num_rows: rows of the data set.
        global_batch: rows per step over all ranks; None for all rows at each step, in their order.
        seed: of the order; not of the noise.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: `global_batch` is larger than the data set, or smaller than the number of ranks.

    Example:
        >>> [GlobalBatches(10, 4, seed=1, rank=rank, world_size=2).rows(0).tolist() for rank in (0, 1)]
        [[8, 4], [7, 0]]
        >>> GlobalBatches(10, 4, seed=1).rows(0).tolist()
        [8, 4, 7, 0]
    """

    def __init__(
        self, num_rows: int, global_batch: int | None = None, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        size = num_rows if global_batch is None else global_batch
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if size > num_rows:
            raise ValueError(
                f"global_batch is {size:,}, but there are {num_rows:,} rows: "
                "make it smaller, or None (null) for all rows at each step"
            )
        if size < world_size:
            raise ValueError(f"{size:,} rows a step cannot be shared by {world_size} ranks: each needs at least one")
        self.num_rows = num_rows
        self.global_batch = size
        self.full = global_batch is None
        self._seed = seed
        self._start = size * rank // world_size
        self._stop = size * (rank + 1) // world_size
        self._world_size = world_size
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def weight(self) -> float:
        """By how much this rank's loss counts in the mean over ranks: 1 where all ranks read equally many rows.

        A loss is scaled to the full data by the rank's own number of rows, `n`. The mean over ranks of the losses times
        `n * world_size / global_batch` is the loss of the global batch.
        """
        return (self._stop - self._start) * self._world_size / self.global_batch

    def rows(self, step: int) -> NDArray[np.int64]:
        """Returns this rank's rows of batch `step` (counted from 0), (global_batch / world_size,) int64.

        Cost: one permutation of `num_rows` per epoch, which is kept until the next one.
        """
        if self.full:
            return np.arange(self._start, self._stop, dtype=np.int64)
        first = step * self.global_batch + self._start
        last = step * self.global_batch + self._stop
        parts = []
        while first < last:
            epoch, offset = divmod(first, self.num_rows)
            count = min(last - first, self.num_rows - offset)
            parts.append(self._permutation(epoch)[offset : offset + count])
            first += count
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of rows in an epoch, (num_rows,)."""
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
            self._epoch = epoch
        return self._order
