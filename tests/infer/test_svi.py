"""SVI on several ranks ends where one Pyro process with all data ends, and fails on all ranks together."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro.infer import ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_value

from distopt.backends import current
from distopt.data import GlobalBatches
from distopt.infer import SVI
from distopt.optim import SGD, Adam, DistributedOptimizer, ReduceOptions, StepInfo
from tests.workers import world

NUM_ROWS = 11


def data() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(2.0, 1.5, NUM_ROWS))


def model(y: torch.Tensor) -> None:
    zero, one = y.new_zeros(()), y.new_ones(())
    z = pyro.sample("z", dist.Normal(zero, 3 * one))
    scale = pyro.sample("scale", dist.LogNormal(zero, one))
    with pyro.plate("rows", NUM_ROWS, subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(z, scale), obs=y)


def guide() -> Any:
    # New tensors for each guide: AutoDelta makes them its parameters, and the optimizer writes into those.
    start = {"z": torch.tensor(0.3, dtype=torch.float64), "scale": torch.tensor(1.2, dtype=torch.float64)}
    return AutoDelta(model, init_loc_fn=init_to_value(values=start))


def parameters() -> dict[str, float]:
    return {name: float(value.detach()) for name, value in pyro.get_param_store().items()}


def _run_train(global_batch: int | None, num_steps: int) -> tuple[dict[str, float], list[float]]:
    """Parameters and losses after `num_steps` on this rank's part of each batch."""
    backend = current()
    batches = GlobalBatches(NUM_ROWS, global_batch, 3, backend.rank, backend.world_size)
    optimizer = DistributedOptimizer(Adam({"lr": 0.05}))
    svi = SVI(model, guide(), optimizer, pyro.infer.Trace_ELBO(), weight=batches.weight)
    losses = [svi.step(data()[batches.rows(step)]) for step in range(num_steps)]
    return parameters(), losses


def train_in_pyro(global_batch: int | None, num_steps: int) -> tuple[dict[str, float], list[float]]:
    """The same in one process, by Pyro alone but for the order of rows."""
    batches = GlobalBatches(NUM_ROWS, global_batch, 3)
    svi = pyro.infer.SVI(model, guide(), pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    losses = [svi.step(data()[batches.rows(step)]) for step in range(num_steps)]
    return parameters(), losses


def _run_failure() -> str:
    """The error that this rank sees when the model fails on rank 1, and whether a parameter has changed."""
    backend = current()
    svi = SVI(model, guide(), DistributedOptimizer(Adam({"lr": 0.05})), pyro.infer.Trace_ELBO())
    svi.step(data())
    before = parameters()

    def failing(y: torch.Tensor) -> None:
        if backend.rank == 1:
            raise ArithmeticError("the rows are rotten")
        model(y)

    svi.model = failing
    try:
        svi.step(data())
    except Exception as error:
        assert parameters() == before
        return f"{type(error).__name__}: {error}"
    return "no error"


def _run_tail_adaptive(num_steps: int) -> dict[str, float]:
    """Parameters after steps of TraceTailAdaptive_ELBO, which can compute no loss."""
    pyro.set_rng_seed(0)

    def normal(y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 3.0))
        with pyro.plate("rows", NUM_ROWS, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal(z.unsqueeze(-1), 1.5), obs=y)

    def guide(y: torch.Tensor) -> None:
        loc, scale = pyro.param("loc", torch.zeros(())), pyro.param("log_scale", torch.zeros(())).exp()
        pyro.sample("z", dist.Normal(loc, scale))

    loss = pyro.infer.TraceTailAdaptive_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(normal, guide, DistributedOptimizer(Adam({"lr": 0.1})), loss)
    for _ in range(num_steps):
        svi.step(data().float())
    return parameters()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("global_batch", [None, 7])
def test_ranks_with_unequal_rows_end_where_one_pyro_process_ends(global_batch: int | None, world_size: int) -> None:
    expected, expected_losses = train_in_pyro(global_batch, 60)
    for params, losses in world("torch_dist", world_size).run(_run_train, global_batch, 60):
        assert params == pytest.approx(expected, rel=1e-9)
        assert losses == pytest.approx(expected_losses, rel=1e-9), "the loss is the mean over ranks"


def test_error_in_one_ranks_model_reaches_all_and_nobody_steps() -> None:
    first, second = world("torch_dist", 2).run(_run_failure)
    assert second == "ArithmeticError: the rows are rotten"
    assert "rank 1" in first and "the rows are rotten" in first


