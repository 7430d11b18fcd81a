"""What each rank reads of a `DataLoader` that is somebody else's: its share of every batch, in an order of all ranks.

Which rows are in a batch follows from (seed, epoch) alone, so that it is the same on every rank, on any number of
ranks, and after a resume. The loader itself stays as it is; a copy with another sampler is read.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from distopt.backends import Backend
from distopt.rng import generators_state, seed_generators, set_generators_state

Split: TypeAlias = Literal["batches", "deal", "rows", "none"]
MIN_ROWS = 2
"""The fewest rows of a share: models squeeze dimensions of size 1, and batch norm has no variance of one row."""

_SEVERAL_LOADERS = (
    "plates {plates} of the model are as large as a batch, and a step reads batches of {count} loaders, so it is not "
    "known how many rows there are in all. Give their number, as in pyro.plate(NAME, NUM_ROWS, subsample=index)."
)


@dataclass(frozen=True)
class Share:
    """What one rank reads of a batch.

    Attributes:
        indices: What the data set is asked for.
        weight: Factor of this rank's loss in the mean over the ranks, which is then the loss of the whole batch.
        num_rows: Number of rows here.
        num_all: Number of rows of the batch over all ranks.
    """

    indices: Any
    weight: float
    num_rows: int
    num_all: int


def split_batch(indices: Any, rank: int, world_size: int, *, only_even: bool = False) -> Share:
    """Returns a rank's share of a batch; of one that is too small, or has no rows, all of it, on every rank.

    A batch that does not split evenly is read whole, too, if it is one of several in a step (`only_even`): their shares
    would weigh differently, and the loss has one weight.

    With `n` of the `N` rows of a batch on a rank, the plates of a model scale its loss by 1/n, so its weight is n W/N.

    Example:
        >>> [split_batch([5, 2, 8, 1, 7], rank, 2) for rank in range(2)]  # doctest: +NORMALIZE_WHITESPACE
        [Share(indices=[5, 2], weight=0.8, num_rows=2, num_all=5),
         Share(indices=[8, 1, 7], weight=1.2, num_rows=3, num_all=5)]
        >>> split_batch([5, 2, 8], 1, 2).indices
        [5, 2, 8]
    """
    size = len(indices) if isinstance(indices, Sequence | np.ndarray) else 1
    if size < MIN_ROWS * world_size or only_even and size % world_size:
        return Share(indices, 1.0, size, size)
    start = size * rank // world_size
    stop = size * (rank + 1) // world_size
    return Share(indices[start:stop], (stop - start) * world_size / size, stop - start, size)


class _Passes:
    """Counts the passes over a loader in an epoch: a loader that is shorter than another beside it starts again."""

    def __init__(self) -> None:
        self._epoch = -1
        self._number = 0
        self._is_over = False

    def begin(self, position: tuple[int, int], num_batches: int, *, is_alone: bool) -> tuple[int, int, int]:
        """Returns the epoch, the pass that begins, and how many of its batches are done; one pass if it is alone."""
        epoch, num_done = position
        if is_alone:
            return epoch, 0, num_done
        is_again = epoch == self._epoch and self._is_over
        self._number = self._number + 1 if is_again else num_done // max(1, num_batches)
        self._epoch = epoch
        self._is_over = False
        return epoch, self._number, 0 if is_again else num_done % max(1, num_batches)

    def end(self) -> None:
        """Notes that all batches of a pass were read."""
        self._is_over = True


class SharedOrder(Sampler[Any]):
    """Yields what one rank reads of the batches of a sampler that has the same rows on all ranks.

    Args:
        sampler: Yields the indices of each batch.
        rank: This rank.
        world_size: Number of ranks.
        seed: Of the order.
        position: Returns the epoch, and how many batches of it are done.
        num_dealt: How many batches of the sampler make up one that is split.

    Attributes:
        only_even: As for `split_batch`; set before an epoch is begun, as is the next one.
        number: Of the loader among those that a step reads, which have orders of their own.
    """

    def __init__(
        self,
        sampler: Any,
        rank: int,
        world_size: int,
        seed: int,
        position: Callable[[], tuple[int, int]],
        num_dealt: int = 1,
    ) -> None:
        self._sampler = sampler
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._position = position
        self._num_dealt = num_dealt
        self._passes = _Passes()
        self._shares: list[Share] = []  # of the epoch, over all passes
        self.only_even = False
        self.number = 0

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._num_dealt)

    def __iter__(self) -> Iterator[Any]:
        epoch, last, num_done = self._passes.begin(self._position(), len(self), is_alone=not self.only_even)
        passes = [self._shares_of(epoch, each) for each in range(last + 1)]
        self._shares = [share for shares in passes for share in shares]
        for share in passes[-1][num_done:]:
            yield share.indices
        self._passes.end()

    @property
    def is_read(self) -> bool:
        """Whether an epoch was begun."""
        return bool(self._shares)

    def share(self, batch: int) -> Share:
        """Returns this rank's share of a batch of the epoch that was begun last; no rows if it has not as many."""
        return self._shares[batch] if batch < len(self._shares) else Share(None, 1.0, 0, 0)

    def _shares_of(self, epoch: int, number: int) -> list[Share]:
        batches = batches_of(self._sampler, self._seed, epoch, *_further(number, self.number))
        groups = [batches[first : first + self._num_dealt] for first in range(0, len(batches), self._num_dealt)]
        return [split_batch(_joined(group), self._rank, self._world_size, only_even=self.only_even) for group in groups]


