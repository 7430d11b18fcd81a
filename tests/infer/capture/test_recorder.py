"""What cannot be captured is refused with the line of the model, and the steps are right all the same."""

import dataclasses
import gc
import logging
import random
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture
from distopt.infer.capture.recorded_step import record_step
from distopt.infer.capture.recording import Recording
from tests.infer.capture.cases import DATA, coin
from tests.infer.capture.steps import EagerSteps, assert_same, run_steps


def observe(loc, scale, x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def reads_item(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + abs(x.mean().item()), x)


def reads_float(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + abs(float(loc.detach())), x)


def reads_int(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + int(x.sum() > 0), x)


def reads_index(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + range(100)[x.argmax()], x)


def reads_numpy(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + abs(float(x.numpy().mean())), x)


def reads_array(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + abs(float(np.asarray(x).mean())), x)


def reads_list(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + abs(sum(x.tolist())), x)


def reads_text(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + float(f"{x[0].abs():.3f}"), x)


def sizes_from_mask(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0, x[x > 0])


def sizes_from_unique(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0, x.round().unique())


def draws_python(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + random.random(), x)


def draws_numpy(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 + np.random.rand(), x)


def seeds(x):
    torch.manual_seed(3)
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0, x)


def prints(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    print("step")
    observe(loc, 1.0, x)


def logs(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    logging.getLogger("model").warning("step")
    observe(loc, 1.0, x)


def looks_at_the_clock(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 if time.time() > 0 else 2.0, x)


def writes_argument(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    x.mul_(1.01)
    observe(loc, 1.0, x)


LEAF = torch.ones((), requires_grad=True)


def uses_unknown_leaf(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc * LEAF, 1.0, x)


def reads_argument_as_global(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0, DATA * 2.0)


def uses_sparse(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc + torch.sparse.mm(torch.eye(3).to_sparse(), torch.ones(3, 1)).sum(), 1.0, x)


class Tagged(torch.Tensor):
    pass


TAGGED = torch.ones(3).as_subclass(Tagged)


def uses_subclass(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc + TAGGED.sum().as_subclass(torch.Tensor), 1.0, x)


def uses_another_device(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    torch.empty(3, device="meta").exp()
    observe(loc, 1.0, x)


CALLS = []


def appends(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    CALLS.append(1)
    observe(loc, 1.0, x)


COUNT = 0


def counts(x):
    global COUNT
    COUNT += 1
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0, x)


class Carries:
    """Hands a tensor to the next step."""

    def __init__(self):
        self.previous = torch.zeros(())

    def __call__(self, x):
        loc = pyro.sample("loc", dist.Normal(self.previous, 1.0))
        self.previous = loc.detach()
        observe(loc, 1.0, x)


class Anneals:
    """Its weight changes from step to step by a way that the bytecode does not show."""

    def __call__(self, x):
        name = "".join(["we", "ight"])
        setattr(self, name, getattr(self, name, 1.0) * 0.9)
        loc = pyro.sample("loc", dist.Normal(0.0, getattr(self, name)))
        observe(loc, 1.0, x)


REFUSED = {
    reads_item: ".item() reads a value",
    reads_float: "reads a value",
    reads_int: "reads a value",
    reads_index: "reads a value",
    reads_numpy: ".numpy() reads a value",
    reads_array: "reads a value",
    reads_list: ".tolist() reads a value",
    reads_text: "reads a value",
    sizes_from_mask: "size of a result follows from values",
    sizes_from_unique: "size of a result follows from values",
    draws_python: "random numbers of Python",
    draws_numpy: "random numbers of Python's random or of NumPy",
    seeds: "generator is seeded",
    prints: "calls print()",
    logs: "calls logging",
    looks_at_the_clock: "calls time()",
    writes_argument: "writes to one of its arguments",
    uses_unknown_leaf: "no parameter of the store",
    reads_argument_as_global: "in another",
    uses_sparse: "layout",
    uses_subclass: "subclass",
    uses_another_device: "captured on the CPU or the current GPU",
    appends: "CALLS changes",
    counts: "COUNT changes",
    Carries: "previous changes",
    Anneals: "Anneals.weight changes",
}


def both_ways(make_model, elbo=Trace_ELBO, guide=AutoNormal, num_steps=12):
    results = []
    for kind in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        LEAF.grad = None
        model = make_model()
        x = DATA.clone() if model is not reads_argument_as_global else DATA
        step = kind(elbo().loss_and_grads)
        result = run_steps(step, model, guide(model), (x,), num_steps)
        result["random"] = (random.getstate(), np.random.get_state()[1].tolist())
        result["leaf"] = LEAF.grad
        results.append(result)
    assert_same(*results)
    assert results[0]["random"] == results[1]["random"]
    assert results[0]["leaf"] is None or torch.equal(results[0]["leaf"], results[1]["leaf"])
    return step


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_refused_steps_are_eager_and_the_reason_is_given(model):
    step = both_ways(model if isinstance(model, type) else lambda: model)
    assert step.num_captured == 0
    assert REFUSED[model] in step.refusal


def test_refusal_names_file_line_and_function_of_the_model():
    step = both_ways(lambda: reads_item, num_steps=4)
    assert "test_recorder.py:" in step.refusal
    assert "(reads_item)" in step.refusal


def decaying_guide(x):
    baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}
    pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))), infer={"baseline": baseline})