def test_init_makes_the_parameters_that_the_first_step_would_make_and_steps_none() -> None:
    svi = SVI(model, guide(), Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    svi.init(data())
    assert parameters() == pytest.approx({"AutoDelta.z": 0.3, "AutoDelta.scale": 1.2})
    assert svi.optim.get_state() == {}
    svi.step(data())
    assert parameters().keys() == svi.optim.get_state().keys()


def test_objective_that_has_no_loss_trains_on_several_ranks() -> None:
    first, second = world("torch_dist", 2).run(_run_tail_adaptive, 40)
    assert first == second
    assert first["loc"] == pytest.approx(2.0, abs=0.7), "it has gone from 0 to where the data are"


def test_optimizer_that_is_not_distributed_gives_pyros_svi() -> None:
    expected, expected_losses = train_in_pyro(7, 1)
    pyro.clear_param_store()
    svi = SVI(model, guide(), pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    loss = svi.step(data()[GlobalBatches(11, 7, 3).rows(0)])
    assert [loss] == expected_losses and parameters() == expected


def delta_model() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def delta_guide() -> None:
    pyro.sample("z", dist.Delta(pyro.param("x", torch.tensor(3.0))))


def test_step_with_returns_what_a_loop_reads() -> None:
    svi = SVI(delta_model, delta_guide, DistributedOptimizer(SGD({"lr": 0.5})), Trace_ELBO())
    loss = -dist.Normal(0.0, 1.0).log_prob(torch.tensor(3.0)).item()
    info = svi.step_with(step=0, stop=True, measure_norm=True)
    assert info == StepInfo(pytest.approx(loss), stop=True, num_active=1, gradient_norm=pytest.approx(3.0))
    assert pyro.param("x").item() == 1.5
    assert svi.step_with(step=1).gradient_norm is None


def test_loss_of_a_call_that_only_adds_gradients_is_this_ranks() -> None:
    options = ReduceOptions(backward_passes_per_step=2)
    svi = SVI(delta_model, delta_guide, DistributedOptimizer(SGD({"lr": 0.1}), reduce=options), Trace_ELBO())
    first, second = svi.step_with(), svi.step_with()
    assert (first.num_active, second.num_active) == (0, 1)
    assert first.loss == second.loss == -dist.Normal(0.0, 1.0).log_prob(torch.tensor(3.0)).item()
    torch.testing.assert_close(pyro.param("x").detach(), torch.tensor(3.0 - 0.1 * 6.0))


def test_step_with_of_an_optimizer_that_is_not_distributed_is_an_error() -> None:
    svi = SVI(delta_model, delta_guide, SGD({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(TypeError, match=r"step_with\(\) needs a DistributedOptimizer, found PyroOptim; use step\(\)"):
        svi.step_with()


# ReweightedWakeSleep has two losses, those of the model's and of the guide's parameters.


def wake_sleep_model(x: torch.Tensor, observations: Any = None) -> None:
    loc = pyro.param("theta", torch.tensor(0.3))
    z = pyro.sample("z", dist.Normal(loc, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def wake_sleep_guide(x: torch.Tensor, observations: Any = None) -> None:
    seen = x if observations is None else observations["x"]
    pyro.sample(
        "z", dist.Normal(pyro.param("weight", torch.tensor(0.5)) * seen, pyro.param("scale", torch.tensor(1.0)))
    )


def wake_sleep(insomnia: float, vectorize: bool) -> ReweightedWakeSleep:
    return ReweightedWakeSleep(
        num_particles=3, insomnia=insomnia, vectorize_particles=vectorize, max_plate_nesting=1, num_sleep_particles=2
    )


def _run_wake_sleep(insomnia: float, vectorize: bool, kind: str, num_steps: int = 6) -> tuple[Any, Any, Any]:
    """Losses, a loss that is only evaluated, and parameters; each rank has rows and noise of its own."""
    rank = current().rank if kind == "ranks" else 0
    optim = pyro.optim.SGD({"lr": 0.02}) if kind == "pyro" else DistributedOptimizer(SGD({"lr": 0.02}), noise="shared")
    make = pyro.infer.SVI if kind == "pyro" else SVI
    svi = make(wake_sleep_model, wake_sleep_guide, optim, wake_sleep(insomnia, vectorize))
    losses = []
    for step in range(num_steps):
        pyro.set_rng_seed(10 * step + rank)
        losses.append(svi.step(torch.tensor(0.5 + rank)))
    pyro.set_rng_seed(7)
    return losses, svi.evaluate_loss(torch.tensor(0.5)), parameters()


def wake_sleep_over_ranks(insomnia: float, num_ranks: int, num_steps: int = 6) -> tuple[Any, Any]:
    """In one process, by Pyro: the mean of the ranks' gradients at each step."""
    pyro.clear_param_store()
    elbo, optim = wake_sleep(insomnia, vectorize=False), pyro.optim.SGD({"lr": 0.02})
    losses = []
    for step in range(num_steps):
        seen = []
        with pyro.poutine.trace(param_only=True) as trace:
            for rank in range(num_ranks):
                pyro.set_rng_seed(10 * step + rank)
                seen.append(elbo.loss_and_grads(wake_sleep_model, wake_sleep_guide, torch.tensor(0.5 + rank)))
        params = {site["value"].unconstrained() for site in trace.trace.nodes.values()}
        for param in params:
            param.grad = param.grad / num_ranks
        optim(params)
        pyro.infer.util.zero_grads(params)
        losses.append(tuple(np.mean(seen, axis=0)))
    return losses, parameters()


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("insomnia", [0.0, 0.4, 1.0])
def test_wake_sleep_on_one_rank_is_pyros_in_every_bit(insomnia: float, vectorize: bool) -> None:
    expected = _run_wake_sleep(insomnia, vectorize, "pyro")
    pyro.clear_param_store()
    actual = _run_wake_sleep(insomnia, vectorize, "distopt")
    assert actual == expected
    assert all(type(loss) is tuple and len(loss) == 2 for loss in (*actual[0], actual[1]))


@pytest.mark.parametrize("insomnia", [0.0, 0.4, 1.0])
def test_wake_sleep_on_two_ranks_steps_by_the_mean_of_their_gradients(insomnia: float) -> None:
    expected_losses, expected = wake_sleep_over_ranks(insomnia, 2)
    first, second = world("torch_dist", 2).run(_run_wake_sleep, insomnia, False, "ranks")
    assert first[0] == second[0] and first[2] == second[2]
    assert first[0] == [pytest.approx(pair, rel=1e-5) for pair in expected_losses]
    assert first[2] == pytest.approx(expected, rel=1e-5)


def custom_loss(model: Any, guide: Any, *args: Any) -> Any:
    guide_trace = pyro.poutine.trace(guide).get_trace(*args)
    model_trace = pyro.poutine.trace(pyro.poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


def doubled_loss_and_grads(model: Any, guide: Any, *args: Any) -> Any:
    loss = 2.0 * custom_loss(model, guide, *args)
    loss.backward()
    return loss


def svi_of(kind: str, loss_and_grads: Any, **kwargs: Any) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    make = pyro.infer.SVI if kind == "pyro" else SVI
    optim = pyro.optim.SGD({"lr": 0.02}) if kind == "pyro" else DistributedOptimizer(SGD({"lr": 0.02}))
    return make(wake_sleep_model, wake_sleep_guide, optim, custom_loss, loss_and_grads, **kwargs)


@pytest.mark.parametrize("loss_and_grads", [None, doubled_loss_and_grads])
def test_loss_and_its_gradients_may_be_functions_as_in_pyro(loss_and_grads: Any) -> None:
    results = []
    for kind in ("pyro", "distopt"):
        svi = svi_of(kind, loss_and_grads)
        results.append(([svi.step(torch.tensor(0.5)) for _ in range(4)], parameters()))
    assert results[0] == results[1]


def test_run_takes_the_steps_and_draws_the_samples_that_pyros_would() -> None:
    results = []
    for kind in ("pyro", "distopt"):
        with pytest.warns(FutureWarning) as caught:
            svi = svi_of(kind, None, num_samples=5, num_steps=3)
            svi.run(torch.tensor(0.5))
        assert {str(each.message).split("`")[1] for each in caught} == {"num_samples", "num_steps", "SVI.run"}
        results.append(([trace.nodes["z"]["value"].item() for trace in svi.exec_traces], parameters()))
    assert results[0] == results[1] and len(results[0][0]) == 5


def _run_functions() -> tuple[list[float], dict[str, float]]:
    svi = svi_of("distopt", doubled_loss_and_grads, num_steps=0)
    return [svi.step(torch.tensor(0.5 + current().rank)) for _ in range(4)], parameters()


def test_ranks_with_a_loss_of_their_own_step_together() -> None:
    first, second = world("torch_dist", 2).run(_run_functions)
    assert first == second


def same(svi: SVI) -> SVI:
    return svi


def with_new_optimizer(svi: SVI) -> SVI:
    svi.optim = DistributedOptimizer(Adam({"lr": 0.05}))
    return svi


def copied(svi: SVI) -> SVI:
    return copy.deepcopy(svi)


def pickled(svi: SVI) -> SVI:
    loaded: SVI = pickle.loads(pickle.dumps(svi))
    return loaded


def poor_guide(y: torch.Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.3).double())
    pyro.sample("z", dist.Normal(loc, 0.1))
    pyro.sample("scale", dist.LogNormal(pyro.param("log_scale", lambda: torch.tensor(0.1).double()), 0.1))


@pytest.mark.parametrize("capture", ["off", "graph"])
@pytest.mark.parametrize(
    # A copied optimizer is that of copied parameters, and these are the store's own: it has not seen them, as in Pyro.
    ("duplicate", "expected"),
    [(copied, with_new_optimizer), (pickled, same)],
)
def test_copy_of_a_used_svi_goes_on_as_that_of_pyros(duplicate: Any, expected: Any, capture: Any) -> None:
    results = []
    for make in (expected, duplicate):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model, poor_guide, DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), capture=capture)
        for _ in range(4):
            svi.step(data())
        svi = make(svi)
        results.append(([svi.step(data()) for _ in range(4)], parameters()))
        assert (svi.captured is None) == (capture == "off")
    assert results[0] == results[1]


def _run_nan(num_steps: int, nan_step: int, capture: Any) -> list[str]:
    """What is warned about where rank 1 reads a NaN at one step, without Pyro's validation."""
    with warnings.catch_warnings(record=True) as caught, pyro.validation_enabled(False):
        warnings.simplefilter("always")
        optimizer = DistributedOptimizer(Adam({"lr": 0.05}, {"global_norm": 1e6}))
        svi = SVI(model, guide(), optimizer, Trace_ELBO(), capture=capture)
        for step in range(num_steps):
            svi.step(data() * float("nan") if step == nan_step and current().rank == 1 else data())
    return [str(each.message) for each in caught if "Encountered NaN" not in str(each.message)]


# Captured steps leave gradients where they are summed: rank 0 from step 3 on, rank 1 from step 4 on.
@pytest.mark.parametrize(("nan_step", "capture"), [(3, "off"), (3, "graph"), (5, "graph")])
def test_nan_in_a_script_that_steps_by_it_is_told_once_with_rank_and_parameter(nan_step: int, capture: Any) -> None:
    for messages in world("torch_dist", 2).run(_run_nan, 8, nan_step, capture):
        (warned,) = messages
        where = f"step {nan_step}"
        assert warned.startswith(
            f"{where}: the mean loss of the ranks is nan. {where}: gradients that are not finite: "
        )
        assert "rank 1: 'AutoDelta.scale', 'AutoDelta.z'." in warned and "rank 0" not in warned
        assert "nonfinite='skip'" in warned


def wide_model(x: torch.Tensor) -> None:
    values = [pyro.param(name, lambda: torch.zeros(3 * 2**18)) for name in ("left", "right")]
    pyro.sample("x", dist.Normal(sum(each[0] * 1e-30 for each in values), 1.0), obs=x)


def wide_guide(x: torch.Tensor) -> None:
    pass


def _run_nan_in_large_buckets(factor: float) -> tuple[list[str], int]:
    """What is warned about where rank 1 reads a number at the sixth step, and how many steps were captured."""
    with warnings.catch_warnings(record=True) as caught, pyro.validation_enabled(False):
        warnings.simplefilter("always")
        optimizer = DistributedOptimizer(SGD({"lr": 0.1}), reduce=ReduceOptions(bucket_mib=3.0))
        svi = SVI(wide_model, wide_guide, optimizer, Trace_ELBO(), capture="graph")
        for step in range(7):
            svi.step(torch.tensor(factor if step == 5 and current().rank == 1 else 1.0))
        assert optimizer.reducer.layout.control_first
    assert svi.captured is not None
    messages = [str(each.message) for each in caught if "Encountered NaN" not in str(each.message)]
    return messages, svi.captured.num_captured


def test_nan_in_large_buckets_is_told_with_its_rank() -> None:
    for messages, num_captured in world("torch_dist", 2).run(_run_nan_in_large_buckets, float("nan")):
        (warned,) = messages
        assert "gradients that are not finite: rank 1: 'left', 'right'." in warned and num_captured > 0
