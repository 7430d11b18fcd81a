"""Batches by number, which a thread reads ahead while a step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.data.batches import GlobalBatches
from distopt.data.sources import as_source


class Loader:
    """This rank's share of each global batch, as tensors on its device.

    The rows depend only on the seed, the step and the rank, so the batch of a step can be read at any time: after a
    resume, or twice. A thread reads the next batches meanwhile.

    Args:
        data: Tensors, `.npy` files, arrays, a map-style dataset, or a `Source`; see `as_source`.
        batches: Which rows are in which batch; made for the length of `data`.
        device: Where tensors are moved; None leaves them on the CPU.
        num_ahead: Batches that are read ahead; 0 reads each when it is needed, without a thread.

    Raises:
        ValueError: `batches` is for another number of rows than `data` has.

    Example:
        >>> with Loader(torch.arange(10), GlobalBatches(10, 4, seed=1)) as loader:
        ...     [batch.tolist() for step, (batch,) in zip(range(2), loader.steps())]
        [[0, 4, 7, 8], [1, 2, 5, 9]]
    """

    def __init__(
        self, data: Any, batches: GlobalBatches, *, device: torch.device | None = None, num_ahead: int = 2
    ) -> None:
        source = as_source(data)
        if len(source) != batches.num_rows:
            raise ValueError(f"the data have {len(source):,} rows, but the batches are made for {batches.num_rows:,}")
        self._source = source
        self._batches = batches
        self._device = device
        self._ahead = Ahead(self._read, num_ahead)

    def batch(self, step: int) -> tuple[Any, ...]:
        """Returns the batch of `step`, counted from 0; raises what the data raised when it was read."""
        result: tuple[Any, ...] = self._ahead.get(step)
        return result

    def steps(self, first: int = 0) -> Iterator[tuple[Any, ...]]:
        """Yields the batches from step `first` on; it never ends."""
        step = first
        while True:
            yield self.batch(step)
            step += 1

    def close(self) -> None:
        """Ends the thread after the batch that it is reading."""
        self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, step: int) -> tuple[Any, ...]:
        batch = self._source.read(self._batches.rows(step))
        if self._device is None or self._device.type == "cpu":
            return batch
        # From pinned memory the copy runs while the GPU computes the step before.
        return tuple(self._moved(each) if isinstance(each, Tensor) else each for each in batch)

    def _moved(self, value: Tensor) -> Tensor:
        pinned = value.pin_memory() if value.device.type == "cpu" else value
        return pinned.to(self._device, non_blocking=True)


class Ahead:
    """Computes `fetch(n)`, `fetch(n + 1)`, ... in a thread while the caller works with `fetch(n)`.

    Args:
        fetch: Called by a single thread with ascending numbers; what it raises is raised by `get`.
        num_ahead: Results that are kept ready; 0 calls `fetch` in `get`.
    """

    def __init__(self, fetch: Callable[[int], Any], num_ahead: int) -> None:
        self._fetch = fetch
        self._num_ahead = num_ahead
        self._pending: dict[int, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="distopt-data") if num_ahead else None

    def get(self, number: int) -> Any:
        """Returns `fetch(number)`, and starts computing the numbers after it."""
        if self._pool is None:
            return self._fetch(number)

        # The caller may jump, as after a resume: what it will not ask for is dropped, so that memory stays bounded.
        wanted = range(number, number + self._num_ahead + 1)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for each in wanted:
            if each not in self._pending:
                self._pending[each] = self._pool.submit(self._fetch, each)
        return self._pending.pop(number).result()

    def close(self) -> None:
        """Ends the thread; calling it again does nothing."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def shard_rows(num_rows: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Returns the rows that a rank holds if a data set is cut into consecutive shards of nearly equal size.

    Every row is in one shard, without padding, and the sizes of the shards differ by at most one row.

    Args:
        num_rows: Rows of the data set.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ValueError: There are fewer rows than ranks.

    Example:
        >>> [shard_rows(7, rank, 3).tolist() for rank in range(3)]
        [[0, 1], [2, 3], [4, 5, 6]]
    """
    if num_rows < world_size:
        raise ValueError(f"{num_rows} rows cannot be split over {world_size} ranks: each needs at least one")
    return np.arange(num_rows * rank // world_size, num_rows * (rank + 1) // world_size, dtype=np.int64)


class ShardBatches(GlobalBatches):
    """Minibatches of datapoints that each rank holds: every step takes the same fraction of each shard.

    Args:
        num_rows: Datapoints of all ranks, which `shard_rows` splits.
        fraction: Of each shard in a step, in (0, 1]; at least one datapoint is taken.
        seed: Seed of the order, which is another one on each rank.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: The fraction is not in (0, 1], or there are fewer datapoints than ranks.

    Example:
        >>> [ShardBatches(7, 0.5, seed=0, rank=rank, world_size=2).rows(0).tolist() for rank in (0, 1)]
        [[0, 2], [3, 6]]
    """

    def __init__(self, num_rows: int, fraction: float, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(num_rows, None, seed, rank, world_size)
        self.full = False
        self._shard = shard_rows(num_rows, rank, world_size)
        self._batches = shard_batches(len(self._shard), fraction, seed, rank)
        sizes = [len(shard_rows(num_rows, each, world_size)) for each in range(world_size)]
        self.global_batch = sum(shard_batches(size, fraction, seed, 0).global_batch for size in sizes)

    @property
    def weight(self) -> float:
        """1: the plate scales a minibatch to its shard."""
        return 1.0

    def rows(self, step: int) -> NDArray[np.int64]:
        """Returns this rank's rows of a batch, all of them in its shard."""
        return self._shard[self._batches.rows(step)]


def shard_batches(num_rows: int, batch_fraction: float, seed: int, rank: int) -> GlobalBatches:
    """Returns minibatches of a shard: the same fraction of it in each step, in an order that depends on the rank.

    Pass their rows to a sharded plate as `subsample`, which scales them to the shard. Since all ranks take the same
    fraction, every datapoint is seen equally often even if the shards are unequal.

    Args:
        num_rows: Number of datapoints that this rank holds.
        batch_fraction: Fraction of the shard in a batch, in (0, 1]; at least one row is taken.
        seed: Seed of the order, the same on all ranks.
        rank: This rank.

    Raises:
        ValueError: The fraction is not in (0, 1].

    Example:
        >>> batches = shard_batches(10, 0.3, seed=0, rank=1)
        >>> batches.global_batch, len(set(batches.rows(0).tolist()))
        (3, 3)
    """
    if not 0 < batch_fraction <= 1:
        raise ValueError(f"batch_fraction is {batch_fraction}, expected a number above 0 and at most 1")
    rank_seed = int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint32)[0])
    return GlobalBatches(num_rows, max(1, round(batch_fraction * num_rows)), seed=rank_seed)
