"""Higher-order optimizers over several ranks."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor

from distopt.backends import current
from distopt.optim import (
    SGD,
    DistributedMultiOptimizer,
    MixedMultiOptimizer,
    MultiOptimizer,
    Newton,
    TorchMultiOptimizer,
)
from distopt.reduce import DisagreementError
from tests.reduce.steps import Values, random_values
from tests.workers import Ranks


def _run_multi_optimizers_on_shards_equal_one_with_all_data() -> Values:
    """A logistic regression whose rows are split: every kind of them takes one process's path with all the rows."""
    rank, size = current().rank, current().world_size
    rows, labels = random_values(3, 24, 2, dtype=torch.float64), (random_values(4, 24) > 0).double()

    def loss_of(x: Tensor, chosen: slice) -> Tensor:
        losses = torch.nn.functional.softplus(rows[chosen] @ x) - labels[chosen] * (rows[chosen] @ x)
        return losses.sum() * (24 / losses.numel()) + x.square().sum()

    shard = slice(24 * rank // size, 24 * (rank + 1) // size)
    results = []
    makers: tuple[Callable[[], MultiOptimizer], ...] = (
        Newton,
        lambda: TorchMultiOptimizer(torch.optim.Adam, {"lr": 0.1}),
        lambda: MixedMultiOptimizer([(["x"], Newton()), (["y"], SGD({"lr": 0.01}))]),
    )
    for make in makers:
        alone, shared = make(), DistributedMultiOptimizer(make())
        pyro.clear_param_store()
        values = {}
        for name in ("alone", "shared"):
            values[name] = {each: torch.zeros(2, dtype=torch.float64, requires_grad=True) for each in ("x", "y")}
        for _ in range(3):
            for optim, params, chosen in ((alone, values["alone"], slice(None)), (shared, values["shared"], shard)):
                loss = torch.stack([loss_of(param, chosen) for param in params.values()]).sum()
                optim.step(loss, params)
        for name, value in values["alone"].items():
            torch.testing.assert_close(values["shared"][name], value, rtol=1e-9, atol=1e-12)
        results += [value.tolist() for value in values["shared"].values()]
    return {"results": results}


def test_multi_optimizers_on_shards_equal_one_with_all_data(ranks: Ranks) -> None:
    ranks.run_alike(_run_multi_optimizers_on_shards_equal_one_with_all_data)


def _run_parameters_that_differ() -> None:
    rank = current().rank
    names = ("x", "y") if rank else ("x", "z")
    params = {name: torch.zeros(2, requires_grad=True) for name in names}
    with pytest.raises(DisagreementError, match=r"rank 0 gives \{'x': \[2\], 'z': \[2\]\}, rank 1 gives"):
        DistributedMultiOptimizer(Newton()).step(torch.stack(list(params.values())).square().sum(), params)
    assert all(param.eq(0).all() for param in params.values())


def test_ranks_with_other_parameters_are_an_error_on_all_and_nothing_is_stepped() -> None:
    Ranks("torch_dist", 2).run(_run_parameters_that_differ)
