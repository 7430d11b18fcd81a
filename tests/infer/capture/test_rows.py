"""Rows of tensors are what indexing gives, however they are asked for."""

from __future__ import annotations

import pytest
import torch

from distopt.infer import TensorRows

COLUMNS = (torch.arange(12.0).reshape(6, 2), torch.arange(6), torch.rand(6, 1, 3))


@pytest.mark.parametrize("rows", [[3, 0], [5, 5, 1], []])
def test_rows_are_those_of_each_column_in_their_order(rows):
    index = torch.tensor(rows, dtype=torch.int64)
    taken, expected = TensorRows(COLUMNS, index), [column[index] for column in COLUMNS]
    for ways in (list(taken), [taken[i] for i in range(3)], taken[:], [*taken[:1], *taken[1:]]):
        assert len(ways) == len(taken) == 3
        assert all(torch.equal(one, other) for one, other in zip(ways, expected, strict=True))
    assert torch.equal(taken[-1], expected[-1])
    with pytest.raises(IndexError):
        taken[3]


def test_rows_are_read_when_they_are_asked_for_and_not_kept():
    column = torch.zeros(4)
    taken = TensorRows((column,), torch.tensor([2]))
    column[2] = 7.0
    (first,) = taken
    assert first.item() == 7.0
    first.zero_()
    assert column[2] == 7.0 and taken[0].item() == 7.0
