"""Training through `SVI.step` with capture gives what it gives without, on one rank and on several."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt import backends
from distopt.infer import SVI, TensorRows, seed_all, sharded_plate
from distopt.infer.capture import StepCapture
from distopt.optim import Adam, DistributedOptimizer, ScaledELBO
from distopt.reduce import PeerError, ReduceOptions
from tests.infer.capture.cases import DATA, hierarchy, mixture, mixture_guide
from tests.workers import world


def sharded(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with sharded_plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def run_captured(name: str, capture: str, num_steps: int = 20, passes: int = 1, noise: str = "independent"):
    """Trains on this rank's rows; returns losses, parameters, the generator's state, and what was captured."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    rank = backends.current().rank
    model, guide, elbo = {
        "hierarchy": (hierarchy, AutoNormal(hierarchy), Trace_ELBO()),
        "sharded": (sharded, AutoNormal(sharded), Trace_ELBO()),
        "mixture": (mixture, mixture_guide(mixture), TraceEnum_ELBO(max_plate_nesting=1)),
    }[name]
    optim = DistributedOptimizer(Adam({"lr": 0.05}), reduce=ReduceOptions(backward_passes_per_step=passes))
    svi = SVI(model, guide, optim, elbo, capture=capture)
    rows = DATA[rank * 15 : rank * 15 + 15]
    losses = []
    for step in range(num_steps):
        seed_all(7, step, rank, noise)
        losses.append(svi.step(rows))
    params = {name: param.detach().tolist() for name, param in pyro.get_param_store()._params.items()}
    captured = svi.captured.num_captured if svi.captured is not None else 0
    refusal = svi.captured.refusal if svi.captured is not None else None
    return losses, params, torch.get_rng_state().tolist(), captured, refusal


