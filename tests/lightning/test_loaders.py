"""Who reads which rows: shares of batches, in an order that follows from seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from distopt.backends import current
from distopt.lightning.loaders import MIN_ROWS, Split, batches_of, split_batch, split_loader
from tests.workers import world


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("size", [*range(1, 40), 128])
def test_shares_are_the_batch_without_a_share_of_one_row_and_their_weights_have_the_mean_1(
    size: int, world_size: int
) -> None:
    batch = list(range(100, 100 + size))
    shares = [split_batch(batch, rank, world_size) for rank in range(world_size)]
    if size < MIN_ROWS * world_size:
        assert [(share.indices, share.weight) for share in shares] == [(batch, 1.0)] * world_size
        return
    assert [row for share in shares for row in share.indices] == batch
    assert all(share.num_rows == len(share.indices) >= MIN_ROWS and share.num_all == size for share in shares)
    assert np.mean([share.weight for share in shares]) == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("indices", [7, np.int64(7), [7], np.array([3, 4])])
def test_what_is_one_row_or_too_few_is_read_by_all(indices: object) -> None:
    assert split_batch(indices, 1, 2).indices is indices


def numpy_order(num_rows: int) -> object:
    class Order:
        def __iter__(self):
            return iter(np.random.permutation(num_rows).reshape(-1, 2))

        def __len__(self) -> int:
            return num_rows // 2

    return Order()


SAMPLERS = {
    "torch": lambda: BatchSampler(RandomSampler(range(12)), 5, drop_last=False),
    "generator": lambda: BatchSampler(RandomSampler(range(12), generator=torch.Generator()), 5, drop_last=False),
    "numpy": lambda: numpy_order(12),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_order_follows_from_seed_and_epoch_whatever_was_drawn_before(kind: str) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(3)
        np.random.rand(3)
        return [int(row) for batch in batches_of(sampler, seed, epoch) for row in batch]

    sampler = SAMPLERS[kind]()
    first = order(4, 0)
    state = torch.get_rng_state()
    others = [order(4, 1), order(5, 0)]
    sampler = SAMPLERS[kind]()
    assert order(4, 0) == first and first not in others and others[0] != others[1]
    assert sorted(first) == list(range(12))
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    batches_of(sampler, 4, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_loader_continues_in_the_middle_of_an_epoch(options: dict[str, object]) -> None:
    data = TensorDataset(torch.arange(11))
    position = [(0, 0)]
    loader = DataLoader(data, batch_size=3, shuffle=True, **options)  # type: ignore[arg-type]
    twin, sampler = split_loader(loader, "batches", current(), 8, lambda: position[0])
    assert len(twin) == len(loader) == 4 and sampler is not None

    iterator = iter(twin)  # made before the position is known, as by Lightning
    position[0] = (1, 0)
    whole = [batch[0].tolist() for batch in iterator]
    assert sorted(sum(whole, [])) == list(range(11))
    position[0] = (1, 3)
    assert [batch[0].tolist() for batch in twin] == whole[3:]
    assert sampler.share(3).num_rows == 2
    assert len(next(iter(loader))[0]) == 3


class Endless(IterableDataset[int]):
    def __iter__(self):
        return iter(range(100))


def _run_refusals() -> list[str]:
    rank = current().rank
    data = TensorDataset(torch.arange(8))
    refused: list[tuple[object, Split]] = [
        (DataLoader(Endless(), batch_size=2), "batches"),
        ([torch.arange(5)], "deal"),
        (DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, rank)), "batches"),
        (DataLoader(range(8 + 7 * rank), batch_size=5), "batches"),
        (DataLoader(range(1 + 4 * rank), batch_size=5), "rows"),
        (DataLoader(range(1), batch_size=None), "rows"),
    ]
    messages = []
    for loader, split in refused:
        with pytest.raises((TypeError, ValueError)) as caught:
            split_loader(loader, split, current(), 0, lambda: (0, 0))
        messages.append(str(caught.value))
        assert split_loader(loader, "none", current(), 0, lambda: (0, 0)) == (loader, None)
    return messages


def test_what_cannot_be_split_is_refused_on_all_ranks_with_what_to_do() -> None:
    for messages in world("torch_dist", 2).run(_run_refusals):
        starts = [
            "the data set Endless is iterable, so its rows cannot be split over ranks",
            "a list cannot be split over ranks: give a torch DataLoader",
            "the loader has a DistributedSampler, which splits the rows over ranks already",
            "rank 1 has 15 rows in 3 batches, rank 0 has 8 in 2: to split batches, every rank needs the same data",
            "rank 0 of 2 holds 1 row(s), expected at least 2: split the rows more evenly",
            "rank 0 of 2 holds 1 row(s), expected at least 2: split the rows more evenly",
        ]
        assert [message[: len(start)] for message, start in zip(messages, starts, strict=True)] == starts
