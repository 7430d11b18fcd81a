"""Models that tell their arguments from other tensors of the same memory, or change them."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture
from distopt.infer.capture.rehearsal import Rehearsal
from tests.infer.capture.steps import EagerSteps, assert_same, run_steps


def model_of(read):
    """Returns a model whose prior's scale is what `read` returns of the arguments."""

    def model(*args):
        loc = pyro.sample("loc", dist.Normal(0.0, read(*args)))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.ones(()))

    return model


def attribute():
    rows = torch.arange(4.0)
    rows.scale = 2.0
    return lambda x: x.scale, lambda i: (rows,), None


def attribute_with_a_default():
    rows = torch.arange(4.0)
    rows.scale = 2.0
    return lambda x: getattr(x, "scale", 3.0), lambda i: (rows,), None


def identity():
    rows = torch.arange(4.0)
    return lambda x: 2.0 if x is rows else 3.0, lambda i: (rows,), None


def identity_of_a_list():
    rows = [torch.arange(4.0)]
    return lambda x: 2.0 if x is rows else 3.0, lambda i: (rows,), None


def table_by_tensor():
    rows = torch.arange(4.0)
    table = {rows: 2.0}
    return lambda x: table[x], lambda i: (rows,), None


def table_by_id():
    rows = torch.arange(4.0)
    table = {}
    return lambda x: table.setdefault(id(x), x.mean() + 1.0), lambda i: (rows,), None


def another_way():
    rows = torch.arange(1.0, 5.0)
    return lambda x: rows.sum() + x.mean(), lambda i: (rows,), None


def seeds_numpy():
    def read():
        np.random.seed(0)
        return 0.5 + np.random.rand()

    return read, lambda i: () if i < 6 else (np.random.seed(i), ())[1], np.random.rand


def seeds_python():
    def read():
        random.seed(3)
        return 0.5 + random.random()

    return read, lambda i: () if i < 6 else (random.seed(i), ())[1], random.random


def draws_and_sets_back():
    def read():
        state = random.getstate()
        scale = 0.5 + random.random()
        random.setstate(state)
        return scale

    return read, lambda i: () if i < 6 else (random.seed(i), ())[1], random.random


def item_of_a_dict():
    batches = [{"x": torch.ones(1)} for _ in range(20)]

    def read(batch):
        batch["seen"] = 1
        return 1.0

    return read, lambda i: (batches[i],), lambda: [len(batch) for batch in batches]


def shape():
    batches = [torch.ones(4) for _ in range(20)]

    def read(x):
        return x.unsqueeze_(0).sum() + 1.0

    return read, lambda i: (batches[i],), lambda: [batch.shape for batch in batches]


def attribute_that_is_set():
    batches = [torch.ones(4) for _ in range(20)]

    def read(x):
        x.seen = 1
        return x.sum() + 1.0

    return read, lambda i: (batches[i],), lambda: [vars(batch) for batch in batches]


def buffer_with_a_write():
    """A step that nothing stands in the way of: what the rehearsal writes is undone."""
    total = torch.zeros(4)

    def read(x):
        with torch.no_grad():
            total.add_(x)
        return total.sum().exp().clamp(0.5, 2.0)

    return read, lambda i: (torch.full((4,), 0.01 * i),), total.tolist


CASES = [
    *(attribute, attribute_with_a_default, identity, identity_of_a_list, table_by_tensor, table_by_id, another_way),
    *(item_of_a_dict, shape, attribute_that_is_set, seeds_numpy, seeds_python, draws_and_sets_back),
]


def both_ways(make, *, keep_grads=False) -> StepCapture:
    """Takes steps eagerly and captured, asserts that both agree, and returns the capture."""
    results = []
    left = []
    for kind in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        read, args, observe = make()
        model = model_of(read)
        step = kind(Trace_ELBO().loss_and_grads)
        results.append(run_steps(step, model, AutoNormal(model), args, 12, keep_grads=keep_grads))
        left.append(None if observe is None else observe())
    assert_same(*results)
    assert left[0] == left[1]
    return step


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_step_that_asks_which_tensors_its_arguments_are_or_changes_them_or_seeds_has_the_bits_of_an_eager_one(make):
    capture = both_ways(make)
    assert capture.refusal is not None
    assert capture.num_captured == 0


@pytest.mark.parametrize("keep_grads", [False, True])
def test_rehearsal_leaves_gradients_generators_and_tensors_as_the_step_left_them(keep_grads):
    capture = both_ways(buffer_with_a_write, keep_grads=keep_grads)
    assert (capture.refusal, capture.num_captured) == (None, 8)


def test_hooks_of_accumulated_gradients_are_called_once_in_each_recorded_step():
    calls = []

    def hook(param):
        calls.append(param)

    hook.__module__ = "distopt.test"  # others keep steps eager
    pyro.clear_param_store()
    model = model_of(lambda x: x.sum())
    guide = AutoNormal(model)
    step = StepCapture(Trace_ELBO().loss_and_grads)
    args = (torch.ones(2),)
    run_steps(step, model, guide, args, 1)
    for param in pyro.get_param_store()._params.values():
        param.register_post_accumulate_grad_hook(hook)
    run_steps(step, model, guide, args, 2)
    assert step.num_recorded == 2
    assert len(calls) == 2 * len(pyro.get_param_store()._params)


def test_undone_rehearsal_leaves_gradients_and_written_tensors_where_they_were():
    pyro.clear_param_store()
    param = pyro.param("a", torch.ones(2)).unconstrained()
    param.grad = grad = torch.ones(2)
    written = torch.zeros(2)
    rehearsal = Rehearsal([written])
    state = torch.get_rng_state()
    torch.rand(2)
    written.add_(1.0)
    param.grad = torch.zeros(2)
    rehearsal.undo()
    assert param.grad is grad
    assert (param.grad.tolist(), written.tolist()) == ([1.0, 1.0], [0.0, 0.0])
    assert torch.equal(torch.get_rng_state(), state)