def test_step_that_replaces_parameters_of_the_store_is_eager():
    step = both_ways(lambda: coin, TraceGraph_ELBO, lambda model: decaying_guide)
    assert "no parameter of the store" in step.refusal  # the new average


@dataclasses.dataclass
class Settings:
    scale: float = 1.0
    factors: list = dataclasses.field(default_factory=lambda: [1.0, 1.0])
    shift: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))


def of_settings(x, settings):
    loc = pyro.sample("loc", dist.Normal(0.0, settings.scale * sum(settings.factors)))
    observe(loc + settings.shift, 1.0, x)


def change_at(i, settings):
    """Changes an attribute, what a container holds, a tensor in place, and the tensor."""
    if i == 5:
        settings.scale = 2.0
    elif i == 9:
        settings.factors[1] = 0.5
    elif i == 13:
        settings.shift.add_(0.5)
    elif i == 15:
        settings.shift = torch.tensor(0.25)


def test_object_as_an_argument_is_followed():
    results = []
    for kind in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        settings = Settings()
        step = kind(Trace_ELBO().loss_and_grads)
        guide = AutoNormal(of_settings)
        change = partial(change_at, settings=settings)
        results.append(run_steps(step, of_settings, guide, lambda i, s=settings: (DATA, s), before_step=change))
    assert_same(*results)
    assert step.refusal is None
    assert step.num_captured == 9  # each of three changes is recorded in two steps, steps 8 and 16 are compared


def test_object_that_is_new_in_each_step_is_eager_after_a_few():
    step = StepCapture(Trace_ELBO().loss_and_grads)
    run_steps(step, of_settings, AutoNormal(of_settings), lambda i: (DATA, Settings()), 12)
    assert "objects given as arguments" in step.refusal
    assert step.num_captured == 0


def test_array_as_an_argument_is_eager():
    def model(x):
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0, torch.from_numpy(x))

    step = StepCapture(Trace_ELBO().loss_and_grads)
    run_steps(step, model, AutoNormal(model), (np.ones(3, dtype=np.float32),), 4)
    assert "an argument is a ndarray" in step.refusal


def test_view_that_is_made_in_place_is_recorded_by_its_arguments():
    def model(x):
        matrix = x[:6].view(2, 3).clone().transpose_(0, 1).unsqueeze_(0).squeeze_(0).t_()
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        observe(loc + matrix.sum(0)[1], 1.0, x)

    step = both_ways(lambda: model)
    assert step.refusal is None


def branches_on_data(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    observe(loc, 1.0 if x.sum() > 0 else 5.0, x)


def test_branch_that_goes_the_other_way_takes_the_other_step():
    batches = [DATA, DATA, DATA, DATA, -DATA, DATA, -DATA, DATA, DATA, -DATA, -DATA, DATA]
    results = []
    for kind in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        step = kind(Trace_ELBO().loss_and_grads)
        guide = AutoNormal(branches_on_data)
        results.append(run_steps(step, branches_on_data, guide, lambda i: (batches[i],), len(batches)))
    assert_same(*results)
    assert step.refusal is None
    assert step.num_captured >= 4


def branches_on_a_sample(x):
    b = pyro.sample("b", dist.Bernoulli(0.3))
    if b > 0.5:
        pyro.sample("c", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))
    observe(b, 1.0, x)


