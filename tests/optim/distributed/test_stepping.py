"""Whole loops of several ranks: what they step by, and what they tell each other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

import distopt.infer
import distopt.optim
from distopt.backends import current
from distopt.optim import (
    SGD,
    Adam,
    DistributedOptimizer,
    PyroLRScheduler,
    ReduceOptions,
    StepInfo,
)
from distopt.reduce import DisagreementError, PeerError
from distopt.sharding import LocalParameter, PlateShard, mark_local
from tests.reduce.steps import Values, random_values, step_with, store_values, unconstrained
from tests.workers import Ranks, world


def _run_failing_rank_is_named_by_all() -> Values:
    """The last rank raises in its model at step 2; the others raise its cause in that step."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    for step in range(3):
        if step == 2 and rank == size - 1:
            optim.abort(ValueError("a bad row"))
        elif step == 2:
            with pytest.raises(PeerError, match=rf"rank {size - 1} of {size} failed at step 2: ValueError: a bad row"):
                step_with(optim, {"x": torch.ones(2)})
        else:
            step_with(optim, {"x": torch.ones(2)})
    assert unconstrained("x").eq(-2).all()
    return store_values()


def _run_uneven_data_is_averaged_over_active_ranks() -> Values:
    """Rank r has 2 + r batches; late ranks bring a new parameter while the others have joined."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    with optim.join():
        for step in range(2 + rank):
            gradients: dict[str, Tensor | None] = {"x": torch.full((2,), float(rank + 1))}
            if step == size:
                pyro.param("late", torch.ones(1), constraint=constraints.positive)
                gradients["late"] = torch.ones(1)
            info = step_with(optim, gradients, loss=float(rank))
            active = [r for r in range(size) if step < 2 + r]
            assert info.num_active == len(active)
            assert info.loss == sum(active) / len(active)
    expected = 0.0
    for step in range(size + 1):
        active = [r for r in range(size) if step < 2 + r]
        expected -= sum(r + 1 for r in active) / len(active)
    torch.testing.assert_close(unconstrained("x"), torch.full((2,), expected))
    assert size == 1 or unconstrained("late").eq(-1).all()
    return store_values()


def _run_failure_while_others_have_joined_reaches_them() -> None:
    """A rank that raises inside `join`, or ends its process, is heard by those who are done."""
    rank, size = current().rank, current().world_size
    for error in (ZeroDivisionError("in the model"), SystemExit(3)):
        optim = DistributedOptimizer(SGD({"lr": 1.0}))
        pyro.param("x", torch.zeros(2))
        expected: Any = type(error) if rank == size - 1 else PeerError
        with pytest.raises(expected), optim.join():
            for step in range(3 if rank == size - 1 else 1):
                if step == 2:
                    raise error
                step_with(optim, {"x": torch.ones(2)})


def _run_model_that_ends_one_process_is_named_by_all() -> None:
    """As one that raises: the others need not wait until the process is gone, and have the cause."""
    rank, size = current().rank, current().world_size

    def model(is_last: bool) -> None:
        pyro.sample("x", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0), obs=torch.ones(()))
        if is_last and rank == size - 1:
            sys.exit(3)

    for kind in (SVI, distopt.infer.SVI):
        svi = kind(model, lambda is_last: None, DistributedOptimizer(SGD({"lr": 0.1})), Trace_ELBO())
        svi.step(False)
        expected: tuple[Any, str] = (SystemExit, "^3$") if rank == size - 1 else (PeerError, "at step 1: SystemExit: 3")
        with pytest.raises(expected[0], match=expected[1]):
            svi.step(True)


def _run_second_optimizer_inside_a_join_is_refused() -> Values:
    """Whether it is called as it is or inside a join of its own: ranks that are done could not follow both."""
    rank, size = current().rank, current().world_size
    first, second = DistributedOptimizer(SGD({"lr": 1.0})), DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    pyro.param("y", torch.zeros(3))
    done = size > 1 and rank == size - 1
    for nested in (False, True):
        cause = (PeerError, f"rank 0 of {size} failed") if done and not nested else (RuntimeError, "and another one is")
        with pytest.raises(cause[0], match=cause[1]), first.join(), second.join() if nested else nullcontext():
            if not done:
                step_with(first, {"x": torch.ones(2)})
                step_with(second, {"y": torch.ones(3)})
    step_with(second, {"y": torch.ones(3)})
    assert unconstrained("x").eq(-1).all() and unconstrained("y").eq(-1).all()
    return store_values()


def _run_several_calls_make_one_step() -> Values:
    """Gradients of three calls are added up, whichever parameters each of them touched."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(backward_passes_per_step=3))
    pyro.param("x", torch.zeros(2))
    pyro.param("y", torch.zeros(2))
    for call in range(6):
        gradients: dict[str, Tensor | None] = {"x" if call % 3 else "y": torch.full((2,), float(rank + call))}
        info = step_with(optim, gradients, loss=float(call))
        assert call % 3 == 2 or info == StepInfo()
        assert (unconstrained("x").eq(0).all() and unconstrained("y").eq(0).all()) == (call < 2)
    mean = (size - 1) / 2
    torch.testing.assert_close(unconstrained("x"), torch.full((2,), -(4 * mean + 1 + 2 + 4 + 5)))
    torch.testing.assert_close(unconstrained("y"), torch.full((2,), -(2 * mean + 0 + 3)))
    assert info.loss == 4.0
    return store_values()


