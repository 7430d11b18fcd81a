"""Schedules of gradients for an optimizer of any module, so that two modules can be compared; and single steps."""

import random
from dataclasses import dataclass, field

import pyro
import torch

from distopt.optim import Adam, FlatGradients

SHAPES = [(3,), (), (2, 3), (1,), (4,), (5,), (2, 1, 2), (7,)]

OPTIMIZERS = {
    "ASGD": {"lr": 0.05},
    "Adadelta": {"lr": 0.5},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.01},
    "AdagradRMSProp": {"eta": 0.3},
    "Adam": {"lr": 0.05, "weight_decay": 0.01},
    "AdamW": {"lr": 0.05, "amsgrad": True},
    "Adamax": {"lr": 0.05},
    "ClippedAdam": {"lr": 0.05, "lrd": 0.97, "weight_decay": 0.01, "clip_norm": 0.8},
    "DCTAdam": {"lr": 0.05, "clip_norm": 0.8},
    "NAdam": {"lr": 0.05},
    "RAdam": {"lr": 0.05},
    "RMSprop": {"lr": 0.02},
    "Rprop": {"lr": 0.02},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
}


@dataclass
class Schedule:
    """Which parameters each call touches, and whether it is followed by a scheduler's step."""

    calls: list[list[int]]
    scheduler_steps: list[bool] = field(default_factory=list)
    save_at: int | None = None
    seed: int = 0

    @classmethod
    def random(cls, seed: int, num_calls: int = 12, **kwargs):
        """Parameters appear one after another; later some are skipped."""
        r = random.Random(seed)
        calls = []
        for t in range(num_calls):
            present = range(min(len(SHAPES), 3 + t))
            calls.append([i for i in present if r.random() < r.choice([1.0, 0.7, 0.5])])
        return cls(calls, [r.random() < 0.4 for _ in calls], seed=seed, **kwargs)


def start(dtype=torch.float64, count=8):
    """Fills the parameter store anew; returns the unconstrained parameters."""
    pyro.clear_param_store()
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        pyro.param(
            f"net$$$p{i}", torch.randn(SHAPES[i % len(SHAPES)], generator=generator, dtype=torch.float64).to(dtype)
        )
    store = dict(pyro.get_param_store().named_parameters())
    return [store[f"net$$$p{i}"] for i in range(count)]


def run(make, schedule, dtype=torch.float64, resume=None):
    """Returns all parameter values after `schedule`, and the state.

    Args:
        make: Returns the optimizer.
        schedule: What to do.
        dtype: Of parameters and gradients.
        resume: Given the optimizer in the middle of the run, returns the one that resumes.
    """
    params = start(dtype)
    optim = make()
    generator = torch.Generator().manual_seed(schedule.seed)
    for t, call in enumerate(schedule.calls):
        if resume is not None and t == schedule.save_at:
            optim = resume(optim)
        for i in call:
            params[i].grad = torch.randn(params[i].shape, generator=generator, dtype=torch.float64).to(dtype)
        optim([params[i] for i in call])
        if t < len(schedule.scheduler_steps) and schedule.scheduler_steps[t] and hasattr(optim, "step"):
            optim.step()
    return [p.detach().clone() for p in params], optim.get_state()


def assert_close(values, expected, dtype=torch.float64):
    """Compares with a tolerance of a few roundings: 1e-12 in float64, 1e-6 in float32."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)


TENSOR_SHAPES = [(7,), (), (3, 5), (2, 1)]


def stepped(params, optim=None, times=1):
    """Steps `params` by gradients of ones, and returns the optimizer; Adam without one."""
    optim = optim or Adam({"lr": 0.1})
    for _ in range(times):
        for p in params:
            p.grad = torch.ones_like(p)
        optim(params)
    return optim


def groups(optim, kind):
    """The groups of one kind in which an optimizer steps its parameters."""
    return [g for g in optim._groups if isinstance(g, kind)]


def flat_gradients(params):
    """The gradients of `params` in one buffer."""
    names = tuple(pyro.get_param_store().param_name(p) for p in params)
    return FlatGradients(names, tuple(params), torch.cat([p.grad.reshape(-1) for p in params]))


def reference(values, times):
    """One torch optimizer per tensor, stepped `times` times by ones."""
    results = []
    for value in values:
        p = value.clone().requires_grad_()
        optim = torch.optim.Adam([p], lr=0.1)
        for _ in range(times):
            p.grad = torch.ones_like(p)
            optim.step()
        results.append(p.detach())
    return results


def param(name="x", size=3, gradient=1.0):
    """A parameter of the store, of zeros, and its gradient."""
    p = pyro.param(name, torch.zeros(size)).unconstrained()
    p.grad = torch.full_like(p, gradient)
    return p


def value(name="x"):
    """The present value of a parameter of the store."""
    return pyro.param(name).detach().clone()


def steps_of(constructor, args, dtype, prepare=lambda p: None, steps=6, skip=True):
    """The values of tensors of `TENSOR_SHAPES` after some steps of a torch optimizer that is given them as a list."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in TENSOR_SHAPES
    ]
    for p in params:
        prepare(p)
    optim = constructor(params, **args)
    for t in range(steps):
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            p.grad = None if skip and (t + i) % 3 == 0 else gradient
        optim.step()
    return [p.detach() for p in params]