def test_branch_on_a_sample_gets_a_program_for_each_way():
    def guide(x):
        pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    step = both_ways(lambda: branches_on_a_sample, guide=lambda model: guide, num_steps=60)
    assert step.refusal is None
    assert step.num_captured > 30


def fails_sometimes(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    matrix = torch.eye(2) * torch.stack([loc, loc])
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), matrix), obs=x[:2])


def test_error_in_a_captured_step_is_that_of_the_eager_step():
    torch.manual_seed(0)
    step = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(fails_sometimes, init_loc_fn=lambda site: torch.tensor(3.0), init_scale=0.01)
    run_steps(step, fails_sometimes, guide, (DATA,), 6)
    assert step.num_captured == 3
    pyro.get_param_store()._params["AutoNormal.locs.loc"].data.fill_(-3.0)
    before = torch.get_rng_state()
    with pytest.raises(Exception, match="positive-definite|constraint"):
        step(fails_sometimes, guide, DATA)
    assert not torch.equal(before, torch.get_rng_state())  # the eager step drew its noise


def test_error_in_a_recorded_step_leaves_nothing_behind():
    model = torch.nn.BatchNorm1d(1)

    def failing(x):
        pyro.module("norm", model)
        model(x[:, None])
        if len(calls) > 1:
            raise ValueError("the model's own")
        calls.append(1)
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.sum())

    calls = []
    step = StepCapture(Trace_ELBO().loss_and_grads)
    step(failing, lambda x: None, DATA)
    calls += [1]
    buffers = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ValueError, match="the model's own"):
        step(failing, lambda x: None, DATA)
    # The eager step that shows the error has moved the buffers once, the recorded one not at all.
    assert int(model.num_batches_tracked) == int(buffers[-1]) + 1


def test_other_batch_sizes_get_programs_of_their_own():
    def model(x):
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0, x)

    sizes = [60, 60, 60, 60, 30, 60, 30, 30, 60, 30, 60, 30]
    results = []
    for kind in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        step = kind(Trace_ELBO().loss_and_grads)
        results.append(run_steps(step, model, AutoNormal(model), lambda i: (DATA[: sizes[i]],), len(sizes)))
    assert_same(*results)
    assert step.num_captured >= 6


def test_more_than_eight_programs_are_refused():
    def model(x):
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0, x)

    step = StepCapture(Trace_ELBO().loss_and_grads)
    run_steps(step, model, AutoNormal(model), lambda i: (DATA[: 10 + i // 3],), 28)
    assert "more than 8 programs" in step.refusal


def test_recording_goes_when_it_is_let_go_and_waits_for_no_collector():
    def model(x):
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0, x)

    guide = AutoNormal(model)
    guide(DATA)

    def num_recordings():
        record_step(Trace_ELBO().loss_and_grads, model, guide, (DATA,), {})
        return sum(type(each) is Recording for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        assert num_recordings() == num_recordings()  # torch may hold the last one's mode
    finally:
        gc.enable()


def with_compiled_network():
    network = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    compiled = torch.compile(network, backend="eager")

    def model(x):
        pyro.module("network", network)
        observe(compiled(x[:, None]).squeeze(-1), pyro.sample("scale", dist.LogNormal(0.0, 1.0)), x)

    return model


def test_model_with_compiled_code_is_captured_and_equals_eager_steps():
    runs = []
    for make in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = with_compiled_network()
        step = make(Trace_ELBO().loss_and_grads)
        runs.append(run_steps(step, model, AutoNormal(model), (DATA,), num_steps=8))
    assert step.refusal is None and step.num_captured > 3
    assert_same(*runs)


SCRIPT = """
import sys
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from distopt.infer import SVI
from distopt.optim import Adam

def model(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0), obs=x)

svi = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), Trace_ELBO(), capture="graph")
for _ in range(9):
    svi.step(torch.ones(5))
assert svi.captured.num_captured > 3 and svi.captured.num_recorded > 2
assert "torch._dynamo" not in sys.modules
"""


def test_recording_imports_no_compiler():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
