"""Inside `everywhere()` what others wrote trains as one process with all rows would, and is plain again afterwards."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.abstract_infer import TracePosterior
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from distopt import infer, optim
from distopt.backends import current
from distopt.infer import everywhere
from distopt.optim import DistributedOptimizer
from distopt.optim.distributed import pyro_hooks
from distopt.reduce import PeerError
from tests.workers import world

DATA = torch.linspace(-1.0, 3.0, 12, dtype=torch.float64)
Values = dict[str, list[float]]


def model(x: Tensor) -> None:
    zero, one = x.new_zeros(()), x.new_ones(())
    loc = pyro.sample("loc", dist.Normal(zero, 10 * one))
    scale = pyro.sample("scale", dist.LogNormal(zero, one))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def start() -> dict[str, Tensor]:
    return {"loc": torch.tensor(0.3, dtype=torch.float64), "scale": torch.tensor(1.2, dtype=torch.float64)}


def guide_of(model: Callable[..., Any]) -> Any:
    return AutoDelta(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values=start()))


def make_optimizer(kind: str) -> Any:
    module = optim if kind.startswith("distopt") else pyro.optim
    if kind.endswith("scheduler"):
        arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
        return module.ExponentialLR(arguments)
    return module.Adam({"lr": 0.1})


def fit(x: Tensor, kind: str, num_steps: int = 6) -> tuple[list[float], Values]:
    """What a library does: makes guide, optimizer and SVI, and steps the schedule that it holds."""
    scheduler = make_optimizer(kind)
    svi = SVI(model, guide_of(model), scheduler, Trace_ELBO())
    losses = []
    for _ in range(num_steps):
        losses.append(svi.step(x))
        if isinstance(scheduler, pyro.optim.PyroLRScheduler | optim.PyroLRScheduler):
            scheduler.step()
    return losses, store_values()


def store_values() -> Values:
    return {name: value.detach().reshape(-1).tolist() for name, value in sorted(pyro.get_param_store().items())}


def my_rows() -> Tensor:
    return DATA[:5] if current().rank == 0 else DATA[5:]


def _run_fit(kind: str) -> tuple[list[float], Values]:
    with everywhere(plates="rows"):
        return fit(my_rows(), kind)


KINDS = ["pyro", "pyro scheduler", "distopt", "distopt scheduler"]


@pytest.mark.parametrize("kind", KINDS)
def test_librarys_own_optimizer_trains_as_one_process_with_all_rows(kind: str) -> None:
    expected_losses, expected = fit(DATA, kind)
    for losses, values in world("torch_dist", 2).run(_run_fit, kind):
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        assert {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()} == values


@pytest.mark.parametrize(
    "kind", ["pyro", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "pyro")]
)
def test_optimizer_is_the_same_object_and_goes_on_as_if_nothing_had_been(kind: str) -> None:
    def train(steps: list[bool]) -> Values:
        pyro.clear_param_store()
        made = make_optimizer(kind)
        svi = SVI(model, guide_of(model), made, Trace_ELBO())
        for inside in steps:
            if inside:
                with everywhere():
                    svi.step(DATA)
                    assert svi.optim is made and isinstance(made, DistributedOptimizer)
                    assert isinstance(made, type(make_optimizer(kind)))
                    if "scheduler" in kind:
                        made.step()
            else:
                svi.step(DATA)
                if "scheduler" in kind:
                    made.step()
            assert type(made) is type(make_optimizer(kind))
        assert (svi.model, type(svi)) == (model, SVI)
        return store_values()

    expected = train([False] * 6)
    for steps in ([True] * 6, [False, False, True, True, False, False], [True, True, False, False, True, False]):
        assert {name: pytest.approx(value, rel=1e-12) for name, value in expected.items()} == train(steps)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_adopted_optimizer_is_pickled_and_copied_as_the_plain_one_that_it_was(kind: str) -> None:
    made = make_optimizer(kind)
    svi = SVI(model, guide_of(model), made, Trace_ELBO())
    with everywhere():
        svi.step(DATA)
        other = copy.copy(made)
        assert isinstance(made, DistributedOptimizer) and type(other) is type(make_optimizer(kind))
        assert other.get_state().keys() == made.get_state().keys() == {"AutoDelta.loc", "AutoDelta.scale"}
        pyro.clear_param_store()  # Pyro's tensors hold weak references, which pickle refuses
        assert type(pickle.loads(pickle.dumps(made))) is type(other)


class Logged(SVI):
    """A subclass whose step calls its parent's."""

    def step(self, *args: Any, **kwargs: Any) -> float:
        self.last = super().step(*args, **kwargs)
        return self.last