def _run_calls_that_are_left_at_the_end_of_uneven_data_make_a_step() -> Values:
    """Rank r has 4 + r batches for steps of three calls: all have two steps in each epoch, and nothing is kept over."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(backward_passes_per_step=3))
    pyro.param("x", torch.zeros(2))
    for epoch in range(2):
        with optim.join():
            for batch in range(4 + rank % 2):
                step_with(optim, {"x": torch.ones(2)}, loss=float(batch))
        mean = sum(4 + each % 2 for each in range(size)) / size
        torch.testing.assert_close(unconstrained("x"), torch.full((2,), -(epoch + 1) * mean))
    return store_values()


def _run_several_backward_passes_before_a_call_need_nothing() -> Values:
    """Particles: `backward` runs three times before one call."""
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    for _ in range(2):
        param = pyro.param("x", torch.zeros(2)).unconstrained()
        for _ in range(3):
            (param.sum() * (current().rank + 1)).backward()
        optim({param})
        param.grad = None
    torch.testing.assert_close(unconstrained("x"), torch.full((2,), -3.0 * (current().world_size + 1)))
    return store_values()


def _run_nonfinite_gradient_is_skipped_by_all() -> Values:
    """NaN on the last rank, then infinity on rank 0: no rank steps, and the counts stay equal."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    optim.nonfinite = "skip"
    pyro.param("x", torch.zeros(2))
    pyro.param("y", torch.zeros(3))
    for step in range(5):
        bad = {1: (size - 1, float("nan")), 3: (0, float("inf"))}.get(step)
        value = bad[1] if bad is not None and bad[0] == rank else 1.0
        step_with(optim, {"x": torch.ones(2), "y": torch.tensor([1.0, value, 1.0])})
    assert optim.num_skipped_steps == 2
    assert optim.get_state()["x"]["state"][0]["step"] == 3
    optim.nonfinite = "raise"
    with pytest.raises(FloatingPointError, match=rf"step 5: .*rank {size - 1}: 'y'"):
        step_with(optim, {"x": torch.ones(2), "y": torch.full((3,), float("nan") if rank == size - 1 else 1.0)})
    return store_values()


