"""The order of the data: which rows make up batch `t`, and which of them this rank reads."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

NUM_DIGITS = 1 << 16
SEARCHED_SHARE = 32  # one over it of the data, or more, is looked for among all rows


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

        self._is_searched = (self._stop - self._start) * SEARCHED_SHARE >= num_rows
        self._epochs: dict[int, _Permutation] = {}  # those of the last batch

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
            4 ns for each row of the data once an epoch, and 1 ns in each step; 2 bytes for each are kept, or twice as
            many where an epoch ends. Up to 65,536 rows of data, or where a share has less than a 32nd of them: 25 ns
            for each row of the data once an epoch, 14 ns for each of the share in each step, and 10 bytes for each of
            the data.
        """
        if self.full:
            return np.arange(self._start, self._stop, dtype=np.int64)

        # All ranks draw an epoch in the same step, whether their shares reach into it or not: they wait for each other.
        begin, end = (at // self.num_rows for at in (step * self.global_batch, (step + 1) * self.global_batch - 1))
        self._epochs = {number: self._epochs.get(number) or self._drawn(number) for number in range(begin, end + 1)}

        # Positions in the endless concatenation of epochs; the share may begin in one epoch and end in the next.
        first = step * self.global_batch + self._start
        last = step * self.global_batch + self._stop
        slices = []
        while first < last:
            epoch, offset = divmod(first, self.num_rows)
            count = min(last - first, self.num_rows - offset)
            slices.append(self._epochs[epoch].rows(offset, offset + count))
            first += count
        # Memory and files are read several times quicker forwards than at random.
        return slices[0] if len(slices) == 1 else np.sort(np.concatenate(slices), kind="stable")

    def _drawn(self, epoch: int) -> _Permutation:
        return _Permutation(self.num_rows, self._seed, epoch, self._is_searched)


class _Permutation:
    """The order of the rows in one epoch, of which slices are asked for in any order.

    Of many rows each draws one of 65,536 digits; rows are ordered by digit, and those with the same digit are shuffled
    among themselves. That is a permutation as good as any (Rao 1961, Sandelius 1962). Rows of a slice ascend anyway, so
    only the digits at its two ends need be shuffled, and what lies between is found without any sorting.

    Args:
        num_rows: Rows of the data set.
        seed: Seed of the order.
        number: Number of the epoch.
        is_searched: Whether rows of a slice are looked for among all rows, as pays for large slices. Otherwise all
            rows are put in order at once.
    """

    def __init__(self, num_rows: int, seed: int, number: int, is_searched: bool) -> None:
        self.number = number
        self._seed = seed
        self._digits: NDArray[np.uint16] | None = None
        generator = np.random.default_rng([seed, number])
        if num_rows <= NUM_DIGITS:
            self._order: NDArray[np.int64] = generator.permutation(num_rows)
            return
        self._digits = generator.integers(0, NUM_DIGITS, num_rows, dtype=np.uint16)
        # Rows that have drawn a digit are at the positions from its own start to the next one's.
        self._starts = np.zeros(NUM_DIGITS + 1, np.int64)
        # By torch, in half of NumPy's time.
        counts = torch.bincount(torch.from_numpy(self._digits.astype(np.int32)), minlength=NUM_DIGITS)
        np.cumsum(counts.numpy(), out=self._starts[1:])
        self._is_searched = is_searched
        if not is_searched:
            self._order = np.argsort(self._digits, kind="stable")

    def rows(self, first: int, last: int) -> NDArray[np.int64]:
        """Returns the rows at positions [first, last), ascending: (last - first,) int64."""
        if self._digits is None:
            return np.sort(self._order[first:last])
        low, high = (int(self._starts.searchsorted(at, "right")) - 1 for at in (first, last - 1))
        begin = self._shuffled(low)[first - self._starts[low] :]
        if low == high:
            return np.sort(begin[: last - first])
        end = self._shuffled(high)[: last - self._starts[high]]
        if not self._is_searched:
            between = self._order[self._starts[low + 1] : self._starts[high]]
            return np.sort(np.concatenate([begin, between, end]))
        is_in = (self._digits > low) & (self._digits < high)
        is_in[begin] = True
        is_in[end] = True
        return np.flatnonzero(is_in)

    def _shuffled(self, digit: int) -> NDArray[np.int64]:
        """Returns the rows that have drawn a digit, in their order within the epoch."""
        if self._is_searched:
            rows = np.flatnonzero(self._digits == digit)
        else:
            rows = self._order[self._starts[digit] : self._starts[digit + 1]]
        return np.random.default_rng([self._seed, self.number, 1 + digit]).permutation(rows)
