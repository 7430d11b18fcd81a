"""What one rank does in the tests of the reducer's options; what a body returns must be the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor

from distopt.backends import current
from distopt.optim import (
    SGD,
    Adam,
    DistributedMultiOptimizer,
    DistributedOptimizer,
    HorovodOptimizer,
    MixedMultiOptimizer,
    MultiOptimizer,
    Newton,
    PyroLRScheduler,
    ReduceOptions,
    SparseAdam,
    TorchMultiOptimizer,
)
from distopt.reduce import DriftError
from distopt.sharding import LocalParameter, PlateShard, mark_local
from tests.reduce.steps import Values, by_rank, noise, step_with, store_values, unconstrained


def sixteen_bits_stay_close_to_the_mean() -> Values:
    """Errors below 2^-10 and 2^-7 of the largest gradient, control slots exact, large float16 sums finite."""
    rank, size = current().rank, current().world_size
    for compression, bits in (("fp16", 10), ("bf16", 7)):
        optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(compression=compression))
        pyro.param(compression, torch.zeros(300))
        gradients = by_rank(1, 300)
        info = step_with(optim, {compression: gradients[rank]}, loss=1.0 + rank / 3)
        mean = torch.stack(gradients).mean(0)
        error = (unconstrained(compression) + mean).abs().max()
        assert 0 < error <= 2.0**-bits * torch.stack(gradients).abs().max()
        assert info.loss == pytest.approx(1.0 + (size - 1) / 6, rel=1e-6)
    optim = HorovodOptimizer(SGD({"lr": 1.0}), compression="fp16")
    pyro.param("large", torch.zeros(2))
    step_with(optim, {"large": torch.full((2,), 60000.0)})
    assert unconstrained("large").eq(-60000.0).all()
    return store_values()


def power_sgd_converges_by_its_error_feedback() -> Values:
    """A fixed full-rank gradient arrives in full over some steps; a low-rank one at once; vectors are exact."""
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(compression="powersgd", power_sgd_rank=2))
    for name, shape in (("full", (12, 10)), ("low", (12, 10)), ("vector", (7,))):
        pyro.param(name, torch.zeros(shape))
    column, rows, vectors = noise(5, 12, 1), by_rank(2, 1, 10), by_rank(3, 7)
    fulls = by_rank(4, 12, 10)
    num_steps = 60
    for _ in range(num_steps):
        step_with(optim, {"full": fulls[rank], "low": column @ rows[rank], "vector": vectors[rank]})
    means = {
        "full": torch.stack(fulls).mean(0),
        "low": column @ torch.stack(rows).mean(0),
        "vector": torch.stack(vectors).mean(0),
    }
    errors = {
        name: ((unconstrained(name) / -num_steps - mean).norm() / mean.norm()).item() for name, mean in means.items()
    }
    assert errors["vector"] < 1e-5 and errors["low"] < 1e-4 and errors["full"] < 0.25, errors
    return store_values()


def power_sgd_keeps_its_errors_while_parameters_come_and_go() -> Values:
    """Steps without a parameter, and rounds thrown away for a new one, leave its own steps as they would be; a
    parameter of another shape takes an old name.
    """
    rank, size = current().rank, current().world_size
    gradient, other = by_rank(7, 12, 10)[rank], by_rank(8, 12, 10)[rank]

    def train(disturbed: bool) -> Tensor:
        pyro.clear_param_store()
        for name in ("x", "y"):
            pyro.param(name, torch.zeros(12, 10))
        optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(compression="powersgd", power_sgd_rank=1))
        for step in range(8):
            step_with(optim, {"x": gradient})
            if disturbed:
                step_with(optim, {"y": other})
            if disturbed and step == 4:
                pyro.get_param_store().setdefault("z", torch.zeros(3))
                step_with(optim, {"y": other} | ({"z": torch.ones(3)} if rank == size - 1 else {}))
        found = unconstrained("x")
        pyro.clear_param_store()
        pyro.param("x", torch.zeros(10, 9))
        step_with(optim, {"x": torch.ones(10, 9)})
        torch.testing.assert_close(unconstrained("x"), -torch.ones(10, 9))
        return found

    torch.testing.assert_close(train(True), train(False))
    return store_values()


def adasum_follows_its_formula() -> Values:
    """The paper's recursion, written plainly in float64; equal gradients give their mean, orthogonal ones the sum."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(op="adasum"))
    gradients = {name: by_rank(seed, *shape) for seed, (name, shape) in enumerate([("a", (5,)), ("b", (2, 3))])}
    for name, each in gradients.items():
        pyro.param(name, torch.zeros(each[0].shape))
    pyro.param("same", torch.zeros(4))
    pyro.param("apart", torch.zeros(8))
    apart = torch.zeros(8)
    apart[rank] = 1.0
    step_with(optim, {name: each[rank] for name, each in gradients.items()} | {"same": torch.ones(4), "apart": apart})
    for name, each in gradients.items():
        vectors = [vector.double().reshape(-1) for vector in each]
        core = 1 << (size.bit_length() - 1)
        folded = [_adasum(vectors[r], vectors[r + core]) if r + core < size else vectors[r] for r in range(core)]
        while len(folded) > 1:
            folded = [_adasum(folded[i], folded[i + 1]) for i in range(0, len(folded), 2)]
        torch.testing.assert_close(unconstrained(name).double().reshape(-1), -folded[0], rtol=1e-5, atol=1e-6)
    assert unconstrained("same").eq(-1).all()
    assert unconstrained("apart")[:size].eq(-1).all()
    return store_values()


