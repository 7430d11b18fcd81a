"""Which hook an option names, a user's own too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, get_args

import pyro
import pytest
import torch

from distopt.backends import current
from distopt.backends.single import Single
from distopt.config import ReduceOptions
from distopt.config.base import ConfigError
from distopt.optim import SGD, DistributedOptimizer
from distopt.reduce.comm_hooks import HOOKS, CommHook, make_hook
from distopt.reduce.comm_hooks.power_sgd import PowerSGD
from distopt.reduce.messages import RoundSummary
from tests.reduce.steps import Values, by_rank, step_with, store_values, unconstrained
from tests.train.runs import config, run_here
from tests.workers import Ranks

NAMED = "tests.reduce.comm_hooks.test_registry:SumOfSigns"


class SumOfSigns(CommHook):
    """A hook of a user's own: of each number only the sign is summed."""

    num_buckets: ClassVar[int] = 0

    def start(self, bucket: Any) -> Any:
        signs = bucket.flat.sign()
        return self.backend.all_reduce(signs), signs

    def finish(self, bucket: Any, started: Any, summary: RoundSummary | None) -> None:
        handle, signs = started
        handle.wait()
        assert summary is not None and summary.num_active > 0
        bucket.flat.copy_(signs)
        SumOfSigns.num_buckets += 1


class Unready:
    """No CommHook."""


def _run_hook_of_the_user_is_used() -> Values:
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(compression=NAMED))
    pyro.param("x", torch.zeros(9))
    pyro.param("y", torch.zeros(2, 3))
    for step in range(3):
        step_with(optim, {"x": by_rank(step, 9)[rank], "y": by_rank(10 + step, 2, 3)[rank]})
    expected = -sum(torch.stack(by_rank(step, 9)).sign().mean(0) for step in range(3))
    torch.testing.assert_close(unconstrained("x"), expected)
    assert type(optim.reducer._hook).__name__ == "SumOfSigns"
    return store_values()


@pytest.mark.parametrize("size", [1, 2])
def test_hook_of_the_user_reduces_by_its_name(size: int) -> None:
    Ranks("torch_dist", size).run_alike(_run_hook_of_the_user_is_used)


def test_hook_of_the_user_is_named_in_a_yaml(tmp_path: Path) -> None:
    before = SumOfSigns.num_buckets
    run_here(config(tmp_path, train={"num_steps": 4}), f"reduce.compression={NAMED}")
    assert SumOfSigns.num_buckets == before + 4


def test_every_name_in_the_options_has_a_hook_and_every_hook_a_name() -> None:
    names, _reference = get_args(ReduceOptions.model_fields["compression"].annotation)
    assert HOOKS.keys() == {*get_args(names), "adasum"}


@pytest.mark.parametrize("name", HOOKS)
def test_options_refuse_overlap_exactly_for_hooks_that_cannot(name: str) -> None:
    options = {"op": name} if name == "adasum" else {"compression": name}
    try:
        accepted = ReduceOptions(overlap=True, **options) is not None
    except ValueError:
        accepted = False
    assert accepted == HOOKS[name].can_overlap
    hook = make_hook(Single(), ReduceOptions(**options))
    assert type(hook) is HOOKS[name]
    assert hook.has_rank_local_state == (type(hook) is PowerSGD)
    hook.forget({"x"})
    hook.load_state_dict(hook.state_dict())


def test_hook_that_cannot_be_used_is_an_error_with_its_name() -> None:
    with pytest.raises(ConfigError, match="reduce.compression: found .*has no SumOfSines; did you mean SumOfSigns"):
        make_hook(Single(), ReduceOptions(compression=NAMED.replace("Signs", "Sines")))
    with pytest.raises(ConfigError, match="Unready, expected a subclass of distopt.reduce.comm_hooks.CommHook"):
        make_hook(Single(), ReduceOptions(compression=NAMED.replace("SumOfSigns", "Unready")))
    with pytest.raises(ValueError, match="overlap=True needs a CommHook with can_overlap=True"):
        make_hook(Single(), ReduceOptions(compression=NAMED, overlap=True))


def test_contract_cannot_be_made_without_start_and_finish() -> None:
    with pytest.raises(TypeError, match="abstract"):
        CommHook(Single(), ReduceOptions())  # type: ignore[abstract]