class Skipping(TracePosterior):
    """An algorithm that leaves out steps by its own loss, as an outlier filter does."""

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any) -> None:
        super().__init__()
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss

    def _traces(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def step(self, x: Tensor) -> None:
        with pyro.poutine.trace(param_only=True) as trace:
            loss = self.loss.loss_and_grads(self.model, self.guide, x)
        if loss < 1e6:
            self.optim({site["value"].unconstrained() for site in trace.trace.nodes.values()})


def _run_subclasses() -> tuple[float, str]:
    with everywhere(plates="rows"):
        svi = Logged(model, guide_of(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        svi.step(my_rows())
        try:
            Skipping(model, guide_of(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(my_rows())
        except TypeError as error:
            return svi.last, str(error)
    return svi.last, "no error"


def test_subclass_that_calls_its_parents_step_is_served_and_one_with_a_step_of_its_own_is_refused() -> None:
    (first, error), (second, other) = world("torch_dist", 2).run(_run_subclasses)
    assert first == second == pytest.approx(fit(DATA, "pyro", 1)[0][0], rel=1e-9)
    assert error == other and error.startswith("Skipping is an inference algorithm with a step() of its own")


def _run_own_loop() -> Values:
    made = pyro.optim.Adam({"lr": 0.1})
    guide = guide_of(model)
    elbo = Trace_ELBO()
    with everywhere():
        for _ in range(4):
            with pyro.poutine.trace(param_only=True) as trace:
                elbo.loss_and_grads(model, guide, my_rows())
            params = {site["value"].unconstrained() for site in trace.trace.nodes.values()}
            made(params)
            pyro.infer.util.zero_grads(params)
    assert type(made) is pyro.optim.PyroOptim
    return store_values()


def test_optimizer_that_is_called_without_an_svi_averages() -> None:
    first, second = world("torch_dist", 2).run(_run_own_loop)
    assert first == second


def _run_failing() -> str:
    def failing(x: Tensor) -> None:
        if current().rank == 1:
            raise ArithmeticError("the rows are rotten")
        model(x)

    svi = SVI(failing, guide_of(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    try:
        with everywhere():
            svi.step(DATA)
    except (ArithmeticError, PeerError) as error:
        assert type(svi.optim) is pyro.optim.PyroOptim
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_error_in_one_ranks_model_reaches_all_ranks_and_everything_is_plain_again() -> None:
    first, second = world("torch_dist", 2).run(_run_failing)
    assert second == "ArithmeticError: the rows are rotten"
    assert first.startswith("PeerError: rank 1 of 2 failed at step 0: ArithmeticError: the rows are rotten")


class Odd(pyro.optim.PyroOptim):  # type: ignore[misc]
    """An optimizer of somebody's that changes how a step is taken."""

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__call__(list(params)[:1], *args, **kwargs)


def test_optimizer_with_a_step_of_its_own_is_refused_by_name() -> None:
    svi = SVI(model, guide_of(model), Odd(torch.optim.Adam, {"lr": 0.1}), Trace_ELBO())
    with everywhere(), pytest.raises(TypeError, match="Odd overrides __call__ of PyroOptim"):
        svi.step(DATA)
    assert type(svi.optim) is Odd


def test_svi_of_distopts_own_and_inner_contexts_are_left_alone() -> None:
    mine = DistributedOptimizer(optim.Adam({"lr": 0.1}))
    svi = infer.SVI(model, guide_of(model), mine, Trace_ELBO())
    adopted = []
    with everywhere(on_adopt=lambda svi, args, kwargs: adopted.append(svi)):
        svi.step(DATA)
        assert adopted == [] and svi.optim is mine
        plain = SVI(model, svi.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        with everywhere():
            plain.step(DATA)
            assert isinstance(plain.optim, DistributedOptimizer)
        assert not isinstance(plain.optim, DistributedOptimizer)
        plain.step(DATA)
        assert adopted == [plain]


def _run_captured(capture: str, inside: bool) -> tuple[list[float], Values, type]:
    def sharded(x: Tensor) -> None:
        zero, one = x.new_zeros(()), x.new_ones(())
        loc = pyro.sample("loc", dist.Normal(zero, 10 * one))
        with infer.sharded_plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, one), obs=x)

    rows = my_rows() if inside else DATA
    optimizer = pyro.optim.Adam({"lr": 0.1})
    svi = infer.SVI(sharded, guide_of(sharded), optimizer, Trace_ELBO(), capture=capture)
    with ExitStack() as stack:
        if inside:
            stack.enter_context(everywhere())
        losses = [svi.step(rows) for _ in range(8)]
    if not inside:
        return losses, store_values(), type(optimizer)
    svi.step(rows)  # plain again
    return losses, {}, type(optimizer)


@pytest.mark.parametrize("capture", ["off", "graph", "auto"])
def test_plain_optimizer_in_an_svi_of_distopts_own_is_adopted_also_where_steps_are_captured(capture: str) -> None:
    expected, _, _ = _run_captured("off", inside=False)
    pyro.clear_param_store()
    for losses, _, kind in world("torch_dist", 2).run(_run_captured, capture, True):
        assert losses == pytest.approx(expected, rel=1e-9)
        assert kind is pyro.optim.PyroOptim


def _run_distopts_svi(is_distributed: bool) -> list[tuple[list[float], Values]]:
    results = []
    for capture in ("off", "auto"):
        pyro.clear_param_store()
        optimizer = DistributedOptimizer(optim.Adam({"lr": 0.1})) if is_distributed else pyro.optim.Adam({"lr": 0.1})
        svi = infer.SVI(model, guide_of(model), optimizer, Trace_ELBO(), capture=capture)
        before = svi.model, svi.guide
        with everywhere(plates="rows"):
            losses = [svi.step(my_rows()) for _ in range(6)]
        assert (svi.model, svi.guide) == before
        results.append((losses, store_values()))
    return results


# Its plates were left whole, so that each rank's rows were counted once and not as many times as there are ranks.
@pytest.mark.parametrize("is_distributed", [False, True])
def test_plates_are_split_in_an_svi_of_distopts_own_too(is_distributed: bool) -> None:
    expected_losses, expected = fit(DATA, "distopt")
    for eager, captured in world("torch_dist", 2).run(_run_distopts_svi, is_distributed):
        assert captured == eager
        assert eager[0] == pytest.approx(expected_losses, rel=1e-9)
        assert {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()} == eager[1]


def _run_plain() -> list[str]:
    svi = SVI(model, guide_of(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            svi.step(DATA)
    return [str(each.message) for each in caught]


def _run_samplers() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyro.infer.MCMC(pyro.infer.NUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True).run(DATA)
        for _ in range(2):
            pyro.infer.Importance(model, num_samples=2).run(DATA)
    return [str(each.message).partition(",")[0][:60] for each in caught if "collective" in str(each.message)]


def _install() -> None:
    DistributedOptimizer(optim.Adam({}))
    pyro_hooks._warned.clear()  # the ranks may have run other tests before


def test_what_one_rank_does_alone_is_warned_about_once() -> None:
    world("torch_dist", 2).run(_install)
    for rank, messages in enumerate(world("torch_dist", 2).run(_run_plain)):
        assert len(messages) == 1
        assert messages[0].startswith(
            f"rank {rank}: the optimizer Adam is not distributed: each of the 2 ranks steps by"
        )
        assert "Write DistributedOptimizer(Adam(...))" in messages[0] and "everywhere()" in messages[0]
    for messages in world("torch_dist", 2).run(_run_samplers):
        assert [text.split()[2] for text in messages] == ["MCMC", "Importance"]


def _run_first_noise(kind: str) -> tuple[list[float], list[float]]:
    """The noise of each rank's first two steps with Pyro's SVI, and the parameters after them."""
    drawn: list[float] = []

    def drawing(x: Tensor) -> None:
        drawn.append(pyro.sample("z", dist.Normal(0.0, 1.0)).item())

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(float(current().rank))), 1.0))

    svi = SVI(drawing, guide, DistributedOptimizer(optim.Adam({"lr": 0.1})), Trace_ELBO())
    pyro.set_rng_seed(3)
    for _ in range(2):
        svi.step(DATA)
    return drawn[1:], store_values()["loc"]


def test_pyros_svi_draws_noise_of_each_ranks_own_and_begins_at_equal_values_in_the_first_step() -> None:
    (first, loc), (second, other) = world("torch_dist", 2).run(_run_first_noise, "")
    assert loc == other
    assert abs(first[0] - second[0]) > 1e-3 and len(first) == len(second) == 2


def _run_gaussian_process() -> tuple[list[float], Values]:
    import pyro.contrib.gp as gp

    with everywhere():
        losses = gp.util.train(gaussian_process(DATA[6 * current().rank :][:6]), num_steps=5)
    return losses, store_values()


def gaussian_process(x: Tensor) -> Any:
    import pyro.contrib.gp as gp

    pyro.clear_param_store()
    kernel = gp.kernels.RBF(input_dim=1, variance=torch.tensor(1.0).double(), lengthscale=torch.tensor(1.0).double())
    likelihood = gp.likelihoods.Gaussian(variance=torch.tensor(0.5).double())
    inducing = torch.linspace(-1.0, 3.0, 4).double()
    return gp.models.VariationalSparseGP(
        x, x.sin(), kernel, Xu=inducing, likelihood=likelihood, num_data=len(DATA), jitter=1e-6
    )


def test_gaussian_process_of_a_closure_trains_as_on_all_rows() -> None:
    import pyro.contrib.gp as gp

    expected = gp.util.train(gaussian_process(DATA), num_steps=5)
    first, second = world("torch_dist", 2).run(_run_gaussian_process)
    assert first == second
    assert first[0] == pytest.approx(expected, rel=1e-9)


def test_autonormal_of_a_library_is_split_by_its_plate() -> None:
    def local(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    svi = SVI(local, AutoNormal(local), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with everywhere(plates="rows"):
        svi.step(DATA)
        param = pyro.get_param_store()._params["AutoNormal.locs.z"]
        assert infer.gather_local("z", rows=[0]).keys() >= {"AutoNormal.locs.z"} and param.shape == (12,)
