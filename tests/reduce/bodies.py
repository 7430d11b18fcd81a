"""What one rank does in the tests of agreement; what a body returns must be the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from distopt.backends import current
from distopt.optim import SGD, Adam, DistributedOptimizer, PyroOptim
from distopt.reduce import DisagreementError, PeerError

Values = dict[str, Any]


def store_values() -> Values:
    """This rank's unconstrained parameters, exactly."""
    named = pyro.get_param_store().named_parameters()
    return {name: torch.view_as_real(p).tolist() if p.is_complex() else p.tolist() for name, p in sorted(named)}


def step_with(optim: PyroOptim, gradients: Mapping[str, Tensor | None]) -> None:
    """One optimizer call as SVI makes it: a set of parameters with gradients, replaced by zeros afterwards."""
    params = set()
    for name, gradient in gradients.items():
        param = pyro.param(name).unconstrained()
        param.grad = gradient
        params.add(param)
    optim(params)
    for param in params:
        if param.grad is not None:
            param.grad = torch.zeros_like(param.grad)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unconstrained(name: str) -> Tensor:
    """A detached copy of a parameter's unconstrained value."""
    return pyro.param(name).unconstrained().detach().clone()


def gradients_are_averaged() -> Values:
    """Equals torch's own SGD on the mean gradient."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 0.1}))
    pyro.param("b", torch.zeros(3))
    pyro.param("a", torch.ones(2, 2), constraint=constraints.positive)
    reference = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    for step in range(3):
        gradients = [
            {name: noise(100 * step + r + ord(name), *reference[name].shape) for name in reference} for r in range(size)
        ]
        step_with(optim, gradients[rank])
        for name, value in reference.items():
            value -= 0.1 * torch.stack([each[name] for each in gradients]).mean(0)
            torch.testing.assert_close(unconstrained(name), value)
    assert optim.num_active == size
    return store_values()


def steady_state_costs_one_collective() -> None:
    """Counts the calls that reach the backend."""
    backend = current()
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    names = [f"p{i}" for i in range(20)]
    for name in names:
        pyro.param(name, torch.zeros(4, 5))
    calls: list[str] = []
    kept = {}
    for method in ("all_reduce", "broadcast", "all_gather", "exchange"):
        kept[method] = getattr(backend, method)
        setattr(
            backend,
            method,
            lambda *args, method=method, **kwargs: (calls.append(method), kept[method](*args, **kwargs))[1],
        )
    try:
        for step in range(6):
            if step == 1:
                calls.clear()
            step_with(optim, {name: noise(step, 4, 5) for name in names})
        assert calls == ["all_reduce"] * 5
        calls.clear()
        for step in range(4):  # fewer of them, and others on each rank: still one
            touched = [names[step], names[step + backend.rank + 1]]
            step_with(optim, {name: noise(step, 4, 5) for name in touched})
        assert calls == ["all_reduce"] * 4
    finally:
        for method in kept:
            delattr(backend, method)
    assert optim.reducer.num_agreements == 1


def parameter_of_one_rank_is_created_everywhere() -> Values:
    """Each rank has one of its own, from another step on; all have all of them, stepped by the zero-aware mean."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("shared", torch.zeros(2))
    expected = {r: 3.0 + r for r in range(size)}
    for step in range(size + 2):
        gradients: dict[str, Tensor | None] = {"shared": torch.ones(2)}
        if step >= rank:
            pyro.param(f"own{rank}", lambda: torch.tensor([3.0 + rank]), constraint=constraints.positive)
            gradients[f"own{rank}"] = torch.full((1,), float(size))
        step_with(optim, gradients)
        for r in range(min(step + 1, size)):
            start = torch.tensor([3.0 + r]).log()
            torch.testing.assert_close(unconstrained(f"own{r}"), start - (step + 1 - r))
            assert type(pyro.get_param_store()._constraints[f"own{r}"]) is type(constraints.positive)
    assert len(expected) == size
    torch.testing.assert_close(unconstrained("shared"), torch.full((2,), -(size + 2.0)))
    return store_values()


