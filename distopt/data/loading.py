"""Batches by number, read ahead while the step before them runs."""

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
    """This rank's part of each global batch, as tensors on its device.

    Which rows they are depends on the seed, the step, and this rank's place in the world, so a step's batch can be
    asked for at any time: after a resume, or twice. The next batches are read by a thread meanwhile.

    Args:
        data: As in `as_source`: tensors, `.npy` files, arrays, a map-style dataset, or a `Source`.
        batches: Says which rows; made for the length of `data`.
        device: Where tensors go; None leaves them on the CPU.
        num_ahead: How many batches are read ahead; 0 reads each when it is asked for, without a thread.

    Raises:
        ValueError: `batches` is for another number of rows than `data` has.

    Example:
        >>> with Loader(torch.arange(10), GlobalBatches(10, 4, seed=1)) as loader:
        ...     [batch.tolist() for step, (batch,) in zip(range(2), loader.steps())]
        [[8, 4, 7, 0], [1, 2, 5, 9]]
    """

    def __init__(
        self, data: Any, batches: GlobalBatches, *, device: torch.device | None = None, num_ahead: int = 2
    ) -> None:
        source = as_source(data)
        if len(source) != batches.num_rows:
            raise ValueError(f"the data have {len(source):,} rows, the batches are for {batches.num_rows:,}")
        self._source = source
        self._batches = batches
        self._device = device
        self._ahead = Ahead(self._read, num_ahead)

    def batch(self, step: int) -> tuple[Any, ...]:
        """Returns the batch of `step`, counted from 0; raises here what the data raised when it was read."""
        result: tuple[Any, ...] = self._ahead.get(step)
        return result

    def steps(self, first: int = 0) -> Iterator[tuple[Any, ...]]:
        """Yields the batches from step `first` on, without end."""
        step = first
        while True:
            yield self.batch(step)
            step += 1

    def close(self) -> None:
        """Ends the thread, after the batch that it is reading."""
        self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, step: int) -> tuple[Any, ...]:
        parts = self._source.read(self._batches.rows(step))
        if self._device is None or self._device.type == "cpu":
            return parts
        return tuple(self._move(part) for part in parts)

    def _move(self, part: Any) -> Any:
        """Moves a tensor to the device; from pinned memory the copy runs beside the step."""
        if not isinstance(part, Tensor):
            return part
        return part.pin_memory().to(self._device, non_blocking=True) if self._device else part


class Ahead:
    """Computes `fetch(n)`, `fetch(n + 1)`, ... in a thread while the caller works with `fetch(n)`.

    Args:
        fetch: Called with ascending numbers by one thread; what it raises is raised by `get`.
        num_ahead: How many results are kept ready; 0 calls `fetch` in `get`.
    """

    def __init__(self, fetch: Callable[[int], Any], num_ahead: int) -> None:
        self._fetch = fetch
        self._num_ahead = num_ahead
        self._pending: dict[int, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="distopt-data") if num_ahead else None

    def get(self, number: int) -> Any:
        """Returns `fetch(number)`, and sees to it that the following ones are on their way."""
        if self._pool is None:
            return self._fetch(number)
        wanted = range(number, number + self._num_ahead + 1)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for each in wanted:
            if each not in self._pending:
                self._pending[each] = self._pool.submit(self._fetch, each)
        return self._pending.pop(number).result()

    def close(self) -> None:
        """Ends the thread; calling it twice does nothing."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def shard_rows(num_rows: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Returns the rows that a rank holds when a data set is cut into consecutive shards, as even as can be.

    No row is padded, dropped or held twice; the first shards are not longer than the others by more than one row.

    Raises:
        ValueError: There are fewer rows than ranks.

    Example:
        >>> [shard_rows(7, rank, 3).tolist() for rank in range(3)]
        [[0, 1], [2, 3], [4, 5, 6]]
    """
    if num_rows < world_size:
        raise ValueError(f"{num_rows} rows cannot be split over {world_size} ranks: each needs at least one")
    return np.arange(num_rows * rank // world_size, num_rows * (rank + 1) // world_size, dtype=np.int64)


def shard_batches(num_rows: int, batch_fraction: float, seed: int, rank: int) -> GlobalBatches:
    """Returns minibatches of a shard: the same fraction of it at each step, in an order of this rank's own.

    They go to a sharded plate as `subsample`, which scales them to the shard. Since all ranks take the same fraction,
    every datapoint of unequal shards comes equally often.

    Args:
        num_rows: Number of datapoints that this rank holds.
        batch_fraction: In (0, 1], the part of the shard in a batch; at least one row is taken.
        seed: Of the order, the same on all ranks.
        rank: This rank.

    Example:
        >>> batches = shard_batches(10, 0.3, seed=0, rank=1)
        >>> batches.global_batch, len(set(batches.rows(0).tolist()))
        (3, 3)
    """
    if not 0 < batch_fraction <= 1:
        raise ValueError(f"batch_fraction is {batch_fraction}, expected more than 0 and at most 1")
    own = int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint32)[0])
    return GlobalBatches(num_rows, max(1, round(batch_fraction * num_rows)), seed=own)
