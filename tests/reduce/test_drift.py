"""Replicas that must be equal, and the one bit by which they are not."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch

from distopt.backends import current
from distopt.backends.single import Single
from distopt.optim import (
    Adam,
    DistributedOptimizer,
    ReduceOptions,
)
from distopt.reduce import DriftError, LocalGradients
from distopt.reduce.drift import (
    combine_checksums,
    explain_nonfinite,
    find_nonfinite,
    state_checksum,
    tensor_checksums,
)
from distopt.reduce.layout import Layout, ParamSpec
from distopt.reduce.messages import BASE, NUM_CHECKSUM_DIGITS
from tests.reduce.steps import step_with
from tests.workers import Ranks


def _run_one_flipped_bit_is_found_and_named() -> list[str]:
    """One bit of a parameter, then of Adam's state, flipped on the last rank."""
    rank, size = current().rank, current().world_size
    messages = []
    for where in ("value", "state"):
        pyro.clear_param_store()
        optim = DistributedOptimizer(Adam({"lr": 0.1}), reduce=ReduceOptions(drift_every_steps=2))
        for name in ("a", "b", "c"):
            pyro.param(name, torch.ones(50))
        for step in range(6):
            if step == 3 and rank == size - 1 and size > 1:
                if where == "value":
                    pyro.param("b").unconstrained().data.view(torch.int32)[17] ^= 1
                else:
                    state = optim.get_state()
                    state["b"]["state"][0]["exp_avg"].view(torch.int32)[17] ^= 1
                    optim.set_state({"b": state["b"]})
            if step == 4 and size > 1:
                with pytest.raises(DriftError) as raised:
                    step_with(optim, {name: torch.ones(50) for name in ("a", "b", "c")})
                messages.append(str(raised.value).replace(f"rank {rank} of", "rank R of", 1))
                assert "parameter 'b'" in messages[-1] and f"against rank {size - 1}" in messages[-1]
                break
            step_with(optim, {name: torch.ones(50) for name in ("a", "b", "c")})
    assert size == 1 or ("value of" in messages[0] and "optimizer state of" in messages[1]), messages
    return messages


def test_one_flipped_bit_is_found_and_named(ranks: Ranks) -> None:
    ranks.run_alike(_run_one_flipped_bit_is_found_and_named)


def _checksum(tensor: torch.Tensor) -> int:
    return tensor_checksums([tensor])[0]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.uint8]
)
def test_checksum_changes_with_any_flipped_bit(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3)
    before = _checksum(tensor)
    assert _checksum(tensor.t().contiguous().t()) == before
    raw = tensor.view(torch.uint8)
    for byte in range(raw.shape[-1]):
        for bit in range(8):
            raw[1, byte] ^= 1 << bit
            assert _checksum(tensor) != before
            raw[1, byte] ^= 1 << bit
    assert _checksum(tensor) == before


def test_checksum_tells_zero_from_minus_zero_and_takes_sparse_tensors() -> None:
    assert _checksum(torch.zeros(1)) != _checksum(-torch.zeros(1))
    assert _checksum(torch.eye(3).to_sparse()) == _checksum(torch.eye(3))


def test_checksum_of_state_depends_on_values_shapes_and_keys() -> None:
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3), "groups": [{"lr": 0.1}]}
    others = [
        state | {"step": torch.tensor(4.0)},
        state | {"exp_avg": torch.ones(3, 2)},
        state | {"groups": [{"lr": 0.2}]},
        state | {"extra": None},
    ]
    sums = {state_checksum(each) for each in (state, dict(state), *others)}
    assert len(sums) == 5


def test_combined_checksum_fits_the_digits_and_does_not_depend_on_order() -> None:
    sums = {"b": (1, "x"), "a": (-(2**63), "y")}
    combined = combine_checksums(sums)
    assert 0 <= combined < BASE**NUM_CHECKSUM_DIGITS
    assert combined == combine_checksums(dict(reversed(sums.items())))


NAN = torch.tensor([float("nan")])


def layout_of(*names: str) -> Layout:
    specs = {name: ParamSpec(name, (1,), torch.float32, "cpu", False, "real") for name in names}
    params = {name: torch.zeros(1) for name in names}
    return Layout(specs, params, bucket_mib=1.0, control_device=torch.device("cpu"))


def test_ranks_and_parameters_that_are_not_finite_are_named() -> None:
    local = LocalGradients(gradients=[torch.tensor([1.0]), None, NAN])
    local.rank_local = [("z", torch.zeros(1), torch.tensor([float("inf")]))]
    nonfinite = find_nonfinite(layout_of("a", "b", "c"), (), local, 2)
    assert explain_nonfinite(Single(), nonfinite, 7) == "step 7: gradients that are not finite: rank 0: 'c', 'z'."
    assert "the sum overflowed" in explain_nonfinite(Single(), find_nonfinite(layout_of("a"), (), None, 2), 7)


def test_gradients_that_the_sum_has_overwritten_blame_no_rank_alone() -> None:
    layout = layout_of("a", "b", "c")
    (bucket,) = layout.buckets
    local = LocalGradients(gradients=[bucket.views[0], NAN, bucket.views[2]])
    bucket.save_()
    bucket.views[0].fill_(float("nan"))
    assert find_nonfinite(layout, (bucket,), LocalGradients(gradients=[*bucket.views]), 2) == ([], [])
    assert find_nonfinite(layout, (), local, 2) == (["b"], ["a"])
    assert find_nonfinite(layout, (), local, 1) == (["a", "b"], []), "of one rank they are its own"

    class Two(Single):
        def all_gather_json(self, value: Any, timeout: Any = None) -> list[Any]:
            return [*super().all_gather_json(value), [["c"], ["a", "b"]], [[], []]]

    explained = explain_nonfinite(Two(), find_nonfinite(layout, (), local, 2), 7)
    assert explained.endswith("not finite: rank 0: 'b'; rank 1: 'c'; on one or more of ranks 0, 1: 'a'.")