def _run_losses_are_averaged_and_a_stop_of_one_rank_reaches_all() -> None:
    """Their mean and their disjunction, over all ranks, after each call."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    for step in range(3):
        stop = step == 1 and rank == size - 1
        info = step_with(optim, {"x": torch.ones(2)}, loss=1000.0 * rank + step, stop=stop)
        assert info.loss == pytest.approx(1000.0 * (size - 1) / 2 + step, rel=1e-6)
        assert info.stop == (step == 1)


def _run_modules_share_their_parameters() -> Values:
    """`pyro.module` and a `PyroModule` whose ranks start from other seeds."""
    pyro.set_rng_seed(current().rank)
    linear = torch.nn.Linear(3, 2)

    class Scale(PyroModule[torch.nn.Module]):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.rand(2), constraint=constraints.positive)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    scale = Scale()

    def model(x: Tensor) -> None:
        pyro.module("linear", linear)
        mean = scale(linear(x))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(len(x), 2))

    svi = SVI(model, lambda x: None, DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO())
    losses = [svi.step(random_values(5 * step + current().rank, 8, 3)) for step in range(20)]
    assert losses[-1] < losses[0]
    values = store_values()
    assert sorted(values) == ["linear$$$bias", "linear$$$weight", "scale"]
    assert linear.weight.tolist() == values["linear$$$weight"]
    return values


def _run_first_gradient_is_computed_from_the_agreed_values() -> Values:
    """Guides that start elsewhere on each rank, and ranks without data: steps on x²/2 from the lowest rank's value."""
    rank, size = current().rank, current().world_size

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Delta(pyro.param("x", torch.tensor(3.0 + rank))))

    for num_idle in (0, size // 2):
        pyro.clear_param_store()
        optim = DistributedOptimizer(SGD({"lr": 0.5}))
        svi = distopt.infer.SVI(model, guide, optim, Trace_ELBO())
        with optim.join():
            for _ in range(2 if rank >= num_idle else 0):
                svi.step()
        assert unconstrained("x").eq((3.0 + num_idle) / 4).all()
    return store_values()


def _run_guide_that_grows_differently_trains() -> Values:
    """An autoguide, and a guide with a parameter for each group that a rank has met in its data."""
    rank, size = current().rank, current().world_size

    def model(groups: list[int]) -> None:
        total = pyro.sample("total", dist.Normal(0.0, 1.0))
        for group in groups:
            effect = pyro.sample(f"effect{group}", dist.Normal(total, 1.0))
            pyro.sample(f"seen{group}", dist.Normal(effect, 0.1), obs=torch.tensor(float(group)))

    def guide(groups: list[int]) -> None:
        pyro.sample("total", dist.Normal(pyro.param("total_loc", torch.tensor(0.0)), 0.1))
        for group in groups:
            pyro.sample(f"effect{group}", dist.Normal(pyro.param(f"loc{group}", torch.tensor(0.5)), 0.1))

    svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.1})), Trace_ELBO())
    for step in range(30):
        svi.step([(step + rank) % 5, 5 + rank % size])
    grown = store_values()
    assert set(grown) >= {"total_loc", "loc0", "loc4", *(f"loc{5 + r}" for r in range(size))}

    def plain(x: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(weight, 1.0), obs=x)

    automatic = SVI(plain, AutoNormal(plain), DistributedOptimizer(Adam({"lr": 0.1})), Trace_ELBO())
    for step in range(5):
        automatic.step(random_values(step + 10 * rank, 6))
    return store_values()