def _adasum(a: Tensor, b: Tensor) -> Tensor:
    return a * (1 - a @ b / (2 * a @ a)) + b * (1 - a @ b / (2 * b @ b))


def sparse_gradients_cross_as_sparse() -> Values:
    """An embedding under SparseAdam: rows of every rank arrive, others are not touched; dense gives the same sums."""
    rank, size = current().rank, current().world_size
    results = []
    for densify in (False, True):
        pyro.clear_param_store()
        optim = DistributedOptimizer(
            SGD({"lr": 1.0}) if densify else SparseAdam({"lr": 0.1}),
            reduce=ReduceOptions(sparse_as_dense=densify, bucket_mib=1.0),
        )
        pyro.param("table", torch.zeros(20, 3))
        pyro.param("dense", torch.zeros(2))
        for step in range(3):
            table = pyro.param("table").unconstrained()
            rows = torch.tensor([rank, rank, 10 + step])
            looked_up = torch.nn.functional.embedding(rows, table, sparse=True)
            table.grad = None
            looked_up.sum().backward()
            assert table.grad is not None and table.grad.is_sparse
            if densify:
                step_with(optim, {"table": table.grad, "dense": torch.ones(2)})
            elif step == 1 and rank == 0 and size > 1:
                step_with(optim, {"table": None})
            else:
                step_with(optim, {"table": table.grad})
        results.append(unconstrained("table"))
    assert results[0][size:10].eq(0).all() and results[0][13:].eq(0).all()
    assert results[0][:size].ne(0).all() and results[0][10:13].ne(0).all()
    torch.testing.assert_close(results[1][:size], torch.full((size, 3), -6.0 / size))
    torch.testing.assert_close(results[1][10:13], torch.full((3, 3), -1.0))
    return store_values()


def schedules_agree_on_the_averaged_metric() -> Values:
    """ReduceLROnPlateau sees one metric on all ranks; a rank that has joined follows its steps."""
    rank, size = current().rank, current().world_size

    def scheduler(**kwargs: object) -> PyroLRScheduler:
        arguments = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "factor": 0.5, "patience": 0}
        return PyroLRScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau, arguments | kwargs)

    optim = DistributedOptimizer(scheduler())
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
    arguments = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}
    exponential = DistributedOptimizer(PyroLRScheduler(torch.optim.lr_scheduler.ExponentialLR, arguments))
    pyro.param("y", torch.zeros(1))
    with exponential.join():
        for _ in range(1 + rank):
            step_with(exponential, {"y": torch.ones(1)})
            exponential.step()
    torch.testing.assert_close(unconstrained("y"), torch.full((1,), -sum(0.5**i for i in range(size))))
    return store_values()


def drift_is_found_and_named() -> list[str]:
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


def own_parameters_are_never_exchanged() -> None:
    """Parameters of one rank's own datapoints have other shapes and values on each, and skip together with the rest."""
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    optim.nonfinite = "skip"
    pyro.param("x", torch.zeros(2))
    own = pyro.param("local", torch.zeros(rank + 1)).unconstrained()
    mark_local(own, LocalParameter(PlateShard("rows", num_shards=1), (rank + 1,), 0))
    for step in range(3):
        bad = step == 1 and rank == 0
        step_with(optim, {"x": torch.ones(2), "local": torch.full((rank + 1,), float("nan") if bad else rank + 1.0)})
    assert unconstrained("x").eq(-2).all()
    assert unconstrained("local").eq(-2 * (rank + 1)).all()
    assert optim.num_skipped_steps == 1


def multi_optimizers_on_shards_equal_one_with_all_data() -> Values:
    """A logistic regression whose rows are split: every kind of them takes one process's path with all the rows."""
    rank, size = current().rank, current().world_size
    rows, labels = noise(3, 24, 2, dtype=torch.float64), (noise(4, 24) > 0).double()

    def loss_of(x: Tensor, part: slice) -> Tensor:
        losses = torch.nn.functional.softplus(rows[part] @ x) - labels[part] * (rows[part] @ x)
        return losses.sum() * (24 / losses.numel()) + x.square().sum()

    own = slice(24 * rank // size, 24 * (rank + 1) // size)
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
            for optim, params, part in ((alone, values["alone"], slice(None)), (shared, values["shared"], own)):
                loss = torch.stack([loss_of(param, part) for param in params.values()]).sum()
                optim.step(loss, params)
        for name, value in values["alone"].items():
            torch.testing.assert_close(values["shared"][name], value, rtol=1e-9, atol=1e-12)
        results += [value.tolist() for value in values["shared"].values()]
    return {"results": results}


OPTIONS = [
    multi_optimizers_on_shards_equal_one_with_all_data,
    sixteen_bits_stay_close_to_the_mean,
    power_sgd_converges_by_its_error_feedback,
    power_sgd_keeps_its_errors_while_parameters_come_and_go,
    adasum_follows_its_formula,
    sparse_gradients_cross_as_sparse,
    schedules_agree_on_the_averaged_metric,
    drift_is_found_and_named,
    own_parameters_are_never_exchanged,
]