def order_of_creation_does_not_matter() -> Values:
    """Same shapes, created in reverse on odd ranks: gradients are not swapped."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    names = ["u", "v", "w"]
    for name in names if rank % 2 == 0 else reversed(names):
        pyro.param(name, torch.zeros(4))
    for _ in range(2):
        step_with(optim, {name: torch.full((4,), float(10**place) * (rank + 1)) for place, name in enumerate(names)})
    for place, name in enumerate(names):
        assert unconstrained(name).eq(-2 * 10**place * (size + 1) / 2).all()
    return store_values()


def first_values_come_from_the_lowest_rank() -> Values:
    """Ranks start from other seeds; `late` is first seen on the highest rank alone, but rank 0 has it in its store."""
    rank, size = current().rank, current().world_size
    pyro.set_rng_seed(rank)
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.full((2,), float(rank)))
    step_with(optim, {"x": torch.zeros(2)})
    assert unconstrained("x").eq(0).all()
    if rank in (0, size - 1):
        pyro.param("late", torch.full((2,), 7.0 + rank))
    step_with(optim, {"x": torch.zeros(2)} | ({"late": torch.zeros(2)} if rank == size - 1 else {}))
    assert unconstrained("late").eq(7).all()
    return store_values()


def synchronize_agrees_before_the_first_step() -> Values:
    """The first gradients are computed from equal values, and a module's buffers are equal."""
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 0.5}))
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(float(rank + 4))
    pyro.param("x", torch.full((2,), float(rank + 1)))
    optim.synchronize(modules=[norm])
    assert norm.running_mean.eq(4).all()
    param = pyro.param("x").unconstrained()
    param.square().sum().backward()
    optim({param})
    assert unconstrained("x").eq(0).all()
    return store_values()


def untouched_parameters_are_not_stepped() -> Values:
    """Adam's step counts: of a parameter touched on some rank all count, of one that is not none."""
    rank = current().rank
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    for name in ("always", "sometimes", "missing"):
        pyro.param(name, torch.ones(2))
    for step in range(4):
        gradients: dict[str, Tensor | None] = {"always": torch.ones(2)}
        if step == 2 and rank == 0:
            gradients["sometimes"] = torch.ones(2)
        gradients["missing"] = None
        step_with(optim, gradients)
    state = optim.get_state()
    assert state["always"]["state"][0]["step"] == 4
    assert state["sometimes"]["state"][0]["step"] == 1
    assert "missing" not in state or not state["missing"]["state"]
    assert unconstrained("missing").eq(1).all()
    return store_values()


def _disagreement(shape_of: Any = None, **differs: Any) -> str:
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("fine", torch.zeros(2))
    step_with(optim, {"fine": torch.ones(2)})
    last = rank == current().world_size - 1
    dtype = differs.get("dtype", torch.float32) if last else torch.float32
    shape = differs.get("shape", (4, 3)) if last else (4, 3)
    constraint = differs.get("constraint", constraints.positive) if last else constraints.positive
    pyro.param("z", torch.ones(shape, dtype=dtype), constraint=constraint)
    before = store_values()
    with pytest.raises(DisagreementError) as raised:
        step_with(optim, {"fine": torch.ones(2), "z": torch.ones(shape, dtype=dtype)})
    assert store_values() == before
    return str(raised.value).replace(f"rank {rank} of", "rank R of", 1)


def disagreement_is_the_same_error_everywhere() -> list[str]:
    """Same numel in another shape, another dtype, another constraint: each names the parameter, ranks and values."""
    if current().world_size == 1:
        return []
    messages = [_disagreement(shape=(3, 4)), _restart(), _disagreement(dtype=torch.float64), _restart()]
    messages += [_disagreement(constraint=constraints.interval(0.0, 2.0)), _restart(), _disagreement(shape=(5,))]
    texts = [message for message in messages if message]
    for text, values in zip(
        texts, [("(4, 3)", "(3, 4)"), ("float32", "float64"), ("GreaterThan", "Interval")], strict=False
    ):
        assert "'z'" in text and "step 1" in text and all(value in text for value in values), text
        assert f"rank {current().world_size - 1}: " in text, text
    return texts


def _restart() -> str:
    pyro.clear_param_store()
    return ""