def _run_call_left_out_is_found_before_anything_is_stepped() -> Values:
    """Rank 1 leaves out step 3 of its loop; all ranks name it in their next call, with the values of before."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    for step in range(5):
        if step == 3 and rank == 1:
            continue
        if size > 1 and step == (4 if rank == 1 else 3):
            with pytest.raises(
                DisagreementError, match="different calls of the optimizer: rank 0: step 3.*rank 1: step 4"
            ):
                step_with(optim, {"x": torch.ones(2)}, step=step)
            break
        step_with(optim, {"x": torch.ones(2)}, step=step)
    assert unconstrained("x").eq(-3 if size > 1 else -5).all()
    return store_values()


def _run_schedules_agree_on_the_averaged_metric() -> Values:
    """ReduceLROnPlateau sees one metric on all ranks; a rank that has joined follows its steps."""
    rank, size = current().rank, current().world_size
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    arguments = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}}
    # What is asked is the schedule, and neither its class nor the function that makes it.
    for name, constructor in {
        "a": partial(plateau, factor=0.5, patience=0),
        "b": lambda optimizer: plateau(optimizer, factor=0.5, patience=0),
    }.items():
        other = DistributedOptimizer(PyroLRScheduler(constructor, arguments))
        pyro.param(name, torch.zeros(2))
        for step in range(3):
            step_with(other, {name: torch.ones(2)})
            other.step(metrics=np.float32(step if rank == 0 else -2 * step))
        # The mean falls at each step if there are several ranks; alone it rises.
        torch.testing.assert_close(unconstrained(name), torch.full((2,), -3.0 if size > 1 else -2.5))

    optim = DistributedOptimizer(PyroLRScheduler(plateau, arguments | {"factor": 0.5, "patience": 0}))
    pyro.param("x", torch.zeros(2))
    with optim.join():
        for _step in range(3 + rank):
            step_with(optim, {"x": torch.ones(2)})
            # By itself rank 0 would see its metric fall, the others see theirs rise; the mean rises.
            optim.step(-1.0 * _step if rank == 0 else 10.0 * _step)
    expected, rate, best, value = 0.0, 1.0, float("inf"), 0.0
    for step in range(2 + size):
        value -= rate
        active = [r for r in range(size) if step < 3 + r]
        metric = sum(-1.0 * step if r == 0 else 10.0 * step for r in active) / len(active)
        best, rate = (metric, rate) if metric < best - abs(best) * 1e-4 or best == float("inf") else (best, rate * 0.5)
        expected = value
    torch.testing.assert_close(unconstrained("x"), torch.full((2,), expected))
    exponential = DistributedOptimizer(
        PyroLRScheduler(torch.optim.lr_scheduler.ExponentialLR, arguments | {"gamma": 0.5})
    )
    pyro.param("y", torch.zeros(1))
    with exponential.join():
        for _ in range(1 + rank):
            step_with(exponential, {"y": torch.ones(1)})
            exponential.step()
    torch.testing.assert_close(unconstrained("y"), torch.full((1,), -sum(0.5**i for i in range(size))))
    return store_values()


def _run_rank_local_parameters_are_never_sent() -> None:
    """Parameters of one rank's own datapoints have other shapes and values on each, and skip together with the rest."""
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    optim.nonfinite = "skip"
    pyro.param("x", torch.zeros(2))
    local = pyro.param("local", torch.zeros(rank + 1)).unconstrained()
    mark_local(local, LocalParameter(PlateShard("rows", num_shards=1), (rank + 1,), 0))
    for step in range(3):
        bad = step == 1 and rank == 0
        step_with(optim, {"x": torch.ones(2), "local": torch.full((rank + 1,), float("nan") if bad else rank + 1.0)})
    assert unconstrained("x").eq(-2).all()
    assert unconstrained("local").eq(-2 * (rank + 1)).all()
    assert optim.num_skipped_steps == 1


LOOPS = [
    _run_failing_rank_is_named_by_all,
    _run_uneven_data_is_averaged_over_active_ranks,
    _run_model_that_ends_one_process_is_named_by_all,
    _run_failure_while_others_have_joined_reaches_them,
    _run_second_optimizer_inside_a_join_is_refused,
    _run_several_calls_make_one_step,
    _run_calls_that_are_left_at_the_end_of_uneven_data_make_a_step,
    _run_several_backward_passes_before_a_call_need_nothing,
    _run_nonfinite_gradient_is_skipped_by_all,
    _run_losses_are_averaged_and_a_stop_of_one_rank_reaches_all,
    _run_modules_share_their_parameters,
    _run_first_gradient_is_computed_from_the_agreed_values,
    _run_guide_that_grows_differently_trains,
    _run_call_left_out_is_found_before_anything_is_stepped,
    _run_schedules_agree_on_the_averaged_metric,
    _run_rank_local_parameters_are_never_sent,
]


@pytest.mark.parametrize("body", LOOPS, ids=lambda body: body.__name__.removeprefix("_run_"))
def test_loops_on_every_backend(ranks: Ranks, body: Callable[[], Any]) -> None:
    ranks.run_alike(body)


