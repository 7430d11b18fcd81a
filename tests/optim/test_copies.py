"""Copies and pickles of optimizers that have stepped, against those of pyro.optim."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.optim
import pytest
import torch

import distopt.backends
import distopt.optim
from distopt.optim import SGD, DistributedOptimizer
from tests.optim.trajectories import param

COPIED = [
    ("SGD", {"lr": 0.5, "momentum": 0.5}),
    ("Adam", {"lr": 0.5}),
    ("ClippedAdam", {"lr": 0.5, "lrd": 0.9}),
    ("ExponentialLR", {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.5}, "gamma": 0.5}),
]


def step(optim, params, gradient):
    for p in params:
        p.grad = torch.full_like(p, gradient)
    optim(params)
    if hasattr(optim, "step"):
        optim.step()


def trained(module, name, args, distributed=False):
    pyro.clear_param_store()
    params = [pyro.param(f"p{i}", torch.full((3,), float(i))) for i in range(5)]
    optim = getattr(module, name)(copy.deepcopy(args))
    optim = DistributedOptimizer(optim) if distributed else optim
    for gradient in (1.0, -0.5, 2.0):
        step(optim, params, gradient)
    return optim, params


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("name", "args"), COPIED, ids=[name for name, _ in COPIED])
def test_copy_steps_the_parameters_of_the_original_as_pyros_does(name, args, distributed):
    def run(module, *options):
        optim, params = trained(module, name, args, *options)
        twin, log = copy.deepcopy(optim), []
        for each in (twin, optim, twin):
            step(each, params, 1.5)
            log.append([p.detach().clone() for p in params])
        return log

    torch.testing.assert_close(run(distopt.optim, distributed), run(pyro.optim), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "args"), COPIED, ids=[name for name, _ in COPIED])
def test_parameters_that_are_copied_along_go_on_with_the_copy_and_leave_the_original_alone(name, args):
    def run(module):
        optim, params = trained(module, name, args)
        copies, twin = copy.deepcopy((params, optim))
        for each, tensors in ((twin, copies), (optim, params), (twin, copies)):
            step(each, tensors, 1.5)
        return [p.detach().clone() for p in (*params, *copies)]

    torch.testing.assert_close(run(distopt.optim), run(pyro.optim), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy], ids=["pickle", "copy"])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("name", "args"), COPIED, ids=[name for name, _ in COPIED])
def test_pickle_goes_on_with_the_parameters_of_its_names(name, args, distributed, how):
    optim, params = trained(distopt.optim, name, args, distributed)
    step(optim, params, 1.5)
    expected = [p.detach().clone() for p in params]

    optim, params = trained(distopt.optim, name, args, distributed)
    state = optim.get_state()
    read = how(optim)
    assert type(read) is type(optim) and str(read.get_state()) == str(state)
    step(read, params, 1.5)
    torch.testing.assert_close([p.detach() for p in params], expected)


def test_copy_of_a_distributed_optimizer_keeps_class_options_and_backend_and_a_pickle_cannot():
    backend = distopt.backends.current()
    plain = SGD({"lr": 1.0})
    options = distopt.optim.ReduceOptions(bucket_mib=3)
    twin = copy.deepcopy(DistributedOptimizer(plain, backend=backend, reduce=options))
    assert twin.backend is backend and twin.options == options and twin.optim is not plain
    assert type(copy.deepcopy(distopt.optim.HorovodOptimizer(plain))) is distopt.optim.HorovodOptimizer
    with pytest.raises(TypeError, match="cannot be pickled; save its state"):
        pickle.dumps(twin)


def test_copy_between_the_calls_of_one_step_is_refused():
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=distopt.optim.ReduceOptions(backward_passes_per_step=2))
    step(optim, [param()], 1.0)
    with pytest.raises(TypeError, match="between the calls that make one step"):
        copy.deepcopy(optim)