def assert_same_training(one, other):
    """Asserts that two runs agree in every bit of losses, parameters and generators."""
    assert one[:3] == other[:3]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("name", ["hierarchy", "sharded", "mixture"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_captured_training_equals_eager_training(name, world_size, passes):
    ranks = world("torch_dist", world_size)
    eager = ranks.run(run_captured, name, "off", 20, passes)
    captured = ranks.run(run_captured, name, "graph", 20, passes)
    for one, other in zip(eager, captured, strict=True):
        assert_same_training(one, other)
        assert other[4] is None
        assert other[3] >= 12


def run_with_late_parameter(capture: str):
    """Rank 1 brings a new parameter at step 9, when all gradients lie in the buckets."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    rank = backends.current().rank
    late = [False]

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(2.0)) if late[0] else 1.0
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    def guide(x):
        pass

    svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), capture=capture)
    losses = []
    for step in range(14):
        late[0] = rank == 1 and step >= 9
        losses.append(svi.step(DATA[rank * 15 : rank * 15 + 15]))
    params = {name: param.tolist() for name, param in pyro.get_param_store()._params.items()}
    return losses, params, svi.captured.num_captured if svi.captured else 0


def test_gradients_in_buckets_survive_a_parameter_that_only_one_rank_has():
    ranks = world("torch_dist", 2)
    eager, captured = ranks.run(run_with_late_parameter, "off"), ranks.run(run_with_late_parameter, "graph")
    for one, other in zip(eager, captured, strict=True):
        assert one[:2] == other[:2]
        assert other[2] >= 5


def test_captured_steps_leave_gradients_in_the_buckets():
    pyro.clear_param_store()
    svi = SVI(hierarchy, AutoNormal(hierarchy), DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), capture="graph")
    for _ in range(6):
        svi.step(DATA)
    (bucket,) = svi.optim.reducer.layout.buckets
    grads = {name: param.grad.data_ptr() for name, param in pyro.get_param_store()._params.items()}
    assert [grads[name] for name in bucket.names] == bucket.addresses
    assert not bucket.flat.any()  # and zero them there


@pytest.mark.parametrize("capture", ["off", "graph"])
def test_rows_that_a_step_selects_itself_equal_rows_that_are_given(capture):
    results = []
    for rows_of in (lambda rows: (DATA[rows],), lambda rows: TensorRows((DATA,), rows)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        optim = DistributedOptimizer(Adam({"lr": 0.05}))
        svi = SVI(hierarchy, AutoNormal(hierarchy), optim, Trace_ELBO(), capture=capture)
        losses = [svi.step_with(rows_of(torch.arange(i, i + 30))).loss for i in range(12)]
        results.append((losses, {name: p.tolist() for name, p in pyro.get_param_store()._params.items()}))
    assert results[0] == results[1]
    assert svi.captured is None or svi.captured.num_captured == 8


@pytest.mark.parametrize("passes", [1, 2])
def test_sharded_plates_under_shared_noise_are_captured_with_each_ranks_stream(passes):
    ranks = world("torch_dist", 2)
    eager = ranks.run(run_captured, "sharded", "off", 20, passes, "shared")
    captured = ranks.run(run_captured, "sharded", "graph", 20, passes, "shared")
    for one, other in zip(eager, captured, strict=True):
        assert_same_training(one, other)
        assert other[4] is None
        assert other[3] >= 12
    assert captured[0][2] == captured[1][2]  # back in the shared stream
    assert captured[0][1]["AutoNormal.locs.z"] != captured[1][1]["AutoNormal.locs.z"]


def test_optimizer_that_is_not_distributed_is_captured_too():
    results = []
    for capture in ("off", "graph"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(hierarchy, AutoNormal(hierarchy), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), capture=capture)
        losses = [svi.step(DATA) for _ in range(12)]
        params = {name: param.tolist() for name, param in pyro.get_param_store()._params.items()}
        results.append((losses, params, torch.get_rng_state().tolist()))
    assert_same_training(*results)
    assert svi.captured.num_captured == 8


def test_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="capture='fast': must be one of 'auto', 'compiled', 'graph', 'off'"):
        SVI(hierarchy, AutoNormal(hierarchy), pyro.optim.Adam({}), Trace_ELBO(), capture="fast")


def test_scaled_steps_are_captured_and_follow_the_scale():
    def train(capture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10)
        optim = DistributedOptimizer(Adam({"lr": 0.05}, scaler=scaler))
        svi = SVI(hierarchy, AutoNormal(hierarchy), optim, ScaledELBO(Trace_ELBO(), scaler), capture=capture)
        losses = [svi.step(DATA) for _ in range(25)]
        assert scaler.get_scale() == 256.0
        assert capture == "off" or svi.captured.refusal is None and svi.captured.num_recorded < 25
        return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    torch.testing.assert_close(train("graph"), train("off"))


def test_auto_leaves_every_100th_step_to_pyro():
    pyro.clear_param_store()
    svi = SVI(hierarchy, AutoNormal(hierarchy), DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), capture="auto")
    counts = []
    for _ in range(201):
        svi.step(DATA)
        counts.append(svi.captured.num_steps)
    assert [step for step in range(1, 201) if counts[step] == counts[step - 1]] == [99, 199]
    assert svi.captured.num_captured > 180


@pytest.mark.parametrize("capture", ["off", "auto", "graph"])
@pytest.mark.parametrize("invalid", [float("nan"), -1.0])
def test_value_that_leaves_its_support_raises_the_eager_error_in_a_captured_step(capture, invalid):
    def model(x):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    pyro.clear_param_store()
    svi = SVI(model, AutoNormal(model), DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), capture=capture)
    counts = DATA.abs().round()
    for _ in range(6):
        svi.step(counts)
    assert capture == "off" or svi.captured.num_captured == 3
    with pytest.raises(ValueError, match="within the support.*of the distribution Poisson"):
        svi.step(torch.where(torch.arange(len(counts)) == 7, invalid, counts))
    assert math.isfinite(svi.step(counts))  # nothing of it is left


def test_svi_from_before_steps_were_captured_is_taken_up_with_the_default():
    pyro.clear_param_store()
    svi = SVI(hierarchy, AutoNormal(hierarchy), DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO())
    new = {"_capture", "_num_calls", "_layout", "captured"}
    old = SVI.__new__(SVI)
    old.__setstate__({name: value for name, value in svi.__getstate__().items() if name not in new})
    losses = [old.step(DATA) for _ in range(6)]
    assert all(map(math.isfinite, losses))
    assert old.captured.num_captured == 3


def test_loss_that_is_replaced_between_steps_is_the_one_that_is_computed():
    def run(capture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(hierarchy, AutoNormal(hierarchy), Adam({"lr": 0.05}), Trace_ELBO(), capture=capture)
        losses = []
        for step in range(12):
            if step == 6:
                replaced = Trace_ELBO(num_particles=3)
                svi.loss, svi.loss_and_grads = replaced.loss, replaced.loss_and_grads
            losses.append(svi.step(DATA))
        return losses, svi.captured

    losses, captured = run("auto")
    assert losses == run("off")[0]
    assert captured.num_captured > 0


@pytest.mark.filterwarnings("ignore")  # torch says where the operation began
def test_gradient_that_is_no_number_is_found_where_torch_looks_for_it():
    def model():
        x = pyro.param("x", torch.tensor(1.0))
        pyro.factor("root", (x * 0.0).sqrt() * 0.0)  # a loss of zero, whose gradient is 0 * inf

    def guide():
        pass

    pyro.clear_param_store()
    capture = StepCapture(Trace_ELBO().loss_and_grads)
    for _ in range(5):
        _, (param,) = capture(model, guide)
        param.grad = None
    assert capture.num_captured > 0
    with pytest.raises(RuntimeError, match="returned nan"), torch.autograd.detect_anomaly(check_nan=True):
        capture(model, guide)


def sharded_vectors(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with sharded_plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_vectors_of_one_shape_beside_a_sharded_plate_are_captured_on_one_rank():
    # Of the shared gradients the first step leaves one in its bucket and the other one beside it.
    results = []
    for capture in ("off", "graph"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        optim = DistributedOptimizer(Adam({"lr": 0.05}))
        svi = SVI(sharded_vectors, AutoNormal(sharded_vectors), optim, Trace_ELBO(), capture=capture)
        losses = [svi.step(torch.ones(9, 4)) for _ in range(12)]
        params = {name: param.tolist() for name, param in pyro.get_param_store()._params.items()}
        results.append((losses, params, torch.get_rng_state().tolist()))
    assert_same_training(*results)
    assert svi.captured.num_captured == 8


def _run_collective_within(kind: str, capture: str, bad_step: int) -> tuple[str, int, str | None]:
    """A model whose ranks sum something by themselves: in a hook of backward, or in the model."""
    backend = backends.current()
    pyro.clear_param_store()
    num_calls = 0

    def total(values):
        nonlocal num_calls
        num_calls += 1
        values = values.clone()
        backend.all_reduce(values).wait()
        return values

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0)) * 1.0
        if kind == "hook, one rank prints" and backend.rank == 0:
            print("loc")
        if kind.startswith("hook") and loc.requires_grad:
            loc.register_hook(total)
        shift = total(x.sum()) / 100.0 if kind.startswith("model") else 0.0
        if kind == "model, one rank raises" and loc.requires_grad and x[0] > 100.0:
            raise OSError("no such row")
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc + shift, 1.0), obs=x)

    guide = AutoNormal(model)
    svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), capture=capture)
    for step in range(8):
        seed_all(1, step, backend.rank)
        is_bad = step == bad_step and backend.rank == 0
        bad = {"model, one rank's loss is not finite": math.inf, "model, one rank raises": 1000.0}.get(kind, 0.0)
        with contextlib.suppress(OSError, PeerError), pyro.validation_enabled(False):
            svi.step(torch.linspace(0.0, 1.0, 10) + backend.rank + (bad if is_bad else 0.0))
    values = [param.tolist() for param in pyro.get_param_store().values()]
    return repr(values), num_calls, svi.captured and (svi.captured.refusal or svi.captured.notice)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["hook", "hook, one rank prints", "model", "model, one rank's loss is not finite", "model, one rank raises"],
)
@pytest.mark.parametrize("capture", ["graph", "compiled"])
def test_step_with_a_collective_of_the_users_stays_eager(kind, capture):
    bad_step = 0 if capture == "compiled" else 1  # the one that is recorded
    eager = world("torch_dist", 2).run(_run_collective_within, kind, "off", bad_step)
    steps = world("torch_dist", 2).run(_run_collective_within, kind, capture, bad_step)
    assert [each[:2] for each in steps] == [each[:2] for each in eager]
    for rank, (_, _, refusal) in enumerate(steps):
        if "prints" in kind and rank == 0 and capture == "graph":
            assert "which a captured step would not" in refusal
        else:
            assert "a collective is called within the step" in refusal and "test_captured_svi.py" in refusal