def settings_that_differ_are_an_error_before_the_first_step() -> None:
    """Another bucket size on one rank would pair unlike collectives."""
    if current().world_size == 1:
        return
    optim = DistributedOptimizer(SGD({"lr": 1.0}), bucket_mib=25.0 if current().rank else 1.0)
    pyro.param("x", torch.zeros(2))
    with pytest.raises(DisagreementError, match=r"bucket_mib differs.*rank 0: 1.0"):
        step_with(optim, {"x": torch.ones(2)})


def call_left_out_is_found_before_anything_is_stepped() -> Values:
    """Rank 1 leaves out step 3 of its loop; all ranks name it in their next call, with the values of before."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    for step in range(5):
        if step == 3 and rank == 1:
            continue
        optim.local_step = step
        if size > 1 and step == (4 if rank == 1 else 3):
            with pytest.raises(
                DisagreementError, match="different calls of the optimizer: rank 0: step 3.*rank 1: step 4"
            ):
                step_with(optim, {"x": torch.ones(2)})
            break
        step_with(optim, {"x": torch.ones(2)})
    assert unconstrained("x").eq(-3 if size > 1 else -5).all()
    return store_values()


def failing_rank_is_named_by_all() -> Values:
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


def uneven_data_is_averaged_over_active_ranks() -> Values:
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
            optim.local_loss = float(rank)
            step_with(optim, gradients)
            active = [r for r in range(size) if step < 2 + r]
            assert optim.num_active == len(active)
            assert optim.mean_loss == sum(active) / len(active)
    expected = 0.0
    for step in range(size + 1):
        active = [r for r in range(size) if step < 2 + r]
        expected -= sum(r + 1 for r in active) / len(active)
    torch.testing.assert_close(unconstrained("x"), torch.full((2,), expected))
    assert size == 1 or unconstrained("late").eq(-1).all()
    return store_values()


def failure_while_others_have_joined_reaches_them() -> None:
    """A rank that raises inside `join` is heard by those who are done."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    expected: Any = ZeroDivisionError if rank == size - 1 else PeerError
    with pytest.raises(expected), optim.join():
        for step in range(3 if rank == size - 1 else 1):
            if step == 2:
                raise ZeroDivisionError("in the model")
            step_with(optim, {"x": torch.ones(2)})


def several_calls_make_one_step() -> Values:
    """Gradients of three calls are added up, whichever parameters each of them touched."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}), backward_passes_per_step=3)
    pyro.param("x", torch.zeros(2))
    pyro.param("y", torch.zeros(2))
    for call in range(6):
        optim.local_loss = float(call)
        step_with(optim, {"x" if call % 3 else "y": torch.full((2,), float(rank + call))})
        assert (unconstrained("x").eq(0).all() and unconstrained("y").eq(0).all()) == (call < 2)
    mean = (size - 1) / 2
    torch.testing.assert_close(unconstrained("x"), torch.full((2,), -(4 * mean + 1 + 2 + 4 + 5)))
    torch.testing.assert_close(unconstrained("y"), torch.full((2,), -(2 * mean + 0 + 3)))
    assert optim.mean_loss == 4.0
    return store_values()


def several_backward_passes_before_a_call_need_nothing() -> Values:
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


def nonfinite_gradient_is_skipped_by_all() -> Values:
    """NaN on the last rank, then infinity on rank 0: no rank steps, and the counts stay equal."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    optim.optim.nonfinite = "skip"
    pyro.param("x", torch.zeros(2))
    pyro.param("y", torch.zeros(3))
    for step in range(5):
        bad = {1: (size - 1, float("nan")), 3: (0, float("inf"))}.get(step)
        value = bad[1] if bad is not None and bad[0] == rank else 1.0
        step_with(optim, {"x": torch.ones(2), "y": torch.tensor([1.0, value, 1.0])})
    assert optim.num_skipped_steps == 2
    assert optim.get_state()["x"]["state"][0]["step"] == 3
    optim.optim.nonfinite = "raise"
    with pytest.raises(FloatingPointError, match=rf"step 5: .*rank {size - 1}: 'y'"):
        step_with(optim, {"x": torch.ones(2), "y": torch.full((3,), float("nan") if rank == size - 1 else 1.0)})
    return store_values()


