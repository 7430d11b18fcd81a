"""The order of the data: which rows make up batch `t`, and which of them this rank reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class GlobalBatches:
    """Batches of all ranks together, of which each rank reads its share.

    Each epoch is a permutation of all rows, drawn from the seed and the number of the epoch. The epochs are placed one
    after the other and cut into batches of `global_batch` rows, so every batch is full, and a batch may hold the end of
    one epoch and the beginning of the next. Which rows are in batch `t` therefore depends on the seed and on `t` alone:
    a run that resumes with another number of workers sees the same batches, and `t` is all that a checkpoint records.
    Within the share of a rank the rows ascend.

    If `world_size` does not divide the batch, some ranks read one row more, and `weight` corrects for it.

    Args:
        num_rows: Rows of the data set.
        global_batch: Rows per step over all ranks; None takes all rows in each step, in their order.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.

    Attributes:
        num_rows: As given.
        global_batch: Rows per step over all ranks.
        full: Whether each step takes all rows.

    Raises:
        ValueError: `global_batch` is larger than the data set, or smaller than the number of ranks.

    Example:
        >>> [GlobalBatches(10, 4, seed=1, rank=rank, world_size=2).rows(0).tolist() for rank in (0, 1)]
        [[4, 8], [0, 7]]
        >>> GlobalBatches(10, 4, seed=1).rows(0).tolist()
        [0, 4, 7, 8]
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
                "make it smaller, or None (null) for all rows in each step"
            )
        if size < world_size:
            raise ValueError(f"{size:,} rows per step cannot be shared by {world_size} ranks: each needs at least one")

        self.num_rows = num_rows
        self.global_batch = size
        self.full: bool = global_batch is None
        self._seed = seed
        self._world_size = world_size

        # This rank's rows of a batch are those in [start, stop); the shares of all ranks differ by one row at most.
        self._start = size * rank // world_size
        self._stop = size * (rank + 1) // world_size

        # Only the permutation of the current epoch is kept: 8 bytes per row.
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def weight(self) -> float:
        """Factor of this rank's loss in the mean over the ranks: 1 if all ranks read equally many rows.

        With `n` rows on this rank, the plates of the model scale its loss to the full data by `num_rows / n`. The mean
        over the ranks of `n * world_size / global_batch` times the loss is then the loss of the global batch.
        """
        return (self._stop - self._start) * self._world_size / self.global_batch

    def rows(self, step: int) -> NDArray[np.int64]:
        """Returns this rank's rows of a batch.

        Args:
            step: Number of the batch, counted from 0.

        Returns:
            (global_batch / world_size,) int64 row numbers, ascending; a row twice where an epoch ends in the batch and
            the next one begins with it.

        Cost:
            One permutation of `num_rows` per epoch, which is kept until the next one, and 14 ns for each row.
        """
        if self.full:
            return np.arange(self._start, self._stop, dtype=np.int64)

        # Positions in the endless concatenation of epochs; the share may begin in one epoch and end in the next.
        first = step * self.global_batch + self._start
        last = step * self.global_batch + self._stop
        slices = []
        while first < last:
            epoch, offset = divmod(first, self.num_rows)
            count = min(last - first, self.num_rows - offset)
            slices.append(self._permutation(epoch)[offset : offset + count])
            first += count
        # Memory and files are read several times quicker forwards than at random.
        return np.sort(slices[0] if len(slices) == 1 else np.concatenate(slices))

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """Returns the order of the rows in an epoch, (num_rows,)."""
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
            self._epoch = epoch
        return self._order