class RankRows(Sampler[Any]):
    """Yields this rank's own rows in as many batches as every other rank has.

    Args:
        sampler: Yields the indices of batches of this rank's rows.
        num_batches: How many batches the rows are cut into.
        rank: This rank, which has an order of its own.
        seed: Of the order.
        position: As for `SharedOrder`.
    """

    def __init__(
        self, sampler: Any, num_batches: int, rank: int, seed: int, position: Callable[[], tuple[int, int]]
    ) -> None:
        self._sampler = sampler
        self._num_batches = num_batches
        self._rank = rank
        self._seed = seed
        self._position = position
        self._passes = _Passes()
        self._is_read = False
        self.only_even = False  # shares here weigh alike; set if a step reads several loaders
        self.number = 0

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Any]:
        self._is_read = True
        epoch, last, num_done = self._passes.begin(self._position(), len(self), is_alone=not self.only_even)
        rows = _joined(batches_of(self._sampler, self._seed, epoch, self._rank, *_further(last, self.number)))
        ends = [len(rows) * number // self._num_batches for number in range(self._num_batches + 1)]
        for start, stop in list(zip(ends, ends[1:], strict=False))[num_done:]:
            yield rows[start:stop]
        self._passes.end()

    @property
    def is_read(self) -> bool:
        """Whether an epoch was begun."""
        return self._is_read

    def share(self, batch: int) -> Share:
        """Returns a share of weight 1: the plates of the model scale this rank's rows to all that it holds."""
        return Share(None, 1.0, 0, 0)


def _further(number: int, loader: int) -> tuple[int, ...]:
    """Returns what an order follows from beside the epoch: nothing in the first pass over the first loader."""
    return (number, loader) if number or loader else ()


class StepLoaders:
    """The loaders of which a step reads a batch each, as `trainer.fit(plan, [a, b])` has them.

    The loss has one weight, and nothing tells which of its terms comes from which loader. So of several loaders only
    batches that split evenly are split, which all weigh 1.

    Attributes:
        sizes: Of this rank's shares of the batches that `share` was asked for last; a whole batch of one loader counts
            for nothing, since nothing of it has to be scaled.
    """

    def __init__(self) -> None:
        self._samplers: list[SharedOrder | RankRows] = []
        self.sizes: list[int] = []

    def add(self, sampler: SharedOrder | RankRows | None) -> None:
        """Takes the sampler of one more loader; if the others were read, Lightning has loaded them all anew."""
        if any(each.is_read for each in self._samplers):
            self._samplers = []
        if sampler is None:
            return
        sampler.number = len(self._samplers)
        self._samplers.append(sampler)
        for each in self._samplers:
            each.only_even = len(self._samplers) > 1

    def share(self, batch: int) -> Share:
        """Returns this rank's share of what a step reads of all loaders."""
        shares = [each.share(batch) for each in self._samplers]
        if len(shares) == 1:
            self.sizes = [shares[0].num_rows] if shares[0].num_rows < shares[0].num_all else []
            return shares[0]
        self.sizes = sorted({each.num_rows for each in shares if each.num_rows})
        return Share(None, 1.0, sum(each.num_rows for each in shares), sum(each.num_all for each in shares))

    def refuse_unscaled(self, plates: Sequence[str]) -> None:
        """Raises if there are plates that are as large as a batch, and several loaders: they have no one size."""
        if plates and len(self._samplers) > 1:
            raise ValueError(_SEVERAL_LOADERS.format(plates=", ".join(plates), count=len(self._samplers)))


def batches_of(sampler: Any, seed: int, *numbers: int) -> list[Any]:
    """Returns the batches that a sampler yields when all that it may draw from is seeded by these numbers."""
    order = int(np.random.SeedSequence([seed, *numbers, 1]).generate_state(1, np.uint32)[0])
    for each in (sampler, getattr(sampler, "sampler", None)):
        generator = getattr(each, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(order)
    with seeded(order):
        return list(sampler)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of the CPU, and puts them back at the end."""
    state = generators_state(torch.device("cpu"))
    seed_generators(seed)
    try:
        yield
    finally:
        set_generators_state(state, torch.device("cpu"))


def _joined(batches: Sequence[Any]) -> Any:
    """Returns the indices of several batches as one."""
    if len(batches) == 1:
        return batches[0]
    if all(isinstance(batch, np.ndarray) for batch in batches):
        return np.concatenate(batches)
    return [index for batch in batches for index in (batch if isinstance(batch, Sequence | np.ndarray) else (batch,))]


@functools.cache
def _positioned(kind: Any) -> type[DataLoader[Any]]:
    """Returns a class of loaders whose position is the trainer's, so that Lightning need not keep one."""

    class Positioned(kind):  # type: ignore[misc]
        def __iter__(self) -> Iterator[Any]:
            # A generator: workers start when the first batch is asked for, and then the trainer knows the position,
            # which it does not yet when it makes the iterator of a first epoch.
            yield from super().__iter__()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    return Positioned


def split_loader(
    loader: Any, split: Split, backend: Backend, seed: int, position: Callable[[], tuple[int, int]]
) -> tuple[Any, SharedOrder | RankRows | None]:
    """Returns what this rank iterates in place of a training loader, and the sampler of it; a collective call.

    Args:
        loader: A `DataLoader`; it is not changed.
        split: How; see `DistoptStrategy`.
        backend: Link to the other ranks.
        seed: Of the order.
        position: Returns the epoch, and how many batches of it are done.

    Raises:
        TypeError: It cannot be split; says what to do.
        ValueError: Ranks have other numbers of rows, or too few.
    """
    if split == "none":
        return loader, None
    _check(loader, backend.world_size)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader, None
    attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
    inner: Any = getattr(loader, attribute)
    sampler: SharedOrder | RankRows
    if split == "rows":
        num_batches = _equal_steps(inner, backend)
        sampler = RankRows(inner, num_batches, backend.rank, seed, position)
    else:
        _compare_rows(loader, inner, backend)
        num_dealt = backend.world_size if split == "deal" else 1
        sampler = SharedOrder(inner, backend.rank, backend.world_size, seed, position, num_dealt)

    twin: Any = copy.copy(loader)
    object.__setattr__(twin, "__class__", _positioned(type(loader)))  # type: ignore[arg-type]
    object.__setattr__(twin, attribute, sampler)  # which DataLoader refuses to set
    return twin, sampler


def _check(loader: Any, world_size: int) -> None:
    if world_size == 1:
        return
    ways = (
        "Or let each rank's loader yield this rank's own batches, equally many on each, with "
        'strategy=DistoptStrategy(split="none").'
    )
    if not isinstance(loader, DataLoader):
        raise TypeError(f"a {type(loader).__name__} cannot be split over ranks: give a torch DataLoader. {ways}")
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"the data set {type(loader.dataset).__name__} is iterable, so its rows cannot be split over ranks: give "
            f"one with __getitem__ and __len__. {ways}"
        )
    for each in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(each, DistributedSampler) and each.num_replicas > 1:
            raise TypeError(
                f"the loader has a {type(each).__name__}, which splits the rows over ranks already. Leave it out: the "
                f"strategy splits each batch. {ways}"
            )


def _compare_rows(loader: Any, sampler: Any, backend: Backend) -> None:
    """Refuses ranks with other numbers of rows or batches: a batch is split, so all ranks must have the same rows."""
    mine = [len(loader.dataset), len(sampler)]
    by_rank = backend.all_gather_json(mine)
    for rank, each in enumerate(by_rank):
        if each != by_rank[0]:
            raise ValueError(
                f"rank {rank} has {each[0]:,} rows in {each[1]:,} batches, rank 0 has {by_rank[0][0]:,} in "
                f"{by_rank[0][1]:,}: to split batches, every rank needs the same data. If each rank holds rows of its "
                'own, give strategy=DistoptStrategy(split="rows", plates=NAME) with the name of the model\'s plate '
                "over rows."
            )


def _equal_steps(sampler: Any, backend: Backend) -> int:
    """Returns how many batches each rank's rows are cut into: as many as the rank with the most of them needs."""
    indices = _joined(batches_of(sampler, 0)) if len(sampler) else []
    num_rows = len(indices) if isinstance(indices, Sized) else 1  # an index by itself, where batch_size is None
    by_rank: list[tuple[int, int]] = backend.all_gather_json([len(sampler), num_rows])
    fewest = min(rows for _, rows in by_rank)
    if fewest < MIN_ROWS and backend.world_size > 1:
        rank = [rows for _, rows in by_rank].index(fewest)
        raise ValueError(
            f"rank {rank} of {backend.world_size} holds {fewest} row(s), expected at least {MIN_ROWS}: split the rows "
            "more evenly, or start fewer workers."
        )
    return max(1, min(max(batches for batches, _ in by_rank), fewest // MIN_ROWS))