def loss_and_flag_ride_along() -> None:
    """Their mean and their disjunction, over all ranks, after each call."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    for step in range(3):
        optim.local_loss, optim.local_flag = 1000.0 * rank + step, step == 1 and rank == size - 1
        step_with(optim, {"x": torch.ones(2)})
        assert optim.mean_loss == pytest.approx(1000.0 * (size - 1) / 2 + step, rel=1e-6)
        assert optim.any_flag == (step == 1)


def modules_share_their_parameters() -> Values:
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
    losses = [svi.step(noise(5 * step + current().rank, 8, 3)) for step in range(20)]
    assert losses[-1] < losses[0]
    values = store_values()
    assert sorted(values) == ["linear$$$bias", "linear$$$weight", "scale"]
    assert linear.weight.tolist() == values["linear$$$weight"]
    return values


def guide_that_grows_differently_trains() -> Values:
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
        automatic.step(noise(step + 10 * rank, 6))
    return store_values()


def replaced_and_cleared_parameters_are_agreed_anew() -> Values:
    """`store[name] = value` on one rank counts for all; a cleared store starts over, other shapes included."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    pyro.param("y", torch.zeros(2))
    step_with(optim, {"x": torch.ones(2), "y": torch.ones(2)})
    if rank == size - 1:
        pyro.get_param_store()["x"] = torch.full((2,), 5.0)
    step_with(optim, {"x": torch.ones(2), "y": torch.ones(2)})
    assert unconstrained("x").eq(4).all() and unconstrained("y").eq(-2).all()
    pyro.clear_param_store()
    pyro.param("y", torch.full((3,), 9.0))
    for _ in range(2):
        step_with(optim, {"y": torch.ones(3)})
    assert unconstrained("y").eq(7).all()
    assert optim.reducer.layout.names == ("y",)
    return store_values()


def kinds_of_tensors_mix() -> Values:
    """float64, 16 bits, complex, scalars and empty tensors in one model."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    kinds = {
        "double": torch.zeros(3, dtype=torch.float64),
        "half": torch.zeros(4, dtype=torch.bfloat16),
        "complex": torch.zeros(2, 2, dtype=torch.complex64),
        "scalar": torch.zeros(()),
        "empty": torch.zeros(0, 3),
        "single": torch.zeros(5, 1),
        "strided": torch.zeros(3, 4),
    }
    for name, value in kinds.items():
        pyro.param(name, value)
    for step in range(3):
        gradients = {
            name: torch.full_like(value, rank + 1)
            for name, value in kinds.items()
            if not (step == 1 and name == "single")
        }
        gradients["complex"] = torch.full_like(kinds["complex"], complex(rank + 1, -rank))
        gradients["strided"] = torch.full((4, 3), float(rank + 1)).t()
        step_with(optim, gradients)
    mean = (size + 1) / 2
    for name in kinds:
        steps = 2 if name == "single" else 3
        expected = complex(-3 * mean, 3 * (mean - 1)) if name == "complex" else -steps * mean
        assert unconstrained(name).eq(expected).all(), name
    return store_values()


AGREEMENT = [
    gradients_are_averaged,
    steady_state_costs_one_collective,
    parameter_of_one_rank_is_created_everywhere,
    order_of_creation_does_not_matter,
    first_values_come_from_the_lowest_rank,
    synchronize_agrees_before_the_first_step,
    untouched_parameters_are_not_stepped,
    disagreement_is_the_same_error_everywhere,
    settings_that_differ_are_an_error_before_the_first_step,
    call_left_out_is_found_before_anything_is_stepped,
    failing_rank_is_named_by_all,
    uneven_data_is_averaged_over_active_ranks,
    failure_while_others_have_joined_reaches_them,
    several_calls_make_one_step,
    several_backward_passes_before_a_call_need_nothing,
    nonfinite_gradient_is_skipped_by_all,
    loss_and_flag_ride_along,
    modules_share_their_parameters,
    guide_that_grows_differently_trains,
    replaced_and_cleared_parameters_are_agreed_anew,
    kinds_of_tensors_mix,
]
