"""The record of which parameters belong to one rank."""

from __future__ import annotations

import gc

import numpy as np
import pyro
import pytest
import torch

from distopt.sharding import (
    LocalParameter,
    LocalParameterError,
    PlateShard,
    any_local,
    local_parameter,
    local_parameters,
    mark_local,
    num_shards,
)


@pytest.fixture(autouse=True)
def nothing_is_local() -> None:
    gc.collect()  # the marks of earlier tests go with their parameters


def test_mark_goes_with_the_parameter_and_not_with_its_name() -> None:
    plate = PlateShard("rows", num_shards=3)
    param = pyro.param("z", torch.zeros(4)).unconstrained()
    mark_local(param, LocalParameter(plate, (4,), 0))
    pyro.param("x", torch.zeros(2))
    assert any_local() and list(local_parameters()) == ["z"]
    assert (num_shards(param), num_shards(torch.zeros(1))) == (3, 1)

    pyro.clear_param_store()
    pyro.param("z", torch.zeros(4))
    assert local_parameters() == {}
    del param
    gc.collect()
    assert not any_local()


@pytest.mark.parametrize(
    ("shape", "dim", "values"), [((4, 2), 0, (4, 2)), ((3, 4), 1, (3, 4)), ((4, 2), 0, (8,)), ((3, 4, 2), 1, (24,))]
)
def test_rows_of_a_parameter_are_cut_and_put_back(shape: tuple[int, ...], dim: int, values: tuple[int, ...]) -> None:
    entry = LocalParameter(PlateShard("rows", 2), shape, dim)
    tensor = torch.arange(torch.Size(values).numel()).view(values)
    rows = entry.by_row(tensor)
    assert rows.shape[0] == shape[dim]
    assert torch.equal(rows[1], tensor.view(shape).select(dim, 1))
    assert torch.equal(entry.from_rows(rows, like=tensor), tensor)


def test_constrained_values_may_have_another_event_shape() -> None:
    entry = LocalParameter(PlateShard("rows", 2), (4, 2), 0)
    assert entry.by_row(torch.zeros(4, 2, 2)).shape == (4, 2, 2)
    assert entry.by_row(torch.zeros(0, 2)).shape == (0, 2)


def test_rows_of_another_length_than_the_plate_are_an_error() -> None:
    shard = PlateShard("rows", 2, rows=np.arange(3))
    shard.resize(3)
    with pytest.raises(LocalParameterError, match=r"plate 'rows' has 4 datapoints on this rank, but its rows have"):
        shard.resize(4)
    assert shard.global_rows([3], 0).tolist() == [0, 1, 2]


def test_ranks_hold_consecutive_blocks_unless_they_say_otherwise() -> None:
    sizes = [1, 2]
    for rank, expected in enumerate([[0], [1, 2]]):
        assert PlateShard("rows", 2, size=sizes[rank]).global_rows(sizes, rank).tolist() == expected


def test_local_parameter_of_a_replicated_one_is_none() -> None:
    assert local_parameter(torch.zeros(1)) is None