# What happens on one rank alone to the parameters of its own datapoints: no gradient in some steps, no datapoint, one
# more such parameter, a gradient that is not finite. It decides which parameters share a group on that rank.
ALONE = ["pauses", "empty", "one more", "nonfinite"]
CLIPPED = {"clip_args": {"global_norm": 3.0}}
STEPPED_BY = [
    ("Adam", {"lr": 0.1}, {}),
    ("Adam", {"lr": 0.1, "amsgrad": True}, CLIPPED),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.1}, {}),
    ("ClippedAdam", {"lr": 0.1, "lrd": 0.99}, {}),
    ("Adam", {"lr": 0.1}, {"clip_args": {"clip_norm": 2.0}}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}, CLIPPED),
    ("RMSprop", {"lr": 0.01}, {}),
    ("AdagradRMSProp", {"eta": 0.1}, {}),
    ("NAdam", {"lr": 0.1}, {}),
]
SHARED = {"a": (7, 6), "m": (19, 0), "q": (11, 9), "z": (23, 0)}  # elements, and the step of the first gradient
LOCAL = {"b": 8, "loc": 3, "zz": 40}


def _run_locals(name: str, args: dict[str, Any], clips: dict[str, Any], alone: str, wide: bool) -> Values:
    """Steps shared parameters and local ones, which on rank 1 are out of the ordinary; drift would be an error."""
    rank, size = current().rank, current().world_size
    dtype = torch.float64 if wide else torch.float32
    optim = DistributedOptimizer(getattr(distopt.optim, name)(args, **clips), reduce=ReduceOptions(drift_every_steps=1))
    optim.nonfinite = "skip"
    num_rows = [37, 0 if alone == "empty" else 5, 13][rank]
    for step in range(60):
        shared = {n: i for i, (n, (_, first)) in enumerate(SHARED.items()) if step >= first}
        local = {n for n, first in LOCAL.items() if step >= first}
        local |= {"only"} if alone == "one more" and rank == 1 and step >= 5 else set()
        params = []
        for n in sorted(shared.keys() | local):
            numel, seed = (SHARED[n][0], 100 * step + 10 * rank + shared[n]) if n in shared else (num_rows, step)
            is_new = n not in pyro.get_param_store()
            p = pyro.param(n, torch.zeros(numel, dtype=dtype)).unconstrained()
            if n in local and is_new:
                mark_local(p, LocalParameter(PlateShard("rows", num_shards=size), (numel,), 0))
            p.grad = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            if n in local and rank == 1 and alone == "pauses" and step % 3:
                p.grad = None
            if n in local and rank == 1 and alone == "nonfinite" and step in (17, 41):
                p.grad.fill_(torch.nan)
            params.append(p)
        optim(params)
    return {n: unconstrained(n).tolist() for n in SHARED}


def plain_values(name: str, args: dict[str, Any], clips: dict[str, Any], wide: bool, size: int) -> Values:
    """Returns what pyro.optim makes of the shared parameters by the ranks' mean gradients."""
    pyro.clear_param_store()
    optim = getattr(pyro.optim, name)(args, **clips)
    dtype = torch.float64 if wide else torch.float32
    for step in range(60):
        params = []
        for i, (n, (numel, first)) in enumerate(SHARED.items()):
            if step >= first:
                p = pyro.param(n, torch.zeros(numel, dtype=dtype)).unconstrained()
                seeds = [100 * step + 10 * rank + i for rank in range(size)]
                of_ranks = [torch.randn(numel, generator=torch.Generator().manual_seed(s), dtype=dtype) for s in seeds]
                p.grad = torch.stack(of_ranks).mean(0)
                params.append(p)
        optim(params)
    return {n: unconstrained(n).tolist() for n in SHARED}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("alone", ALONE)
def test_what_befalls_local_parameters_of_one_rank_changes_no_bit_of_shared_ones(alone: str, wide: bool) -> None:
    for name, args, clips in STEPPED_BY:
        first, *others = world("torch_dist", 3).run(_run_locals, name, args, clips, alone, wide)
        for other in others:
            assert first == other, name
        if alone != "nonfinite" and clips != CLIPPED:  # which skips steps, and a norm that Pyro does not have
            torch.testing.assert_close(first, plain_values(name, args, clips, wide, 3), rtol=1e-4, atol=1e-4)
